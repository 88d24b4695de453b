"""Which model a name means, whether it is loaded, and loading it: from recorded answers."""

from __future__ import annotations

import pytest

from loadbench.errors import TargetError
from loadbench.target.control import BODY_LIMIT_BYTES
from loadbench.target.endpoint import Endpoint, discover
from loadbench.target.models import ModelInfo, Resolved, ensure_loaded, list_models, resolve, unload
from tests.endpoint_replay import recorded, replay


async def _resolve(recording: str, asked: str) -> Resolved:
    async with replay(recording) as server:
        return await resolve(await discover(server.url), asked)


@pytest.mark.parametrize(
    ("recording", "asked", "meant", "how"),
    [
        (
            "foundry-0.8",
            "qwen2.5-0.5b-instruct-generic-cpu:3",
            "qwen2.5-0.5b-instruct-generic-cpu:3",
            "by its exact id",
        ),
        ("foundry-0.8", "PHI-4-MINI-instruct-generic-cpu:4", "Phi-4-mini-instruct-generic-cpu:4", "by its id"),
        (
            "foundry-0.8",
            "qwen2.5-0.5b-instruct-generic-cpu",
            "qwen2.5-0.5b-instruct-generic-cpu:4",
            "by its name, newest version",
        ),
        ("foundry-0.8", "qwen2.5-0.5b", "qwen2.5-0.5b-instruct-generic-cpu:4", "by its alias"),
        # The GPU variant is newer, but it is the other one that is loaded.
        ("foundry-0.8", "phi-4-mini", "Phi-4-mini-instruct-generic-cpu:4", "by its alias"),
        ("foundry-0.8", "phi-4-mini@gpu", "Phi-4-mini-instruct-generic-gpu:5", "by its alias"),
        ("foundry-0.8", "phi-4-mini@CPU", "Phi-4-mini-instruct-generic-cpu:4", "by its alias"),
        (
            "foundry-2-public",
            "qwen2.5-0.5b-instruct-cuda-gpu@gpu",
            "qwen2.5-0.5b-instruct-cuda-gpu:4",
            "by its name, newest version",
        ),
        ("foundry-0.3", "phi-3.5-mini", "Phi-3.5-mini-instruct-generic-cpu", "by its alias"),
        ("ollama", "gemma3", "gemma3:latest", "by its name, newest version"),
        ("ollama", "gemma3:12b", "gemma3:12b", "by its exact id"),
        ("vllm", "qwen/qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "by its id"),
        ("foundry-0.8", "auto", "Phi-4-mini-instruct-generic-cpu:4", "the only model that is loaded"),
        ("foundry-0.3", "auto", "Phi-3.5-mini-instruct-generic-cpu", "the first of 1 listed; none is loaded"),
        ("ollama", "auto", "gemma3:12b", "the only model that is loaded"),
        ("lm-studio", "auto", "meta-llama-3.1-8b-instruct", "the only model that is loaded"),  # embeddings do not chat
        ("llama.cpp", "auto", "Qwen3-0.6B-Q8_0.gguf", "the only model that is loaded"),
        ("llama.cpp-router", "auto", "LFM2-1.2B-Q6_K", "the only model that is loaded"),
        ("vllm", "auto", "Qwen/Qwen2.5-0.5B-Instruct", "the only model that is loaded"),
    ],
)
async def test_a_name_means_one_exact_id_and_it_is_said_why(recording: str, asked: str, meant: str, how: str) -> None:
    model = await _resolve(recording, asked)
    assert model.id == meant
    assert how in model.how and asked in model.how


async def test_auto_among_several_loaded_models_takes_the_first_and_says_so() -> None:
    recording = recorded("ollama")
    recording["answers"]["/api/ps"] = recording["answers"]["/api/tags"]
    async with replay(recording) as server:
        model = await resolve(await discover(server.url), "auto")
    assert (model.id, model.how) == ("gemma3:latest", "auto: gemma3:latest, the first of 2 loaded models")


async def test_auto_where_the_server_does_not_say_what_is_loaded_takes_the_first_listed() -> None:
    listing = {"data": [{"id": "a"}, {"id": "b"}]}
    async with replay({"answers": {"/v1/models": listing}}) as server:
        model = await resolve(await discover(server.url), "auto")
    assert (model.id, model.loaded) == ("a", None)
    assert model.how == "auto: a, the first of 2 listed; the server does not say what is loaded"


async def test_auto_does_not_take_a_model_of_a_catalogue_for_one_that_is_there() -> None:
    with pytest.raises(TargetError, match="no model is loaded for auto to choose: load one, or name one"):
        await _resolve("foundry-2-public", "auto")


async def test_an_unknown_model_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(TargetError) as caught:
        await _resolve("foundry-0.8", "qwen2.5-0.5")
    line = str(caught.value)
    assert "there is no model qwen2.5-0.5; the nearest of 4: qwen2.5-0.5b-instruct-generic-cpu" in line
    with pytest.raises(TargetError, match=r"no model xyzzy; the nearest of 2: gemma3:latest, gemma3:12b$"):
        await _resolve("ollama", "xyzzy")


async def test_a_variant_for_a_device_that_is_not_there_is_refused_though_others_are() -> None:
    with pytest.raises(TargetError, match="there is no model phi-4-mini@npu; the nearest of 4: "):
        await _resolve("foundry-0.8", "phi-4-mini@npu")


async def test_a_server_that_lists_nothing_gets_the_name_as_given() -> None:
    async with replay({"answers": {"/v1/chat/completions": {"status": 405, "text": ""}}}) as server:
        endpoint = await discover(server.url)
        assert (await resolve(endpoint, "anything")).id == "anything"
        with pytest.raises(TargetError, match="lists no models, so auto cannot choose"):
            await resolve(endpoint, "auto")


@pytest.mark.parametrize(
    ("recording", "first"),
    [
        (
            "foundry-0.8",
            ModelInfo(
                *("Phi-4-mini-instruct-generic-gpu:5", "phi-4-mini", False, "/v1", 3710 << 20, "GPU", "MIT"),
                *("WebGpuExecutionProvider", ("chat-completion",), True),
            ),
        ),
        ("ollama", ModelInfo("gemma3:latest", None, False, "/v1", 3338801804, None, None, cached=True)),
        ("lm-studio", ModelInfo("qwen2-vl-7b-instruct", None, False, "/v1", None, None, None, cached=True)),
        ("llama.cpp", ModelInfo("Qwen3-0.6B-Q8_0.gguf", None, True, "/v1", 633401344, None, None)),
        ("foundry-2-public", ModelInfo("qwen2.5-0.5b-instruct-generic-cpu:4", None, False, "/v1", None, None, None)),
    ],
)
async def test_a_model_is_listed_with_what_the_server_tells_of_it_and_no_more(recording: str, first: ModelInfo) -> None:
    async with replay(recording) as server:
        listed = (await list_models(await discover(server.url)))[0]
    assert listed.base_url == server.url + first.base_url
    assert {**_fields(listed), "base_url": "/v1"} == _fields(first)


def _fields(model: ModelInfo) -> dict[str, object]:
    return {name: getattr(model, name) for name in ModelInfo.__slots__}


@pytest.mark.parametrize(
    "listing",
    [
        {"data": None},
        {"data": "models"},
        {"data": [None, 7, {}, {"id": 7}, {"id": ""}]},
        {"data": [{"id": "m", "size": "big"}]},
        {"data": [{"id": "m", "meta": [], "status": "loaded", "runtime": None, "license": {}}]},
    ],
)
async def test_a_list_of_nonsense_is_read_as_far_as_it_makes_sense(listing: dict[str, object]) -> None:
    async with replay({"answers": {"/v1/models": {"data": []}}}) as server:
        endpoint = await discover(server.url)
        server.answers["/v1/models"] = listing
        listed = await list_models(endpoint)
    assert listed in ([], [ModelInfo("m", None, None, server.url + "/v1", None, None, None)])


async def test_a_catalogue_that_fails_costs_the_aliases_and_not_the_models() -> None:
    recording = recorded("foundry-0.8")
    recording["answers"]["/foundry/list"] = " " * (BODY_LIMIT_BYTES + 1)
    async with replay(recording) as server:
        endpoint = await discover(server.url)
        assert (await resolve(endpoint, "auto")).id == "Phi-4-mini-instruct-generic-cpu:4"
        with pytest.raises(TargetError, match="there is no model phi-4-mini; the nearest of 4: Phi-4-mini"):
            await resolve(endpoint, "phi-4-mini")


async def test_an_old_foundry_is_told_to_keep_the_model_for_a_day() -> None:
    async with replay("foundry-0.8") as server:
        endpoint = await discover(server.url)
        model = await ensure_loaded(endpoint, await resolve(endpoint, "qwen2.5-0.5b"))
    assert "/openai/load/qwen2.5-0.5b-instruct-generic-cpu:4?ttl=86400" in server.asked
    assert model.loaded and model.load_ms is not None and 0 < model.load_ms < 5_000
    assert "loaded for this run in" in model.how


async def test_a_loaded_model_is_not_loaded_again_and_has_no_load_time() -> None:
    async with replay("foundry-0.8") as server:
        endpoint = await discover(server.url)
        model = await ensure_loaded(endpoint, await resolve(endpoint, "auto"))
    assert model.loaded and model.load_ms is None
    assert not [path for path in server.asked if "/load/" in path]


async def test_a_refusal_to_load_is_passed_on_in_the_servers_words() -> None:
    with pytest.raises(TargetError, match=r"refused to load it with 500: No OpenAIService provider found"):
        async with replay("foundry-0.3") as server:
            endpoint = await discover(server.url)
            await ensure_loaded(endpoint, await resolve(endpoint, "phi-3.5-mini"))


async def test_a_load_that_loads_nothing_is_not_taken_for_one() -> None:
    recording = recorded("foundry-0.8")
    recording["answers"]["/openai/loadedmodels"] = []
    async with replay(recording) as server:
        endpoint = await discover(server.url)
        with pytest.raises(TargetError, match=r"when asked for it .* loads nothing"):
            await ensure_loaded(endpoint, await resolve(endpoint, "qwen2.5-0.5b"))


async def test_ollama_loads_by_a_request_without_a_prompt() -> None:
    recording = recorded("ollama")
    nothing: dict[str, object] = {"models": []}
    recording["answers"]["/api/ps"] = nothing
    async with replay(recording) as server:
        endpoint = await discover(server.url)
        model = await resolve(endpoint, "gemma3")
        server.answers["/api/ps"] = nothing
        with pytest.raises(TargetError, match="loads nothing"):
            await ensure_loaded(endpoint, model)
        assert server.bodies == [{"model": "gemma3:latest", "stream": False}]
        server.answers["/api/ps"] = recording["answers"]["/api/tags"]
        assert await unload(endpoint, model)
    assert server.bodies[-1] == {"model": "gemma3:latest", "stream": False, "keep_alive": 0}


async def test_where_the_api_cannot_load_it_is_said_and_not_claimed() -> None:
    async with replay("lm-studio") as server:
        endpoint = await discover(server.url)
        model = await ensure_loaded(endpoint, await resolve(endpoint, "qwen2-vl-7b-instruct"))
        assert not await unload(endpoint, model)
    assert model.loaded is False and model.load_ms is None
    assert model.how.endswith("; LM Studio loads a model at its first request, if at all")


async def test_an_alias_of_the_public_catalogue_is_put_to_the_service_which_alone_knows_it() -> None:
    model, endpoint = await _public("qwen2.5-0.5b")
    assert (model.id, model.loaded) == ("qwen2.5-0.5b-instruct-cuda-gpu:4", True)
    assert (model.base_url, model.chat_path) == (endpoint.root + "/v1", "/v1/chat/completions")
    assert model.load_ms is not None and "as the service loaded it" in model.how


async def test_a_device_is_refused_with_the_reason_where_the_service_tells_of_none() -> None:
    async with replay({"answers": {"/v1/models": {"data": [{"id": "a:1"}]}}}) as server:
        endpoint = await discover(server.url)
        with pytest.raises(TargetError, match=r"a:1@gpu: .* does not say for which device .* the nearest of 1: a:1$"):
            await resolve(endpoint, "a:1@gpu")


async def test_an_alias_that_was_loaded_before_is_known_by_the_id_that_begins_with_it() -> None:
    recording = recorded("foundry-2-public")
    recording["answers"]["/models/loaded"] = ["qwen2.5-0.5b-instruct-cuda-gpu:4", "Phi-4-mini-instruct-generic-cpu:5"]
    async with replay(recording) as server:
        model = await resolve(await discover(server.url), "qwen2.5-0.5b")
    assert (model.id, model.load_ms) == ("qwen2.5-0.5b-instruct-cuda-gpu:4", None)


async def test_a_model_that_is_not_downloaded_is_refused_in_the_services_words() -> None:
    with pytest.raises(TargetError, match="phi-4-mini: Foundry Local 2 refused to load it with 400: Model not cached"):
        await _public("phi-4-mini")


async def test_a_prefix_of_an_id_that_is_no_alias_is_not_guessed_at() -> None:
    with pytest.raises(TargetError, match=r"there is no model phi-4; the nearest of 5: .*phi-4-mini"):
        await _public("phi-4")


async def test_an_id_of_the_public_catalogue_is_loaded_by_its_alias_and_not_confused_with_another_variant() -> None:
    recording = recorded("foundry-2-public")
    recording["answers"]["/models/loaded"] = [[], [], ["qwen2.5-0.5b-instruct-cuda-gpu:4"]]
    recording["answers"]["/models/unload/qwen2.5-0.5b"] = {"status": 200, "json": {"status": "unloaded"}}
    async with replay(recording) as server:
        endpoint = await discover(server.url)
        model = await resolve(endpoint, "qwen2.5-0.5b-instruct-generic-cpu:4")
        with pytest.raises(TargetError, match=r"when asked for it .* loads qwen2.5-0.5b-instruct-cuda-gpu:4"):
            await ensure_loaded(endpoint, model)
        assert server.asked[-1] == "/models/unload/qwen2.5-0.5b"  # the machine is left as it was

        server.answers["/models/loaded"] = [[], ["qwen2.5-0.5b-instruct-generic-cpu:4"]]
        assert (await ensure_loaded(endpoint, model)).loaded


async def test_an_alias_is_in_small_letters_where_the_id_is_not() -> None:
    recording = recorded("foundry-2-public")
    recording["answers"]["/models/loaded"] = [[], [], ["Phi-4-mini-instruct-generic-cpu:5"]]
    recording["answers"]["/models/load/phi-4-mini"] = {"status": 200, "json": {"status": "loaded"}}
    async with replay(recording) as server:
        endpoint = await discover(server.url)
        model = await ensure_loaded(endpoint, await resolve(endpoint, "Phi-4-mini-instruct-generic-cpu:5"))
    assert model.loaded and server.asked[-2] == "/models/load/phi-4-mini"


async def _public(asked: str) -> tuple[Resolved, Endpoint]:
    async with replay("foundry-2-public") as server:
        endpoint = await discover(server.url)
        return await resolve(endpoint, asked), endpoint
