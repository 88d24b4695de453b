"""The plain things that move: from the plan to the socket, and from the socket to the disk. No behaviour, no I/O.

Times are integer nanoseconds since the run began, on the monotonic clock; None where a thing never happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

Find = Literal["max-concurrency", "max-rate"]
"""What ``--find`` looks for: the most users, or the highest rate, that keep the SLO."""

STALL_NS = 1_000_000_000
"""A gap between content chunks above this is a stall: what a reader feels as frozen."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as drawn from the mix. ``kind`` is the mix entry's name, ``index`` counts draws within the level.

    ``place`` says which of its kind's prompts it is, in the order of its file; None where each is made up.
    """

    kind: str
    index: int
    messages: tuple[dict[str, Any], ...]
    max_tokens: int
    place: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with its due time. ``user`` is the closed-loop user that sends it, None in open loop."""

    seq: int
    prompt: Prompt
    due_ns: int
    user: int | None = None


class Sample(NamedTuple):
    """What happened to one request; one line of ``samples.jsonl``. Key order here is key order there.

    A tuple, not a dataclass: one is made per request on the hot path. ``level`` is the level's index in the run;
    ``phase`` is ``load``, or one that no figure counts: ``warmup``, ``canary``, ``keep_warm``, ``quality``. ``chunks``
    counts content deltas; ``output_tokens`` comes from where ``token_source`` says (``usage`` or ``chunks``; None: no
    token seen). ``max_gap_ns`` is the largest pause between two content chunks, ``stall_ns`` the sum of the pauses over
    one second. ``place`` is the prompt's; ``answer_hash`` is `engine.text`'s of what was answered, None where
    nothing was. ``endpoint`` is which of a fleet was asked, None where there is one.
    """

    level: int
    phase: str
    seq: int
    kind: str
    user: int | None
    due_ns: int
    sent_ns: int | None
    headers_ns: int | None
    first_event_ns: int | None
    first_token_ns: int | None
    last_token_ns: int | None
    done_ns: int | None
    outcome: str
    detail: str | None
    http_status: int | None
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    token_source: str | None
    chunks: int
    keep_alives: int
    max_gap_ns: int | None
    stall_ns: int | None
    bytes_received: int
    connect_ns: int | None
    place: int | None = None
    answer_hash: str | None = None
    endpoint: int | None = None


