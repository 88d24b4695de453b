"""What is made from the code says what the code says, and what the README tells people to type is understood."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from loadbench.cli import main
from loadbench.scenario.load import load_scenario
from tests import made

README = (made.ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in sorted((made.ROOT / "docs").glob("*.md")))
COMMANDS = [
    line.split("#")[0].strip().removesuffix(" &")
    for kind, block in [*BLOCKS, *re.findall(r"```(\w+)\n(.*?)```", PAGES, flags=re.DOTALL)]
    if kind in ("sh", "powershell")
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"(?<!\")\bloadbench [a-z]", line)
]


@pytest.mark.parametrize("path", made.files(), ids=lambda path: path.name)
def test_made_files_are_up_to_date(path: Path) -> None:
    kept, now = path.read_text(encoding="utf-8"), made.files()[path]
    if path.suffix == ".json":  # its spelling may differ between versions of pydantic, its meaning may not
        assert json.loads(kept) == json.loads(now), "run `make docs`"
    else:
        assert kept == now, "run `make docs`"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_and_the_pages_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results" / "X").mkdir(parents=True)  # what the pages call the directory of a run
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("\\", "/"))
    while "loadbench" not in words[0] or "=" in words[0]:  # NAME=VALUE before it
        words.pop(0)
    name, arguments = words[1], words[2:]
    found = main.get_command(click.Context(main), name)
    assert found is not None, f"there is no command {name}"
    while isinstance(found, click.Group):
        found = found.get_command(click.Context(found), name := arguments.pop(0))
        assert found is not None, f"there is no command {name} of its group"
    found.make_context(name, list(arguments))
    for word in arguments:
        if word.endswith(".yaml"):
            assert (made.ROOT / word).is_file()


def test_every_command_is_in_the_readme() -> None:
    for name in main.list_commands(click.Context(main)):
        assert f"`loadbench {name}" in README, f"README does not name {name}"


def test_the_scenario_of_the_readme_is_valid(tmp_path: Path) -> None:
    (yaml,) = [block for kind, block in BLOCKS if kind == "yaml"]
    (tmp_path / "prompts").symlink_to(made.ROOT / "scenarios" / "prompts")
    path = tmp_path / "readme.yaml"
    path.write_text(yaml, encoding="utf-8")
    assert load_scenario(path).scenario.name == "edge"


def test_make_has_the_targets_that_the_readme_promises() -> None:
    makefile = (made.ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)|`make (\w+)`", README, flags=re.MULTILINE)):
        name = "".join(target)
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), f"no target {name}"


def test_the_readme_names_every_shipped_scenario() -> None:
    for path in (made.ROOT / "scenarios").glob("*.yaml"):
        assert f"`{path.stem}`" in README
