"""The command ``models`` as a user calls it: on the real SDK with a loopback catalogue, and on recordings."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from loadbench.errors import UsageError
from loadbench.models_cli import _next
from loadbench.report.models import Pace
from loadbench.target.synthetic import ensure
from tests.asking import scripted
from tests.catalogue import Catalogue, Entry, needs_openssl, put_into_cache, serving
from tests.command import ROOT, ended, environment, loadbench, started
from tests.endpoint_replay import recorded, replay

NOWHERE = {"LOADBENCH_CATALOG_URL": "http://127.0.0.1:1/asset-gallery/v1.0/models"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure("tiny", tmp_path_factory.mktemp("models")).path


@pytest.fixture
def catalogue(tiny: Path, tmp_path: Path) -> Iterator[Catalogue]:
    """Two models, one of them for two devices."""
    entries = [
        Entry("qwen-tiny-generic-cpu", "qwen-tiny", tiny, 4),
        Entry("qwen-tiny-cuda-gpu", "qwen-tiny", tiny, 4, "gpu", "CUDAExecutionProvider", "Apache-2.0"),
        Entry("phi-x-generic-cpu", "phi-x", tiny, 2),
    ]
    with serving(entries, tmp_path) as served:
        yield served


class User:
    """Calls ``loadbench models`` with a cache of their own."""

    def __init__(self, cache: Path, env: dict[str, str]) -> None:
        self.env = {"LOADBENCH_CACHE": str(cache), **env}
        self.cache = cache

    def models(self, *words: str | Path) -> tuple[int, str, str]:
        done = loadbench("models", *words, cwd=ROOT, **self.env)
        return done.returncode, done.stdout, done.stderr

    def listed(self) -> dict[str, dict[str, Any]]:
        code, out, _ = self.models("list", "--json")
        assert code == 0
        return {row["id"]: row for row in json.loads(out)["models"]}


@pytest.fixture
def user(tmp_path: Path, catalogue: Catalogue) -> User:
    return User(tmp_path / "cache", catalogue.environment)


def test_the_list_shows_the_catalogue_the_cache_and_ones_own_with_all_that_is_known(
    user: User, catalogue: Catalogue, tiny: Path
) -> None:
    put_into_cache(user.cache, catalogue.entries[2])
    assert user.models("add", tiny, "--id", "mine:3")[0] == 0
    rows = user.listed()
    assert {model_id: row["state"] for model_id, row in rows.items()} == {
        "mine:3": "own",
        "phi-x-generic-cpu:2": "cached",
        "qwen-tiny-generic-cpu:4": "online",
        "qwen-tiny-cuda-gpu:4": "online",
    }
    gpu = rows["qwen-tiny-cuda-gpu:4"]
    assert (gpu["alias"], gpu["device"], gpu["execution_provider"]) == ("qwen-tiny", "GPU", "CUDAExecutionProvider")
    assert (gpu["licence"], gpu["capabilities"], gpu["path"]) == ("Apache-2.0", ["chat", "tool-calling"], None)
    assert rows["phi-x-generic-cpu:2"]["size_bytes"] > 400_000
    assert rows["mine:3"]["path"] == str(tiny)


def test_in_a_pipe_the_list_is_one_line_a_model_with_its_fields_apart_by_tabs(user: User) -> None:
    _, out, _ = user.models("list")
    head, *lines = (line.split("\t") for line in out.splitlines())
    assert head == ["alias", "id", "device", "provider", "size", "licence", "can", "state"]
    assert lines[0] == ["phi-x", "phi-x-generic-cpu:2", "CPU", "CPU", "n/a", "MIT", "chat, tool-calling", "online"]


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script, for a terminal")
@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_every_id_is_whole_and_no_line_is_too_long(user: User, width: int) -> None:
    env = environment(PYTHONPATH=str(ROOT), TERM="xterm", **user.env) | {"COLUMNS": str(width)}
    command = ["script", "-qec", f"{sys.executable} -m loadbench models list", "/dev/null"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    table = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines() if "made when" not in line]
    assert max(map(len, table)) <= width
    for word in ("qwen-tiny-generic-cpu:4", "chat, tool-calling", "Apache-2.0", "CUDA", "GPU", "online"):
        assert any(word in line for line in table), word


@needs_openssl
def test_a_pulled_model_is_in_the_cache_and_is_not_fetched_again(user: User, catalogue: Catalogue) -> None:
    code, out, _ = user.models("pull", "qwen-tiny@cpu")
    assert code == 0 and re.match(r"qwen-tiny-generic-cpu:4: 49\d KiB in .* m?s, ", out)
    assert {name for name, _ in catalogue.sent} >= {"genai_config.json", "model.onnx", "tokenizer.json"}
    catalogue.sent.clear()
    code, out, _ = user.models("pull", "qwen-tiny@cpu")
    assert code == 0 and "is in the cache already" in out and catalogue.sent == []
    assert user.listed()["qwen-tiny-generic-cpu:4"]["state"] == "cached"


@needs_openssl
def test_a_download_that_stalls_is_told_and_tried_again(user: User, catalogue: Catalogue) -> None:
    catalogue.stalls = 1
    code, out, err = user.models("pull", "phi-x", "--stall", "1s")
    assert code == 0 and "phi-x-generic-cpu:2: 49" in out
    assert re.search(r"the download broke off at \d+ % \(nothing came for 1 s\); again in 2 s", err)


@needs_openssl
def test_what_cannot_be_pulled_does_not_keep_the_others(user: User) -> None:
    code, out, err = user.models("pull", "nope", "phi-x")
    assert code == 3 and out.startswith("phi-x-generic-cpu:2: ")
    assert "nope: neither synthetic" in err and err.splitlines()[-1] == "loadbench: 1 of 2 not downloaded"


def test_a_device_that_the_alias_is_not_there_for_is_refused_with_those_it_is(user: User) -> None:
    code, _, err = user.models("pull", "qwen-tiny@npu")
    assert code == 3
    assert err == "loadbench: qwen-tiny@npu: for this machine the catalogue has it for @cpu, @gpu only\n"


def test_offline_one_line_says_what_to_do_and_what_is_here_is_listed(user: User, tiny: Path) -> None:
    offline = User(user.cache, NOWHERE)
    assert offline.models("add", tiny, "--id", "mine:1")[0] == 0
    code, out, err = offline.models("list")
    assert code == 0 and "mine:1" in out and "the model catalogue cannot be reached: connect to the internet" in err
    assert "name a model" not in err
    code, _, err = offline.models("pull", "phi-x")
    assert code == 3 and err.count("\n") == 1
    assert err.startswith("loadbench: phi-x: the model catalogue cannot be reached: connect to the internet")


async def test_pull_at_an_hour_says_that_it_waits_and_ends_at_ctrl_c(user: User) -> None:
    at = f"{(datetime.now().hour + 12) % 24:02}:30"
    process = await started("models", "pull", "phi-x", "--at", at, cwd=ROOT, **user.env)
    assert process.stderr is not None
    line = (await asyncio.wait_for(process.stderr.readline(), 30)).decode()
    assert re.match(rf"waiting until {at}, 1[12]:\d\d:\d\d from now; Ctrl-C ends that", line)
    process.send_signal(signal.SIGINT)
    assert (await ended(process))[0] == 130


async def test_pull_at_an_hour_refuses_at_once_a_name_that_is_nowhere(user: User) -> None:
    process = await started("models", "pull", "never-heard-of-it", "--at", "02:00", cwd=ROOT, **user.env)
    code, _, err = await ended(process)
    assert code == 3 and "waiting" not in err and "never-heard-of-it: " in err


@pytest.mark.parametrize(("at", "day", "hour"), [("02:00", 2, 2), ("23:05", 1, 23), ("14:00", 2, 14)])
def test_an_hour_is_the_next_one(at: str, day: int, hour: int) -> None:
    found = _next(at, datetime(2026, 1, 1, 14, 0, 0))
    assert (found.day, found.hour) == (day, hour)


@pytest.mark.parametrize("at", ["24:00", "2", "noon", "02:60", ""])
def test_what_is_no_time_of_day_is_refused(at: str) -> None:
    with pytest.raises(UsageError, match="--at: expected a time of day such as 02:00, got "):
        _next(at, datetime(2026, 1, 1))


def test_progress_tells_rate_and_time_left_from_what_came_since_it_began() -> None:
    pace = Pace(100 << 20)
    assert pace.told(40.0, 10.0) == ["40 %", "40 MiB of 100 MiB"]  # resumed there
    assert pace.told(60.0, 20.0) == ["60 %", "60 MiB of 100 MiB", "2 MiB/s", "0:20 left"]
    assert pace.told(10.0, 21.0) == ["10 %", "10 MiB of 100 MiB"]  # begun anew
    unsized = Pace(None)
    unsized.told(0.0, 0.0)
    assert unsized.told(50.0, 30.0) == ["50 %", "0:30 left"]


def broken(tiny: Path, folder: Path, kind: str) -> Path:
    """A copy of a model with one thing wrong."""
    shutil.copytree(tiny, folder)
    config = folder / "genai_config.json"
    match kind:
        case "no config":
            config.unlink()
        case "no json":
            config.write_text("{no")
        case "no decoder":
            config.write_text("{}")
        case "no model":
            (folder / "model.onnx").unlink()
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no config", "expected an ONNX Runtime GenAI model, found no genai_config.json in it"),
        ("no json", "genai_config.json: expected JSON: "),
        ("no decoder", "model.decoder.filename: expected the name of an ONNX file, got None"),
        ("no model", "model.onnx: expected the model that genai_config.json names, found no such file"),
        ("no tokenizer", "expected a tokenizer (tokenizer.json, "),
    ],
)
def test_a_folder_that_is_no_model_is_not_registered(
    user: User, tiny: Path, tmp_path: Path, kind: str, said: str
) -> None:
    code, _, err = user.models("add", broken(tiny, tmp_path / "b", kind), "--id", "b:1")
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (user.cache / "models.json").exists()


@pytest.mark.parametrize("model_id", ["mine", "mine:x", "mine:01", "-mine:1", "a/b:1", "synthetic-tiny:1"])
def test_an_id_that_foundry_would_not_take_is_refused(user: User, tiny: Path, model_id: str) -> None:
    code, _, err = user.models("add", tiny, f"--id={model_id}")
    assert code == 2 and err.startswith("loadbench: --id: expected ")


def test_an_id_of_another_folder_is_not_taken_over(user: User, tiny: Path, tmp_path: Path) -> None:
    assert user.models("add", tiny, "--id", "mine:1")[0] == 0
    assert user.models("add", tiny, "--id", "mine:1")[0] == 0  # the same once more
    code, _, err = user.models("add", shutil.copytree(tiny, tmp_path / "other"), "--id", "mine:1")
    assert code == 2 and f"--id: mine:1 is {tiny}: choose another version, or `models rm` it first" in err


def test_rm_forgets_a_registered_folder_and_deletes_a_download(user: User, catalogue: Catalogue, tiny: Path) -> None:
    download = put_into_cache(user.cache, catalogue.entries[2])
    user.models("add", tiny, "--id", "mine:1")
    code, out, _ = user.models("rm", "mine")
    assert code == 0 and out == f"mine:1: no longer registered; its folder stays, {tiny}\n"
    assert (tiny / "model.onnx").exists()
    code, out, _ = user.models("rm", "phi-x")
    assert code == 0 and out.startswith("phi-x-generic-cpu:2: deleted from the cache, 49")
    assert not download.exists()
    code, _, err = user.models("rm", "phi-x")
    assert code == 3
    assert err == "loadbench: phi-x: neither registered nor in the cache; `loadbench models list` shows what is\n"


def test_rm_of_a_registered_folder_says_what_it_is_called(user: User, tiny: Path) -> None:
    user.models("add", tiny, "--id", "mine:1")
    code, _, err = user.models("rm", tiny)
    assert code == 2
    assert err == f"loadbench: {tiny}: it is registered as mine:1: `loadbench models rm mine:1` forgets it\n"


def test_a_device_that_there_is_not_is_refused_before_any_network(user: User, catalogue: Catalogue) -> None:
    code, _, err = user.models("pull", "qwen-tiny@tpu")
    assert (code, err) == (2, "loadbench: qwen-tiny@tpu: expected @cpu, @gpu or @npu, got @tpu\n")
    words = ("run", "scenarios/smoke.yaml", "--model", "qwen-tiny@tpu", "--out", user.cache / "out")
    done = loadbench(*words, cwd=ROOT, **user.env)
    assert done.returncode == 2 and "qwen-tiny@tpu: expected @cpu, @gpu or @npu, got @tpu" in done.stderr
    assert catalogue.filters == []


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_the_embedded_service_is_loaded_by_a_run_or_by_serve(user: User, verb: str) -> None:
    code, _, err = user.models(verb, "phi-x")
    assert code == 2 and err.count("\n") == 1
    assert "lives as long as a run or `loadbench serve --model phi-x`: expected --endpoint URL" in err


async def asked(*words: str) -> tuple[int, str, str]:
    return await ended(await started("models", *words))


async def test_an_old_service_lists_what_it_has_and_what_it_could_download() -> None:
    async with replay("foundry-0.8") as server:
        code, out, err = await asked("list", "--endpoint", server.url, "--json")
    rows = {row["id"]: row for row in json.loads(out)["models"]}
    assert code == 0, err
    assert rows["Phi-4-mini-instruct-generic-cpu:4"]["state"] == "loaded"
    assert rows["Phi-4-mini-instruct-generic-gpu:5"]["state"] == "cached"
    assert rows["Phi-4-mini-instruct-generic-gpu:5"]["execution_provider"] == "WebGpuExecutionProvider"
    assert {row["licence"] for row in rows.values() if row["alias"]} >= {"MIT"}


async def test_a_service_older_still_lists_ids_without_a_version_and_its_wrapped_catalogue() -> None:
    async with replay("foundry-0.3") as server:
        code, out, err = await asked("list", "--endpoint", server.url)
    assert code == 0, err
    told = [
        "phi-3.5-mini",
        "Phi-3.5-mini-instruct-generic-cpu",
        "CPU",
        "CPU",
        "2.53 GiB",
        "MIT",
        "chat-completion",
        "cached",
    ]
    assert out.splitlines()[1].split("\t") == told


async def test_an_old_service_downloads_by_its_own_route_with_what_it_wants_to_be_told() -> None:
    recording = recorded("foundry-0.8")
    row = recording["answers"]["/foundry/list"][0]
    done = (
        'Total 12.50% Downloading model.onnx\nTotal 100.00% Downloading done\n{"success": true, "errorMessage": null}'
    )
    recording["answers"]["POST /openai/download"] = done
    async with replay(recording) as server:
        code, out, err = await asked("pull", "phi-4-mini@gpu", "--endpoint", server.url)
        assert (code, out.startswith("phi-4-mini@gpu: downloaded by Foundry Local 0.8 or older in ")) == (0, True), err
        [body] = server.bodies
    assert body["model"] == {
        "Name": "Phi-4-mini-instruct-generic-gpu:5",
        "Uri": row["uri"],
        "Publisher": "Microsoft",
        "ProviderType": "AzureFoundryLocal",
        "PromptTemplate": row["promptTemplate"],
    }


async def test_an_old_services_failed_download_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from loadbench.errors import TargetError
    from loadbench.target.endpoint import discover
    from loadbench.target.remote_pull import pull

    recording = recorded("foundry-0.8")
    async with replay(recording) as server:
        endpoint, seen = await discover(server.url), list[float]()
        for answer, said in (
            ('Total 3.0 %\n{"success": false, "errorMessage": "disk full"}', "disk full"),
            ("Total 3.0 %\n", "without saying how it went"),
            ({"status": 500, "text": "out of luck"}, "500: out of luck"),
        ):
            server.answers["POST /openai/download"] = answer
            with pytest.raises(TargetError, match=said):
                await pull(endpoint, "phi-4-mini@cpu", seen.append, 5.0, {})
        assert seen == [3.0, 3.0]
        with pytest.raises(TargetError, match=r"phi-4: not in the catalogue of .*; the nearest: phi-4-mini"):
            await pull(endpoint, "phi-4", seen.append, 5.0, {})


async def test_ollama_downloads_layer_by_layer() -> None:
    from loadbench.target.endpoint import discover
    from loadbench.target.remote_pull import pull

    lines = [
        {"status": "pulling manifest"},
        {"status": "pulling a", "digest": "a", "total": 300},
        {"status": "pulling a", "digest": "a", "total": 300, "completed": 300},
        {"status": "pulling b", "digest": "b", "total": 100, "completed": 50},
        {"status": "success"},
    ]
    recording = recorded("ollama")
    recording["answers"]["POST /api/pull"] = "\n".join(map(json.dumps, lines))
    async with replay(recording) as server:
        seen: list[float] = []
        await pull(await discover(server.url), "gemma3", seen.append, 5.0, {})
        assert server.bodies == [{"model": "gemma3", "stream": True}]
    assert seen == [0.0, 100.0, 87.5]


async def test_what_is_refused_for_good_is_not_tried_again() -> None:
    async with scripted(flavour="ollama", models=("gemma3:4b",)) as server:
        code, out, err = await asked("pull", "gemma3:4b", "--endpoint", server.base_url)
        assert code == 0 and out.startswith("gemma3:4b: downloaded by Ollama 0.12.6 in "), err
        code, out, err = await asked("pull", "nope", "--endpoint", server.base_url)
        failed = "loadbench: nope: the download failed at 0 %: nope: pull model manifest: file does not exist\n"
        assert (code, err) == (3, failed)
    recording = recorded("ollama")
    recording["answers"]["POST /api/pull"] = {"status": 404, "text": "no such thing"}
    async with replay(recording) as server:
        code, _, err = await asked("pull", "nope", "--endpoint", server.url)
    assert code == 3 and err.count("\n") == 1 and "404: no such thing" in err and "again in" not in err


async def test_models_of_an_old_service_are_loaded_and_unloaded_by_alias() -> None:
    recording = recorded("foundry-0.8")
    model_id = "qwen2.5-0.5b-instruct-generic-cpu:4"
    recording["answers"][f"/openai/unload/{model_id}?force=true"] = {"status": 200, "json": {}}
    async with replay(recording) as server:
        code, out, err = await asked("load", "qwen2.5-0.5b", "--endpoint", server.url)
        assert code == 0 and "by its alias; loaded in " in out, err
        code, out, err = await asked("unload", "nothing-like-it", "--endpoint", server.url)
        assert code == 3 and "no model nothing-like-it is loaded; loaded: " in err
        server.answers["/openai/loadedmodels"] = [model_id]
        code, out, err = await asked("unload", "qwen2.5-0.5b", "--endpoint", server.url)
        assert code == 0 and out.endswith(f"{model_id} unloaded\n"), err


@pytest.mark.parametrize(
    ("recording", "verb", "instead"),
    [
        ("foundry-2-public", "pull", "on its host, `foundry model download m`"),
        ("foundry-2-public", "rm", "on its host, `foundry cache remove m`"),
        ("foundry-0.8", "rm", "on its host, `foundry cache remove m`"),
        ("ollama", "rm", "on its host, `ollama rm m`"),
        ("lm-studio", "load", "on its host, `lms load m`"),
        ("lm-studio", "unload", "on its host, `lms unload m`"),
        ("lm-studio", "pull", "on its host, `lms get m`"),
        ("llama.cpp", "load", "start it anew, `llama-server --model FILE`"),
        ("llama.cpp", "rm", "remove its file from the host"),
        ("vllm", "pull", "start it anew, `vllm serve NAME`, which downloads it"),
    ],
)
async def test_what_an_api_cannot_do_is_said_in_one_line_with_what_does_it(
    recording: str, verb: str, instead: str
) -> None:
    async with replay(recording) as server:
        code, _, err = await asked(verb, "m", "--endpoint", server.url)
    assert code == 2 and err.count("\n") == 1
    what = {"pull": "download", "rm": "delete"}.get(verb, verb)
    assert f" cannot {what} a model: {instead}\n" in err


async def test_a_key_is_sent_and_one_that_is_given_comes_before_the_environments() -> None:
    async with replay("ollama") as server:
        words = ("models", "list", "--endpoint", server.url)
        assert (await ended(await started(*words, cwd=ROOT, OPENAI_API_KEY="k1")))[0] == 0
        assert server.headers["Authorization"] == "Bearer k1"
        given = ("--header", "authorization: Bearer k2")
        assert (await ended(await started(*words, *given, cwd=ROOT, OPENAI_API_KEY="k1")))[0] == 0
        assert {v for k, v in server.headers.items() if k.lower() == "authorization"} == {"Bearer k2"}
        code, _, err = await asked("list", "--endpoint", server.url, "--header", "k2")
        assert code == 2 and err == "loadbench: --header: expected 'Name: value', got no colon after a name\n"


async def test_a_service_of_today_loads_and_unloads_an_alias() -> None:
    async with replay("foundry-2-public") as server:
        server.answers["/models/unload/qwen2.5-0.5b"] = {"status": 200, "json": {"status": "unloaded"}}
        code, out, err = await asked("load", "qwen2.5-0.5b", "--endpoint", server.url)
        assert code == 0 and "qwen2.5-0.5b-instruct-cuda-gpu:4" in out, err
        code, out, err = await asked("list", "--endpoint", server.url)
        assert code == 0 and "qwen2.5-0.5b-instruct-cuda-gpu:4\tn/a" in out, err


def test_help_costs_nothing_and_names_every_verb() -> None:
    done = loadbench("models", "--help")
    assert done.returncode == 0
    for verb in ("list", "pull", "load", "unload", "add", "rm"):
        assert re.search(rf"^  {verb} ", done.stdout, re.MULTILINE)
