"""Lays out what memory did: level by level, what a model takes and would need, deaths, and the way back from them.

The numbers are ``analysis``'s; formats and escaping are ``console``'s and ``markdown``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from loadbench.analysis.findings import LevelMemory, Memory, Recovery, Share
from loadbench.analysis.stats import Range
from loadbench.analysis.summary import Level, Summary
from loadbench.records import load_title
from loadbench.report import content
from loadbench.report.content import Cells, Table
from loadbench.report.findings import Finding, Row, Stands
from loadbench.report.words import count, figure, milliseconds, octets, share

OF = {
    "gpu": "GPU memory",
    "cgroup": "memory of its cgroup",
    "footprint": "physical footprint",
    "private": "private bytes",
    "rss": "resident memory of its processes",
}
NONE = "–"
SAMPLED = "≥"  # before a peak that is the highest of samples
AS_MANY = 0.95  # of the tokens asked for: levels are told as one number, and theirs differ by chance
TOO_MUCH = "!"  # after what does not fit

USERS = (1, 2, 4, 8, 16, 32)
TOKENS = (512, 2048, 8192)
"""What the table of needs is made for: round numbers, so that two models' tables can be laid side by side."""

_AT_EASE = ("fits", "grows")  # verdicts whose evidence is for report.md


def tables(summary: Summary) -> list[Table]:
    """A row a level, model by model, and a row for each time that the target came back or did not."""
    models = list(_by_model(summary))
    made = [_levels(model, levels) for model, levels in models if any(map(_figures, levels))]
    return made + [_recoveries(summary, model, levels) for model, levels in models if _lost(summary, levels)]


def findings(summary: Summary, *, everything: bool = False) -> list[Finding]:
    """What happened and by what evidence, what a model takes, and what it would need.

    ``everything``: the evidence of levels at which nothing was wrong, too, and fits that tell nothing but why.
    """
    told = []
    for model, levels in _by_model(summary):
        if rows := [*_verdicts(levels, everything), *_states(levels)]:
            told.append(Finding(model, "memory and state, by what evidence", ("load", "what", "evidence"), tuple(rows)))
    for memory in summary.memory:
        shares = (memory.base, memory.per_stream, memory.per_token, memory.leak_per_1000)
        if everything or memory.first_failure is not None or any(one.value_bytes is not None for one in shares):
            told += [_fit(summary, memory), *_needs(summary, memory)]
    return told


def fact(summary: Summary) -> str | None:
    """Where the figures came from, the limit and what reading cost; of a run without figures a level, its RSS."""
    has_table = any(map(_figures, summary.levels))
    parts = [None if has_table else content.memory(summary), *(text for _, text in sources(summary))]
    if absent := (summary.memory_source or {}).get("absent"):
        parts.append(f"not given: {', '.join(absent)} (report.md says why)")
    return "; ".join(filter(None, parts)) or None


def sources(summary: Summary) -> list[tuple[str, str]]:
    """(what, how) of where the figures came from; none for a run that recorded nothing of it."""
    facts = summary.memory_source
    if facts is None:
        return []
    told = {"local": "read on this machine", "probe": "read by a probe on its host"}.get(str(facts.get("source")))
    rows = [("source", told or f"not read: {facts.get('because') or 'no reason is recorded'}")]
    if limit := facts.get("limit"):
        instead = f" ({limit['instead_of']})" if limit.get("instead_of") else ""
        rows.append(("limit", f"a limit of {octets(limit.get('bytes'))} by {limit.get('kind')}{instead}"))
    if clock := facts.get("clock"):
        error_ms, drift_ms = (abs(clock.get(name) or 0) / 1e6 for name in ("error_ns", "drift_ns"))
        rows.append(("clock", f"the probe's clock known to ±{milliseconds(error_ms)}, drift {milliseconds(drift_ms)}"))
    if (cost := facts.get("cost_share")) is not None:
        rows.append(("cost", f"reading took {share(cost)} of a core"))
    return rows


def absent(summary: Summary) -> list[tuple[str, str]]:
    """(source, why) of what was not given."""
    return [(str(name), str(why)) for name, why in ((summary.memory_source or {}).get("absent") or {}).items()]


def _by_model(summary: Summary) -> Iterator[tuple[str, list[Level]]]:
    for model in dict.fromkeys(level.model for level in summary.levels):
        yield model, [level for level in summary.levels if level.model == model]


def _figures(level: Level) -> bool:
    return level.memory is not None and level.memory.of is not None


