"""What the target's memory did, in sentences: what a model takes, where it failed, what it keeps, how it came back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loadbench.analysis import words
from loadbench.analysis.findings import Memory, Recovery, Share
from loadbench.analysis.memory_fit import predict
from loadbench.analysis.memory_leak import SO_FAR, is_told
from loadbench.analysis.summary import Level
from loadbench.analysis.words import listed, size
from loadbench.records import load_title

EXAMPLE_TOKENS = 2048  # what Foundry Local reserves where a request does not say
EXAMPLE_STREAMS = 8
HOW: Mapping[str | None, str] = {
    "oom_killed": "as a kill by the kernel",
    "crashed": "as a crash, likely for want of memory",
    "wedged": "as allocation errors, after which the service was wedged",
    "unreachable": "as allocation errors, after which the service was unreachable",
}
SHORT = {"under_pressure": "Memory was short", "spills": "Memory spilled"}


def memory(found: Memory | None, levels: Sequence[Level], local: bool) -> Iterator[str]:
    """All of one model; ``levels`` are its own, ``local`` whether it is served by our own machine."""
    if found is None or not _each(found):
        yield from _before_and_after(levels)
    if found is not None:
        yield from _takes(found, {level.index: level for level in levels}, local)
        yield from _leak(found, sure=any(is_told(level.memory.because) for level in levels if level.memory))
    for verdict, told in SHORT.items():
        mine = [level for level in levels if level.memory and level.memory.verdict == verdict]
        if mine and mine[0].memory:
            yield f"{told} {words.where(mine)}: {mine[0].memory.because[0]}."


def recovery(found: Recovery) -> str:
    """How the target came back once."""
    return f"The target: {found.told}."


def no_failure(rungs: Sequence[Level]) -> Iterator[str]:
    """Of a ladder that was to go on until failure and came to its end."""
    sent = sum(level.requests.attempted for level in rungs)
    if not sent:
        return
    cut = sum(level.requests.failed.get("censored", 0) for level in rungs) / sent
    told = f"No failure for want of memory up to {load_title(rungs[-1].load)}"
    yield f"{told}, but {cut:.0%} of the answers were cut off before their end." if cut else f"{told}."


def how_failed(level: Level) -> str:
    """In what way it failed for want of memory."""
    return HOW.get(level.target.state, "as allocation errors that the service survived")


def _before_and_after(levels: Sequence[Level]) -> Iterator[str]:
    """From before the first level, over the highest, to after the last."""
    rss = [level.target.rss_bytes for level in levels]
    peaks = [figures.peak for figures in rss if figures.peak is not None]
    if not peaks:
        return
    before, after = rss[0].before, rss[-1].after
    told = [f"{size(before)} before" if before is not None else "", f"{size(max(peaks))} at its peak"]
    told.append(f"{size(after)} after" if after is not None else "")
    yield f"The service's memory: {', '.join(part for part in told if part)}."


def _takes(found: Memory, levels: Mapping[int, Level], local: bool) -> Iterator[str]:
    where = "On this machine" if local else "There"
    failed = None if found.first_failure is None else levels.get(found.first_failure)
    failure = "" if failed is None else f"the first failure came at {load_title(failed.load)}, {found.how}"
    each, base = _each(found), found.base.value_bytes
    if base is not None and each:
        told = f"{where} {found.model} takes {size(base)} plus {each}"
        yield "; ".join(part for part in (told, _example(found, levels), failure) if part) + "."
        return
    if any(level.purpose == "rung" for level in levels.values()):
        why = found.base.not_told or found.per_token.not_told or found.per_stream.not_told
        yield f"What a stream takes is not told: {why}."
    if failed is not None:
        yield f"The first failure for want of memory came at {load_title(failed.load)}, {found.how}."


def _each(found: Memory) -> str:
    stream, token = found.per_stream, found.per_token
    parts = []
    if stream.value_bytes is not None:
        at = "" if found.at_tokens is None else f" of {found.at_tokens:,.0f} tokens"
        parts.append(f"{size(stream.value_bytes)} a stream{at}{_off(stream)}")
    if token.value_bytes is not None:
        parts.append(f"{size(token.value_bytes)} a token of every stream{_off(token)}")
    how = {
        "reserved": ", reserved for all that a request asks for",
        "grows": ", as answers grow: while a cache does, the old one and the new one are there at once",
        None: "",
    }
    return listed(parts) + how[found.allocates] if parts else ""


def _off(share: Share) -> str:
    low, high = share.interval_95 or (0.0, 0.0)
    return f" (± {size((high - low) / 2)})" if share.interval_95 else ""


def _example(found: Memory, levels: Mapping[int, Level]) -> str:
    """What a load that one may want would need."""
    if found.per_token.value_bytes is not None:
        needs = predict(found, EXAMPLE_STREAMS, EXAMPLE_TOKENS)
        return f"at {EXAMPLE_TOKENS:,} tokens {EXAMPLE_STREAMS} streams would need {size(needs)}" if needs else ""
    most = max((levels[index].memory.streams or 0 for index in found.levels if levels[index].memory), default=0)  # type: ignore[union-attr]
    needs = predict(found, 2 * most, found.at_tokens or 0.0)
    return f"{2 * most} such streams would need {size(needs)}" if needs and most else ""


def _leak(found: Memory, sure: bool) -> Iterator[str]:
    leak = found.leak_per_1000
    if leak.value_bytes is not None and leak.interval_95 is not None:
        low, high = leak.interval_95
        each = f"{size(leak.value_bytes / 1e3)} for every request ({size(low / 1e3)} to {size(high / 1e3)})"
        told = f"{each}, {size(leak.value_bytes)} for every 1,000"
        yield f"It leaks: it keeps {told}." if sure else f"So far it keeps {told}: {SO_FAR}."
