"""The pages: what they tell people to type runs, what they show is read by the program, what they link to is there.

The blocks of docs/python.md are run by ``test_api``; tables that are made from the code are held by ``test_made``.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from loadbench.analysis import cautions
from loadbench.analysis.night import OUTCOMES as CODES
from loadbench.analysis.verdict import STATES
from loadbench.cli import main
from loadbench.commands import load
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.scenario.quality_prompts import read_quality_prompts
from tests import made
from tests.command import ROOT, environment
from tests.test_house import PLAIN, ROOMS

README = ROOT / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in
         (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str


@dataclass(frozen=True)
class Typed:
    """A command line of a page: what stands before it as ``NAME=VALUE``, the program, and its words."""

    page: str
    line: str
    variables: dict[str, str]
    program: str
    words: tuple[str, ...]


def _blocks() -> Iterator[Block]:
    for page, text in PAGES.items():
        for indent, language, body in re.findall(r"^( *)```(\w*)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
            yield Block(page, language, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE))


def _typed() -> Iterator[Typed]:
    for block in BLOCKS:
        if block.language not in ("sh", "console", "powershell"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.replace("\\", "/") if block.language == "powershell" else line.removeprefix("$ ")
            words = shlex.split(re.split(r"(?<!\S)(?:&|\|\|.*)(?!\S)", line)[0], comments=True)
            count = next((place for place, word in enumerate(words) if not re.match(r"\w+=", word)), len(words))
            variables = dict(word.split("=", 1) for word in words[:count])
            if words[count:] and (program := words[count].split("/")[-1]) in ("loadbench", "make"):
                yield Typed(block.page, line.strip(), variables, program, tuple(words[count + 1 :]))


BLOCKS = [*_blocks()]
TYPED = [*_typed()]

NOT_RUN = {
    r"^make ": "makes an environment of its own; CI runs `make test`. That the target is there is tested",
    r"^run (?!.*127\.0\.0\.1:9333/v1 --concurrency)": "minutes, or a model or host of one's own: its scenario and its"
    " flags are loaded as `check` would",
    r"^calibrate": "twenty seconds; test_calibrate",
    r"^fake --port (?!9333)|^probe": "a server that nothing here asks; test_fake_server, test_probe",
    r"^models (pull|list|add|rm)": "Foundry's catalogue, or a folder of one's own; test_models_cli",
    r"^quality (collect|judge)": "asks a model; test_quality_cli",
    r"^quality mark": "asks a person; test_quality_cli",
    r"^report .*--export otlp": "sends to a collector; test_exports",
    r"^report .*--weights": "ranks models, and the run here has one; test_choose",
    r"^compare .*--gate": "refuses what has too few runs; test_compare",
    r"^nightly": "minutes; test_nightly",
    r"^merge": "shards from several machines; test_merge",
    r"^trend nightly-chat": "of a scenario that was not run here; test_trend",
    r"^check .*--probe --model|^check scenarios/choose.yaml --probe": "models of one's own, or an embedded service;"
    " test_checklist",
}
"""Commands of the pages that no test here runs, and why not. All are parsed by the command line itself."""

EXITS = {"--assert": (0, 94, 99)}
"""Where another exit code than 0 is right: a gate that this short run cannot pass."""

NOT_SCENARIOS = {"docs/nightly.md": "a workflow of GitHub's", "docs/distributed.md": "a Job of Kubernetes'"}


def told(command: Typed) -> str:
    return shlex.join(command.words) if command.program == "loadbench" else f"make {shlex.join(command.words)}"


def is_run(command: Typed) -> bool:
    return not any(re.search(pattern, told(command)) for pattern in NOT_RUN)


def found(command: Typed) -> click.Context:
    """The command as the command line understands it, its arguments parsed."""
    name, arguments = command.words[0], [*command.words[1:]]
    group: click.Command | None = main.get_command(click.Context(main), name)
    while isinstance(group, click.Group):
        group = group.get_command(click.Context(group), name := arguments.pop(0))
    assert group is not None, f"there is no command {name}"
    return group.make_context(name, arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory as the pages take one for granted: scenarios, and runs of a scripted endpoint.

    The run is made by the recipe of docs/client.md, letter by letter but for its port and its directory.
    """
    folder = tmp_path_factory.mktemp("place")
    (folder / "scenarios").symlink_to(ROOT / "scenarios")
    [serve] = {command.words for command in TYPED if command.line.startswith("loadbench fake --port 9333")}
    [measure] = {command.words for command in TYPED if is_run(command) and command.words[0] == "run"}
    run = [sys.executable, "-m", "loadbench"]
    env = environment(PYTHONPATH=str(ROOT))
    served = [*run, *(word.replace("9333", "0") for word in serve)]
    with subprocess.Popen(served, env=env, stdout=subprocess.PIPE, text=True) as fake:
        try:
            assert fake.stdout is not None
            url = fake.stdout.readline().strip()
            here = {"http://127.0.0.1:9333/v1": url, "/tmp/cost": "results/X"}
            words = [here.get(word, word) for word in measure]
            done = subprocess.run([*run, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            for lost, number in enumerate(("main/1", "main/2", "branch/1", "branch/2"), start=1):
                samples = shutil.copytree(folder / "results/X", folder / "results" / number) / "samples.jsonl"
                lines = samples.read_bytes().splitlines(keepends=True)
                samples.write_bytes(b"".join(lines[:-lost]))  # what is alike to the byte is refused as a copy
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                for name in set(os.environ) - set(env):
                    patch.delenv(name)
                patch.setenv("FOUNDRY_LOCAL_ENDPOINT", url)
                yield folder
        finally:
            fake.terminate()


def type_(*words: str) -> Result:
    return CliRunner().invoke(main, words, catch_exceptions=False, prog_name="loadbench")


# Commands


@pytest.mark.parametrize(
    "command", [c for c in TYPED if c.program == "loadbench"], ids=lambda c: f"{c.page}: {told(c)}"
)
def test_every_command_is_understood_with_all_its_options_and_its_scenario_is_there(
    command: Typed, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in command.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FOUNDRY_LOCAL_ENDPOINT", raising="FOUNDRY_LOCAL_ENDPOINT" in command.variables)
    given = found(command).params
    if given.get("scenario"):
        options = {name: given[name] for name in (*Overrides.__dataclass_fields__, "scenario") if name in given}
        assert load(options, given.get("find")).scenario.stages


@pytest.mark.parametrize(
    "command",
    [c for c in TYPED if is_run(c) and c.words[0] not in ("run", "fake")],
    ids=lambda c: f"{c.page}: {told(c)}",
)
def test_a_command_that_needs_no_more_than_a_run_does_what_the_page_says(command: Typed, place: Path) -> None:
    done = type_(*command.words)
    allowed = next((codes for option, codes in EXITS.items() if option in command.words), (0,))
    assert done.exit_code in allowed, done.output
    assert "Traceback" not in done.output


def test_every_command_is_run_or_has_a_reason_why_not() -> None:
    assert sum(map(is_run, TYPED)) > 12
    for pattern in NOT_RUN:
        assert any(re.search(pattern, told(command)) for command in TYPED), f"no page has {pattern} any more"


def test_what_a_report_is_said_to_write_lies_in_its_directory(place: Path) -> None:
    page = PAGES["docs/architecture.md"]
    for words in (["--figures"], ["--hgrm"], ["--stable"], ["--format", "workshop"], ["--export", "prometheus"]):
        if not any(words == [*command.words[2:]] for command in TYPED if is_run(command)):
            assert type_("report", "results/X", *words).exit_code == 0
    for path in (place / "results" / "X").iterdir():
        name = re.sub(r"^.*(?=\.hgrm$)", "*", re.sub(r"^(stable|benchmark_report)\..*", r"\1.*", path.name))
        assert f"`{name}" in page, f"docs/architecture.md does not name {path.name}"


def test_every_command_is_in_the_readme() -> None:
    for name in main.list_commands(click.Context(main)):
        assert f"`loadbench {name}" in PAGES["README.md"], f"README does not name {name}"


def test_make_has_the_targets_that_the_pages_promise() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    typed = [command.words[0] for command in TYPED if command.program == "make"]
    for target in {*typed, *(name for text in PAGES.values() for name in re.findall(r"`make ([\w-]+)", text))}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"no target {target}"


@pytest.mark.parametrize(
    ("scenario", "page"),
    [
        ("stages:\n  - {concurency: 2}\n", "docs/scenarios.md"),
        ("stages:\n  - {rate: -2/s}\n", "docs/scenarios.md"),
        ("stages:\n  - {concurency: 2}\n", "docs/troubleshooting.md"),
        ("endpoint: ${NOPE}\n", "docs/troubleshooting.md"),
        ("endpoint: http://127.0.0.1:1\nmemory_limit: 2GiB\n", "docs/troubleshooting.md"),
    ],
)
def test_the_errors_of_the_pages_are_those_of_the_program(scenario: str, page: str, place: Path) -> None:
    Path("my.yaml").write_text(scenario, encoding="utf-8")
    done = CliRunner().invoke(main, ["check", "my.yaml"], env={"FOUNDRY_LOCAL_ENDPOINT": None})
    assert done.exit_code == 2
    said = done.output.strip().removeprefix("loadbench: ")
    assert said in PAGES[page] or f"`{said.split(': ', 1)[1]}`" in PAGES[page], said


def test_the_errors_of_a_run_that_cannot_start_are_those_of_the_page(place: Path) -> None:
    page = PAGES["docs/troubleshooting.md"]
    for words, code in (
        (["run", "scenarios/smoke.yaml", "--out", "results/X"], 2),
        (["run", "scenarios/smoke.yaml", "--model", "other"], 3),
        (["run", "scenarios/smoke.yaml", "--endpoint", "http://127.0.0.1:1/v1"], 3),
        (["report", "scenarios"], 2),
    ):
        done = type_(*words)
        assert done.exit_code == code, done.output
        said = re.search(r"loadbench: (.*)", done.output)
        assert said, done.output
        quoted = [text for text in re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE) if text[-20:] in said[1]]
        assert quoted, f"docs/troubleshooting.md does not have: {said[1]}"


# Scenarios


SHOWN = [block for block in BLOCKS if block.language == "yaml" and block.page not in NOT_SCENARIOS]


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: f"{block.page}: {block.text[:30]}")
def test_every_scenario_that_is_shown_is_one(block: Block, home: Path) -> None:
    for name in ("prompts", "traces"):
        (home / name).symlink_to(ROOT / "scenarios" / name)
    (home / "prompts.json").symlink_to(ROOT / "scenarios" / "prompts" / "quality.json")
    (home / "models.json").write_text(json.dumps({"phi-4-mini": {"capabilities": ["chat"], "size_mb": 3600}}))
    (home / "shown.yaml").write_text(block.text, encoding="utf-8")
    assert load_scenario(Path("shown.yaml")).scenario.stages


def test_other_yaml_and_json_is_well_formed(home: Path) -> None:
    for block in BLOCKS:
        if block.language == "yaml" and block.page in NOT_SCENARIOS:
            assert yaml.safe_load(block.text)
        if block.language == "json":
            (home / "prompts.json").write_text(block.text, encoding="utf-8")
            assert read_quality_prompts(Path("prompts.json"))
    assert {block.page for block in BLOCKS if block.language == "yaml"} >= set(NOT_SCENARIOS)


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _keys(part)


def test_every_key_of_a_scenario_has_its_table_and_an_example() -> None:
    page, shown = PAGES["docs/scenarios.md"], {key for block in SHOWN for key in _keys(yaml.safe_load(block.text))}
    for name, part in made.PARTS.items():
        assert f"<!-- made: keys_{name} -->" in page
        keys = {field.alias or key for key, field in part.model_fields.items()}
        assert keys - shown <= {"sha256"}, f"no example of {keys - shown} of {name}"  # which only saved scenarios have


def test_every_shipped_file_is_explained_and_every_explained_one_is_shipped() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scenarios").rglob("*") if path.is_file()}
    text = "".join(PAGES.values())
    assert files == set(re.findall(r"`(scenarios/[\w/-]+\.\w+)`", PAGES["docs/scenarios.md"]))
    for path in (ROOT / "scenarios").glob("*.yaml"):
        assert f"`{path.stem}`" in PAGES["README.md"]
    assert set(re.findall(r"\bscenarios/[\w/-]+\.(?:yaml|jsonl?)\b", text)) <= files


# Words


def _cautions() -> Iterator[str]:
    """What cautions may be about: the first of every three things that are yielded, and those of a level's memory."""
    tree = ast.parse(Path(cautions.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Yield | ast.Return) else None
        if isinstance(value, ast.Tuple) and len(value.elts) == 3 and isinstance(value.elts[0], ast.Constant):
            yield str(value.elts[0].value)
    yield from (about for about, _ in cautions._MEMORY.values())
    yield from cautions.STATUS


@pytest.mark.parametrize("word", sorted({*_cautions()}))
def test_every_caution_is_explained(word: str) -> None:
    assert f"`{word}`" in PAGES["docs/metrics.md"]


def test_every_state_and_exit_code_is_explained() -> None:
    page = PAGES["docs/metrics.md"]
    assert set(STATES) <= set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert table == set(CODES)


def test_the_page_on_architecture_names_the_rooms_the_plain_modules_and_every_dependency() -> None:
    page = PAGES["docs/architecture.md"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=;]", each)[0] for each in project["dependencies"]}
    extras = {f"loadbench[{name}]" for name in project["optional-dependencies"]} - {"loadbench[dev]"}
    for name in {*(f"{room}/" for room in ROOMS), *PLAIN, *needed, *extras}:
        assert name in page, f"docs/architecture.md does not name {name}"


# Links


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    plain = re.sub(r"^ *```.*?^ *```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in _anchors(found.read_text(encoding="utf-8")), f"{page}: {target}"


def test_every_page_and_picture_can_be_reached_from_the_readme() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in PAGES["README.md"], f"README does not link {path.name}"
    for path in (ROOT / "docs" / "figures").iterdir():
        assert any(f"figures/{path.name})" in text for text in PAGES.values()), f"no page shows {path.name}"
        assert path.stat().st_size < 200_000


def test_no_page_names_a_place_on_the_machine_of_its_writer() -> None:
    for page, text in PAGES.items():
        assert not re.search(r"/work/|/root/|/home/|lbvenv", text), page