def _levels(model: str, levels: Sequence[Level]) -> Table:
    rows = [(level, level.memory) for level in levels if level.memory is not None and level.memory.of is not None]
    memories = [memory for _, memory in rows]

    def cells(rank: int, heading: str, show: Callable[[LevelMemory], str]) -> Cells:
        return Cells(tuple(heading.split("\n")), rank, tuple(map(show, memories)))

    def size(rank: int, heading: str, name: str) -> Cells:
        return cells(rank, heading, lambda memory: _size(getattr(memory, name)))

    columns = [
        Cells(("load",), 0, tuple(load_title(level.load) for level, _ in rows)),
        size(4, "before", "before_bytes"),
        cells(1, "peak", _peak),
        size(3, "after", "after_bytes"),
        size(6, "limit", "limit_bytes"),
        size(5, "lowest\navailable", "available_min_bytes"),
        size(7, "most\nin swap", "swap_peak_bytes"),
        size(7, "most in\nshared GPU", "gpu_shared_peak_bytes"),
        cells(
            8,
            "most\npressure",
            lambda memory: NONE if memory.pressure_max_share is None else share(memory.pressure_max_share),
        ),
        cells(9, "streams", lambda memory: _number(memory.streams)),
        cells(10, "tokens\neach", lambda memory: _number(memory.tokens)),
        Cells(("given", "up"), 8, tuple(_given_up(level) for level, _ in rows)),
        Cells(("verdict",), 2, tuple(_spaced(memory.verdict) for memory in memories), left=True),
    ]
    kept = [column for column in columns if not {*column.cells} <= {NONE, "0", "0 %"}]
    of = dict.fromkeys(OF[memory.of] for memory in memories if memory.of is not None)
    sampled = any(memory.peak_bytes is not None and not memory.exact for memory in memories)
    notes = [f"{SAMPLED} the highest of samples: it may have been more between two of them"] if sampled else []
    if any(memory.of == "rss" and (memory.peak_bytes or 0) > (memory.limit_bytes or math.inf) for memory in memories):
        notes.append("a peak above the limit: pages of mapped files are resident, and no limit counts them")
    return Table(model, f"memory by level: {', '.join(of)}", tuple(kept), "; ".join(notes) or None)


def _given_up(level: Level) -> str:
    """How many requests were unanswered when their rung ended."""
    return f"{level.requests.failed.get('censored', 0):,}" if level.purpose == "rung" else NONE


def _peak(memory: LevelMemory) -> str:
    told = _size(memory.peak_bytes)
    return told if told == NONE or memory.exact else f"{SAMPLED} {told}"


def _verdicts(levels: Sequence[Level], everything: bool) -> Iterator[Row]:
    """Levels of one verdict and the same evidence share a row; a target that ran out of memory has one with both."""
    rows: dict[tuple[str, str], list[Level]] = {}
    for level in levels:
        if level.memory is not None and (everything or level.memory.verdict not in _AT_EASE):
            told, state, because = str(level.memory.verdict), level.target.state, level.memory.because
            if _is_one(level):
                told = f"{told}: {state}"
                because = tuple(dict.fromkeys((*because, *level.target.evidence)))
                because = tuple(line for line in because if line != f"the target was {state}")
            elif _unwell(level):
                because = tuple(line for line in because if line not in level.target.evidence)
            rows.setdefault((told, "; ".join(because)), []).append(level)
    for (told, evidence), found in rows.items():
        yield (_stands(found), _spaced(told), evidence)


def _is_one(level: Level) -> bool:
    """Whether the state of the target and the verdict on its memory are two words for one failure."""
    return _unwell(level) and level.memory is not None and level.memory.verdict == "out_of_memory"


def _states(levels: Sequence[Level]) -> Iterator[Row]:
    for level in levels:
        if _unwell(level) and not _is_one(level):
            yield (_stands([level]), _spaced(level.target.state), "; ".join(level.target.evidence))


def _unwell(level: Level) -> bool:
    return level.target.state not in (None, "healthy")


def _lost(summary: Summary, levels: Sequence[Level]) -> list[tuple[Level, Recovery]]:
    known = {level.index: level for level in levels}
    return [(known[found.level], found) for found in summary.recoveries if found.level in known]


