"""Downloading a model by a service that is not ours: an old Foundry Local or Ollama, each by the route that it has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from loadbench.errors import TargetError
from loadbench.target.catalogue import Progress
from loadbench.target.control import Control, HopelessError, one_line
from loadbench.target.dialects import read_models
from loadbench.target.endpoint import Endpoint, Headers
from loadbench.target.models import list_catalogue, nearest, split_device, version_of


async def pull(endpoint: Endpoint, asked: str, progress: Progress, stall_s: float, headers: Headers) -> None:
    """Have the service download it, once. TargetError when it does not; what it keeps of a half one is its matter."""
    async with Control(endpoint.address, headers) as control:
        if endpoint.kind == "ollama":
            await _ollama(control, asked, progress, stall_s)
        else:
            await _old_foundry(control, await _offered(endpoint, asked, headers), progress, stall_s)


def can_pull(endpoint: Endpoint) -> bool:
    """Whether its API has a route for it; Foundry Local 2 and its CLI from 0.10 on have none."""
    return endpoint.kind in ("foundry-0.8", "ollama")


async def _offered(endpoint: Endpoint, asked: str, headers: Headers) -> Mapping[str, Any]:
    """The catalogue's row for a name, in the service's own fields, since it wants some of them back."""
    name, device = split_device(asked)
    rows = {row["name"]: row for row in await list_catalogue(endpoint, headers=headers) if "name" in row}
    offered = read_models(list(rows.values()))
    wanted = name.lower()
    found = [
        model["id"]
        for model in offered
        if wanted in (model["id"].lower(), model["id"].rpartition(":")[0].lower(), (model["alias"] or "").lower())
        and (device is None or (model["device"] or "").upper() == device)
    ]
    if not found:
        alike = nearest(wanted, {(m["alias"] or m["id"]).lower(): m["alias"] or m["id"] for m in offered})
        raise HopelessError(
            f"{asked}: not in the catalogue of {endpoint.title}; the nearest: {', '.join(alike) or 'none'}"
        )
    # The catalogue has the variant that suits the machine best first; of one name the newest version is meant.
    first = found[0].rpartition(":")[0]
    return rows[max((id_ for id_ in found if id_.rpartition(":")[0] == first), key=version_of)]


async def _old_foundry(control: Control, row: Mapping[str, Any], progress: Progress, stall_s: float) -> None:
    """``POST /openai/download``: lines with a percentage, then a JSON object, which alone says whether it succeeded."""
    provider = row.get("providerType")
    model = {
        "Name": row["name"],
        "Uri": row.get("uri"),
        "Publisher": row.get("publisher"),
        "ProviderType": "AzureFoundryLocal" if provider == "AzureFoundry" else provider,
        "PromptTemplate": row.get("promptTemplate"),
    }
    said = ""
    async for line in control.lines("/openai/download", {"model": model, "IgnorePipeReport": True}, stall_s):
        if said or line.lstrip().startswith("{"):
            said += line
        elif found := re.search(r"(\d+(?:\.\d+)?) ?%", line):
            progress(float(found[1]))
    try:
        answer = {key.lower(): value for key, value in orjson.loads(said).items()}
    except (orjson.JSONDecodeError, AttributeError):
        raise TargetError(f"{row['name']}: the service ended the download without saying how it went") from None
    if answer.get("success") is not True:
        raise TargetError(f"{row['name']}: {one_line(str(answer.get('errormessage') or 'the download failed'))}")


async def _ollama(control: Control, asked: str, progress: Progress, stall_s: float) -> None:
    """``POST /api/pull``: a JSON object a line, each about one layer; ``success`` is the last.

    An ``error`` is the last word: what broke off Ollama has tried again itself by then.
    """
    sizes: dict[str, tuple[int, int]] = {}  # digest → completed, total
    status = None
    async for line in control.lines("/api/pull", {"model": asked, "stream": True}, stall_s):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if "error" in row:
            raise HopelessError(f"{asked}: {one_line(str(row['error']))}")
        status = row.get("status")
        if isinstance(row.get("total"), int) and row["total"]:
            sizes[str(row.get("digest"))] = (int(row.get("completed") or 0), row["total"])
            progress(100 * sum(done for done, _ in sizes.values()) / sum(total for _, total in sizes.values()))
    if status != "success":
        raise TargetError(f"{asked}: the service ended the download at: {one_line(str(status))}")
