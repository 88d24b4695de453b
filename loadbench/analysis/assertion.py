"""Reads what ``--assert`` says, in our own form or in that of k6's thresholds; each error names its place in the text.

``ttft.p95<2s``, ``ttft.response.p99 <= 1.5s``, ``error_rate<1%``, ``output_tokens_per_s>100 @ 4 users``,
``ttft: p(95)<2000``, ``http_req_failed: rate<0.01``, ``slo``. To hold it against a run is ``gates``' job.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, cast

from pydantic_core import PydanticCustomError

from loadbench.analysis.metrics import LATENCIES, RATES, Series
from loadbench.analysis.stats import PERCENTILES
from loadbench.errors import UsageError
from loadbench.scenario.units import DURATION, SHARE, Quantity

Comparison = Literal["<", "<=", ">", ">="]

WHOLE_SLO = "slo"
ERROR_RATE = "error_rate"
SAME = {
    "goodput": "goodput_share",
    "output_tok_per_s": "output_tokens_per_s",
    "output_tok_per_s_per_user": "output_tokens_per_s_per_user",
}
"""Names that go without saying for METRICS' own."""

K6: dict[str, tuple[str, Series | None]] = {
    "http_req_duration": ("e2e", "service"),  # k6 counts from sending, whatever was due
    "http_req_failed": (ERROR_RATE, None),
    "http_reqs": ("requests_per_s", None),
}
"""k6's metrics that are ours too. http_req_waiting is none: it ends with the first byte, which holds no token."""

STATISTICS = (*PERCENTILES, "p99_all", "mean", "min", "max")
_K6_STATISTICS = {"avg": "mean", "med": "p50", "min": "min", "max": "max"}
_K6_AMOUNTS = ("rate", "value")
_COMPARISONS: tuple[Comparison, ...] = ("<=", ">=", "<", ">")  # the longer first: that is the order of trying them
_NAME = r"[A-Za-z]\w*"


@dataclass(frozen=True, slots=True)
class Scope:
    """The levels that are meant: by ``number``, or by their load as reports name it, and of one model or of all."""

    number: int | None
    load: str | None
    model: str | None


@dataclass(frozen=True, slots=True)
class Assertion:
    """``text`` as it was written; ``limit`` in ``unit``: ms, share, or the unit of the rate.

    ``metric`` is a key of METRICS, error_rate, or slo: then the scenario's clauses are meant and the rest says nothing.
    A ``series`` of None is the level's headline; the ``statistic`` is a latency's.
    """

    text: str
    metric: str
    series: Series | None = None
    statistic: str | None = None
    comparison: Comparison = "<="
    limit: float | None = None
    unit: str = ""
    scope: Scope | None = None

    @property
    def clause(self) -> str:
        """``ttft.p95``, ``error_rate``; goodput as the SLO has it."""
        name = "goodput" if self.metric == "goodput_share" else self.metric
        return f"{name}.{self.statistic}" if self.statistic else name

    @property
    def is_share(self) -> bool:
        """Whether it says how many requests may fail."""
        return self.metric in (ERROR_RATE, "goodput_share")

    def met(self, value: float) -> bool:
        assert self.limit is not None
        if self.comparison == "<":
            return value < self.limit
        if self.comparison == ">":
            return value > self.limit
        return value <= self.limit if self.comparison == "<=" else value >= self.limit


def parse(text: str) -> Assertion:
    """The assertion that the text is. UsageError: which character, what was expected there, what was found."""
    text = text.strip()
    reading = _Reading(text)
    if reading.found(rf"{WHOLE_SLO}\b(?!\s*:|\.)"):
        return Assertion(text, WHOLE_SLO, scope=_scope(reading))
    at = reading.at
    name = reading.need(_NAME, "a metric such as ttft or error_rate")
    by_k6 = reading.found(r"\s*:\s*") is not None
    metric, series = _metric(reading, name, at, by_k6)
    if by_k6:
        statistic = _k6_statistic(reading, metric)
    else:
        series, statistic = _own_statistic(reading, metric, series)
    comparison = _comparison(reading, metric)
    limit, unit = _limit(reading, metric, by_k6)
    return Assertion(text, metric, series, statistic, comparison, limit, unit, _scope(reading))