def _recoveries(summary: Summary, model: str, levels: Sequence[Level]) -> Table:
    rows = _lost(summary, levels)
    found = [recovery for _, recovery in rows]

    def seconds(rank: int, heading: str, name: str) -> Cells:
        return Cells((*heading.split("\n"), "s"), rank, tuple(_seconds(each, name) for each in found))

    columns = (
        Cells(("after",), 0, tuple(load_title(level.load) for level, _ in rows)),
        Cells(("state",), 1, tuple(_spaced(each.state) for each in found), left=True),
        Cells(("restarted", "by us"), 8, tuple(_answer(each.restarted) for each in found)),
        seconds(6, "port", "to_port_s"),
        seconds(7, "status", "to_status_s"),
        seconds(2, "good token", "to_token_s"),
        seconds(3, "TTFT as\nbefore", "to_ttft_s"),
        Cells(("requests", "lost"), 4, tuple(f"{each.lost:,}" for each in found)),
        Cells(("memory", "returned"), 5, tuple(_answer(each.memory_returned) for each in found)),
    )
    untold = [f"after {load_title(level.load)}: {each.told}" for level, each in rows if each.to_ttft_s is None]
    title = "the way back, from its last good token"
    return Table(model, title, columns, "; ".join(untold) or None)


def _seconds(found: Recovery, name: str) -> str:
    """The time; that it took longer than was waited, where it did not come so far at all."""
    value: float | None = getattr(found, name)
    if value is not None:
        return figure(value)
    return NONE if found.to_token_s is not None else f"> {found.limit_s:g}"


def _fit(summary: Summary, memory: Memory) -> Finding:
    known = {level.index: level for level in summary.levels}
    at = f" of {memory.at_tokens:,.0f} tokens" if memory.at_tokens is not None else ""
    how = {
        "reserved": "reserved at the start, for prompt and max_tokens",
        "grows": "taken while the answer grows; where a cache is copied into a larger one, both count",
        None: "the whole cache where it is reserved, old and new at once where it grows: not told apart here",
    }[memory.allocates]
    shares = memory.base, memory.per_stream, memory.per_token
    rows: list[Row] = [
        ("with no stream", *_share(memory.base, "")),
        (f"each stream{at}", *_share(memory.per_stream, how if at else "")),
        ("each of a stream's tokens", *_share(memory.per_token, how)),
    ]
    if not any(told.value_bytes is not None for told in shares) and len({told.not_told for told in shares}) == 1:
        rows = [("what a stream takes", *_share(memory.base, ""))]
    rows += [
        ("kept per 1,000 requests", *_share(memory.leak_per_1000, "")),
    ]
    if memory.first_failure in known:
        rows.append(("first failure", _stands([known[memory.first_failure]]), memory.how or ""))
    if peaks := [known[index] for index in memory.levels if index in known]:
        stands = Stands(tuple(level.index for level in peaks), count(len(peaks), "level"))
        rows.append(("from the peaks of", stands, f"up to {load_title(peaks[-1].load)}"))
    title = f"what it takes: {OF.get(memory.of, memory.of)}"
    return Finding(memory.model, title, ("what", "bytes (95 %)", "because"), tuple(rows))


def _share(told: Share, because: str) -> tuple[str, str]:
    if told.value_bytes is None:
        return "not told", told.not_told or ""
    unsure = told.not_told if told.interval_95 is None else None
    return _size(told.value_bytes) + _between(told.interval_95), "; ".join(filter(None, (because, unsure)))


def _between(reach: Range | None) -> str:
    """`` (195 to 205 MiB)``: the unit once, where it is the same."""
    if reach is None:
        return ""
    low, high = map(_size, reach)
    return f" ({low.removesuffix(high[-4:])} to {high})"


