"""What the target's memory did: every level's verdict with its evidence, and what each model takes, of all its levels.

What a stream and a token take is ``memory_fit``'s, what is never given back ``memory_leak``'s. A verdict is the worst
that is true, and its evidence all that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np

from loadbench.analysis import memory_fit, memory_leak, memory_words
from loadbench.analysis.findings import LevelMemory, Memory, Share
from loadbench.analysis.memory_columns import Figures, columns, gpu_total, row
from loadbench.analysis.memory_fit import Peaks, Rung
from loadbench.analysis.memory_leak import Kept, TooFew
from loadbench.analysis.road import is_over
from loadbench.analysis.rundir import RunData
from loadbench.analysis.span import Span
from loadbench.analysis.stats import Floats
from loadbench.analysis.summary import ClosedLoad, Level
from loadbench.analysis.words import mib, requests
from loadbench.target.memory_figures import GPU_BYTES, HELD
from loadbench.target.state import DEAD

Of = Literal["gpu", "cgroup", "footprint", "private", "rss"]

SPILL_BYTES = 64 << 20  # buffers to and from a device lie in system memory too, and pages at rest go to swap
NEARLY_FULL = 0.8  # of a device: with more room left, what lies in shared memory was not pushed out
PRESSURE_SHARE = 0.10  # of the time some task waited for memory: as much as we allow ourselves to add to a latency
AVAILABLE_SHARE = 0.05  # of the machine's memory: earlyoom begins to kill at 10 %, and page cache is gone by then
GROWN_SHARE = 0.05  # of the memory before: less growth is not worth the word

WANT_OF_MEMORY = "likely cause: want of memory"  # as target/state says it
CUT_SHARE = 0.5  # of the answers: with so many given up, what grows has not grown to its end


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of one level. ``held`` is by column, with what was read before and after the level."""

    span: Span
    level: Level
    held: dict[str, Floats]
    before: Figures
    after: Figures
    mark_bytes: int | None


def of_run(
    run: RunData, spans: Sequence[Span], levels: Sequence[Level]
) -> tuple[tuple[Level, ...], tuple[Memory, ...]]:
    """The levels with what the memory did in each, and what each model takes; both in the order of the levels."""
    seen = [_see(span, level) for span, level in zip(spans, levels, strict=True)]
    told: dict[int, Level] = {}
    models = []
    for model in dict.fromkeys(level.model for level in levels):
        mine = [one for one in seen if one.level.model == model]
        column = _counted(mine)
        of = None if column is None else cast(Of, "gpu" if column.startswith("gpu") else column)
        found = [_level(run, one, column, of) for one in mine]
        if of is not None:
            memory, found = _model(model, of, column or "", mine, found)
            models.append(memory)
        told |= {one.level.index: replace(one.level, memory=each) for one, each in zip(mine, found, strict=True)}
    return tuple(told[level.index] for level in levels), tuple(models)


def _see(span: Span, level: Level) -> _Seen:
    target = (span.events.end or {}).get("target", {})
    figures = target.get("memory") or {}
    before, after, peak = (figures.get(name) or {} for name in ("before", "after", "peak"))
    if not figures:  # a run of before there were figures, or one whose target is not ours to watch
        rss = level.target.rss_bytes
        before, peak, after = ({} if n is None else {"rss_bytes": n} for n in (rss.before, rss.peak, rss.after))
    rows = [*row(before), *span.events.memory, *row(peak), *row(after)]
    return _Seen(span, level, columns(rows), before, after, peak.get("peak_rss_bytes"))


def _counted(seen: Sequence[_Seen]) -> str | None:
    """The column in which the model's memory shows; None where nothing was read.

    A device, where the target holds some of it; where no driver says who does, where it changed by more than the
    process did. Else what its process holds.
    """
    if not seen:
        return None
    everything = {name: np.concatenate([one.held[name] for one in seen]) for name in seen[0].held}
    process, used = everything["gpu_process"], everything["gpu_used"]
    if _most(process) >= GPU_BYTES:
        return "gpu_process"
    if np.isnan(process).all() and _range(used) > max(GPU_BYTES, _range(everything["rss"])):
        return "gpu_used"
    return next((name for name in HELD if not np.isnan(everything[name]).all()), None)


def _most(values: Floats) -> float:
    return 0.0 if np.isnan(values).all() else float(np.nanmax(values))


def _range(values: Floats) -> float:
    return 0.0 if np.isnan(values).all() else float(np.nanmax(values) - np.nanmin(values))


