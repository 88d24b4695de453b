"""What is made from the code and kept beside it, JSON Schemas and the README's tables; `make docs` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson

from loadbench.analysis.compared import schema as comparison_schema
from loadbench.analysis.metrics import METRICS
from loadbench.analysis.summary import schema as summary_schema
from loadbench.outcomes import OUTCOMES
from loadbench.scenario.schema import schema_json

ROOT = Path(__file__).parent.parent


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _metrics() -> str:
    rows = ((f"`{name}`", metric.title, metric.unit, metric.definition) for name, metric in METRICS.items())
    return _table(("key", "metric", "unit", "what it is"), rows)


def _outcomes() -> str:
    rows = ((f"`{row.name}`", row.meaning, row.advice) for row in OUTCOMES.values())
    return _table(("outcome", "what happened", "what to do"), rows)


TABLES: dict[str, Callable[[], str]] = {"metrics": _metrics, "outcomes": _outcomes}
SCHEMAS: dict[str, Callable[[], str]] = {
    "compare.schema.json": lambda: orjson.dumps(comparison_schema(), option=orjson.OPT_INDENT_2).decode() + "\n",
    "scenario.schema.json": schema_json,
    "summary.schema.json": lambda: orjson.dumps(summary_schema(), option=orjson.OPT_INDENT_2).decode() + "\n",
}


def with_tables(text: str) -> str:
    """The page with every ``<!-- made: NAME -->`` … ``<!-- /made -->`` filled anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- made: (\w+) -->)\n.*?(<!-- /made -->)", fill, text, flags=re.DOTALL)


def files() -> dict[Path, str]:
    """Every made file with the text that it should have."""
    readme = ROOT / "README.md"
    schemas = {ROOT / "loadbench" / "schemas" / name: make() for name, make in SCHEMAS.items()}
    return schemas | {readme: with_tables(readme.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
