"""Models of the catalogue and of one's own in one embedded service: the real SDK, its catalogue on loopback."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from loadbench.errors import TargetError
from loadbench.target import catalogue as catalogue_module
from loadbench.target.catalogue import Catalogue as Public
from loadbench.target.catalogue import download
from loadbench.target.control import without_whereabouts
from loadbench.target.foundry import cache_dir
from loadbench.target.models import Resolved
from loadbench.target.register import Register
from loadbench.target.synthetic import ensure
from loadbench.target.target import Target
from tests.catalogue import Catalogue, Entry, needs_openssl, put_into_cache, serving
from tests.command import ROOT, ended, eventually, loadbench, started
from tests.endpoint_replay import replay

CPU = "qwen-tiny-generic-cpu:4"
GPU = "qwen-tiny-cuda-gpu:4"
PHI = "phi-x-generic-cpu:2"
UNREACHABLE = "http://127.0.0.1:1/asset-gallery/v1.0/models"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure("tiny", tmp_path_factory.mktemp("models")).path


@pytest.fixture
def catalogue(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalogue]:
    """It, and a cache of our own; both for this process and its children."""
    entries = [
        Entry("qwen-tiny-generic-cpu", "qwen-tiny", tiny, 4),
        Entry("qwen-tiny-cuda-gpu", "qwen-tiny", tiny, 4, "gpu", "CUDAExecutionProvider"),
        Entry("phi-x-generic-cpu", "phi-x", tiny, 2, licence="Apache-2.0"),
    ]
    monkeypatch.setenv("LOADBENCH_CACHE", str(tmp_path / "cache"))
    with serving(entries, tmp_path) as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        yield served


@asynccontextmanager
async def embedded(*asked: str) -> AsyncIterator[Target]:
    target = await Target.embedded(asked, "test")
    try:
        yield target
    finally:
        await target.close()


async def answers(model: Resolved) -> int:
    body = {"model": model.id, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{model.base_url}/chat/completions", json=body) as response,
    ):
        await response.read()
        return response.status


def ignore(percent: float) -> None:
    pass


@needs_openssl
async def test_own_and_catalogue_models_are_served_side_by_side_each_by_its_exact_id(catalogue: Catalogue) -> None:
    put_into_cache(cache_dir(), catalogue.entries[2])
    async with embedded("synthetic:tiny", "qwen-tiny@cpu", "phi-x") as target:
        seen: list[float] = []
        for asked, model_id, base in (
            ("synthetic:tiny", "synthetic-tiny:1", "/catalogs/local/v1"),
            ("qwen-tiny@cpu", CPU, "/v1"),
            ("phi-x", PHI, "/v1"),
        ):
            model = await target.resolve(asked)
            assert (model.id, model.loaded) == (model_id, False) and model.base_url.endswith(base)
            took_ms = await target.pull(asked, seen.append)
            assert (took_ms is not None) == (asked == "qwen-tiny@cpu")
            model = await target.load(model)
            assert model.load_ms is not None and await answers(model) == 200
            await target.unload(model)
            assert await answers(model) == 400
        assert seen[-1] == 100.0 and seen == sorted(seen)
        assert await target.pull("qwen-tiny@cpu", seen.append) is None
        await target.restart()
        assert await answers(await target.load(await target.resolve("qwen-tiny@cpu"))) == 200
    assert {path.name for path in (cache_dir() / "catalog" / "Contoso").iterdir()} == {
        "qwen-tiny-generic-cpu-4",
        "phi-x-generic-cpu-2",
    }


async def test_what_is_known_of_a_model_is_the_catalogues_word_and_its_size_on_the_disk(catalogue: Catalogue) -> None:
    path = put_into_cache(cache_dir(), catalogue.entries[2])
    async with embedded("synthetic:tiny", "phi-x") as target:
        listed = await target.info(await target.resolve("phi-x"))
        own = await target.info(await target.resolve("synthetic:tiny"))
    assert listed is not None and own is not None
    assert (listed.device, listed.execution_provider, listed.licence) == ("CPU", "CPUExecutionProvider", "Apache-2.0")
    assert (listed.capabilities, listed.cached, listed.path) == (("chat", "tool-calling"), True, path)
    assert listed.size_bytes == sum(file.stat().st_size for file in path.iterdir())
    assert (own.device, own.execution_provider, own.licence) == ("CPU", "CPUExecutionProvider", None)
    assert own.size_bytes is not None and own.size_bytes > 400_000


async def test_what_another_service_tells_of_a_model_is_known_and_what_it_does_not_tell_is_not() -> None:
    async with replay("foundry-0.8") as server:
        target = await Target.at(server.url, "test", {})
        told = await target.info(await target.resolve("phi-4-mini@gpu"))
        assert told is not None
        assert (told.device, told.licence, told.size_bytes, told.cached) == ("GPU", "MIT", 3710 << 20, True)
        assert await target.pull("phi-4-mini@gpu", ignore) is None
    async with replay({"answers": {"/v1/chat/completions": {"status": 405, "text": ""}}}) as server:
        target = await Target.at(server.url, "test", {})
        assert await target.info(await target.resolve("anything")) is None


async def test_the_variants_of_an_alias_are_models_of_their_own_and_one_that_cannot_load_says_why(
    catalogue: Catalogue,
) -> None:
    for entry in catalogue.entries[:2]:
        put_into_cache(cache_dir(), entry)
    async with embedded("qwen-tiny@cpu", "qwen-tiny@gpu", "qwen-tiny@npu") as target:
        cpu, gpu = await target.resolve("qwen-tiny@cpu"), await target.resolve("qwen-tiny@gpu")
        assert (cpu.id, gpu.id) == (CPU, GPU)
        with pytest.raises(
            TargetError, match="qwen-tiny@npu: for this machine the catalogue has it for @cpu, @gpu only"
        ):
            await target.resolve("qwen-tiny@npu")
        with pytest.raises(TargetError, match=f"^{GPU}: Foundry Local 2 refused to load it: .*CUDA") as caught:
            await target.load(gpu)
        assert ".cc:" not in str(caught.value)
        assert await answers(await target.load(cpu)) == 200


def break_it(folder: Path, kind: str) -> None:
    config = folder / "genai_config.json"
    match kind:
        case "config":
            config.write_text("{no")
        case "type":
            config.write_text(config.read_text().replace('"type": "', '"type": "un'))
        case "missing":
            (folder / "model.onnx").unlink()
        case "corrupt":
            (folder / "model.onnx").write_bytes(b"\x08\x07nonsense" * 5000)
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")


async def test_a_broken_model_is_its_own_error_and_not_the_services(
    catalogue: Catalogue, tiny: Path, tmp_path: Path
) -> None:
    said = {
        "config": "genai_config.json: expected JSON",
        "type": "Unsupported model_type in config.json: un",
        "missing": "model.onnx: expected the model that genai_config.json names",
        "corrupt": "Protobuf parsing failed",
        "tokenizer": "failed to create tokenizer",
        "gone": "expected a folder, found nothing there",
        "nowhere": "neither synthetic, nor a folder, nor registered",
    }
    names = {kind: str(tmp_path / kind) for kind in said} | {"nowhere": "nowhere"}
    for kind in list(said)[:5]:
        break_it(shutil.copytree(tiny, tmp_path / kind), kind)
    async with embedded("synthetic:tiny", *names.values()) as target:
        for kind, asked in names.items():
            with pytest.raises(TargetError, match=re.escape(said[kind])) as caught:
                await target.load(await target.resolve(asked))
            assert "\n" not in str(caught.value) and ".cc:" not in str(caught.value)
        assert await answers(await target.load(await target.resolve("synthetic:tiny"))) == 200


async def test_a_registered_folder_goes_by_its_name_in_any_later_run(catalogue: Catalogue, tiny: Path) -> None:
    register = Register(cache_dir())
    for model_id in ("mine:1", "mine:10", "mine:9"):
        register.add(model_id, tiny)
    async with embedded("mine", "mine:9", "MINE@cpu") as target:
        assert (await target.resolve("mine")).id == "mine:10"
        assert (await target.resolve("mine:9")).id == "mine:9"
        assert (await target.resolve("MINE@cpu")).id == "mine:10"
        assert await answers(await target.load(await target.resolve("mine"))) == 200
    async with embedded("mine@gpu") as target:
        with pytest.raises(TargetError, match=r"mine@gpu: its genai_config\.json is for the CPU"):
            await target.resolve("mine@gpu")


async def test_offline_a_cached_model_is_served_and_another_says_what_to_do(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_cache(cache_dir(), catalogue.entries[2])
    await Public.read(cache_dir())  # it was online once
    monkeypatch.setenv("LOADBENCH_CATALOG_URL", UNREACHABLE)
    async with embedded("phi-x", "qwen-tiny@cpu", "never-heard-of-it") as target:
        assert await answers(await target.load(await target.resolve("phi-x"))) == 200
        for asked in ("qwen-tiny@cpu", "never-heard-of-it"):
            with pytest.raises(TargetError, match=f"^{asked}: the model catalogue cannot be reached: connect to the"):
                await target.resolve(asked)


@needs_openssl
async def test_where_all_is_still_to_be_downloaded_the_service_has_its_own_cache_without_hard_links_too(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")  # as on exFAT

    monkeypatch.setattr(os, "link", no_links)
    async with embedded("phi-x") as target:
        assert await target.pull("phi-x", ignore) is not None
        instances = cache_dir() / "instances"
        assert [path.name for path in instances.rglob("genai_config.json")] == ["genai_config.json"]
        assert await answers(await target.load(await target.resolve("phi-x"))) == 200


async def test_the_sdk_asks_for_what_this_machine_can_run(catalogue: Catalogue) -> None:
    listed = await Public.read(cache_dir())
    assert listed.reachable and {variant.info.id for variant in listed.variants} == {CPU, GPU, PHI}
    asked = {row["field"]: (row["operator"], row["values"]) for row in catalogue.filters}
    assert asked["type"] == ("eq", ["models"]) and asked["labels"] == ("eq", ["latest"])
    assert "cpu" in asked["properties/variantInfo/variantMetadata/device"][1]
    providers = asked["properties/variantInfo/variantMetadata/executionProvider"][1]
    assert "CPUExecutionProvider" in providers


@needs_openssl
async def test_a_stalled_download_goes_on_where_it_was(
    catalogue: Catalogue, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "BACKOFF_S", (0.1,))
    monkeypatch.setattr(catalogue_module, "CANCEL_TIMEOUT_S", 0.1)
    folder = shutil.copytree(tiny, tmp_path / "large")
    pieces = 24  # of 2 MiB, all in flight at once; what is done is noted every 16 MiB
    with (folder / "weights.bin").open("wb") as weights:
        weights.truncate(pieces * 2 << 20)
    catalogue.entries.append(Entry("large-generic-cpu", "large", folder))
    await Public.read(cache_dir())

    broken: list[str] = []
    catalogue.stall_if = lambda name, first: name == "weights.bin" and first == 0 and not broken
    path, took_ms = await download(cache_dir(), "large-generic-cpu:1", ignore, say=broken.append, stall_s=1.0)
    assert (path / "weights.bin").stat().st_size == pieces * 2 << 20 and took_ms > 1000
    assert len(broken) == 1 and "nothing came for 1 s" in broken[0]
    sent = [first for name, first in catalogue.sent if name == "weights.bin"]
    assert len(set(sent)) == pieces and pieces <= len(sent) <= pieces + 8  # and not twice of everything


@needs_openssl
async def test_a_slow_download_is_no_stall_where_the_system_counts_no_bytes(
    catalogue: Catalogue, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "BACKOFF_S", (0.1,))
    monkeypatch.setattr(catalogue_module, "TRIES", 2)
    monkeypatch.delattr(psutil.Process, "io_counters")  # as on macOS
    folder = shutil.copytree(tiny, tmp_path / "large")
    with (folder / "weights.bin").open("wb") as weights:
        weights.truncate(2 << 20)
    catalogue.entries.append(Entry("large-generic-cpu", "large", folder))
    await Public.read(cache_dir())
    broken: list[str] = []
    catalogue.trickle_s = 0.4
    _, took_ms = await download(cache_dir(), "large-generic-cpu:1", ignore, say=broken.append, stall_s=1.5)
    assert broken == [] and took_ms > 2 * 1500


@needs_openssl
async def test_a_download_that_never_comes_ends_with_the_reason(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "BACKOFF_S", (0.01,))
    monkeypatch.setattr(catalogue_module, "TRIES", 2)
    await Public.read(cache_dir())
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    told: list[str] = []
    with pytest.raises(TargetError, match=f"{PHI}: the download failed at 0 %: ") as caught:
        await download(cache_dir(), PHI, ignore, say=told.append)
    assert len(told) == 1 and ".cc:" not in str(caught.value)


def test_a_run_measures_catalogue_and_own_models_one_after_the_other(
    catalogue: Catalogue, tiny: Path, tmp_path: Path
) -> None:
    put_into_cache(cache_dir(), catalogue.entries[2])
    Register(cache_dir()).add("mine:1", tiny)
    words = ("--model", "phi-x", "--model", "mine", "--concurrency", "1", "--requests", "5", "--quiet")
    done = loadbench("run", ROOT / "scenarios" / "smoke.yaml", *words, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode in (0, 94), done.stderr  # five requests are too few to vouch for
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert [(row["id"], row["status"]) for row in run["models"]] == [(PHI, "ok"), ("mine:1", "ok")]


@needs_openssl
async def test_serve_downloads_what_it_is_to_serve(catalogue: Catalogue) -> None:
    process = await started("serve", "--model", "qwen-tiny@cpu")
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/v1  {CPU}\n", line)
    process.send_signal(signal.SIGINT)
    await ended(process)
    instances = Path(os.environ["LOADBENCH_CACHE"]) / "instances"
    await eventually(lambda: not any(instances.iterdir()))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("model.cc:530 void fl::Model::Load(fl::ExecutionProvider) model not found", "model not found"),
        (
            "Load failed: a_b.cc:1 fl::X::X(std::string, f<int(float)>) const no: c.cc:2 y(a) why",
            "Load failed: no: why",
        ),
        ("genai_config.json: expected (this)", "genai_config.json: expected (this)"),
        ("a.cc:1 cut off(in the", ""),
    ],
)
def test_foundrys_errors_are_told_without_its_source_files(said: str, told: str) -> None:
    assert without_whereabouts(said) == told