def _level(run: RunData, seen: _Seen, column: str | None, of: Of | None) -> LevelMemory:
    held = np.empty(0) if column is None else seen.held[column]
    exact = of == "rss" and seen.mark_bytes is not None
    peaks = [int(held[~np.isnan(held)].max())] if not np.isnan(held).all() else []
    peaks += [seen.mark_bytes] if exact and seen.mark_bytes is not None else []
    asked = _asked(run, seen.span)
    least = seen.held["available"]
    memory = LevelMemory(
        of=of,
        before_bytes=_of_figures(seen.before, column),
        peak_bytes=max(peaks, default=None),
        after_bytes=_of_figures(seen.after, column),
        exact=exact,
        limit_bytes=_limit(run, seen, of),
        available_min_bytes=None if np.isnan(least).all() else int(np.nanmin(least)),
        swap_peak_bytes=_peak(seen.held["swap"]),
        gpu_shared_peak_bytes=_peak(seen.held["gpu_shared"]),
        pressure_max_share=None if np.isnan(seen.held["pressure"]).all() else _most(seen.held["pressure"]),
        streams=_streams(seen.span),
        tokens=None if np.isnan(asked) else asked,
        verdict="fits" if of is not None else "undecided",
        because=() if of is not None else ("no memory of the target was read",),
    )
    doubts: dict[Literal["spills", "under_pressure", "out_of_memory"], list[str]] = {
        "spills": _spills(seen, memory),
        "under_pressure": _pressed(seen, memory),
        "out_of_memory": _out(seen),
    }
    for verdict, because in doubts.items():
        if because:
            memory = replace(memory, verdict=verdict, because=(*because, *memory.because))
    return memory


def _peak(values: Floats) -> int | None:
    return None if np.isnan(values).all() else int(np.nanmax(values))


def _of_figures(figures: Figures, column: str | None) -> int | None:
    value = np.nan if column is None else columns(row(figures))[column][0]
    return None if np.isnan(value) else int(value)


def _limit(run: RunData, seen: _Seen, of: Of | None) -> int | None:
    """The smallest limit on what is counted: the device's size, the run's own limit, the cgroup's."""
    if of == "gpu":
        return gpu_total(seen.before) or gpu_total(seen.after)
    ours = ((run.facts.get("memory") or {}).get("limit") or {}).get("bytes")
    limits = [ours, *(figures.get("cgroup_limit_bytes") for figures in (seen.before, seen.after))]
    return min((limit for limit in limits if limit is not None), default=None)


def _streams(span: Span) -> int | None:
    """How many requests were in flight at most."""
    sent_ns, done_ns = (stamps[~np.isnan(stamps)] for stamps in (span.samples.sent_ns, span.samples.done_ns))
    if not sent_ns.size:
        return None
    at = np.concatenate([sent_ns, done_ns])
    change = np.concatenate([np.ones(sent_ns.size), -np.ones(done_ns.size)])
    return int(np.cumsum(change[np.lexsort((change, at))]).max())


def _asked(run: RunData, span: Span) -> float:
    """Tokens that a request of the level asked for, on average: its input and its max_tokens; NaN: not known."""
    ask = span.plan["load"].get("ask")
    inputs = span.samples.input_tokens
    known = not np.isnan(inputs).all()
    if ask:
        return float(ask["max_tokens"] + (np.nanmean(inputs) if known else ask["input_tokens"]))
    scenario = run.facts["scenario"]
    usual: int | None = (scenario.get("request") or {}).get("max_tokens")
    counts = span.samples.counts(span.samples.kind)
    if not known or usual is None:
        return np.nan
    own: dict[str, int] = {entry["name"]: entry.get("max_tokens") or usual for entry in scenario.get("prompts") or ()}
    if not set(counts) <= set(own):
        return np.nan
    return float(np.nanmean(inputs) + sum(own[kind] * n for kind, n in counts.items()) / sum(counts.values()))


def _held(span: Span) -> float:
    """Tokens that a request came to hold, on average, also where it was cut off: then a chunk is a token."""
    samples, ask = span.samples, span.plan["load"].get("ask")
    inputs = np.nan if np.isnan(samples.input_tokens).all() else np.nanmean(samples.input_tokens)
    inputs = ask["input_tokens"] if ask and np.isnan(inputs) else inputs
    output = np.where(np.isnan(samples.output_tokens), samples.chunks, samples.output_tokens)
    return float(inputs + output.mean()) if output.size else np.nan


def _spills(seen: _Seen, memory: LevelMemory) -> list[str]:
    """What does not fit a device lies in system memory, and what does not fit that, on a disk."""
    because = []
    for name, where in (("gpu_shared", "system memory that the GPU uses"), ("swap", "swap")):
        values = seen.held[name]
        if np.isnan(values).all():
            continue
        first, most = float(values[~np.isnan(values)][0]), float(np.nanmax(values))
        full = memory.limit_bytes is None or _most(seen.held["gpu_used"]) >= NEARLY_FULL * memory.limit_bytes
        if most - first > SPILL_BYTES and (name == "swap" or memory.of != "gpu" or full):
            because.append(f"{where} grew by {mib(int(most - first))}")
    return because


