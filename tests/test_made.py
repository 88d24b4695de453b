"""What is made from the code and kept beside it says what the code says; ``test_docs`` holds the rest of the pages."""

import json
from pathlib import Path

import pytest

from tests import made


@pytest.mark.parametrize("path", made.files(), ids=lambda path: path.name)
def test_made_files_are_up_to_date(path: Path) -> None:
    kept, now = path.read_text(encoding="utf-8"), made.files()[path]
    if path.suffix == ".json":  # its spelling may differ between versions of pydantic, its meaning may not
        assert json.loads(kept) == json.loads(now), "run `make docs`"
    else:
        assert kept == now, "run `make docs`"


def test_every_table_that_can_be_made_stands_on_a_page() -> None:
    pages = "".join(text for path, text in made.files().items() if path.suffix == ".md")
    for name in made.TABLES:
        assert f"<!-- made: {name} -->" in pages
