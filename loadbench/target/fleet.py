"""Several endpoints that serve the same models, behind the face of one: what is asked of it is asked of each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from loadbench.errors import TargetError, UsageError
from loadbench.target.memory import MemoryWatch
from loadbench.target.models import Resolved
from loadbench.target.state import DEAD
from loadbench.target.target import Target

T = TypeVar("T")

WORST_FIRST = ("oom_killed", "crashed", "wedged", "unreachable", "oom_reported", "degraded", "restarted", "healthy")
NAMED = 3  # more URLs are no line; the table of endpoints has them all


class Fleet(Target):
    """None of it is ours. Its ``members`` are in the order in which the scenario names them.

    A model of it has a `Resolved` for each in ``members``. What only one of them can have, such as a process, it has
    not.
    """

    unwatched = "each of a fleet's hosts has its own: told by endpoint, where target_probe lists their probes"

    def __init__(self, members: Sequence[Target], source: str) -> None:
        first, local = members[0], any(member.endpoint.local for member in members)
        super().__init__(replace(first.endpoint, pid=None, local=local), source, first.headers, None)
        self._members = tuple(members)

    @property
    def members(self) -> tuple[Target, ...]:
        return self._members

    @classmethod
    async def of(cls, urls: Sequence[str], source: str, headers: Mapping[str, str]) -> Fleet:
        """Find out who answers at each. TargetError where at one nobody does, UsageError where two are one server."""
        members = await _all(Target.at(url, source, headers) for url in urls)
        servers = Counter(map(_server, members))
        for member in members:
            if servers[_server(member)] > 1:
                raise UsageError(f"endpoint: expected each server of a fleet once, got {member.endpoint.url} twice")
        return cls(members, source)

    async def look_again(self, timeout_s: float) -> None:
        """One that does not answer stays what it was."""
        for member in self.members:
            with suppress(TargetError):
                await member.look_again(timeout_s)

    async def resolve(self, asked: str) -> Resolved:
        """Each must have it, since requests go to all; where its ids differ it is called as it was asked for."""
        found = await self._each((member, member.resolve(asked)) for member in self.members)
        first, each = found[0], [f"{one.id} at {url}" for url, one in zip(self.urls, found, strict=True)]
        if len({one.id for one in found}) == 1:
            return _together(found, first.id, first.how)
        if asked == "auto":
            raise TargetError(f"auto: expected the same model at each endpoint, got {' and '.join(each)}: name one")
        return _together(found, asked, f"{asked}: {', '.join(each)}")

    async def load(self, model: Resolved) -> Resolved:
        loaded = await self._each((member, member.load(one)) for member, one in self._of(model))
        took = sum(one.load_ms is not None for one in loaded)
        how = model.how if model.id != loaded[0].id or not took else f"{model.how}; loaded for this run at {took}"
        return _together(loaded, model.id, how)

    async def unload(self, model: Resolved) -> None:
        """Where it was us who loaded it."""
        await self._each((member, member.unload(one)) for member, one in self._of(model) if _is_ours(one))

    async def unload_patiently(self, model: Resolved, *, loading: bool = False) -> None:
        await self._each(
            (member, member.unload_patiently(one, loading=loading and not one.loaded))
            for member, one in self._of(model)
            if _is_ours(one)
        )

    def memory_watch(self) -> MemoryWatch | None:
        return None

    def cpu_s(self) -> float | None:
        """Of all; None where one of them is not known."""
        used = [member.cpu_s() for member in self.members]
        return None if None in used else sum(seconds or 0.0 for seconds in used)

    @property
    def urls(self) -> list[str]:
        return [member.endpoint.url for member in self.members]

    def facts(self) -> dict[str, Any]:
        """As of one, with those of each in ``endpoints``."""
        each = [member.facts() for member in self.members]
        titles = Counter(str(one["title"]) for one in each)
        more = [f"{len(each) - NAMED} more"] if len(each) > NAMED else []
        return super().facts() | {
            "url": ", ".join([*self.urls[:NAMED], *more]),
            "kind": each[0]["kind"] if len({one["kind"] for one in each}) == 1 else "fleet",
            "title": " and ".join(f"{number} × {title}" for title, number in titles.items()),
            "memory_absent": self.unwatched,
            "facts": {},
            "endpoints": each,
        }

    async def close(self) -> None:
        await super().close()
        for member in self.members:
            await member.close()

    def _of(self, model: Resolved) -> Iterable[tuple[Target, Resolved]]:
        return zip(self.members, model.each, strict=True)

    async def _each(self, work: Iterable[tuple[Target, Awaitable[T]]]) -> list[T]:
        """What comes of all; of an error one can tell whose it is."""

        async def named(member: Target, one: Awaitable[T]) -> T:
            try:
                return await one
            except TargetError as error:
                url = member.endpoint.url
                raise error if url in str(error) else TargetError(f"{url}: {error}") from error

        return await _all(named(*one) for one in work)


def _together(each: Sequence[Resolved], name: str, how: str) -> Resolved:
    """``load_ms`` is the longest, for all are loaded at once; ``loaded`` None where one does not tell."""
    took = [one.load_ms for one in each if one.load_ms is not None]
    loaded = (
        False if any(one.loaded is False for one in each) else None if any(not one.loaded for one in each) else True
    )
    return Resolved(name, each[0].base_url, loaded, how, max(took, default=None), tuple(each))


def _is_ours(one: Resolved) -> bool:
    """Whether we have loaded it there, or may have begun to."""
    return one.load_ms is not None or one.loaded is False


def _server(member: Target) -> tuple[str, int, str, str]:
    """What makes it another one: on one port of one host names may still lead to several."""
    endpoint, address = member.endpoint, member.endpoint.address
    root = endpoint.root.removeprefix(f"{address.scheme}://{address.host_header}")
    return address.ip, address.port, "" if endpoint.local else address.host_header, root


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """What comes of all, which go on side by side to their ends; else the error of the first that has one."""
    done = await asyncio.gather(*work, return_exceptions=True)
    found: list[T] = []
    for one in done:
        if isinstance(one, BaseException):
            raise one
        found.append(one)
    return found


def together(states: Sequence[tuple[str, Sequence[str]]], urls: Sequence[str]) -> tuple[str, list[str]]:
    """(state, evidence) of a fleet from those of its members.

    It is dead when all are. While one serves it is degraded at worst: the next level can be measured.
    """
    if len(states) == 1:
        return states[0][0], list(states[0][1])
    worst = min((state for state, _ in states), key=WORST_FIRST.index)
    ill = [
        f"{url} {state}: {'; '.join(why)}" for url, (state, why) in zip(urls, states, strict=True) if state != "healthy"
    ]
    if worst in DEAD and any(state not in DEAD for state, _ in states):
        worst = "degraded"
    return worst, ill or [f"{len(states)} canaries answered"]