def _pressed(seen: _Seen, memory: LevelMemory) -> list[str]:
    because = []
    share, total = memory.pressure_max_share, _peak(seen.held["total"])
    if share is not None and share > PRESSURE_SHARE:
        scope = "of the machine" if seen.before.get("pressure_scope", "machine") == "machine" else "of its cgroup"
        because.append(f"some task {scope} waited for memory {share:.0%} of the time, at most")
    if _most(seen.held["alarm"]) > 0:
        level = "critical" if _most(seen.held["alarm"]) > 1 else "warn"
        because.append(f"the system's memory pressure was {level}")
    least = memory.available_min_bytes
    if least is not None and total and least < AVAILABLE_SHARE * total:
        because.append(f"{mib(least)} were available at least, {least / total:.1%} of the machine's")
    return because


def _out(seen: _Seen) -> list[str]:
    level, because = seen.level, []
    failed = level.requests.failed.get("out_of_memory", 0)
    if failed:
        because.append(f"{failed} of {requests(level.requests.attempted)} failed for want of memory")
    state, evidence = level.target.state, level.target.evidence
    likely = state == "crashed" and any(WANT_OF_MEMORY in line for line in evidence)
    if state in ("oom_killed", "oom_reported") or likely:
        because += [f"the target was {state}", *evidence]
    before, after = (figures.get("cgroup_oom_kills") for figures in (seen.before, seen.after))
    if before is not None and after is not None and after > before:
        many = f"{after - before} more process{'' if after - before == 1 else 'es'}"
        because.append(f"its cgroup counted {many} killed for want of memory")
    return because


def _model(
    model: str, of: Of, column: str, seen: Sequence[_Seen], found: Sequence[LevelMemory]
) -> tuple[Memory, list[LevelMemory]]:
    """What one model takes, and its levels with what that explains in them."""
    pairs = list(zip(seen, found, strict=True))
    leak, leaking, leaks_not = _leak(pairs, column)
    # What leaks from level to level would be taken for what their streams hold; a rung may have a process of its own.
    usable = [(one, memory) for one, memory in pairs if _counts(one, memory) and (one.span.is_rung or not leaking)]
    peaks = memory_fit.fit([rung for pair in usable if (rung := _rung(*pair)) is not None], leaks_not=leaks_not)
    if cut := _cut_off([pair for pair in usable if pair[0].level.index in peaks.levels], peaks):
        peaks = memory_fit.unsure(peaks, cut)
    failed = next(((one, memory) for one, memory in pairs if memory.verdict == "out_of_memory"), None)
    told = []
    for one, memory in pairs:
        because = []
        if one.level.index in leaking:
            because = [leaking[one.level.index]]
            verdict: Literal["leaks", "grows"] = "grows" if memory_leak.SO_FAR in because[0] else "leaks"
        elif one.level.index in peaks.levels and (grown := _grown(memory, peaks)):
            because, verdict = [grown], "grows"
        if because:
            worse = memory.verdict not in ("fits", "undecided")
            because = [*memory.because, *because]
            memory = replace(memory, verdict=memory.verdict if worse else verdict, because=tuple(because))
        elif memory.verdict == "fits" and (state := one.level.target.state) in DEAD:
            memory = replace(memory, verdict="undecided", because=(f"the target was {state}: what fits is not told",))
        elif memory.verdict == "fits":
            memory = replace(memory, because=("no failure, no pressure and no spill", *_unexplained(memory)))
        told.append(memory)
    return (
        Memory(
            model=model,
            of=of,
            base=peaks.base,
            per_stream=peaks.per_stream,
            per_token=peaks.per_token,
            at_tokens=peaks.at_tokens,
            allocates=peaks.allocates,
            leak_per_1000=leak,
            first_failure=None if failed is None else failed[0].level.index,
            how=None if failed is None else memory_words.how_failed(failed[0].level),
            levels=peaks.levels,
        ),
        told,
    )


def _counts(seen: _Seen, memory: LevelMemory) -> bool:
    """Whether a level's peak is that of its load: a closed loop of so many users, which did not fail."""
    load = seen.level.load
    alive = seen.level.target.state not in DEAD and memory.verdict != "out_of_memory"
    return isinstance(load, ClosedLoad) and not load.legs and alive


def _rung(seen: _Seen, memory: LevelMemory) -> Rung | None:
    if memory.streams is None or memory.peak_bytes is None:
        return None
    asked = np.nan if memory.tokens is None else memory.tokens
    requests = None if seen.span.is_rung else seen.level.requests.attempted
    held = _held(seen.span)
    return Rung(seen.level.index, memory.streams, asked, held, memory.before_bytes, memory.peak_bytes, requests)


