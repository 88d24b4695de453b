"""Quantities: what people write is read into one unit, and what is written back reads as the same number."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from loadbench.scenario.units import BYTES, DURATION, RATE, SHARE, Count, Duration, Quantity, Rate, Share, Size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15s", 15.0),
        ("250ms", 0.25),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("500us", 0.0005),
        ("1.5 s", 1.5),
        (3, 3.0),
        ("0", 0),
    ],
)
def test_a_duration_is_read_in_seconds(text: object, seconds: float) -> None:
    assert TypeAdapter(Duration).validate_python(text) == seconds


@pytest.mark.parametrize(("text", "per_second"), [("2/s", 2.0), ("120/min", 2.0), ("90/h", 0.025), (0.5, 0.5)])
def test_a_rate_is_read_per_second(text: object, per_second: float) -> None:
    assert TypeAdapter(Rate).validate_python(text) == per_second


@pytest.mark.parametrize(("text", "fraction"), [("1%", 0.01), ("0.01", 0.01), (0.25, 0.25), ("100%", 1.0), (0, 0.0)])
def test_a_share_is_read_as_a_fraction(text: object, fraction: float) -> None:
    assert TypeAdapter(Share).validate_python(text) == fraction


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2**31), ("500MB", 500_000_000), ("1.5GiB", 3 * 2**29), ("1.1GiB", 1_181_116_006), (2**20, 2**20)],
)
def test_a_size_is_in_whole_bytes_and_knows_both_kinds_of_prefix(text: object, count: int) -> None:
    read = TypeAdapter(Size).validate_python(text)
    assert read == count
    assert isinstance(read, int)


def test_a_decimal_fraction_of_a_unit_is_the_nearest_float() -> None:
    assert DURATION.read("0.1ms") == 0.0001  # 0.1 * 1e-3 is not
    assert DURATION.read("300ms") == 0.3


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (Duration, "15 sec", "expected a duration such as 15s, 250ms or 2m"),
        (Duration, "2/s", "expected a duration"),
        (Duration, "-1s", "greater than or equal to 0"),
        (Duration, float("nan"), "expected a duration"),
        (Duration, float("inf"), "expected a duration"),
        (Duration, "1e999", "expected a duration"),
        (Duration, True, "expected a duration"),
        (Duration, None, "expected a duration"),
        (Rate, "2s", "expected a rate such as 2/s or 120/min"),
        (Rate, "-2/s", "greater than 0"),
        (Rate, 0, "greater than 0"),
        (Share, "101%", "less than or equal to 1"),
        (Share, "five", "expected a share such as 1% or 0.01"),
        (Size, "2 gigabytes", "expected a number of bytes such as 2GiB"),
        (Size, "-2GiB", "expected 1MiB or more"),
        (Size, 512, "expected 1MiB or more"),
        (Count, True, "expected a whole number"),
    ],
)
def test_what_is_no_quantity_is_refused_with_what_was_expected(kind: Any, value: object, expected: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(expected)):
        TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        (DURATION, 15.0, "15s"),
        (DURATION, 120.0, "2m"),
        (DURATION, 0.25, "250ms"),
        (DURATION, 0.0, "0s"),
        (DURATION, 1 / 3, "0.3333333333333333s"),
        (RATE, 2.0, "2/s"),
        (RATE, 0.5, "30/min"),
        (SHARE, 0.01, "1%"),
        (SHARE, 0.005, "0.005"),
        (BYTES, 2**31, "2GiB"),
        (BYTES, 1001, "1001B"),
    ],
)
def test_a_quantity_is_written_in_the_largest_unit_that_makes_it_whole(
    quantity: Quantity, value: float, text: str
) -> None:
    assert quantity.write(value) == text


@given(
    quantity=st.sampled_from([DURATION, RATE, SHARE]),
    value=st.floats(min_value=0, allow_infinity=False) | st.floats(0, 1e6),
)
def test_what_is_written_reads_back_as_the_same_float(quantity: Quantity, value: float) -> None:
    assert quantity.read(quantity.write(value)) == value


@given(st.integers(0, 2**53))
def test_whole_bytes_read_back_as_the_same_number(value: int) -> None:
    assert BYTES.read(BYTES.write(value)) == value


@given(quantity=st.sampled_from([DURATION, RATE, SHARE, BYTES]), value=st.floats(0, 1e9))
def test_the_json_schema_admits_what_is_written(quantity: Quantity, value: float) -> None:
    number, text = quantity.json_schema()["anyOf"]
    assert number["type"] == "number"
    assert re.search(text["pattern"], quantity.write(value))
