"""Who is asked: what kind of server a base URL leads to. Which of its models is ``models``'s.

What each kind is recognised by is in ``dialects``; here is the order in which it is asked, and what follows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loadbench.errors import TargetError
from loadbench.target.address import Address, Url, locate, parse_url
from loadbench.target.control import Answer, Control
from loadbench.target.dialects import DIALECTS, Answers, Dialect
from loadbench.target.processes import find_process, is_this_machine

Headers = Mapping[str, str]

LIST_TIMEOUT_S = 20.0  # Foundry's public catalogue takes 5 s to find that there is no internet
LOAD_TIMEOUT_S = 600.0  # tens of gigabytes from a slow disk


class StrangerError(TargetError):
    """Somebody answers at the base URL, but no model server; ``status`` is the HTTP status of what tells the most."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that answered. ``url`` is the base under which ``/chat/completions`` lives, ``root`` what is above it.

    ``pid`` is a process of this machine, verified; where it is None ``pid_absent`` says why. Holds no headers.
    """

    url: str
    root: str
    address: Address
    dialect: Dialect = field(repr=False)
    title: str
    local: bool
    pid: int | None
    pid_absent: str | None
    facts: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.dialect.kind


async def discover(text: str, *, headers: Headers | None = None, timeout_s: float = 5.0) -> Endpoint:
    """Find out who answers at a base URL.

    Raises UsageError for what is no URL, TargetError where nothing answers, StrangerError where no model server does.
    """
    url = parse_url(text)
    address = await locate(url, timeout_s)
    root = url.path.removesuffix("/v1").removesuffix("/catalogs/local")
    answers: dict[str, Answer] = {}
    failures: list[TargetError] = []
    async with Control(address, headers) as control:
        for group in DIALECTS:
            paths = list(dict.fromkeys(path for dialect in group for path in dialect.probes))
            probed = await asyncio.gather(*(_probe(control, root + path, timeout_s) for path in paths))
            answers |= {path: found for path, found in zip(paths, probed, strict=True) if isinstance(found, Answer)}
            failures += [found for found in probed if isinstance(found, TargetError)]
            for dialect in group:
                facts = dialect.recognise(answers)
                if facts is not None:
                    return _endpoint(url, root, address, dialect, facts)
            if not answers:  # not even an error: nothing that further questions could find out
                raise failures[0]
    raise _not_a_model_server(url, answers)


async def _probe(control: Control, path: str, timeout_s: float) -> Answer | TargetError:
    try:
        return await control.ask(path, timeout_s)
    except TargetError as error:
        return error


def _endpoint(url: Url, root: str, address: Address, dialect: Dialect, facts: dict[str, Any]) -> Endpoint:
    claimed = facts.pop("pid", None)
    pid, why = find_process(address.ip, address.port, claimed if isinstance(claimed, int) else None, dialect.process)
    facts["process"] = None if pid is None else why
    version = facts.get("version")
    given = url.path.removeprefix(root).removesuffix("/v1")
    base = next((base for base in dialect.bases if base.removesuffix("/v1") == given), dialect.bases[-1])
    return Endpoint(
        url=url.origin + root + base,
        root=url.origin + root,
        address=address,
        dialect=dialect,
        title=f"{dialect.title} {version}" if isinstance(version, str) else dialect.title,
        local=is_this_machine(address.ip),
        pid=pid,
        pid_absent=why if pid is None else None,
        facts={name: value for name, value in facts.items() if value is not None},
    )


def _not_a_model_server(url: Url, answers: Answers) -> StrangerError:
    """Say what it is instead, from the answer that tells the most."""
    path = "/v1/models" if "/v1/models" in answers else min(answers)
    answer = answers[path]
    said = f": {answer.said}" if answer.said else ""
    if answer.status in (401, 403):
        return StrangerError(
            f"{url}: refuses us with {answer.status}{said}; a key goes into OPENAI_API_KEY or --header", answer.status
        )
    found = f"{answer.status} {answer.content_type}" + (f" from {answer.server}" if answer.server else "")
    return StrangerError(f"{url}: expected a model server, got {found} for GET {path}{said}", answer.status)