def _cut_off(pairs: Sequence[tuple[_Seen, LevelMemory]], peaks: Peaks) -> str | None:
    """Why the fit says less than its intervals would, where what is held grows with answers and most were given up."""
    sent = sum(one.level.requests.attempted for one, _ in pairs)
    cut = [(one, memory) for one, memory in pairs if one.level.requests.failed.get("censored")]
    lost = sum(one.level.requests.failed["censored"] for one, _ in cut)
    if peaks.allocates == "reserved" or peaks.base.value_bytes is None or lost <= CUT_SHARE * sent:
        return None
    held, asked = np.mean([(_held(one.span), memory.tokens or np.nan) for one, memory in cut], axis=0)
    at = "" if np.isnan(held) or np.isnan(asked) else f" at about {held:,.0f} of {asked:,.0f} tokens"
    return f"{lost / sent:.0%} of the answers were cut off{at}"


def _grown(memory: LevelMemory, peaks: Peaks) -> str | None:
    """How much the level's load took, where the fit says that it is the load's."""
    base = peaks.base.value_bytes
    if (
        base is None
        or memory.peak_bytes is None
        or (peaks.per_stream.value_bytes or peaks.per_token.value_bytes) is None
    ):
        return None
    grown = memory.peak_bytes - base
    if grown <= max(GROWN_SHARE * base, memory_fit.PAGES_BYTES):
        return None
    return f"{mib(round(grown))} above the {mib(round(base))} that it takes without load"


def _unexplained(memory: LevelMemory) -> list[str]:
    """Growth that neither the fit nor a leak accounts for."""
    if memory.peak_bytes is None or memory.before_bytes is None:
        return []
    grown = memory.peak_bytes - memory.before_bytes
    least = max(GROWN_SHARE * memory.before_bytes, memory_fit.PAGES_BYTES)
    return [f"{mib(grown)} more than before at its peak; the levels do not tell for what"] if grown > least else []


def _leak(pairs: Sequence[tuple[_Seen, LevelMemory]], column: str) -> tuple[Share, dict[int, str], bool]:
    """What the model keeps for every 1,000 requests, the levels in which that shows, in words, and whether it is known
    to keep nothing."""
    plain = [(one, memory) for one, memory in pairs if _is_plain(one, memory)]
    if not plain:
        return Share(None, None, "no level of a steady load that the target lived through"), {}, False
    within = {one.level.index: _within(one, memory, column) for one, memory in plain}
    kept = [found for found in within.values() if not isinstance(found, str)]
    sure = memory_leak.agree(kept)
    leaking = {index: _words(found, sure) for index, found in within.items() if not isinstance(found, str)}
    reasons = {o.level.requests.attempted: found for o, _ in plain if isinstance(found := within[o.level.index], str)}
    whole = [(o, m) for o, m in plain if m.before_bytes is not None and m.after_bytes is not None]
    across = memory_leak.across(
        [one.level.requests.attempted for one, _ in whole],
        [(memory.streams or 0) * (memory.tokens or 1.0) for _, memory in whole],
        [(float(memory.before_bytes or 0), float(memory.after_bytes or 0)) for _, memory in whole],
    )
    if isinstance(across, str):
        reasons[0] = across
    else:
        kept.append(across)
        leaking |= {one.level.index: _words(across, sure=True) for one, _ in whole if one.level.index not in leaking}
    if not kept:
        judged = not all(isinstance(found, TooFew) for found in (*within.values(), across))
        return Share(None, None, reasons[max(reasons)]), {}, judged
    return min(kept, key=lambda one: (one.high - one.low) / one.bytes_each).share(), leaking, False


def _is_plain(seen: _Seen, memory: LevelMemory) -> bool:
    """Whether its load is the same all the time and nothing else moves its memory."""
    failed = memory.verdict == "out_of_memory" or seen.level.target.state in DEAD
    return not (seen.span.changes or seen.span.is_rung or failed or is_over(seen.level.road))


def _within(seen: _Seen, memory: LevelMemory, column: str) -> Kept | str:
    events = seen.span.events
    readings = columns(events.memory)
    done_ns = np.sort(seen.span.samples.done_ns[~np.isnan(seen.span.samples.done_ns)])
    end_ns = np.inf if events.issue_end_ns is None else events.issue_end_ns
    after = None if memory.after_bytes is None else float(memory.after_bytes)
    return memory_leak.within(readings["t_ns"], readings[column], done_ns, memory.streams or 1, end_ns, after)


def _words(kept: Kept, sure: bool) -> str:
    low, high = kept.low / 1024, kept.high / 1024
    told = f"{kept.bytes_each / 1024:,.0f} KiB {memory_leak.KEPT} of {kept.requests:,} ({low:,.0f} to {high:,.0f})"
    return told if sure or kept.sure else f"{told}: {memory_leak.SO_FAR}"
