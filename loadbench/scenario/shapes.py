"""The shapes that a stage's loads may have: ladders, ramps, stretches over time; and the rules that end a ladder early.

What a stage makes of them is ``stage``'s job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from loadbench.records import Leg
from loadbench.scenario.part import Part, as_list, exactly_one, refuse
from loadbench.scenario.units import RATE, Duration, Positive, Rate, RateOrZero, Share

MOST_RUNGS = 32
"""Doublings from one user to two thousand million; a ladder with more is a slip of the factor."""

DEFAULT_FACTOR = 2
"""Of a ladder that is written 1..64: each level tells whether twice the load still brings more."""

Steepness = Annotated[float, Field(gt=1, allow_inf_nan=False)]


def rungs(first: float, last: float, factor: float) -> tuple[float, ...]:
    """``first``, ``first`` × ``factor`` and so on below ``last``, and ``last``."""
    steps = math.ceil((math.log(last) - math.log(first)) / math.log(factor) - 1e-9)  # 1e-9: log(64) / log(2) is no 6
    if steps >= MOST_RUNGS:
        raise refuse(f"expected at most {MOST_RUNGS} loads in a ladder, got {steps + 1:,}: raise factor")
    return (*(first * factor**step for step in range(steps)), last)


class UserLadder(Part):
    """So many users, then ``factor`` times as many, and so on: one level each."""

    from_users: Positive = Field(alias="from", description="Users of the first level.")
    to_users: Positive = Field(alias="to", description="Users of the last level, whatever the factor.")
    factor: Steepness = Field(description="From level to level so many times as many, in whole users.")

    @model_validator(mode="after")
    def _climbs(self) -> UserLadder:
        if self.to_users < self.from_users:
            raise refuse(f"expected from ≤ to, got {self.from_users} and {self.to_users}")
        self.rungs()
        return self

    def rungs(self) -> tuple[int, ...]:
        """The users of each level; what rounds to the same number is one level."""
        return tuple(dict.fromkeys(round(users) for users in rungs(self.from_users, self.to_users, self.factor)))


class RateRange(Part):
    """A rate that changes evenly from one to another over the stage's duration; with ``factor`` a ladder of rates."""

    from_per_s: RateOrZero = Field(alias="from", description="Requests per second at the start; 0 without factor only.")
    to_per_s: Rate = Field(alias="to", description="Requests per second at the end of the duration, or of the ladder.")
    factor: Steepness | None = Field(
        default=None, description="Make it a ladder: a level at each rate, from level to level so many times as high."
    )

    @model_validator(mode="after")
    def _climbs(self) -> RateRange:
        if self.factor is not None and not 0 < self.from_per_s <= self.to_per_s:
            raise refuse(f"expected 0 < from ≤ to beside factor, got {self.from_per_s:g}/s and {self.to_per_s:g}/s")
        self.rungs()
        return self

    def rungs(self) -> tuple[float, ...]:
        """The rate of each level of a ladder; of a ramp none."""
        return () if self.factor is None else rungs(self.from_per_s, self.to_per_s, self.factor)


def as_loads(value: object) -> object:
    """One load is a list of one, ``1,2,4`` a list of three, and ``1..64`` a ladder, as flags write them."""
    loads = as_list(value)
    return [_spread(load) for load in loads] if isinstance(loads, list | tuple) else loads


def _spread(load: object) -> object:
    if not isinstance(load, str) or ".." not in load:
        return load
    first, _, last = load.partition("..")
    return {"from": first.strip(), "to": last.strip(), "factor": DEFAULT_FACTOR}


def is_ladder(loads: object) -> bool:
    """Whether what a file says, as ``as_loads`` gives it back, is a ladder."""
    return isinstance(loads, list) and any(isinstance(load, dict) and "factor" in load for load in loads)


class StopRules(Part):
    """When the rest of a ladder is not run. A ladder has those of the defaults, a list those that it names."""

    gain_share: Share | None = Field(
        default=0.05, alias="gain", description="Throughput gained less than this, twice in a row; null: never."
    )
    slo: bool = Field(default=True, description="The SLO was missed.")
    error_rate: Share | None = Field(
        default=0.1, description="A larger share of the requests failed; null: however many."
    )
    degraded: bool = Field(default=True, description="The target is not healthy any more.")
    over_capacity: bool = Field(default=True, description="Open loop: what waits for an answer kept growing.")
    time_s: Annotated[Duration, Field(gt=0)] | None = Field(
        default=None, alias="time", description="The stage has taken so long, on this model."
    )


_OFF = {"gain": None, "slo": False, "error_rate": None, "degraded": False, "over_capacity": False}


def spelt_out(stop: object, ladder: bool) -> object:
    """The rules as a mapping that says all that ``stop`` leaves open: true and false are all of them and none."""
    if stop is None:
        return {} if ladder else None
    if isinstance(stop, bool):
        return {} if stop else _OFF
    return {**_OFF, **stop} if isinstance(stop, dict) and not ladder else stop


def _users_or_rate(value: object) -> object:
    """Whole numbers are users, an int; what has a unit is a rate, a float in requests per second."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and float(value).is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal():  # as ${USERS:-4} gives it
        return int(value)
    if not isinstance(value, str) or "/" not in value or (per_s := RATE.read(value)) < 0:
        raise PydanticCustomError("expected", "expected users as a whole number or a rate such as 2/s")
    return per_s


def _written(value: float) -> int | str:
    return value if isinstance(value, int) else RATE.write(value)


UsersOrRate = Annotated[
    int | float,
    BeforeValidator(_users_or_rate),
    PlainSerializer(_written, when_used="json-unless-none"),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": RATE.pattern() + r"|.*\$\{.+\}.*"}]}
    ),
]


class Stretch(Part):
    """A part of a load over time: users where its number is whole, a rate where it has a unit."""

    hold: UsersOrRate | None = Field(default=None, description="Go to this load at once and stay there.")
    ramp: UsersOrRate | None = Field(default=None, description="Go evenly to this load from where it is; at first 0.")
    spike: UsersOrRate | None = Field(default=None, description="This load, and then back to where it was before.")
    for_s: Annotated[Duration, Field(gt=0)] = Field(alias="for", description="How long it lasts.")

    @model_validator(mode="after")
    def _one_kind(self) -> Stretch:
        exactly_one(hold=self.hold, ramp=self.ramp, spike=self.spike)
        return self

    def load(self) -> tuple[str, int | float]:
        """What it is called, and the load that it goes to."""
        given: dict[str, Any] = {"hold": self.hold, "ramp": self.ramp, "spike": self.spike}
        return next((name, value) for name, value in given.items() if value is not None)


def are_rates(stretches: object) -> bool:
    """Whether what a file says of a load over time is about rates: one of its loads has a unit."""
    found = stretches if isinstance(stretches, list | tuple) else ()
    values = [value for one in found if isinstance(one, dict) for key, value in one.items() if key != "for"]
    return any(isinstance(value, str) and "/" in value for value in values)


def legs_of(stretches: Sequence[Stretch]) -> tuple[Leg, ...]:
    """The legs of a load that goes through these, from 0 on."""
    legs, before = [], 0.0
    for stretch in stretches:
        name, load = stretch.load()
        legs.append(Leg(name, before if name == "ramp" else float(load), float(load), stretch.for_s))
        before = before if name == "spike" else float(load)
    return tuple(legs)
