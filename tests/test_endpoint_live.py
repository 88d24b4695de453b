"""Endpoints that live: the real Foundry Local, and the scripted endpoint in each of its guises."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from loadbench.errors import TargetError
from loadbench.target.address import locate, parse_url
from loadbench.target.endpoint import discover
from loadbench.target.fake import FakeServer, serve
from loadbench.target.fake_script import script_from
from loadbench.target.foundry import EmbeddedFoundry
from loadbench.target.models import Resolved, ensure_loaded, list_models, resolve, unload
from loadbench.target.processes import ProcessTree
from loadbench.target.synthetic import ensure


@pytest_asyncio.fixture
async def foundry(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedFoundry]:
    """The real service with one tiny model under three ids, none of them loaded."""
    model = ensure("tiny", tmp_path_factory.getbasetemp() / "endpoint-cache")
    ids = ("synthetic-tiny:1", "synthetic-tiny:2", "other-tiny:1")
    async with await EmbeddedFoundry.start(dict.fromkeys(ids, model.path), tmp_path) as service:
        yield service


async def _chat(root_url: str, model: Resolved) -> int:
    body = {"model": model.id, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    async with aiohttp.ClientSession() as session, session.post(root_url + model.chat_path, json=body) as response:
        await response.read()
        return response.status


async def test_the_real_service_is_known_with_its_process_and_memory(foundry: EmbeddedFoundry) -> None:
    port = foundry.root_url.rpartition(":")[2]
    for written in (foundry.root_url, foundry.base_url, f"localhost:{port}/v1", f"0.0.0.0:{port}/catalogs/local"):
        endpoint = await discover(written)
        assert (endpoint.kind, endpoint.local, endpoint.pid, endpoint.pid_absent) == (
            "foundry-2",
            True,
            foundry.pid,
            None,
        )
    figures = ProcessTree(foundry.pid).sample()
    assert figures is not None and 10 << 20 < figures.rss_bytes < 4 << 30


async def test_a_name_becomes_its_newest_version_is_loaded_answers_and_is_unloaded(foundry: EmbeddedFoundry) -> None:
    endpoint = await discover(foundry.root_url)
    model = await resolve(endpoint, "synthetic-tiny")
    assert (model.id, model.base_url, model.loaded) == ("synthetic-tiny:2", foundry.base_url, False)
    assert await _chat(foundry.root_url, model) == 400  # not loaded

    model = await ensure_loaded(endpoint, model)
    assert model.loaded and model.load_ms is not None and model.load_ms > 1
    assert await _chat(foundry.root_url, model) == 200
    assert (await resolve(endpoint, "auto")).how == "auto: synthetic-tiny:2, the only model that is loaded"
    assert (await ensure_loaded(endpoint, await resolve(endpoint, "synthetic-tiny:2"))).load_ms is None

    other = await ensure_loaded(endpoint, await resolve(endpoint, "other-tiny:1"))
    assert "of 2 loaded models" in (await resolve(endpoint, "auto")).how
    assert await unload(endpoint, await resolve(endpoint, "synthetic-tiny:1"))  # has the same alias
    assert (await resolve(endpoint, "synthetic-tiny:2")).loaded
    for loaded in (model, other):
        assert await unload(endpoint, loaded)
        assert (await resolve(endpoint, loaded.id)).loaded is False
        assert await unload(endpoint, loaded)  # twice does no harm


async def test_an_older_version_is_out_of_reach_and_the_newer_is_not_left_loaded(foundry: EmbeddedFoundry) -> None:
    endpoint = await discover(foundry.base_url)
    with pytest.raises(
        TargetError, match=r"^synthetic-tiny:1: when asked for it Foundry Local 2 loads synthetic-tiny:2"
    ):
        await ensure_loaded(endpoint, await resolve(endpoint, "synthetic-tiny:1"))
    assert (await resolve(endpoint, "synthetic-tiny:2")).loaded is False


async def test_a_service_that_was_killed_is_gone_for_discovery_and_for_memory(foundry: EmbeddedFoundry) -> None:
    tree = ProcessTree(foundry.pid)
    assert tree.sample() is not None
    os.kill(foundry.pid, 9)
    await foundry.stop()  # waits for it to be gone
    assert tree.sample() is None
    with pytest.raises(TargetError, match="connection refused"):
        await discover(foundry.root_url)


@asynccontextmanager
async def _fake(token: str | None = None, **script: Any) -> AsyncIterator[FakeServer]:
    server = await serve(script_from(script, "test"), token=token)
    try:
        yield server
    finally:
        await server.close()


GUISES = {
    "openai": "openai",
    "foundry2": "foundry-2",
    "foundry08": "foundry-0.8",
    "ollama": "ollama",
    "llamacpp": "llama.cpp",
    "vllm": "vllm",
    "lmstudio": "lm-studio",
}


@pytest.mark.parametrize("guise", GUISES)
async def test_the_scripted_endpoint_passes_for_what_it_plays(guise: str) -> None:
    async with _fake(flavour=guise, models=("first:1", "second:3"), loaded=("second:3",)) as server:
        endpoint = await discover(server.base_url)
        listed = await list_models(endpoint)
        chosen = await resolve(endpoint, "auto")
    assert endpoint.kind == GUISES[guise]
    assert [model.id for model in listed] == ["first:1", "second:3"]
    # vLLM and llama.cpp serve what they list; a plain OpenAI server does not say what is loaded.
    assert chosen.id == ("first:1" if guise in ("openai", "llamacpp", "vllm") else "second:3")


@pytest.mark.parametrize("guise", ["foundry2", "foundry08", "ollama"])
async def test_a_model_is_loaded_and_unloaded_where_the_api_can(guise: str) -> None:
    async with _fake(flavour=guise, models=("first:1", "second:3"), loaded=()) as server:
        endpoint = await discover(server.base_url)
        model = await ensure_loaded(endpoint, await resolve(endpoint, "second"))
        assert model.load_ms is not None
        assert (await resolve(endpoint, "auto")).id == "second:3"
        assert await unload(endpoint, model)
        assert (await resolve(endpoint, "second")).loaded is False


async def test_a_wrong_key_is_told_from_a_wrong_server() -> None:
    async with _fake("right", flavour="foundry2") as server:
        with pytest.raises(TargetError, match="refuses us with 401"):
            await discover(server.base_url, headers={"Authorization": "Bearer wrong"})
        assert (await discover(server.base_url, headers={"Authorization": "Bearer right"})).kind == "foundry-2"


async def test_a_host_is_resolved_once_and_the_address_is_what_is_asked() -> None:
    async with _fake() as server:
        address = await locate(parse_url(f"localhost:{server.port}"), timeout_s=5)
        assert (address.ip, address.port, address.host) == ("127.0.0.1", server.port, "localhost")
