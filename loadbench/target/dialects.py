"""The servers we know, one table row each: how one is recognised, and where it lists, loads and unloads its models.

To add an API dialect, add a row. Asking is ``control``'s, choosing a model ``endpoint``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadbench.target.control import Answer

Answers = Mapping[str, Answer]
"""What the probed paths answered, by path below the root. A path is missing where no HTTP answer came."""


@dataclass(frozen=True, slots=True)
class Call:
    """A control call for one model: GET ``path``, or POST ``post`` to it, with ``{name}`` filled in.

    ``names`` gives the names to try for a model id, in order; 404 means the next one.
    """

    path: str
    post: Mapping[str, Any] | None = None
    names: Callable[[str], list[str]] = lambda model_id: [model_id]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server. In paths ``{base}`` is an entry of ``bases``, ``{prefix}`` the same without ``/v1``.

    ``recognise`` gets what ``probes`` answered and returns facts (with ``version`` and ``pid`` where told), or None.
    The first of ``listing`` says which models there are, the others add what they know of them. ``loaded`` lists the
    loaded ones; where it is None they are those the listing marks, or all if ``resident``. ``process`` is a pattern for
    the name of the process that listens and, with its children, holds the models; None: the server tells its pid, or
    that process is not known to be the one.

    ``on_disk``: what it lists is on its disk. ``catalogue`` lists what it could download besides. ``instead`` says, by
    the command of ``loadbench models`` that its API has nothing for, what does it.
    """

    kind: str
    title: str
    probes: tuple[str, ...]
    recognise: Callable[[Answers], dict[str, Any] | None]
    bases: tuple[str, ...] = ("/v1",)
    listing: tuple[str, ...] = ("{base}/models",)
    loaded: str | None = None
    resident: bool = False
    load: Call | None = None
    unload: Call | None = None
    process: str | None = None
    on_disk: bool = False
    catalogue: str | None = None
    instead: Mapping[str, str] = field(default_factory=dict)


def read_models(body: Any) -> list[dict[str, Any]]:
    """Read any list of models, OpenAI's, Ollama's, Foundry's, or bare names, into the fields of ModelInfo."""
    if isinstance(body, dict):
        body = body.get("data", body.get("models"))
    items = body if isinstance(body, list) else []
    rows = ({"id": item} if isinstance(item, str) else item for item in items if isinstance(item, str | dict))
    return [model for row in rows if row.get("type") != "embeddings" and (model := _read_model(row))["id"]]


def _read_model(row: Mapping[str, Any]) -> dict[str, Any]:
    def inner(key: str, field: str, kind: type) -> Any:
        value = row.get(key)
        value = value.get(field) if isinstance(value, dict) else None
        return value if isinstance(value, kind) else None

    def plain(key: str, kind: type) -> Any:
        value = row.get(key)
        return value if isinstance(value, kind) else None

    megabytes = plain("fileSizeMb", int)  # Foundry: bytes divided by 1024 × 1024
    state = plain("state", str) or inner("status", "value", str)  # LM Studio; llama.cpp's router
    return {
        "id": plain("id", str) or plain("name", str) or plain("model", str),
        "alias": plain("alias", str),
        "loaded": None if state is None else state == "loaded",
        "size_bytes": plain("size", int) or inner("meta", "size", int) if megabytes is None else megabytes << 20,
        "device": inner("runtime", "deviceType", str),
        "licence": plain("license", str),
        "execution_provider": inner("runtime", "executionProvider", str),
        "capabilities": _capabilities(row),
    }


def _capabilities(row: Mapping[str, Any]) -> tuple[str, ...]:
    """LM Studio and Ollama list them; an old Foundry has a task and says of tools alone whether it can."""
    told = row.get("capabilities")
    words = told.split(",") if isinstance(told, str) else told if isinstance(told, list) else [row.get("task")]
    tools = ["tool-calling"] if row.get("supportsToolCalling") is True else []
    return tuple(word for word in [*words, *tools] if word and isinstance(word, str))


