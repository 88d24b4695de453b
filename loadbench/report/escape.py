"""Makes foreign text harmless: model names, error texts and scenario words come from servers and files, not from us.

``plain`` is for every output; ``markdown``, ``code`` and ``cell`` add what one format needs. On the console the result
goes into a ``rich.text.Text``, where square brackets mean nothing.
"""

from __future__ import annotations

import re

# What CommonMark and GitHub read as inline syntax; $ opens a formula on GitHub. An underscore inside a word means
# nothing, nor does a tilde that has no second one, and both are frequent in what we write: those stay readable.
_INLINE = re.compile(r"[\\`*\[\]|#$]|(?<![^\W_])_|_(?![^\W_])|~(?=[^~]*~)")
_BLOCK = re.compile(r"^(\d{1,9})?([-+=.)])(?=[\s=+-]|$)")  # a list, a heading or a rule, only at the start of a line
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet takes for a formula (OWASP, CSV injection)


def plain(text: object, limit: int = 2000) -> str:
    """One line, every run of white space a single space, every other unprintable character a visible escape.

    ``str.isprintable`` is False for control characters (ANSI escapes start with one), for the bidirectional and
    zero-width formats that reorder or hide what follows, and for lone surrogates, which no file could store.
    """
    line = " ".join(str(text).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
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
