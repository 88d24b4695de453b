"""Times a target's way back after a failure: port, status, first good token, the latency that it had before.

It asks and waits, bounded, and starts nothing: an embedded service is started anew by ``Target.restart`` before, any
other comes back by itself or does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from loadbench.errors import TargetError
from loadbench.records import Sample
from loadbench.target.models import Resolved
from loadbench.target.target import Target

LIMIT_S = 60.0
POLL_S = 0.1  # the resolution of the times; each poll of a closed port costs 0.1 ms
STATUS_TIMEOUT_S = 2.0  # a status that takes longer is asked for again
WITHIN_SHARE, WITHIN_MS = 0.10, 50.0  # of a TTFT of 11 ms a tenth is noise

AskCanary = Callable[[Resolved], Awaitable[Sample]]


class Clock(Protocol):
    """The run's clock."""

    def now_ns(self) -> int: ...


@dataclass(slots=True)
class Recovery:
    """How a target came back, in seconds since its last good token; None: it did not come that far in time.

    ``noticed_s`` is when it was noticed and waiting began, for ``limit_s`` at most; None: that is what all counts from.

    ``model`` is the model as it is served now, loaded, for the requests that follow. ``to_usual_s`` is when TTFT was
    within 10 % or 50 ms of ``ttft_before_ms``, which is None where nothing was known of it.
    """

    limit_s: float
    noticed_s: float | None = None
    to_port_s: float | None = None
    to_status_s: float | None = None
    to_token_s: float | None = None
    to_usual_s: float | None = None
    ttft_before_ms: float | None = None
    ttft_after_ms: float | None = None
    rss_before_bytes: int | None = None
    rss_after_bytes: int | None = None
    canaries: int = 0
    last_failure: str | None = None
    model: Resolved | None = None

    @property
    def back(self) -> bool:
        """Whether it answers again, as fast as before or not."""
        return self.to_token_s is not None

    def as_json(self) -> dict[str, Any]:
        """All but the model; what is None is left out."""
        named = {name: getattr(self, name) for name in self.__slots__ if name != "model"}
        return {"back": self.back} | {name: value for name, value in named.items() if value is not None}

    def told(self) -> str:
        """``back 12.5 s after the last good token (0.3 s after it was noticed): port after 12.2 s, …``."""
        named = {"port after": self.to_port_s, "status": self.to_status_s, "first good token": self.to_token_s}
        steps = [f"{name} {seconds:.1f} s" for name, seconds in named.items() if seconds is not None]
        if not self.back:
            reason = [] if self.last_failure is None else [self.last_failure]
            return "; ".join([f"did not come back within {self.limit_s:g} s", *steps, *reason])
        if self.to_usual_s is not None:
            steps.append(f"TTFT as before ({self.ttft_after_ms:.0f} ms) {self.to_usual_s:.1f} s")
        elif self.ttft_before_ms is not None and self.ttft_after_ms is not None:
            steps.append(f"TTFT {self.ttft_after_ms:.0f} ms against {self.ttft_before_ms:.0f} before")
        return f"{self._back()}: {', '.join(steps)}"

    def _back(self) -> str:
        if self.noticed_s is None or self.to_token_s is None:
            return "back"
        noticed_s = self.to_token_s - self.noticed_s
        return f"back {self.to_token_s:.1f} s after the last good token ({noticed_s:.1f} s after it was noticed)"


async def recover(
    target: Target,
    asked: str,
    ask_canary: AskCanary,
    clock: Clock,
    *,
    since_ns: int | None = None,
    noticed_ns: int | None = None,
    ttft_before_ms: float | None = None,
    rss_before_bytes: int | None = None,
    limit_s: float = LIMIT_S,
) -> Recovery:
    """Wait until the target serves the model ``asked`` again, and stamp each step on the run's clock.

    ``since_ns`` is what times count from, else now, and ``noticed_ns`` when the failure was noticed. ``ask_canary``
    sends one small request for the model that it is given. Ends after ``limit_s`` whatever the target does, and does
    not raise for anything that it does.
    """
    since_ns = clock.now_ns() if since_ns is None else since_ns
    found = Recovery(limit_s, ttft_before_ms=ttft_before_ms, rss_before_bytes=rss_before_bytes)
    found.noticed_s = None if noticed_ns is None else (noticed_ns - since_ns) / 1e9

    def elapsed_s() -> float:
        return (clock.now_ns() - since_ns) / 1e9

    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await _until_connected(target, found)
            found.to_port_s = elapsed_s()
            await _until_status(target, found)
            found.to_status_s = elapsed_s()
            found.model = await _until_loaded(target, asked, found)
            await _until_good(found.model, ask_canary, found, elapsed_s)
    found.rss_after_bytes = target.rss_bytes(relist=True)
    return found


async def _until_connected(target: Target, found: Recovery) -> None:
    while True:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                _, writer = await asyncio.open_connection(target.endpoint.address.ip, target.endpoint.address.port)
        except OSError as error:  # TimeoutError is one
            found.last_failure = f"no connection: {error.strerror or type(error).__name__}"
            await asyncio.sleep(POLL_S)
        else:
            writer.close()
            return


async def _until_status(target: Target, found: Recovery) -> None:
    while True:
        try:
            await target.look_again(STATUS_TIMEOUT_S)
        except TargetError as error:
            found.last_failure = str(error)
            await asyncio.sleep(POLL_S)
        else:
            return


async def _until_loaded(target: Target, asked: str, found: Recovery) -> Resolved:
    while True:
        try:
            return await target.load(await target.resolve(asked))
        except TargetError as error:
            found.last_failure = str(error)
            await asyncio.sleep(POLL_S)


async def _until_good(model: Resolved, ask_canary: AskCanary, found: Recovery, elapsed_s: Callable[[], float]) -> None:
    """Ask until an answer is good, and then until one is as fast as before, if that is known."""
    while True:
        found.canaries += 1
        sample = await ask_canary(model)
        if sample.outcome == "ok":
            found.to_token_s = elapsed_s() if found.to_token_s is None else found.to_token_s
            found.last_failure = None
            found.ttft_after_ms = _ttft_ms(sample)
            if _as_before(found):
                found.to_usual_s = elapsed_s()
            if found.ttft_before_ms is None or found.to_usual_s is not None:
                return
        else:
            found.last_failure = f"a canary failed: {sample.outcome}" + (f" ({sample.detail})" if sample.detail else "")
        await asyncio.sleep(POLL_S)


def _ttft_ms(sample: Sample) -> float | None:
    if sample.first_token_ns is None or sample.sent_ns is None:
        return None
    return (sample.first_token_ns - sample.sent_ns) / 1e6


def _as_before(found: Recovery) -> bool:
    before, now = found.ttft_before_ms, found.ttft_after_ms
    return before is not None and now is not None and now <= max(before * (1 + WITHIN_SHARE), before + WITHIN_MS)
