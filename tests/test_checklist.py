"""The checklist of `check --probe`: what it finds amiss, and the cure that it names."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadbench.checklist import Checklist
from loadbench.errors import TargetError, UsageError
from loadbench.outcomes import OUTCOMES
from loadbench.report.checklist import Item, Telling, as_json
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.target.endpoint import discover
from loadbench.target.fake import Script, serve
from loadbench.target.foundry import cache_dir
from loadbench.target.models import list_models
from loadbench.target.synthetic import ensure
from loadbench.target.unreachable import USUAL_PORTS, cure_of
from tests.asking import STREAM, answering, listening, scripted
from tests.catalogue import Entry, needs_openssl, serving
from tests.command import environment, loadbench
from tests.endpoint_replay import at_socket, recorded, replay

CHAT = "POST /v1/chat/completions"
QUICK = "deadlines: {first_token: 300ms, total: 600ms}"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "API_KEY"):
        monkeypatch.delenv(name, raising=False)


async def checked(folder: Path, endpoint: str, *lines: str) -> list[Item]:
    """The answers for a scenario with these lines."""
    path = folder / "scenario.yaml"
    path.write_text("\n".join(["schema: 1", f"endpoint: {endpoint}", *lines]) + "\n")
    telling = Telling(as_json=True)
    await Checklist(load_scenario(path, Overrides(), {}), telling).go()
    return telling.items


def marks(items: list[Item]) -> dict[str, str]:
    """The marks of the model's questions."""
    return {item.question: item.mark for item in items if item.model is not None}


def of(items: list[Item], question: str) -> Item:
    [item] = [item for item in items if item.question == question and (item.model is not None or len(items) == 1)]
    return item