class Asked(NamedTuple):
    """What happened to one request, and what was answered: of an answer of many megabytes the beginning."""

    sample: Sample
    text: str


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of a load over time: for ``over_s`` seconds it goes evenly from ``start`` to ``end``, users or requests/s.

    ``name`` is hold, ramp or spike. After its last leg a load stays where that one ended.
    """

    name: str
    start: float
    end: float
    over_s: float


def at(legs: Sequence[Leg], since_s: float) -> float:
    """The load so many seconds after the level's start, in the legs' unit."""
    for leg in legs:
        if since_s < leg.over_s:
            return leg.start + (leg.end - leg.start) * since_s / leg.over_s
        since_s -= leg.over_s
    return legs[-1].end


@dataclass(frozen=True, slots=True)
class Ask:
    """What every request of a level asks for in place of the mix: made-up prompts and answers of these lengths."""

    max_tokens: int
    input_tokens: int

    @property
    def tokens(self) -> int:
        """What a stream may come to hold."""
        return self.input_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Closed:
    """N users; each sends its next request when its last one is done. With ``legs`` N is the most there ever are.

    With ``ask`` it is a rung of a memory ladder.
    """

    concurrency: int
    legs: tuple[Leg, ...] = ()
    ask: Ask | None = None

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"kind": "closed", "concurrency": self.concurrency}
        told |= {"legs": [asdict(leg) for leg in self.legs]} if self.legs else {}
        return told | ({"ask": asdict(self.ask)} if self.ask else {})

    @classmethod
    def from_json(cls, load: dict[str, Any]) -> Closed:
        """The load that ``as_json`` wrote."""
        ask = load.get("ask")
        return cls(load["concurrency"], _legs(load), None if ask is None else Ask(**ask))


@dataclass(frozen=True, slots=True)
class Trace:
    """A file of recorded requests, replayed ``speed`` times as fast.

    ``requests`` of them lie within the stage's bounds, the last of these due ``length_s`` after the first.
    ``timestamps`` is the unit of its numbers, ``s`` or ``ms``; None: what its columns say.
    """

    file: str
    sha256: str
    timestamps: str | None
    speed: float
    requests: int
    length_s: float


@dataclass(frozen=True, slots=True)
class Open:
    """A schedule laid down beforehand at ``rate_per_s`` requests per second on average.

    ``arrivals`` is constant, poisson, gamma (then with ``burstiness``) or trace (then with ``trace``). With ``legs``
    the rate changes, and ``rate_per_s`` is its mean over them.
    """

    rate_per_s: float
    arrivals: str = "poisson"
    burstiness: float | None = None
    legs: tuple[Leg, ...] = ()
    trace: Trace | None = None

    @property
    def most_per_s(self) -> float:
        """The highest rate that it ever asks for."""
        return max([self.rate_per_s, *(max(leg.start, leg.end) for leg in self.legs)])

    def as_json(self) -> dict[str, Any]:
        """Without what does not apply."""
        return {"kind": "open"} | {name: value for name, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_json(cls, load: dict[str, Any]) -> Open:
        """The load that ``as_json`` wrote."""
        trace = load.get("trace")
        return cls(
            load["rate_per_s"],
            load["arrivals"],
            load.get("burstiness"),
            _legs(load),
            None if trace is None else Trace(**trace),
        )


def _legs(load: dict[str, Any]) -> tuple[Leg, ...]:
    return tuple(Leg(**leg) for leg in load.get("legs", ()))


Load = Closed | Open


def load_from_json(load: dict[str, Any]) -> Load:
    """The load that ``as_json`` wrote."""
    return Closed.from_json(load) if load["kind"] == "closed" else Open.from_json(load)


def load_title(load: Any) -> str:
    """The load of a level as sentences, lists and tables name it.

    ``4 users``, ``4 users × 2,048 tokens``, ``1→8→1 users``, ``2/s poisson``, ``2/s gamma 0.5``, ``1→8/s``,
    ``1→8/s constant``, ``trace azure.csv ×2``.

    It is a load of ours or of ``analysis.summary``, told apart by what it has: the live view needs these words before
    the run and must not pay for importing the analysis then.
    """
    legs = getattr(load, "legs", ())
    if hasattr(load, "concurrency"):
        users = f"{_path(legs)} users" if legs else f"{load.concurrency:,} user{'' if load.concurrency == 1 else 's'}"
        return users if load.ask is None else f"{users} × {load.ask.tokens:,} tokens"
    burstiness, trace = getattr(load, "burstiness", None), getattr(load, "trace", None)
    if trace is not None:
        return f"trace {PurePath(trace.file).name}" + ("" if trace.speed == 1 else f" ×{trace.speed:g}")
    arrivals = load.arrivals + (f" {burstiness:g}" if burstiness else "")
    if not legs:
        return f"{load.rate_per_s:g}/s {arrivals}"
    return f"{_path(legs)}/s" + ("" if arrivals == "poisson" else f" {arrivals}")


MOST_STOPS = 4


def _path(legs: Sequence[Leg]) -> str:
    """``1→8→1``: where the load goes, stop by stop; of a long way its beginning and its end."""
    stops = [legs[0].start]
    for value in (value for leg in legs for value in (leg.start, leg.end)):
        if value != stops[-1]:
            stops.append(value)
    told = [f"{stop:g}" for stop in stops]
    return "→".join(told if len(told) <= MOST_STOPS else [*told[:2], "…", told[-1]])


@dataclass(frozen=True, slots=True)
class Level:
    """One load on one model, measured for a while.

    It stops issuing at ``duration_s`` or after ``requests``, whichever comes first, but not before ``min_requests``.
    ``at_most_s`` ends it even before its ``min_requests``. ``start_spacing_s`` is the time between the first requests
    of two closed-loop users. ``purpose`` is level, or in a search probe or confirmation. Results are told for every
    ``interval_s`` of it too, None: as a whole only.
    """

    index: int
    stage: int
    model: str
    load: Load
    duration_s: float | None
    requests: int | None
    min_requests: int
    seed: int
    start_spacing_s: float = 0.001
    max_in_flight: int | None = None
    at_most_s: float | None = None
    interval_s: float | None = None
    purpose: str = "level"

    def as_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"load": self.load.as_json()}

    @classmethod
    def from_json(cls, level: dict[str, Any]) -> Level:
        """The level that ``as_json`` wrote."""
        return cls(**{**level, "load": load_from_json(level["load"])})

    def share(self, index: int, count: int) -> Level:
        """What shard ``index`` of ``count`` has to do: numbers are dealt out like cards, the rest to the first."""

        def dealt(number: int) -> int:
            return number // count + (index < number % count)

        return replace(
            self,
            requests=None if self.requests is None else dealt(self.requests),
            min_requests=dealt(self.min_requests),
        )
