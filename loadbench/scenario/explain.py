"""What pydantic found wrong, in the house's words: where it stands, what was expected, what was found."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from loadbench.errors import UsageError
from loadbench.scenario.reading import Document, Loc
from loadbench.scenario.redaction import is_secret
from loadbench.scenario.schema import Scenario

# pydantic's names for what went wrong → what was expected, filled from the error's context.
_EXPECTED = {
    "missing": "this key",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is finite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "some text",
    "string_pattern_mismatch": "text like {pattern}",
    "literal_error": "{expected}",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "too_short": "at least {min_length} in the list",
}


def explained(error: ValidationError, document: Document) -> UsageError:
    """The first thing that is wrong, in the house's words; unknown keys first, for they cause the rest."""
    found = error.errors(include_url=False)
    # A list whose entries are wrong counts as too short as well: the entry is what matters.
    above = {one["loc"][:depth] for one in found for depth in range(len(one["loc"]))}
    causes = [one for one in found if one["type"] != "too_short" or one["loc"] not in above]
    first = min(causes, key=lambda one: one["type"] != "extra_forbidden")
    absent = first["type"] in ("missing", "extra_forbidden")
    outer, last = (first["loc"][:-1], first["loc"][-1:]) if absent else (first["loc"], ())
    loc = (*_inside(outer, document), *last)
    others = len(causes) - 1
    more = f" (and {others} more)" if others else ""
    return document.error(loc, _problem(first, loc, document) + more)


def _inside(loc: Loc, document: Document) -> Loc:
    """The steps of pydantic's path that the file has: a lone value is a list of one only to the schema."""
    found: Loc = ()
    for step in loc:
        with contextlib.suppress(LookupError):
            document.get((*found, step))
            found = (*found, step)
    return found


def _problem(detail: ErrorDetails, loc: Loc, document: Document) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        return "unknown key; " + (f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}")
    if kind == "refused":
        return detail["msg"]
    expected = "expected " + _EXPECTED[kind].format(**context) if kind in _EXPECTED else detail["msg"]
    return f"{expected}, got {'nothing' if kind == 'missing' else _shown(loc, document)}"


def _shown(loc: Loc, document: Document) -> str:
    """A value as it may stand in an error: short, on one line, and no secret."""
    value = document.get(loc)
    secrets = (*document.taken.get(loc, ()), *(str(step) for step in loc[2:] if loc[0] == "request"))
    if any(is_secret(name) for name in secrets):
        return "something that is not shown"
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _keys(loc: Loc) -> list[str]:
    """The keys that the schema knows at ``loc``."""
    model: type[BaseModel] = Scenario
    for step in loc:
        if isinstance(step, str):
            by_key = {field.alias or name: field for name, field in model.model_fields.items()}
            model = next(_models_in(by_key[step].annotation))
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
