"""Quantities as people write them (``15s``, ``2/s``, ``1%``, ``2GiB``, ``45W``), each read into one unit and back.

Seconds, per second, a fraction of one, bytes, watts: a bare number is in that unit. What is written back reads as the
same float, bit for bit, so a saved scenario repeats its run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

_NUMBER = r"[0-9]*\.?[0-9]+([eE][+-]?[0-9]{1,3})?"
# An editor sees the file before the environment is put in, so ${NAME} has to pass wherever a quantity does.
VARIABLE = r".*\$\{.+\}.*"


@dataclass(frozen=True, slots=True)
class Quantity:
    """One kind of quantity: what to call it in an error, and what its units are in canonical ones, largest first.

    ``canonical`` is the unit of a bare number.
    """

    expected: str
    units: Mapping[str, Fraction]
    canonical: str

    def pattern(self, sign: str = "") -> str:
        """The regular expression of the accepted text, in the dialect that Python and JSON Schema share."""
        units = "|".join(re.escape(unit) for unit in self.units)
        return rf"^\s*({sign}{_NUMBER})\s*({units})?\s*$"

    def read(self, value: object) -> float:
        """``15s`` → 15.0. Raises pydantic's error, which says what was expected; bounds are the field's matter."""
        is_quantity = isinstance(value, int | float | str) and not isinstance(value, bool)
        match = re.match(self.pattern(sign="-?"), str(value)) if is_quantity else None
        if match is None:
            raise PydanticCustomError("expected", "expected {expected}", {"expected": self.expected})
        try:
            # Fractions, because 0.1 × 1e-3 in floats is not the float nearest to 0.1 ms.
            return float(Fraction(match[1]) * self.units[match[3] or self.canonical])
        except OverflowError:
            raise PydanticCustomError("expected", "expected {expected}", {"expected": self.expected}) from None

    def write(self, value: float) -> str:
        """15.0 → ``15s``: in the largest unit that makes it a whole number, else in the canonical one."""
        exact = Fraction(repr(value))
        for unit, scale in self.units.items():
            if exact and (exact / scale).denominator == 1:
                return f"{exact / scale}{unit}"
        return f"{repr(value).removesuffix('.0')}{self.canonical}"

    def json_schema(self) -> dict[str, Any]:
        text = {"type": "string", "pattern": f"{self.pattern()}|{VARIABLE}"}
        return {"anyOf": [{"type": "number", "minimum": 0}, text]}


DURATION = Quantity(
    "a duration such as 15s, 250ms or 2m",
    {
        "h": Fraction(3600),
        "m": Fraction(60),
        "s": Fraction(1),
        "ms": Fraction(1, 1000),
        "us": Fraction(1, 1_000_000),
    },
    "s",
)
RATE = Quantity(
    "a rate such as 2/s or 120/min",
    {"/s": Fraction(1), "/min": Fraction(1, 60), "/h": Fraction(1, 3600)},
    "/s",
)
SHARE = Quantity("a share such as 1% or 0.01", {"%": Fraction(1, 100), "": Fraction(1)}, "")
BYTES = Quantity(
    "a number of bytes such as 2GiB or 500MB",
    {
        "TiB": Fraction(2**40),
        "TB": Fraction(10**12),
        "GiB": Fraction(2**30),
        "GB": Fraction(10**9),
        "MiB": Fraction(2**20),
        "MB": Fraction(10**6),
        "KiB": Fraction(2**10),
        "kB": Fraction(10**3),
        "B": Fraction(1),
    },
    "B",
)
POWER = Quantity("a power such as 45W or 1.2kW", {"kW": Fraction(1000), "W": Fraction(1), "mW": Fraction(1, 1000)}, "W")


def _write_if_given(quantity: Quantity) -> PlainSerializer:
    return PlainSerializer(quantity.write, return_type=str, when_used="json-unless-none")


Duration = Annotated[
    float,
    BeforeValidator(DURATION.read),
    Field(ge=0),
    _write_if_given(DURATION),
    WithJsonSchema(DURATION.json_schema()),
]
Rate = Annotated[
    float,
    BeforeValidator(RATE.read),
    Field(gt=0),
    _write_if_given(RATE),
    WithJsonSchema(RATE.json_schema()),
]
RateOrZero = Annotated[
    float,
    BeforeValidator(RATE.read),
    Field(ge=0),
    _write_if_given(RATE),
    WithJsonSchema(RATE.json_schema()),
]
Share = Annotated[
    float,
    BeforeValidator(SHARE.read),
    Field(ge=0, le=1),
    _write_if_given(SHARE),
    WithJsonSchema(SHARE.json_schema()),
]
Power = Annotated[
    float,
    BeforeValidator(POWER.read),
    Field(gt=0),
    _write_if_given(POWER),
    WithJsonSchema(POWER.json_schema()),
]
LEAST_SIZE_BYTES = 1 << 20  # a size below it lacks its unit


def size(value: object) -> int:
    """``1.5GiB`` → 1610612736, to the nearest byte. Raises pydantic's error, for what is too little too."""
    found = round(BYTES.read(value))
    if found < LEAST_SIZE_BYTES:
        raise PydanticCustomError("expected", "expected {least} or more", {"least": BYTES.write(LEAST_SIZE_BYTES)})
    return found


Size = Annotated[
    int,
    BeforeValidator(size),
    _write_if_given(BYTES),
    WithJsonSchema(BYTES.json_schema()),
]


def _no_bool(value: object) -> object:
    """Keep YAML's yes and no from being read as 1 and 0, which pydantic would do."""
    if isinstance(value, bool):
        raise PydanticCustomError("expected", "expected a whole number")
    return value


Count = Annotated[int, Field(ge=0), BeforeValidator(_no_bool)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_no_bool)]