class _Reading:
    """The text and how far it has been read; blanks between two words mean nothing."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def _skip(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def found(self, pattern: str) -> str | None:
        match = re.compile(pattern).match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        self._skip()
        return match[0]

    def need(self, pattern: str, expected: str) -> str:
        found = self.found(pattern)
        return self.refuse(expected) if found is None else found

    def refuse(self, expected: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        rest = " ".join(self.text[at : at + 40].split())
        got = f"got {rest!r}" if rest else "but it ends there"
        raise UsageError(f"--assert {self.text!r}: character {at + 1}: expected {expected}, {got}")


def _metric(reading: _Reading, name: str, at: int, by_k6: bool) -> tuple[str, Series | None]:
    if name in K6:
        if not by_k6:
            reading.refuse(f"a colon after {name}, as k6 has it")
        return K6[name]
    metric = SAME.get(name, name)
    if metric != ERROR_RATE and metric not in LATENCIES and metric not in RATES:
        known = [*LATENCIES, ERROR_RATE, *RATES, *(K6 if by_k6 else ()), *(() if by_k6 else (WHOLE_SLO,))]
        reading.refuse(_one_of(known), at)
    return metric, None


def _own_statistic(reading: _Reading, metric: str, series: Series | None) -> tuple[Series | None, str | None]:
    """``.p95`` or ``.response.p95`` of a latency; nothing of a number per level."""
    if metric not in LATENCIES:
        if reading.text[reading.at : reading.at + 1] == ".":
            reading.refuse(f"a comparison, as {metric} is one number of a level")
        return None, None
    there = LATENCIES[metric].series
    reading.need(r"\.", f"a dot and a statistic of {metric}, such as .p95")
    if (named := reading.found(r"(service|response)(?=\s*\.)")) is not None:
        if named not in there:
            reading.refuse(f"{metric} without {named}: its only series is {_one_of(there)}", reading.at - len(named))
        series = cast(Series, named)
        reading.need(r"\.", f"a dot and a statistic of {metric}, such as .p95")
    at = reading.at
    expected = _one_of(map(_shown, STATISTICS))
    statistic = reading.need(r"p[0-9]+([._][0-9]+|_all)?|[A-Za-z]\w*", expected).replace(".", "_")
    if statistic not in STATISTICS:
        reading.refuse(expected, at)
    return series, statistic


def _k6_statistic(reading: _Reading, metric: str) -> str | None:
    at = reading.at
    if metric not in LATENCIES:
        if reading.need(_NAME, _one_of(_K6_AMOUNTS)) not in _K6_AMOUNTS:
            reading.refuse(_one_of(_K6_AMOUNTS), at)
        return None
    percentiles = [f"p({_shown(name)[1:]})" for name in PERCENTILES]
    expected = _one_of([*percentiles, *_K6_STATISTICS])
    share = reading.found(r"p\(\s*[0-9]+(\.[0-9]+)?\s*\)")
    word = None if share else reading.need(_NAME, expected)
    if word is not None:
        return _K6_STATISTICS.get(word) or reading.refuse(expected, at)
    wanted = float((share or "")[2:-1]) / 100
    named = next((name for name, told in PERCENTILES.items() if abs(told - wanted) < 1e-9), None)
    return named or reading.refuse(expected, at)


def _comparison(reading: _Reading, metric: str) -> Comparison:
    """A comparison that can fail: who asks for a latency above something has turned it round."""
    at = reading.at
    found = next((sign for sign in _COMPARISONS if reading.found(re.escape(sign))), None)
    lower = metric == ERROR_RATE or (LATENCIES.get(metric) or RATES[metric]).lower_is_better
    if found is None:
        reading.refuse("< or <=" if lower else "> or >=")
    if lower != (found[0] == "<"):
        reading.refuse(f"{'< or <=' if lower else '> or >='}, as {'less' if lower else 'more'} of it is better", at)
    if reading.text[reading.at : reading.at + 1] in ("<", ">", "="):
        reading.refuse("a number")
    return found


def _limit(reading: _Reading, metric: str, by_k6: bool) -> tuple[float, str]:
    """In milliseconds, shares or the rate's unit. A bare number of a latency is k6's milliseconds, and only there."""
    start = reading.at
    number = reading.need(r"[0-9]+(\.[0-9]+)?|\.[0-9]+", "a number")
    if metric in LATENCIES:
        told = reading.found(r"(us|ms|s|m|h)\b")
        if told is None and not by_k6:
            reading.refuse(f"a unit after {number}: s or ms")
        return round(_read(reading, DURATION, number + (told or "ms"), start) * 1e3, 9), "ms"
    unit = "share" if metric == ERROR_RATE else RATES[metric].unit
    at = reading.at
    if unit != "share":
        named = {"1/s": r"(1|req|requests)?/s\b", "tok/s": r"(tok|tokens)?/s\b", "J": r"J\b"}
        reading.found(named[unit])
        return float(number), unit
    limit = _read(reading, SHARE, number + (reading.found("%") or ""), start)
    if not 0 <= limit <= 1:
        reading.refuse("a share from 0 to 1, or 0% to 100%", at - len(number))
    return limit, unit


def _read(reading: _Reading, quantity: Quantity, text: str, at: int) -> float:
    try:
        return quantity.read(text)
    except PydanticCustomError as error:  # a number too large for a float
        reading.refuse(error.message().removeprefix("expected "), at)


def _scope(reading: _Reading) -> Scope | None:
    """``@ 4 users``, ``@ 2/s``, ``@ level 3``, ``@ 1→8 users of MODEL``; nothing: the end."""
    if reading.at == len(reading.text):
        return None
    reading.need("@", "nothing more, or @ and a level such as @ 4 users")
    if reading.at == len(reading.text):
        reading.refuse("a level: 4 users, 2/s or level 3")
    load, _, model = reading.text[reading.at :].strip().partition(" of ")
    reading.at = len(reading.text)
    number = re.fullmatch(r"level\s+([0-9]{1,9})", load)
    return Scope(int(number[1]) if number else None, None if number else load.strip(), model.strip() or None)


def _shown(statistic: str) -> str:
    return statistic if statistic == "p99_all" else statistic.replace("_", ".")


def _one_of(names: Collection[str] | map[str]) -> str:
    told: Sequence[str] = [*names]
    return f"{', '.join(told[:-1])} or {told[-1]}" if told[1:] else told[0]
