"""The memory ladder of a stage: users who all ask for so many tokens, rung by rung, least memory first, up to a limit.

What a rung does to the target is the runner's to see.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from loadbench.records import Ask, Closed
from loadbench.scenario.part import Part, refuse
from loadbench.scenario.shapes import CountLadder, Counts, each
from loadbench.scenario.units import BYTES, SHARE, Size, size

MOST_RUNGS = 64
"""Twenty minutes, at twenty seconds each."""

FAILURE = "failure"

FLOOR_SHARE = 0.05  # of the host's memory; below it desktops begin to swap and their killers to look around
LEAST_FLOOR_BYTES = 512 << 20


def _limit(text: str) -> str:
    """A share has its percent sign: 0.8 could be bytes as well."""
    text = text.strip()
    try:
        fits = text == FAILURE or (0 < SHARE.read(text) <= 1 if text.endswith("%") else size(text) > 0)
    except PydanticCustomError:
        fits = False
    if not fits:
        raise PydanticCustomError("expected", "expected failure, a size such as 1.5GiB or a share such as 80%")
    return text


Limit = Annotated[
    str,
    AfterValidator(_limit),
    WithJsonSchema(
        {
            "anyOf": [
                *BYTES.json_schema()["anyOf"],
                {"type": "string", "pattern": rf"^\s*{FAILURE}\s*$|{SHARE.pattern()}"},
            ]
        }
    ),
]


class MemoryLadder(Part):
    """Users who each send one request at once, from rung to rung with more tokens between them.

    Every user of a rung asks for the same: so many tokens of made-up text, and an answer of so many.
    """

    until: Limit = Field(
        description="Where to stop: the target takes so much memory, 1.5GiB; or such a share, 80%, of its limit, its"
        " GPU or the machine, whichever it lives in; or failure."
    )
    concurrency: Counts = Field(
        default=(CountLadder(**{"from": 1, "to": 16, "factor": 2}),),
        description="Users: a number, a list or a ladder such as 1..32.",
    )
    max_tokens: Counts = Field(default=(256, 1024, 4096), description="Most tokens per answer, in the same way.")
    input_tokens: Counts = Field(default=(64,), description="Tokens per prompt, in the same way.")
    floor_bytes: Size | None = Field(
        default=None,
        alias="floor",
        description="Stop when the host has less memory available; 5 % of its memory, at least 512MiB, unless stated.",
    )

    @model_validator(mode="after")
    def _not_too_many(self) -> MemoryLadder:
        if (found := len(self.rungs())) > MOST_RUNGS:
            raise refuse(f"expected at most {MOST_RUNGS} rungs in a memory ladder, got {found:,}: name fewer numbers")
        return self

    @property
    def until_failure(self) -> bool:
        return self.until == FAILURE

    @property
    def until_share(self) -> float | None:
        """The share to stop at, 0 to 1."""
        return SHARE.read(self.until) if self.until.endswith("%") else None

    @property
    def until_bytes(self) -> int | None:
        return None if self.until_failure or self.until.endswith("%") else size(self.until)

    def floor_of(self, total_bytes: int) -> int:
        """The guard of a host with so much memory."""
        usual_bytes = max(round(FLOOR_SHARE * total_bytes), LEAST_FLOOR_BYTES)
        return usual_bytes if self.floor_bytes is None else self.floor_bytes

    def rungs(self) -> tuple[Closed, ...]:
        """Least memory first, by all that the users of a rung may come to hold; of two alike, fewer users first."""
        lists = (set(each(counts)) for counts in (self.concurrency, self.max_tokens, self.input_tokens))
        rungs = (Closed(users, ask=Ask(answer, asked)) for users, answer, asked in product(*lists))
        return tuple(sorted(rungs, key=_weight))


def _weight(rung: Closed) -> tuple[int, int, int]:
    assert rung.ask is not None
    return rung.concurrency * rung.ask.tokens, rung.concurrency, rung.ask.max_tokens
