"""Memory figures from a probe on another host, set onto the run's clock. What they are is ``memory_figures``'s."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

import orjson

from loadbench.errors import TargetError, UsageError
from loadbench.target.address import Address, locate, parse_url
from loadbench.target.memory_figures import MemoryFigures
from loadbench.target.probe import SCHEMA, check_token

ANSWER_LIMIT_BYTES = 1 << 18  # eight devices take 2 KiB
EXCHANGES = 8
STEP_NS = 1_000_000_000
"""A stamp that lies further from its exchange than this: the other clock was set anew, as at a restart of the host."""


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """How far the probe's clock is ahead of ours, at most ``error_ns`` off: half of what the exchange took."""

    offset_ns: int
    error_ns: int


def offset_of(sent_ns: int, received_ns: int, answered_ns: int, back_ns: int) -> ClockOffset:
    """The offset that one exchange shows, its first and last stamp ours, the others theirs: RFC 5905, section 8."""
    travelled_ns = (back_ns - sent_ns) - (answered_ns - received_ns)
    return ClockOffset(((received_ns - sent_ns) + (answered_ns - back_ns)) // 2, travelled_ns // 2)


class RemoteMemory:
    """A probe's figures. ``clock`` is the run's; ``absent`` says, after a fetch, what the other host does not give.

    The token is in no text that this class makes. One connection is kept, and made again where it broke.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        clock: Callable[[], int] = perf_counter_ns,
        timeout_s: float = 5.0,
    ) -> None:
        self.absent: dict[str, str] = {}
        self.offset: ClockOffset | None = None
        self.service: str | None = None
        try:
            self._url = parse_url(url)
        except UsageError as error:
            raise UsageError(str(error).replace("endpoint:", "target_probe:", 1)) from None
        self._path = self._url.path.removesuffix("/v1")
        self._base = self._url.origin + self._path
        self._token = check_token(token, "LOADBENCH_PROBE_TOKEN")
        self._clock = clock
        self._timeout_s = timeout_s
        self._address: Address | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._asking = asyncio.Lock()

    def __repr__(self) -> str:
        return f"RemoteMemory({self._base!r})"

    async def __aenter__(self) -> Self:
        """Connect, and measure the clocks' offset. Raises TargetError."""
        try:
            self.offset = await self.measure_offset()
        except BaseException:  # cancelled, too: whoever does not get in is never let out
            self._drop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    async def measure_offset(self) -> ClockOffset:
        """The offset now, from the quickest of eight exchanges. Raises TargetError."""
        return min([await self._exchange() for _ in range(EXCHANGES)], key=lambda offset: offset.error_ns)

    async def fetch(self) -> MemoryFigures:
        """The figures, their ``t_ns`` on the run's clock. Raises TargetError."""
        if self.offset is None:
            self.offset = await self.measure_offset()
        sent_ns = self._clock()
        answer = await self._ask("/v1/memory")
        t_ns = _integer(answer, "t_ns", self._where("/v1/memory"))
        if not sent_ns - STEP_NS < t_ns - self.offset.offset_ns < self._clock() + STEP_NS:
            self.offset = await self.measure_offset()
        self.absent = {str(source): str(reason) for source, reason in _object(answer.get("absent")).items()}
        self.service = str(answer.get("service"))
        return replace(self._figures(answer), t_ns=t_ns - self.offset.offset_ns)

    async def finish(self) -> dict[str, int]:
        """Measure the offset again. The offset's facts for the run's record, the drift between the two included."""
        first = self.offset or await self.measure_offset()
        last = await self.measure_offset()
        return {
            "offset_ns": first.offset_ns,
            "error_ns": first.error_ns,
            "drift_ns": last.offset_ns - first.offset_ns,
            "end_error_ns": last.error_ns,
        }

    def _figures(self, answer: dict[str, Any]) -> MemoryFigures:
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(MemoryFigures).validate_json(orjson.dumps(answer.get("figures")), strict=True)
        except ValidationError as error:
            wrong = ".".join(map(str, error.errors()[0]["loc"]))
            where = self._where("/v1/memory")
            raise TargetError(f"{where}: expected memory figures, got something else in {wrong}") from None

    async def _exchange(self) -> ClockOffset:
        where = self._where("/v1/clock")
        async with self._asking:
            await self._connect()
            sent_ns = self._clock()
            answer = await self._call("/v1/clock")
            back_ns = self._clock()
        return offset_of(sent_ns, _integer(answer, "received_ns", where), _integer(answer, "sent_ns", where), back_ns)

    async def _ask(self, path: str) -> dict[str, Any]:
        async with self._asking:
            await self._connect()
            return await self._call(path)

    async def _connect(self) -> None:
        if self._streams is not None and not self._streams[0].at_eof():
            return
        self._drop()
        if self._address is None:
            self._address = await locate(self._url, self._timeout_s)
        tls = ssl.create_default_context() if self._url.scheme == "https" else None
        try:
            async with asyncio.timeout(self._timeout_s):
                self._streams = await asyncio.open_connection(
                    self._address.ip, self._address.port, ssl=tls, server_hostname=self._url.host if tls else None
                )
        except TimeoutError:
            raise TargetError(f"{self._url}: no connection within {self._timeout_s:g} s") from None
        except OSError as error:
            raise TargetError(f"{self._url}: no connection ({error.strerror or error})") from None

    async def _call(self, path: str) -> dict[str, Any]:
        """GET of one path on the connection that there is. Whatever goes wrong ends it."""
        assert self._streams is not None
        reader, writer = self._streams
        host = self._url.host_header
        bearer = "" if self._token is None else f"Authorization: Bearer {self._token}\r\n"
        where = self._where(path)
        self._streams = None
        try:
            async with asyncio.timeout(self._timeout_s):
                writer.write(f"GET {self._path}{path} HTTP/1.1\r\nHost: {host}\r\n{bearer}\r\n".encode("ascii"))
                answer = await _read(reader, where)
        except TimeoutError:
            raise TargetError(f"{where}: no answer within {self._timeout_s:g} s") from None
        except (OSError, asyncio.IncompleteReadError):
            raise TargetError(f"{where}: the connection was lost") from None
        except asyncio.LimitOverrunError:
            raise TargetError(f"{where}: expected a loadbench probe, got a header without end") from None
        else:
            self._streams = reader, writer
            return answer
        finally:
            if self._streams is None:
                writer.close()

    def _where(self, path: str) -> str:
        return f"{self._base}{path}"

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read(reader: asyncio.StreamReader, where: str) -> dict[str, Any]:
    """The answer's JSON object. What else came is not repeated: it may echo what we sent."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = re.match(r"HTTP/1\.[01] (\d{3}) ", head)
    length = re.search(r"^content-length: *(\d{1,9})\r$", head, re.IGNORECASE | re.MULTILINE)
    if status and status[1] == "401":
        raise TargetError(f"{where}: the probe asks for another token than LOADBENCH_PROBE_TOKEN gives")
    if status and status[1] == "503":
        raise TargetError(f"{where}: the probe has too many connections")
    if not status or status[1] != "200" or not length or int(length[1]) > ANSWER_LIMIT_BYTES:
        got = f"status {status[1]}" if status else "no HTTP"
        raise TargetError(f"{where}: expected a loadbench probe, got {got}")
    try:
        answer = _object(orjson.loads(await reader.readexactly(int(length[1]))))
    except orjson.JSONDecodeError:
        answer = {}
    if answer.get("schema") != SCHEMA:
        raise TargetError(f"{where}: expected a loadbench probe ({SCHEMA}), got something else")
    return answer


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _integer(answer: dict[str, Any], name: str, where: str) -> int:
    value = answer.get(name)
    if not isinstance(value, int):
        raise TargetError(f"{where}: expected a loadbench probe, got no {name}")
    return value
