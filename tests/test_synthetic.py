"""The synthetic models as files: made once, whole, the same for everybody, and only when they are needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from loadbench.errors import UsageError
from loadbench.target import synthetic_graph
from loadbench.target.synthetic import SYNTHETIC, ensure

SMALL_ENGINE = replace(SYNTHETIC["batching"], hidden=64, layers=2, heads=4, feed_forward=128)


def test_a_model_is_made_once(tmp_path: Path) -> None:
    graph = ensure("tiny", tmp_path).path / "model.onnx"
    made = graph.stat()
    again = ensure("tiny", tmp_path).path / "model.onnx"
    assert again == graph
    assert (again.stat().st_ino, again.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_two_processes_that_make_a_model_at_once_both_get_it_and_leave_nothing_else(tmp_path: Path) -> None:
    program = (
        "import onnx, sys, pathlib; from loadbench.target.synthetic import ensure\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(ensure('tiny', pathlib.Path(sys.argv[1])).path)"
    )
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for maker in makers:
        assert maker.stdout is not None and maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("\n")
        maker.stdin.flush()
    answers = {maker.communicate(timeout=30)[0].strip() for maker in makers}
    assert [maker.returncode for maker in makers] == [0, 0]
    assert [str(path) for path in (tmp_path / "synthetic").iterdir()] == list(answers)


def test_another_recipe_under_the_same_name_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ensure("tiny", tmp_path)
    monkeypatch.setitem(SYNTHETIC, "tiny", replace(SYNTHETIC["tiny"], seed=1))
    assert ensure("tiny", tmp_path).path != before.path


@pytest.mark.parametrize("recipe", [SYNTHETIC["tiny"], SMALL_ENGINE], ids=["generator", "engine"])
def test_the_same_recipe_gives_the_same_bytes(recipe: synthetic_graph.Recipe, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        synthetic_graph.write(recipe, folder)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("recipe", [SYNTHETIC["tiny"], SMALL_ENGINE], ids=["generator", "engine"])
def test_the_parameters_told_are_the_weights_in_the_graph(recipe: synthetic_graph.Recipe, tmp_path: Path) -> None:
    synthetic_graph.write(recipe, tmp_path)
    weights = [w for w in onnx.load(tmp_path / "model.onnx").graph.initializer if w.name.startswith("weight")]
    assert synthetic_graph.parameters(recipe) == sum(onnx.numpy_helper.to_array(weight).size for weight in weights)


def test_a_pool_of_blocks_holds_as_many_full_requests_as_a_batch_has() -> None:
    for name, recipe in SYNTHETIC.items():
        if (pool := recipe.batching) and name != "wedge":
            assert pool.block_size * pool.num_blocks >= pool.max_batch_size * recipe.context_length


def test_two_requests_that_fit_the_wedging_pool_one_by_one_do_not_fit_it_together() -> None:
    pool = SYNTHETIC["wedge"].batching
    assert pool is not None
    tokens = pool.block_size * pool.num_blocks
    assert 24 + 200 <= tokens < 2 * (24 + 200)


@pytest.mark.parametrize("name", ["kv", "kv-growing"])
def test_a_model_to_measure_memory_with_is_small_on_disk_and_large_in_use(name: str, tmp_path: Path) -> None:
    model = ensure(name, tmp_path)
    assert sum(file.stat().st_size for file in model.path.iterdir()) < 10e6
    assert model.kv_bytes_per_token == 16 * 2 * 2 * 64 * 4 == 16 << 10
    assert model.context_length >= 8192


def test_an_unknown_name_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"synthetic:huge: expected one of tiny, broken, edge, batching, kv, kv-growing, wedge, got 'huge'",
    ):
        ensure("huge", tmp_path)


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"cache/synthetic/tiny-\w+: expected a place to write a model to, got Not a "):
        ensure("tiny", tmp_path / "cache")


def test_what_makes_and_serves_models_is_not_imported_before_it_is_used() -> None:
    program = (
        "import sys, loadbench.target.synthetic, loadbench.target.foundry\n"
        "print([name for name in ('onnx', 'numpy', 'foundry_local_sdk') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"
