"""The variables of the environment that come before a scenario's file, and what a repeated run needs in their place.

``${NAME}`` inside a file is ``reading``'s matter. A variable that is set but empty counts as unset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from loadbench.errors import UsageError
from loadbench.scenario.reading import Document, Loc, read_value
from loadbench.scenario.redaction import is_secret, redact_url, redact_urls
from loadbench.scenario.schema import Scenario

ENDPOINT_VARIABLE = "FOUNDRY_LOCAL_ENDPOINT"
MODELS_VARIABLE = "BENCH_MODELS"
KEY_VARIABLES = ("OPENAI_API_KEY", "API_KEY")
"""A bearer key for an endpoint; the first one that is set."""


def key_headers(env: Mapping[str, str]) -> dict[str, str]:
    """What the environment adds to every request, to be sent and never stored."""
    key = next((value for name in KEY_VARIABLES if (value := env.get(name, "").strip())), None)
    return {"Authorization": f"Bearer {key}"} if key else {}


def put_variables(document: Document, env: Mapping[str, str]) -> None:
    """Put what they say over what the file says. Raises UsageError that names the variable."""
    if endpoint := env.get(ENDPOINT_VARIABLE, "").strip():
        document.put(["endpoint"], endpoint, ENDPOINT_VARIABLE)
    if asked := env.get(MODELS_VARIABLE, "").strip():
        models = [part.strip() for part in asked.rstrip(", ").split(",")]  # the workshop takes a last comma, too
        if not all(models):
            raise UsageError(f"{MODELS_VARIABLE}: expected models with commas between them, got {asked}")
        if models == ["ALL"]:
            raise UsageError(
                f"{MODELS_VARIABLE}: expected models by name, got ALL: write those that you mean, such as"
                f" {MODELS_VARIABLE}=phi-4-mini,qwen2.5-0.5b; `loadbench models list` has them"
            )
        document.put(["models"], models, MODELS_VARIABLE)


def keep_keys_out(document: Document) -> None:
    """Raise UsageError where a key is put into a value that would be saved with the results."""
    for loc, names in document.taken.items():
        if set(names) & set(KEY_VARIABLES) and not (_is_private(loc) or loc[:1] == ("endpoint",)):
            raise document.error(loc, "expected a key in request.headers only, which are never saved, got one")


def in_their_place(document: Document, scenario: Scenario) -> Iterator[str]:
    """The flags that say what the environment said, without its secrets.

    A header's value, a key and a user's name are left out: who repeats the run has them in an environment of his own.
    """
    if document.places.get(("endpoint",)) == ENDPOINT_VARIABLE:
        yield from (word for url in scenario.endpoints for word in ("--endpoint", redact_url(url)))
    if document.places.get(("models",)) == MODELS_VARIABLE:
        yield from (word for model in scenario.models for word in ("--model", model))
    for loc, names in document.taken.items():
        value = document.get(loc)
        if not (_is_private(loc) or any(is_secret(name) for name in names) or any("." in str(step) for step in loc)):
            value = redact_urls(value) if loc[0] == "endpoint" else value
            yield from ("--set", f"{'.'.join(map(str, loc))}={_as_yaml(value)}")


def _is_private(loc: Loc) -> bool:
    return loc[:2] == ("request", "headers") or any(is_secret(str(step)) for step in loc)


def _as_yaml(text: str) -> str:
    """The text as ``--set`` reads it back, plain where that means the same."""
    try:
        found = read_value(text, "")
    except UsageError:
        found = None
    same = found == text or (type(found) in (int, float) and str(found) == text)
    return text if same else json.dumps(text, ensure_ascii=False)  # a text of JSON is one of YAML