def _aliases(model_id: str) -> list[str]:
    """Guess the alias of a Foundry 2 id, longest first: the list does not tell it, and load takes nothing else.

    A model of one's own has its name for an alias; in the public catalogue ``qwen2.5-0.5b-instruct-generic-cpu:4`` has
    ``qwen2.5-0.5b``, in small letters.
    """
    parts = model_id.rpartition(":")[0].split("-") if ":" in model_id else model_id.split("-")
    names = ["-".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return list(dict.fromkeys(name for exact in names for name in (exact, exact.lower())))


def _fields(answers: Answers, path: str) -> dict[str, Any]:
    """The JSON object at ``path``, empty if there is none."""
    answer = answers.get(path)
    return answer.json if answer and answer.ok and isinstance(answer.json, dict) else {}


def _foundry_2(answers: Answers) -> dict[str, Any] | None:
    status = _fields(answers, "/status")
    if not {"endpoints", "modelCachePath"} <= status.keys():
        return None
    return {"model_cache_path": status["modelCachePath"], "pid": status.get("pid")}


def _foundry_0(answers: Answers) -> dict[str, Any] | None:
    status = {key.lower(): value for key, value in _fields(answers, "/openai/status").items()}
    if not {"endpoints", "modeldirpath"} <= status.keys():
        return None
    return {"model_cache_path": status["modeldirpath"]}


def _llama_cpp(answers: Answers) -> dict[str, Any] | None:
    props = _fields(answers, "/props")
    if "default_generation_settings" not in props and not any(a.server == "llama.cpp" for a in answers.values()):
        return None
    return {"version": props.get("build_info"), "slots": props.get("total_slots")}


def _ollama(answers: Answers) -> dict[str, Any] | None:
    # Open WebUI has /api/version too, but nothing that runs.
    if "models" not in _fields(answers, "/api/ps"):
        return None
    return {"version": _fields(answers, "/api/version").get("version")}


def _lm_studio(answers: Answers) -> dict[str, Any] | None:
    # Lemonade has the path too, without a state. LM Studio itself answers 200 with an error on every path it lacks.
    rows = _fields(answers, "/api/v0/models").get("data")
    return {} if isinstance(rows, list) and any(isinstance(row, dict) and "state" in row for row in rows) else None


def _vllm(answers: Answers) -> dict[str, Any] | None:
    rows = _fields(answers, "/v1/models").get("data")
    if not isinstance(rows, list) or not any(isinstance(row, dict) and row.get("owned_by") == "vllm" for row in rows):
        return None
    return {"version": _fields(answers, "/version").get("version")}


def _lists_models(path: str) -> Callable[[Answers], dict[str, Any] | None]:
    return lambda answers: {} if isinstance(_fields(answers, path).get("data"), list) else None


def _takes_posts(path: str) -> Callable[[Answers], dict[str, Any] | None]:
    """A server that lists nothing, but has the one path that counts: it objects to GET there, not to the path."""
    return lambda answers: {} if path in answers and answers[path].status in (400, 405, 415, 422) else None


# Probed group by group, each in parallel: a Foundry is asked for its status only, and never for /v1/models, since
# its public catalogue then goes to the internet, for 5 s where there is none.
DIALECTS: tuple[tuple[Dialect, ...], ...] = (
    (
        Dialect(
            "foundry-2",
            "Foundry Local 2",
            ("/status",),
            _foundry_2,
            bases=("/catalogs/local/v1", "/v1"),  # models of one's own, then the public catalogue
            loaded="{prefix}/models/loaded",
            load=Call("{prefix}/models/load/{name}", names=_aliases),
            unload=Call("{prefix}/models/unload/{name}", names=_aliases),
            instead={
                "pull": "on its host, `foundry model download {name}`",
                "rm": "on its host, `foundry cache remove {name}`",
            },
        ),
        Dialect(
            "foundry-0.8",
            "Foundry Local 0.8 or older",
            ("/openai/status",),
            _foundry_0,
            listing=("/openai/models", "/foundry/list"),
            loaded="/openai/loadedmodels",
            # Its own ttl of 600 s unloads a model in the middle of a run.
            load=Call("/openai/load/{name}?ttl=86400"),
            unload=Call("/openai/unload/{name}?force=true"),
            process="inference|foundry",
            on_disk=True,
            catalogue="/foundry/list",
            instead={"rm": "on its host, `foundry cache remove {name}`"},
        ),
    ),
    (
        Dialect(
            "llama.cpp",
            "llama.cpp",
            ("/props",),
            _llama_cpp,
            resident=True,
            process="llama",
            instead=dict.fromkeys(("load", "unload"), "start it anew, `llama-server --model FILE`")
            | {"pull": "put its file on the host, and start it anew, `llama-server --model FILE`"}
            | {"rm": "remove its file from the host"},
        ),
        Dialect(
            "ollama",
            "Ollama",
            ("/api/version", "/api/ps"),
            _ollama,
            listing=("{base}/models", "/api/tags"),
            loaded="/api/ps",
            load=Call("/api/generate", {"model": "{name}", "stream": False}),
            unload=Call("/api/generate", {"model": "{name}", "stream": False, "keep_alive": 0}),
            process="ollama",
            on_disk=True,
            instead={"rm": "on its host, `ollama rm {name}`"},
        ),
        Dialect(
            "lm-studio",
            "LM Studio",
            ("/api/v0/models",),
            _lm_studio,
            listing=("/api/v0/models",),
            on_disk=True,
            instead={
                "pull": "on its host, `lms get {name}`",
                "load": "on its host, `lms load {name}`",
                "unload": "on its host, `lms unload {name}`",
                "rm": "on its host, in its window",
            },
        ),
        Dialect(
            "vllm",
            "vLLM",
            ("/version", "/v1/models"),
            _vllm,
            resident=True,
            process="vllm|python",
            instead=dict.fromkeys(("load", "unload"), "start it anew, `vllm serve NAME`")
            | {"pull": "start it anew, `vllm serve NAME`, which downloads it"}
            | {"rm": "remove its files from the host"},
        ),
        Dialect("openai", "OpenAI-compatible server", ("/v1/models",), _lists_models("/v1/models")),
        Dialect("openai", "OpenAI-compatible server", ("/models",), _lists_models("/models"), bases=("",)),
    ),
    (
        Dialect(
            "openai",
            "OpenAI-compatible server",
            ("/v1/chat/completions",),
            _takes_posts("/v1/chat/completions"),
            listing=(),
        ),
    ),
)
