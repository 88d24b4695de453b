"""The house: who may import whom, one door for each dependency, nothing heavy at the start, no room too large."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "loadbench"
ROOMS = ("scenario", "target", "engine", "analysis", "report")
PLAIN = {"records", "outcomes", "errors", "files", "hdr", "platform"}
ABOVE = {
    "api",
    "api_run",
    "order",
    "runner",
    "slots",
    "shards",
    "shard_facts",
    "merge_cli",
    "course",
    "lineup",
    "keep_warm",
    "afresh",
    "aftermath",
    "vigil",
    "stall",
    "hosts",
    "journal",
    "progress",
    "calibrate",
    "checklist",
    "chronicle",
    "clean_cli",
    "commands",
    "compare_cli",
    "nightly",
    "nightly_compare",
    "trend_cli",
    "repeats",
    "quality_answers",
    "models_cli",
    "quality_cli",
    "quality_judge",
    "quality_mark",
    "cli",
    "__main__",
}

DOORS = {
    "foundry_local_sdk": {"target/foundry_child.py"},
    "onnx": {"target/synthetic.py", "target/synthetic_graph.py"},
    "hdrh": {"hdr.py"},
    "psutil": {
        *("target/processes.py", "target/memory.py", "target/foundry.py", "engine/pulse.py", "engine/environment.py"),
        "calibrate.py",
    },
    "httptools": {"engine/client.py", "target/fake.py", "target/fake_wire.py"},
    "aiohttp": {"target/control.py"},
    "opentelemetry": {"report/otlp.py"},
    "pynvml": {"target/memory_gpu.py"},
    "ray": {"engine/cluster.py"},
    "ruptures": {"analysis/trend.py"},
    "vl_convert": {"report/plots.py"},
    "pydantic": None,
    "yaml": {"scenario/reading.py", "scenario/load.py", "report/markdown.py"},
    "rich": None,
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def where(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def rank(module: str) -> int:
    """How far to the right a module of ours stands: 0 is plain, then the rooms, then what is above all."""
    part = module.removeprefix("loadbench").strip(".").split(".")[0]
    if part in ROOMS:
        return 1 + ROOMS.index(part)
    if part in ABOVE or part == "__init__":  # the package's own names come from above, when they are asked for
        return 1 + len(ROOMS)
    return 0


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_a_module_imports_only_from_its_own_room_rooms_to_its_left_and_the_plain_modules(path: Path) -> None:
    mine = rank("loadbench." + where(path).removesuffix(".py").replace("/", "."))
    for name in imports(path):
        if name.startswith("loadbench."):
            assert rank(name) <= mine, f"{where(path)} imports {name}"


def test_the_plain_modules_are_those_of_the_picture() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")}
    assert found == PLAIN | ABOVE | {"__init__"}
    picture = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    for name in (PLAIN | ABOVE - {"__main__"}) | set(ROOMS):
        assert name in picture, f"the package docstring does not show {name}"


@pytest.mark.parametrize("package", sorted(name for name, doors in DOORS.items() if doors is not None))
def test_each_dependency_has_one_door(package: str) -> None:
    doors = DOORS[package] or set()
    users = {where(path) for path in MODULES if any(n.split(".")[0] == package for n in imports(path))}
    assert users, f"nothing uses {package}"
    assert {user for user in users if not any(user.startswith(door) for door in doors)} == set()


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_no_module_is_too_long_and_every_one_says_what_its_job_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    if text:
        assert ast.get_docstring(ast.parse(text)), f"{where(path)} has no docstring"


def test_no_function_is_too_long() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 60, f"{where(path)}: {node.name} has {lines} lines"


def test_no_class_is_named_for_what_it_is_not() -> None:
    empty = ("Manager", "Factory", "Handler", "Processor", "Strategy", "Base", "Mixin", "Service", "Util")
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not any(word in node.name for word in empty), f"{where(path)}: {node.name}"


HEAVY = {"ruptures", "ray", "vl_convert", "scipy", "onnx", "foundry_local_sdk", "onnxruntime", "pandas", "matplotlib"}


def test_neither_help_nor_the_start_of_a_run_pays_for_what_it_does_not_use() -> None:
    told = "import sys, {0}; print(*sorted({{n.split('.')[0] for n in sys.modules}} & {1!r}))"
    helped = "from loadbench.cli import main; main(['--help'], standalone_mode=False); " + told
    ours = HEAVY | {"numpy", "pydantic", "aiohttp"}
    for code in (
        told.format("loadbench.cli", ours),
        helped.format("click", ours),
        told.format("loadbench.runner", HEAVY),
    ):
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert shown.splitlines()[-1] == "", f"{code} loads {shown}"
