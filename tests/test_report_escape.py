"""What came from a server or a file is shown and never obeyed: by a terminal, a Markdown renderer or a spreadsheet."""

from __future__ import annotations

import csv
import io
import re

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from loadbench.report.escape import as_line, cell, code, json_text, markdown, plain

HOSTILE = (
    "[bold red]x[/] \x1b[31mred\x1b[0m \x07 <script>alert(1)</script> | a | `b` ``c``\n# h\n"
    "![i](http://x) [l](javascript:y) ~~s~~ *e* _e_ $m$ &amp; \u202egnp.exe \u200b end\\"
)
# Characters that some format reads, more often than chance would bring them.
TEXTS = st.text() | st.text(alphabet="\\`*_[]()<>&|~#$!+-=.:1a \n\t")
RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def inline(source: str) -> list[Token]:
    return [leaf for token in RENDERER.parse(source) if token.type == "inline" for leaf in token.children or []]


def test_plain_text_is_one_line_without_anything_a_terminal_obeys() -> None:
    text = plain(HOSTILE)
    assert "\n" not in text
    assert "\x1b" not in text
    assert r"\x1b[31mred\x1b[0m \x07" in text
    assert r"\u202egnp.exe \u200b end" in text


def test_plain_text_that_is_harmless_stays_as_it_is() -> None:
    assert plain("Größe 5 µs, 日本語 [x] 🙂") == "Größe 5 µs, 日本語 [x] 🙂"


def test_plain_text_is_cut_with_an_ellipsis_where_it_is_too_long() -> None:
    assert plain("abcdef", limit=4) == "abc…"


@given(TEXTS)
def test_any_text_becomes_printable_and_storable(text: str) -> None:
    assert plain(text).isprintable()
    plain(text).encode()


@given(TEXTS | st.text(alphabet=" :#[\n\t\x1b"))
@example("  ::error::x")
@example("###[error]x")
def test_any_text_as_a_line_commands_neither_a_terminal_nor_githubs_runner(text: str) -> None:
    line = as_line(text)
    assert line.isprintable()
    assert not line.lstrip().startswith("::")
    assert "##[" not in line


def test_a_line_keeps_the_spaces_of_a_path_and_is_cut_at_no_length_that_an_error_has() -> None:
    assert as_line("Results  a  b/c::d \n#[x]") == "Results  a  b/c::d  #[x]"
    assert as_line("x" * 9000) == "x" * 9000


@given(st.dictionaries(TEXTS, TEXTS))
def test_any_json_stays_what_it_is_and_becomes_printable(values: dict[str, str]) -> None:
    made = json_text(orjson.dumps(values, option=orjson.OPT_INDENT_2))
    assert orjson.loads(made) == values
    assert {c for c in made.decode() if not c.isprintable()} <= {"\n"}


@given(TEXTS)
@example(HOSTILE)
@example("&lt; and ~this~ and ~~that~~")
@example("# heading")
@example("- item")
@example("1. item")
@example("---")
@example("> quotation")
def test_any_text_in_markdown_renders_as_itself(text: str) -> None:
    source = markdown(text)
    if not source:
        return
    assert {token.type for token in inline(f"before {source}")} <= {"text", "text_special"}
    assert "".join(token.content for token in inline(f"before {source}")) == f"before {plain(text)}"
    assert [token.type for token in RENDERER.parse(source)] == ["paragraph_open", "inline", "paragraph_close"]


@given(TEXTS)
@example(HOSTILE)
def test_any_text_in_a_markdown_table_stays_in_its_cell(text: str) -> None:
    cells = [token for token in RENDERER.parse(f"|a|b|\n|---|---|\n| {markdown(text)} | z |") if token.type == "inline"]
    assert [cell.content for cell in cells[:2]] == ["a", "b"]
    assert "".join(token.content for token in cells[2].children or []) == plain(text)
    assert cells[3].content == "z"


@given(TEXTS)
def test_any_text_in_a_code_span_renders_as_itself(text: str) -> None:
    (span,) = inline(code(text))
    assert span.type == "code_inline"
    assert span.content == (plain(text) or " ")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("http://x")', "\t=1+1", "\r\n=1"])
def test_a_formula_becomes_text_in_a_spreadsheet(text: str) -> None:
    assert cell(text) == f"'{text.strip()}"


@given(TEXTS)
def test_any_text_in_csv_is_read_back_as_one_value_that_starts_no_formula(text: str) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerow([cell(text), "z"])
    ((value, last),) = csv.reader(io.StringIO(out.getvalue(), newline=""))
    assert (value.removeprefix("'"), last) == (plain(text).removeprefix("'"), "z")
    assert not re.match(r"[=+@-]", value)