def answer(**usage: int) -> dict[str, Any]:
    """A chat's answer in one piece."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello there"}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 4, **usage}}


# --- what a model does -----------------------------------------------------------------------------------------------


async def test_a_server_that_does_all_has_no_answer_that_is_no(tmp_path: Path) -> None:
    async with scripted(tokens=8) as server:
        items = await checked(tmp_path, server.base_url)
    assert items[0].told == f"OpenAI-compatible server at {server.base_url}"
    assert marks(items) == {
        "is there": "yes", "disk": "none", "memory": "unknown", "loads": "none",
        "answers": "yes", "streams": "yes", "usage": "yes",
    }  # fmt: skip
    assert of(items, "streams").told == "8 events with content"


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ("model_not_found", OUTCOMES["model_not_found"].advice),
        ("model_not_loaded", OUTCOMES["model_not_loaded"].advice),
        ("out_of_memory", OUTCOMES["out_of_memory"].advice),
        ("out_of_memory_stream", OUTCOMES["out_of_memory"].advice),
        ("engine_failed_stream", OUTCOMES["engine_failed"].advice),
        ("stream_error", "read what it says; its log has more"),
        ("crash", OUTCOMES["connection_lost"].advice),
        ("protocol_html", OUTCOMES["protocol"].advice),
    ],
)
async def test_a_model_that_does_not_answer_has_its_reason_and_the_outcomes_advice(
    tmp_path: Path, fault: str, cure: str
) -> None:
    async with scripted(faults=(fault,)) as server:
        items = await checked(tmp_path, server.base_url)
    assert marks(items)["answers"] == "no" and of(items, "answers").cure == cure
    assert (marks(items)["streams"], marks(items)["usage"]) == ("unknown", "unknown")


async def test_keep_alives_for_ever_end_at_the_deadline(tmp_path: Path) -> None:
    async with scripted(faults=("first_token_deadline",), keep_alive_ms=20) as server:
        item = of(await checked(tmp_path, server.base_url, QUICK), "answers")
    assert item.mark == "no" and item.told.startswith(OUTCOMES["first_token_deadline"].meaning)
    assert item.cure is not None and "cold load" in item.cure


async def test_a_server_that_counts_no_tokens_is_told_so(tmp_path: Path) -> None:
    async with scripted(usage=False) as server:
        items = await checked(tmp_path, server.base_url)
    assert marks(items) | {"usage": "no"} == marks(items)
    assert marks(items)["answers"] == "yes"


async def test_a_server_that_answers_a_stream_in_one_piece_streams_not(tmp_path: Path) -> None:
    async with replay({"answers": {"/v1/models": {"data": [{"id": "m"}]}, CHAT: answer()}}) as server:
        items = await checked(tmp_path, server.url)
    assert (marks(items)["answers"], marks(items)["streams"], marks(items)["usage"]) == ("yes", "no", "yes")
    assert "request.stream to false" in (of(items, "streams").cure or "")


@pytest.mark.parametrize(
    ("usage", "told"),
    [({"completion_tokens": 9999}, "9 tokens in, 9999 out, though at most 8 were asked for"), ({}, None)],
)
async def test_a_server_that_lies_about_its_tokens_is_not_believed(
    tmp_path: Path, usage: dict[str, int], told: str | None
) -> None:
    async with replay({"answers": {"/v1/models": {"data": [{"id": "m"}]}, CHAT: answer(**usage)}}) as server:
        items = await checked(tmp_path, server.url, "request: {stream: false}")
    assert marks(items)["streams"] == "none"
    assert marks(items)["usage"] == ("no" if told else "yes")
    assert told is None or of(items, "usage").told == told


async def test_a_model_that_is_not_there_has_the_nearest_names(tmp_path: Path) -> None:
    async with scripted(models=("qwen2.5-0.5b:4", "phi-4-mini:5")) as server:
        items = await checked(tmp_path, server.base_url, "models: [qwen2.5, phi-4-mini]")
    missing = [item for item in items if item.model == "qwen2.5"]
    assert [item.mark for item in missing] == ["no"] + ["unknown"] * 6
    assert "the nearest of 2: qwen2.5-0.5b:4" in missing[0].told
    assert missing[0].cure == OUTCOMES["model_not_found"].advice
    assert next(item for item in items if item.model == "phi-4-mini" and item.question == "answers").mark == "yes"


def test_what_cannot_be_told_for_one_reason_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    telling = Telling()
    telling.tell(*(Item("m", question, "unknown", "it is not there") for question in ("disk", "memory", "loads")))
    assert capsys.readouterr().out == "\nm\n  ? disk, memory, loads: it is not there\n"
    assert telling.end() == 0 and capsys.readouterr().out == "\n3 ?\n"


async def test_what_was_loaded_stays_loaded_and_what_was_not_is_unloaded_again(tmp_path: Path) -> None:
    models = ("alpha:1", "beta:1")
    async with scripted(flavour="foundry2", prefix="/catalogs/local", models=models, loaded=models[:1]) as server:
        items = await checked(tmp_path, server.base_url, "models: [alpha, beta]")
        loaded = [model.id for model in await list_models(await discover(server.base_url)) if model.loaded]
    told = {item.model: item.told for item in items if item.question == "loads"}
    assert told["alpha"] == "it is loaded" and (told["beta"] or "").startswith("cold in ")
    assert loaded == ["alpha:1"] and all(item.mark != "no" for item in items)


async def test_one_model_by_two_names_is_asked_once(tmp_path: Path) -> None:
    async with scripted(models=("alpha:1",)) as server:
        items = await checked(tmp_path, server.base_url, "models: [alpha, 'alpha:1']")
    assert [item.mark for item in items if item.model == "alpha:1"] == ["no"] + ["unknown"] * 6


async def test_a_model_of_an_old_foundry_is_loaded_asked_and_unloaded(tmp_path: Path) -> None:
    recording, model = recorded("foundry-0.8"), "qwen2.5-0.5b-instruct-generic-cpu:4"
    loaded = recording["answers"]["/openai/loadedmodels"]
    recording["answers"] |= {
        CHAT: answer(),
        f"/openai/load/{model}?ttl=86400": {},
        f"/openai/unload/{model}?force=true": {},
        "/openai/loadedmodels": [loaded, loaded, loaded, [*loaded, model]],
    }
    async with replay(recording) as server:
        items = await checked(tmp_path, server.url, "models: [qwen2.5-0.5b]", "request: {stream: false}")
        asked = [path for path in server.asked if "load/" in path or path == CHAT]
    assert marks(items)["loads"] == marks(items)["answers"] == "yes"
    assert asked == [f"/openai/load/{model}?ttl=86400", CHAT, f"/openai/unload/{model}?force=true"]


async def test_who_breaks_off_while_a_model_is_loaded_leaves_it_unloaded(tmp_path: Path) -> None:
    recording, model = recorded("foundry-0.8"), "qwen2.5-0.5b-instruct-generic-cpu:4"
    loaded = recording["answers"]["/openai/loadedmodels"]
    recording["answers"] |= {
        f"/openai/load/{model}?ttl=86400": {},
        f"/openai/unload/{model}?force=true": {},
        "/openai/loadedmodels": [loaded, loaded, loaded, [*loaded, model]],
    }

    class BrokenOff(dict[str, Any]):
        def get(self, path: str, otherwise: Any = None) -> Any:
            if "/openai/load/" in path:
                check.cancel()
            return super().get(path, otherwise)

    async with replay(recording) as server:
        server.answers = BrokenOff(server.answers)
        check = asyncio.create_task(checked(tmp_path, server.url, "models: [qwen2.5-0.5b]"))
        with pytest.raises(asyncio.CancelledError):
            await check
    assert f"/openai/unload/{model}?force=true" in server.asked


async def test_a_model_that_an_old_foundry_could_download_has_the_command_for_it(tmp_path: Path) -> None:
    recording = recorded("foundry-0.8")
    recording["answers"]["/openai/models"] = ["Phi-4-mini-instruct-generic-cpu:4"]
    async with replay(recording) as server:
        item = of(await checked(tmp_path, server.url, "models: [qwen2.5-0.5b]"), "is there")
    pull = f"`loadbench models pull qwen2.5-0.5b --endpoint {server.url}/v1`"
    assert (item.mark, item.cure) == ("no", f"it is in the catalogue: {pull}")


async def test_a_model_larger_than_the_memory_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text(json.dumps({"alpha": {"capabilities": [], "size_mb": 10**7}}))
    async with scripted(flavour="foundry2", prefix="/catalogs/local", models=("alpha:1",), loaded=()) as server:
        items = await checked(tmp_path, server.base_url, "models: [alpha]", "models_file: models.json")
    assert marks(items)["memory"] == "no" and "free there" in of(items, "memory").told
    assert {marks(items)[question] for question in ("loads", "answers", "streams", "usage")} == {"unknown"}


async def test_a_memory_probe_that_is_not_there_is_named_with_its_command(tmp_path: Path) -> None:
    async with scripted() as server:
        items = await checked(tmp_path, server.base_url, "target_probe: http://127.0.0.1:1")
    [item] = [item for item in items if item.question == "memory probe"]
    assert item.mark == "no" and "loadbench probe" in (item.cure or "")


# --- where it is -----------------------------------------------------------------------------------------------------


async def test_a_key_that_is_missing_and_one_that_is_refused_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve(Script(first_token_ms=1, gap_ms=1), token="right")
    try:
        missing = await checked(tmp_path, server.base_url)
        monkeypatch.setenv("API_KEY", "wrong")
        refused = await checked(tmp_path, server.base_url)
        monkeypatch.setenv("API_KEY", "right")
        assert marks(await checked(tmp_path, server.base_url))["answers"] == "yes"
    finally:
        await server.close()
    assert (missing[0].cure or "").startswith("no key was sent")
    assert (refused[0].cure or "").startswith("the key that was sent is refused")
    assert "wrong" not in f"{refused}"


async def test_a_key_that_only_the_chat_asks_for_is_told(tmp_path: Path) -> None:
    refusal = {"status": 401, "json": {"error": {"message": "who are you?"}}}
    async with replay({"answers": {"/v1/models": {"data": [{"id": "m"}]}, CHAT: refusal}}) as server:
        item = of(await checked(tmp_path, server.url), "answers")
        assert server.asked.count(CHAT) == 1
    assert item.mark == "no" and (item.cure or "").startswith("no key was sent")


async def test_a_wrong_path_is_told_with_the_right_one(tmp_path: Path) -> None:
    async with replay({"answers": {"/v1/models": {"data": [{"id": "m"}]}}}) as server:
        [item] = await checked(tmp_path, f"{server.url}/api/v3")
    assert item.cure == f"the path is wrong: OpenAI-compatible server answers at {server.url}/v1"


def _free_usual_port() -> int:
    for port in USUAL_PORTS:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    pytest.skip("every usual port is taken on this machine")


async def test_a_wrong_port_is_told_with_the_local_one_that_answers(tmp_path: Path) -> None:
    server = await serve(Script(), port=(port := _free_usual_port()))
    try:
        [item] = await checked(tmp_path, "http://127.0.0.1:1")
    finally:
        await server.close()
    assert item.mark == "no" and item.told.endswith(": connection refused")
    assert f"OpenAI-compatible server answers at http://localhost:{port}/v1" in (item.cure or "")


@pytest.mark.skipif(sys.platform != "linux", reason="a process takes a name of its own by prctl")
async def test_a_foundry_process_is_found_on_whichever_port_it_listens(tmp_path: Path) -> None:
    code = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"foundrylocal", 0, 0, 0)
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"endpoints": [], "modelCachePath": "/models"}' if self.path == "/status" else b"{}"
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
server = HTTPServer(("127.0.0.1", 0), Answers)
print(server.server_port, flush=True)
server.serve_forever()
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        [item] = await checked(tmp_path, "http://127.0.0.1:1")
    finally:
        process.kill()
        await process.communicate()
    assert f"Foundry Local 2 answers at http://localhost:{port}/v1" in (item.cure or "")


def _self_signed(folder: Path) -> ssl.SSLContext:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return tls


@needs_openssl
async def test_tls_against_plain_is_told_either_way(tmp_path: Path) -> None:
    async with listening(answering(STREAM), _self_signed(tmp_path)) as port:
        [plain] = await checked(tmp_path, f"http://localhost:{port}")
    async with scripted() as server:
        [secure] = await checked(tmp_path, server.base_url.replace("http:", "https:"))
    assert plain.cure == "it speaks TLS: write https:// in the URL"
    assert secure.cure == "it speaks HTTP without TLS: write http:// in the URL"


async def test_a_silent_server_is_told_to_be_started_anew() -> None:
    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with at_socket(nothing) as url:
        with pytest.raises(TargetError) as caught:
            await discover(url, timeout_s=0.1)
        cure = await cure_of(url, caught.value, {})
    assert cure.startswith("something takes connections there and says nothing") or "answers at" in cure


@pytest.mark.parametrize(
    ("cause", "word"),
    [
        (ConnectionRefusedError(), "bound to loopback"),
        (TimeoutError(), "firewall"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "Local Network"),
        (socket.gaierror(-2, "Name or service not known"), "spelling"),
    ],
)
async def test_another_host_that_refuses_is_silent_or_has_no_way_to_it_has_a_cure_of_its_own(
    cause: OSError, word: str
) -> None:
    error = TargetError("no")
    error.__cause__ = cause
    cure = await cure_of("http://192.0.2.7:5273/v1", error, {})
    assert word in cure
    if word != "spelling":
        assert cure.endswith("docs/remote-windows.md")
    assert (Path(__file__).parent.parent / "docs" / "remote-windows.md").exists()


# --- the embedded service, and the command ---------------------------------------------------------------------------


def test_the_embedded_service_loads_asks_and_tells_of_a_broken_model(tmp_path: Path) -> None:
    words = ("check", "scenarios/smoke.yaml", "--probe", "--model", "synthetic:broken", "--model", "synthetic:tiny")
    shown = loadbench(*words)
    assert shown.returncode == 3 and shown.stderr == ""
    assert shown.stdout.startswith("\nEndpoint\n")  # and no plan before it
    head, broken, tiny = shown.stdout.split("\nsynthetic:")
    assert "  ✓ answers: Foundry Local 2 at http://127.0.0.1:" in head
    assert "  ✗ loads: Foundry Local 2 refused to load it" in broken and " → " in broken
    assert "  ? answers, streams, usage: it cannot be loaded\n" in broken
    lines = tiny.splitlines()
    assert [line[2] for line in lines[1:8]] == ["✓", "–", "✓", "✓", "✓", "✓", "✓"]
    assert "cold in" in lines[4] and lines[7].endswith(" tokens in, 8 out")
    assert lines[-1] == "9 ✓, 1 ✗, 2 –, 3 ?"


async def test_a_model_larger_than_the_memory_limit_is_told_to_raise_it(tmp_path: Path) -> None:
    items = await checked(tmp_path, "embedded", "models: ['synthetic:edge']", "memory_limit: 100MiB")
    item = of(items, "memory")
    assert item.mark == "no" and item.told.endswith("left of its limit") and "memory_limit" in (item.cure or "")
    assert marks(items)["loads"] == "unknown"


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    shown = loadbench("check", "scenarios/smoke.yaml", "--probe", "--json", "--model", "synthetic:tiny")
    document = json.loads(shown.stdout)
    assert (shown.returncode, document["ok"]) == (0, True)
    assert {check["mark"] for check in document["checks"]} == {"yes", "none"}
    assert set(document["checks"][0]) == {"model", "question", "mark", "told", "cure"}


def test_a_scenario_that_no_run_would_take_exits_with_2(tmp_path: Path) -> None:
    for words in (
        ("--json",),
        ("--probe", "--model", "synthetic:none"),
        ("--probe", "--json", "--model", "synthetic:none"),
    ):
        shown = loadbench("check", "scenarios/smoke.yaml", *words)
        assert shown.returncode == 2 and shown.stderr.count("\n") == 1, words


@needs_openssl
async def test_a_model_that_is_still_to_be_downloaded_is_told_with_the_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ensure("broken", tmp_path / "made").path
    monkeypatch.setenv("LOADBENCH_CACHE", str(tmp_path / "cache"))
    with serving([Entry("phi-x-generic-cpu", "phi-x", large, 2)], tmp_path) as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        begun = cache_dir() / "catalog" / "Contoso" / "phi-x-generic-cpu-2"
        begun.mkdir(parents=True)
        (begun / "model.onnx").write_bytes(bytes(200_000))
        items = await checked(tmp_path, "embedded", "models: [phi-x]")
    item = of(items, "disk")
    assert item.mark == "yes" and "broke off" in item.told and "loadbench models pull phi-x" in (item.cure or "")
    assert {marks(items)[question] for question in ("loads", "answers", "streams", "usage")} == {"unknown"}


async def test_what_a_server_sends_cannot_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "m\x1b]0;owned\x07\x9b31m\u202e"
    refusal = {"status": 400, "json": {"error": {"message": f"no \x1b[2J{evil}"}}}
    (tmp_path / "scenario.yaml").write_text("schema: 1\n")
    async with replay({"answers": {"/v1/models": {"data": [{"id": evil}]}, CHAT: refusal}}) as server:
        items = await checked(tmp_path, server.url)
    telling = Telling()
    for item in items:
        telling.tell(item)
    telling.end()
    shown = capsys.readouterr().out + json.dumps(as_json(items), ensure_ascii=False)
    assert "owned" in shown and "[2J" in shown
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


async def test_a_synthetic_model_at_an_endpoint_is_the_scenarios_fault(tmp_path: Path) -> None:
    async with scripted() as server:
        with pytest.raises(UsageError, match="made for the embedded service"):
            await checked(tmp_path, server.base_url, "models: ['synthetic:tiny']")


async def test_a_terminal_is_told_what_takes_longer_than_two_seconds(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="Windows has no such terminal")
    path, (ours, theirs) = tmp_path / "scenario.yaml", pty.openpty()
    async with scripted(first_token_ms=3500) as server:
        path.write_text(f"schema: 1\nendpoint: {server.base_url}\n")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadbench", "check", str(path), "--probe"),
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=environment(PYTHONPATH=str(Path(__file__).parent.parent), TERM="xterm"),
        )
        out, _ = await process.communicate()
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert process.returncode == 0 and "first token after 3.5" in out.decode()
    assert "fake-model:1 answers a test prompt" in shown
