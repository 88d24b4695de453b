"""What is made from the code and kept beside it, JSON Schemas and tables in the pages; `make docs` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from loadbench.analysis.compared import schema as comparison_schema
from loadbench.analysis.metrics import LATENCIES, METRICS, RATES
from loadbench.analysis.stats import FLOORS, LEASTS
from loadbench.analysis.summary import schema as summary_schema
from loadbench.outcomes import OUTCOMES
from loadbench.scenario import schema, shapes
from loadbench.scenario.memory import MemoryLadder
from loadbench.scenario.part import Part
from loadbench.scenario.quality import Quality
from loadbench.scenario.schema import schema_json
from loadbench.scenario.stage import Stage

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


def _latencies() -> str:
    rows = (
        (f"`{name}`", metric.title, " and ".join(metric.series), f"{metric.of} requests", metric.definition)
        for name, metric in LATENCIES.items()
    )
    return _table(("key", "metric", "series", "of", "what it is"), rows)


def _rates() -> str:
    rows = (
        (f"`{name}`", rate.title, rate.unit, "less" if rate.lower_is_better else "more", rate.definition)
        for name, rate in RATES.items()
    )
    return _table(("key", "metric", "unit", "better is", "what it is"), rows)


def _floors() -> str:
    rows = ((name.replace("_", "."), f"{LEASTS[name]:,}", f"{FLOORS[name]:,}") for name in FLOORS)
    return _table(("percentile", "indicative `~` from", "firm from"), rows)


def _written(field: FieldInfo, value: object) -> str:
    """The value as a file would have it, with its unit."""
    kind: Any = Annotated[field.annotation, None, *field.metadata]
    plain = TypeAdapter(kind).dump_python(value, mode="json")
    plain = f"{plain:g}" if isinstance(plain, float) else plain
    return plain if isinstance(plain, str) else orjson.dumps(plain).decode()


def _keys(part: type[Part]) -> str:
    """The keys of a mapping of scenario files: what each means, and what it is where the file says nothing."""
    rows = []
    for name, field in part.model_fields.items():
        value = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        nested = any(isinstance(one, BaseModel) for one in (value if isinstance(value, tuple) else (value,)))
        silent = field.is_required() or value in (None, "") or nested or "unless stated" in (field.description or "")
        told = "" if silent else f"`{_written(field, value)}`"
        rows.append((f"`{field.alias or name}`", "needed" if field.is_required() else told, field.description or ""))
    if not any(told for _, told, _ in rows):
        return _table(("key", "what it says"), ((key, meaning) for key, _, meaning in rows))
    return _table(("key", "unless stated", "what it says"), rows)


PARTS: dict[str, type[Part]] = {
    "scenario": schema.Scenario,
    "request": schema.RequestOptions,
    "prompt": schema.PromptEntry,
    "message": schema.Message,
    "input_tokens": schema.InputTokens,
    "quality": Quality,
    "warmup": schema.Warmup,
    "stage": Stage,
    "count_ladder": shapes.CountLadder,
    "rate_range": shapes.RateRange,
    "stop": shapes.StopRules,
    "stretch": shapes.Stretch,
    "memory": MemoryLadder,
    "deadlines": schema.Deadlines,
    "slo": schema.Slo,
    "limits": schema.LatencyLimits,
}
"""Every mapping that a scenario file may hold, by what its table is called."""

TABLES: dict[str, Callable[[], str]] = {
    "metrics": _metrics,
    "latencies": _latencies,
    "rates": _rates,
    "floors": _floors,
    "outcomes": _outcomes,
    **{f"keys_{name}": partial(_keys, part) for name, part in PARTS.items()},
}
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
    schemas = {ROOT / "loadbench" / "schemas" / name: make() for name, make in SCHEMAS.items()}
    pages = {
        page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    }
    return schemas | {page: with_tables(text) for page, text in pages.items() if "<!-- made: " in text}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
