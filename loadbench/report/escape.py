"""Makes foreign text harmless: model names, error texts and scenario words come from servers and files, not from us.

``plain`` is for every output that is read; ``as_line``, ``markdown``, ``code`` and ``cell`` add what one format needs,
and ``json_text`` keeps values as they were. On the console the result goes into a ``rich.text.Text``, where square
brackets mean nothing.
"""

from __future__ import annotations

import json
import re

# What CommonMark and GitHub read as inline syntax; $ opens a formula on GitHub. An underscore inside a word means
# nothing, nor does a tilde that has no second one, and both are frequent in what we write: those stay readable.
_INLINE = re.compile(r"[\\`*\[\]|#$]|(?<![^\W_])_|_(?![^\W_])|~(?=[^~]*~)")
_BLOCK = re.compile(r"^(\d{1,9})?([-+=.)])(?=[\s=+-]|$)")  # a list, a heading or a rule, only at the start of a line
_COMMAND = re.compile(r"(^ *):(?=:)|#(?=#\[)")  # GitHub's runner obeys lines that begin with ::, and ##[ anywhere
_FOREIGN = re.compile(r"[^\x00-\x7e]")  # what JSON need not escape and a terminal may not be able to show
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet takes for a formula (OWASP, CSV injection)


def plain(text: object, limit: int = 2000) -> str:
    """One line, every run of white space a single space, every other unprintable character a visible escape.

    ``str.isprintable`` is False for control characters (ANSI escapes start with one), for the bidirectional and
    zero-width formats that reorder or hide what follows, and for lone surrogates, which no file could store.
    """
    return _cut(visible(" ".join(str(text).split())), limit)


def as_line(text: object, limit: int = 10_000) -> str:
    """A line of its own on a terminal or in a log, where it commands nobody; the spaces that it has stay as they are.

    For what is printed by itself: an error, a note, a path. ``::error::`` becomes ``\\x3a:error::``.
    """
    line = visible(re.sub(r"[^\S ]+", " ", str(text)))
    return _cut(_COMMAND.sub(lambda found: f"{found[1] or ''}\\x{ord(found[0][-1]):02x}", line), limit)


def visible(text: str) -> str:
    """With an escape for every unprintable character."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def json_text(made: bytes) -> bytes:
    """JSON that says the same, and is printable: it may end up on a terminal, which may obey C1 controls."""
    return _FOREIGN.sub(_escaped, made.decode()).encode()


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def _cut(line: str, limit: int) -> str:
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown(text: object, limit: int = 2000) -> str:
    """``plain`` as Markdown prose that reads as it was written: no syntax, no HTML, no table cell ended early."""
    line = plain(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _BLOCK.sub(r"\1\\\2", _INLINE.sub(r"\\\g<0>", line))


def code(text: object, *, in_table: bool = False) -> str:
    """``plain`` as a Markdown code span, its fence longer than any run of backticks inside (CommonMark 6.1).

    A pipe needs its backslash in a table even here (GFM 4.10), and shows it anywhere else.
    """
    line = plain(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    if in_table:
        line = line.replace("|", r"\|")
    return f"{fence}{pad}{line}{pad}{fence}"


def cell(text: object) -> str:
    """``plain`` as a CSV value that no spreadsheet runs as a formula: the quote before it makes it text."""
    line = plain(text)
    return "'" + line if line.startswith(_FORMULA) else line
