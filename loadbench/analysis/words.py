"""The words of sentences about levels: numbers with their units, loads, and clauses of the SLO."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.analysis.summary import ClosedLoad, Gate, Level, SloClause
from loadbench.records import load_title

FAR_SHARE = 10.0  # a margin beyond is far, and how far exactly means nothing


def number(value: float) -> str:
    """Three digits: no throughput of some seconds is known better."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time(milliseconds: float) -> str:
    if milliseconds < 1000:
        return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1e3:.3g} s"


def mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def size(size_bytes: float) -> str:
    """Three digits, in the first unit that has no more before its point: 0.98 GiB, not 1004 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size_bytes) < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.3g} GiB" if size_bytes < 999.5 else f"{size_bytes:,.0f} GiB"


def requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """``1, 2 and 4``."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if words[1:] else words[0]


def users(count: float) -> str:
    return f"{count:,.4g} user{'' if count == 1 else 's'}"


def load(value: float, unit: str) -> str:
    """``8 users`` or ``4/s``."""
    return users(value) if unit == "users" else f"{value:.3g}/s"


def signed(share: float) -> str:
    """``+1.6%``, ``−6.2%``."""
    return f"{share:+.1%}".replace("-", "−")


def margin(value: float) -> str:
    """What ln(limit / value) leaves, as a share of the value: ``+12 %``, ``−4 %``."""
    room = math.expm1(min(value, 20.0))
    if room > FAR_SHARE:
        return f"over +{100 * FAR_SHARE:,.0f} %"
    percent = abs(100 * room)
    return f"{'−' if room < 0 else '+'}{f'{percent:.0f}' if percent >= 1 else f'{percent:.1g}'} %"


def load_of(level: Level) -> float:
    """Users, or requests per second."""
    return level.load.concurrency if isinstance(level.load, ClosedLoad) else level.load.rate_per_s


def is_fixed(level: Level) -> bool:
    """Whether it is one load all the time: neither legs nor a trace."""
    return not getattr(level.load, "legs", ()) and getattr(level.load, "trace", None) is None


def sorts(levels: Sequence[Level]) -> list[list[Level]]:
    """Levels whose loads differ by a number only, together and by that number; what changes over time is alone."""
    found: dict[str, list[Level]] = {}
    for level in levels:
        title = load_title(level.load)
        sort = title[len(head(level)) :].replace(" users", " user").removesuffix("s") if is_fixed(level) else title
        found.setdefault(sort, []).append(level)
    return [sorted(same, key=load_of) for same in found.values()]


def together(levels: Sequence[Level]) -> str:
    """``1, 2 and 4 users``, ``2 and 4/s poisson``: the loads of one sort."""
    titles = {head(level): load_title(level.load) for level in levels}
    return listed([*[*titles][:-1], [*titles.values()][-1]])


def head(level: Level) -> str:
    """The number of a load that does not change."""
    title = load_title(level.load)
    return re.split(r" user|/s", title)[0] if is_fixed(level) else title


def where(levels: Sequence[Level]) -> str:
    """``at 1, 2 and 4 users and at 2 and 4/s poisson``."""
    return listed([f"at {together(same)}" for same in sorts(levels)])


def clause(told: SloClause) -> str:
    """``TTFT p95 is 1.2 s, the limit 1 s``; or why it is missed all the same."""
    if told.result == "fail" and told.because:
        return f"{clause_title(told.clause)}: {told.because}"
    words = time if told.unit == "ms" else "{:.1%}".format
    value = "unknown" if told.value is None else words(told.value)
    return f"{clause_title(told.clause)} is {value}, the limit {words(told.limit)}"


def gate(told: Gate, at: str = "") -> str:
    """``TTFT p95 at 4 users is 2.3 s, asserted < 2 s``; and why it could not be told, or is missed all the same."""
    value, limit = (None if number is None else measured(number, told.unit) for number in (told.value, told.limit))
    if value == limit and told.value != told.limit:  # 2.003 s is not under 2 s
        value = f"{told.value:.9g} {told.unit}"
    seen = f" is {value}" if value is not None else ""
    wanted = f", asserted {told.comparison} {limit}" if limit is not None else ""
    return f"{clause_title(told.clause)}{at}{seen}{wanted}" + (f" ({told.because})" if told.because else "")


def measured(value: float, unit: str) -> str:
    """``1.2 s``, ``3.4%``, ``6.61/s``, ``145 tok/s``."""
    if unit == "ms":
        return time(value)
    return f"{value:.1%}" if unit == "share" else f"{number(value)} {unit}".replace(" 1/s", "/s")


def clause_title(name: str) -> str:
    """``TTFT p95`` of ttft.p95, ``Requests/s`` of requests_per_s, ``error rate`` of error_rate."""
    if name in RATES:
        return RATES[name].title
    metric, _, percentile = name.partition(".")
    return f"{LATENCIES[metric].title} {percentile}" if percentile and metric in LATENCIES else name.replace("_", " ")
