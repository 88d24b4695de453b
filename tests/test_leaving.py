"""What a command leaves behind of the models that it has had loaded, on the real Foundry Local, and names as paths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loadbench.errors import TargetError, UsageError
from loadbench.order import Order
from loadbench.report.live import choose_view
from loadbench.runner import Run
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.target.chosen import folder_of
from loadbench.target.models import ensure_loaded, list_models
from loadbench.target.register import Register
from loadbench.target.target import Target
from tests.command import ended, started
from tests.endpoint_replay import recorded, replay
from tests.quality import FIRST, answer
from tests.test_choose import IDS, NAMES, QUALITY, interrupted, write
from tests.test_quality_cli import run_with

TINY, _, KV = IDS


@pytest.fixture
async def service() -> AsyncIterator[Target]:
    target = await Target.embedded(NAMES, "test")
    try:
        yield target
    finally:
        await target.close()


async def loaded(target: Target) -> set[str]:
    assert target.foundry is not None
    return {model.id for model in await list_models(target.endpoint, base_url=target.foundry.base_url) if model.loaded}


async def test_a_load_that_was_not_waited_for_is_unloaded_when_it_ends(
    service: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, f'"{TINY}"', f'"{KV}"')
    monkeypatch.setitem(ensure_loaded.__kwdefaults__ or {}, "timeout_s", 0.005)
    scenario = load_scenario(tmp_path / "s.yaml", Overrides(endpoint=service.endpoint.url), {})
    run = Run(Order(scenario, tmp_path, tmp_path / "out", "", {}), choose_view(quiet=True, keep=False))
    with pytest.raises(TargetError, match="no answer within"):
        await run.execute()
    for _ in range(10):  # that something does not happen takes a while to see
        assert await loaded(service) == set()
        await asyncio.sleep(0.1)


async def test_a_second_ctrl_c_leaves_nothing_loaded(service: Target, tmp_path: Path) -> None:
    write(tmp_path, f'"{TINY}"', f'"{KV}"', more=QUALITY)
    (tmp_path / "prompts.json").write_text('[{"prompt": "x", "max_tokens": 2}, "for long"]', encoding="utf-8")
    words = ("--endpoint", service.endpoint.url, "--set", "quality.max_tokens=1500", "--set", "quality.repeats=50")
    code, err = await interrupted(tmp_path, tmp_path / "out" / "answers.jsonl", *words, times=2)
    assert code == 130, err
    assert await loaded(service) == set()


@pytest.mark.parametrize("refusals", [1, 1000])
async def test_a_judge_that_cannot_be_unloaded_at_once_is_later_or_is_told_and_the_marks_are_there(
    tmp_path: Path, refusals: int
) -> None:
    folder = run_with(tmp_path, [answer(FIRST, 0)])
    recording, model = recorded("foundry-0.8"), "qwen2.5-0.5b-instruct-generic-cpu:4"
    before, unload = recording["answers"]["/openai/loadedmodels"], f"/openai/unload/{model}?force=true"
    said = {"message": {"role": "assistant", "content": '{"mark": 4, "reason": "r"}'}, "finish_reason": "stop"}
    recording["answers"] |= {
        "POST /v1/chat/completions": {"choices": [said]},
        f"/openai/load/{model}?ttl=86400": {},
        unload: {},
        "/openai/loadedmodels": [before, before, [*before, model]],
    }

    class Refusing(dict[str, Any]):
        def get(self, path: str, otherwise: Any = None) -> Any:
            busy = path == unload and server.asked.count(unload) <= refusals
            return {"status": 400, "text": "a session is in use"} if busy else super().get(path, otherwise)

    async with replay(recording) as server:
        server.answers = Refusing(server.answers)
        words = ("quality", "judge", folder, "--model", "qwen2.5-0.5b", "--endpoint", server.url)
        code, out, err = await ended(await started(*words))
    assert code == 0 and "Results" in out, err
    assert server.asked.count(unload) > 1
    assert (f"{model} stays loaded: " in err) is (refusals > 1)


def test_a_home_of_nobody_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"~nouser-here.x: expected a folder, found no"):
        folder_of("~nouser-here/x", tmp_path)
    with pytest.raises(UsageError, match=r"~nouser-here.x: expected a folder, found no"):
        Register(tmp_path).add("a:1", Path("~nouser-here/x"))


def test_a_folder_that_happens_to_be_called_like_a_model_is_not_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("phi-4-mini").mkdir()
    assert folder_of("phi-4-mini", tmp_path) is None
    for path in ("C:\\missing", "missing/model", "./phi-4-mini"):
        with pytest.raises(TargetError, match="expected a"):
            folder_of(path, tmp_path)
    with pytest.raises(TargetError, match="expected the name of a model"):
        folder_of(" ", tmp_path)
