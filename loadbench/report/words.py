"""How numbers read, wherever they are told: three significant digits, a unit that fits, `n/a` where there is none."""

from __future__ import annotations

NONE = "n/a"


def figure(value: float | None) -> str:
    """A number in about three significant digits, whole ones never cut: 0.25, 5.97, 48.2, 190, 4,512."""
    if value is None:
        return NONE
    if value != 0 and abs(value) < 0.995:
        return f"{value:.3g}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """A latency with its unit: 11.2 ms, 4.51 s."""
    if value is None:
        return NONE
    return f"{figure(value)} ms" if abs(value) < 999.5 else f"{figure(value / 1000)} s"


def octets(value: float | None) -> str:
    """A memory size with its binary unit: 446 KiB, 512 MiB, 1.25 GiB."""
    if value is None:
        return NONE
    size, unit = (value / 2**20, "MiB") if abs(value) < 1000 * 2**20 else (value / 2**30, "GiB")
    if 0 < abs(value) < 2**20:
        size, unit = value / 2**10, "KiB"
    return f"{size:,.0f} {unit}" if abs(size) >= 100 else f"{size:.3g} {unit}"


def share(value: float | None) -> str:
    """A share of one as a percentage: 0.4 %, 12.5 %, 100 %."""
    return NONE if value is None else f"{figure(100 * value).removesuffix('.00')} %"


def percentile(name: str) -> str:
    """A statistic's key as headings have it: p95, p99.9, p99 all."""
    return name.replace("_all", " all").replace("_", ".")


def clock(seconds: float) -> str:
    """A duration as a clock shows it: 0:07, 12:30, 1:05:00."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count(number: int, noun: str) -> str:
    """``1 user``, ``2 users``: the regular plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
