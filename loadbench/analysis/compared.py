"""What is told about two sets of runs: these dataclasses are compare.json, field for field. `compare` fills them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from loadbench.analysis.metrics import Series
from loadbench.analysis.provenance import Difference

SCHEMA = 1

Answer = Literal["regressed", "equivalent", "improved", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Side:
    """One figure of one set: its ``values`` run by run (None: that run has none, or was left out) and their median.

    ``indicative`` values stand on fewer samples than a firm percentile takes: that they scatter is in the interval.
    ``beyond``: so many are latencies over capacity, worse than any number, which compare.json has as null.
    """

    values: tuple[float | None, ...]
    median: float | None
    indicative: int = 0
    beyond: int = 0

    @property
    def runs(self) -> int:
        """How many runs have a value."""
        return sum(value is not None for value in self.values)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one level, in both sets.

    ``change`` is new ÷ base, or where ``kind`` is difference new − base, with its 95 % interval from ``low`` to
    ``high``. ``chance`` is how likely runs that do not differ show so much in any figure that ``gates``. ``answer`` is
    None for a figure that is told and not judged. ``because`` is why it is inconclusive, with what it would take.
    """

    metric: str
    title: str
    unit: str
    kind: Literal["ratio", "difference"]
    lower_is_better: bool
    gates: bool
    base: Side
    new: Side
    change: float | None
    low: float | None
    high: float | None
    chance: float | None
    answer: Answer | None
    because: str | None


@dataclass(frozen=True, slots=True)
class Compared:
    """One load on one model in both sets; ``new_model`` where another stands in its place.

    ``x`` is users or requests per second, None for a load that is no single number. ``left_out`` are runs whose level
    does not count, and why; ``doubts`` are the cautions of those that do, with how many runs have each.
    """

    model: str
    new_model: str
    load: str
    loop: Literal["closed", "open", "search"]
    x: float | None
    headline: Series | None
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """How one prompt was answered in both sets, by the hashes of its answers.

    same: one answer in all runs; changed: one in the base, another in the new runs; unstable: several in one of them.
    """

    model: str
    kind: str
    place: int
    result: Literal["same", "changed", "unstable"]
    base: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunName:
    """A run that was compared."""

    path: str
    started: str
    status: str
    scenario: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sets of runs. ``differences`` in provenance are there under ``--force`` only, but for ``instrument``'s.

    ``least_effect`` is what a change must be to count, ``alarm`` how often a comparison of identical runs may call any
    figure worse. ``answer`` is the worst of the figures that gate; ``compared`` says whether any of them has one,
    beside those of failing. ``missing`` is what the base has and a gate could not hold, level by level.
    """

    schema: int
    loadbench: str
    name: str
    base: tuple[RunName, ...]
    new: tuple[RunName, ...]
    least_effect: float
    alarm: float
    answer: Answer
    compared: bool
    text: str
    differences: tuple[Difference, ...]
    levels: tuple[Compared, ...]
    not_compared: tuple[str, ...]
    answers: tuple[Said, ...]
    environment: dict[str, Any]
    endpoint: dict[str, Any]
    missing: tuple[str, ...] = ()


def schema() -> dict[str, Any]:
    """The JSON Schema of compare.json."""
    made = TypeAdapter(Comparison).json_schema(mode="serialization")
    for shape in (made, *made["$defs"].values()):
        shape["required"] = list(shape["properties"])  # what is null is written, too
    made["properties"]["schema"] = {"const": SCHEMA}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "loadbench comparison", **made}