def _needs(summary: Summary, memory: Memory) -> list[Finding]:
    """Users × tokens → bytes, where the fit tells what a stream takes from nothing; else none."""
    base = memory.base.value_bytes
    if base is None or not (_is_sure(memory.per_stream) or _is_sure(memory.per_token)):
        return []
    stream, token = (told.value_bytes or 0.0 for told in (memory.per_stream, memory.per_token))
    of_model = [(level, level.memory) for level in summary.levels if level.index in memory.levels]
    known = [(level, figures) for level, figures in of_model if figures is not None]
    room, whose, is_met_before = _room(summary, base, [figures for _, figures in known])
    failed_users, failed_tokens = _failed_at(summary, memory)
    # What grows has grown to its end only where every answer came to its own.
    whole = [x for level, x in known if memory.allocates != "grows" or level.requests.ok == level.requests.attempted]
    each = {tokens: stream + tokens * token for tokens in _tokens(memory)}

    def cell(users: int, tokens: float) -> str:
        needed = base + users * each[tokens]
        seen = any((x.streams or 0) >= users and (x.tokens or 0) >= AS_MANY * tokens for x in whole)
        told = _size(needed) if seen else f"({_size(needed)})"
        return f"{told} {TOO_MUCH}" if needed > room or (users >= failed_users and tokens >= failed_tokens) else told

    def most(tokens: float) -> str:
        fit = (room - base) / each[tokens] if each[tokens] > 0 else math.inf
        fewer = is_met_before and fit >= 1
        if tokens >= failed_tokens and failed_users - 1 <= fit:
            fit, fewer = failed_users - 1, False
        if math.isinf(fit):
            return NONE
        return f"fewer than {int(fit) + 1:,}" if fewer else f"{int(fit):,}" if fit >= 1 else "none"

    rows: list[Row] = [(f"{users:,}", *(cell(users, tokens) for tokens in each)) for users in USERS]
    rows.append(("at most", *map(most, each)))
    cells = [str(cell) for row in rows for cell in row]
    notes = ["in brackets: more than any of these levels had"] if any("(" in cell for cell in cells) else []
    if any(TOO_MUCH in cell for cell in cells):
        notes += [] if math.isinf(failed_users) else [f"{TOO_MUCH} no less than the load that failed"]
        if is_met_before:
            by = f"by more than its limit of {octets(room - base)}"
            notes.append(f"{TOO_MUCH} grows {by}, which counts all that is asked for and is met before as much is held")
        elif not math.isinf(room):
            notes.append(f"{TOO_MUCH} more than the {octets(room)} that there are: {whose}")
    headings = ("users", *(f"{tokens:,.0f} tokens each" if tokens else "as these levels asked" for tokens in each))
    return [Finding(memory.model, "what it would need", headings, tuple(rows), tuple(notes))]


def _failed_at(summary: Summary, memory: Memory) -> tuple[float, float]:
    """Users and tokens each of the first load that failed for want of memory; infinitely many where none did."""
    failed = next((level for level in summary.levels if level.index == memory.first_failure), None)
    figures = failed.memory if failed is not None else None
    if figures is None or not figures.streams or figures.tokens is None:
        return math.inf, math.inf
    return figures.streams, figures.tokens


def _tokens(memory: Memory) -> tuple[float, ...]:
    """For how many tokens needs are told: only those measured where the fit does not tell what a token takes."""
    return TOKENS if memory.per_token.value_bytes is not None else (memory.at_tokens or 0.0,)


def _is_sure(told: Share) -> bool:
    """Whether it can be told from nothing."""
    return told.value_bytes is not None and (told.interval_95 or (told.value_bytes, 0))[0] > 0


def _room(summary: Summary, base_bytes: float, known: Sequence[LevelMemory]) -> tuple[float, str, bool]:
    """How much the target may come to hold, and what sets that bound; infinitely much where nothing is known of it.

    And whether that bound is met before as much is held: RLIMIT_DATA counts what is asked for, threads' stacks too, but
    no mapped file. So what the target holds without load may lie outside it, and all that load adds lies within.
    """
    early = ((summary.memory_source or {}).get("limit") or {}).get("kind") == "RLIMIT_DATA"
    bounds: list[tuple[float, str, bool]] = []
    for memory in known:
        if memory.limit_bytes is not None and memory.of == "gpu":
            bounds.append((memory.limit_bytes, "its device's memory", False))
        elif memory.limit_bytes is not None:
            bounds.append((memory.limit_bytes + (base_bytes if early else 0.0), "its limit", early))
    left = "what it held at its peak, and what its machine had left"
    bounds += [
        (memory.peak_bytes + memory.available_min_bytes, left, False)
        for memory in known
        if memory.of != "gpu" and memory.peak_bytes is not None and memory.available_min_bytes is not None
    ]
    return min(bounds, default=(math.inf, "", False), key=lambda bound: bound[0])


def _stands(levels: Sequence[Level]) -> Stands:
    titles = list(dict.fromkeys(load_title(level.load) for level in levels))
    text = ", ".join(titles) if len(titles) < 3 else f"{len(titles)} loads up to {titles[-1]}"
    return Stands(tuple(level.index for level in levels), text or NONE)


def _size(value: float | None) -> str:
    """With its unit, small ones too: 16.0 KiB, 25.1 MiB, −1.2 MiB."""
    if not value:
        return NONE if value is None else "0"
    size = abs(value)
    told = octets(size) if size >= 1 << 20 else f"{figure(size / 1024)} KiB"
    return f"−{told}" if value < 0 else told


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _spaced(word: str | None) -> str:
    return (word or NONE).replace("_", " ")


def _answer(value: bool | None) -> str:
    return NONE if value is None else "yes" if value else "no"
