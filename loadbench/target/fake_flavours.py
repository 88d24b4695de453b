"""Who the scripted endpoint says it is: the routes beside the chat by which servers are told apart, as data.

Foundry Local 2.x: recorded from 2.2.1. 0.8: the shapes that its SDK (0.5.1) and REST reference name. The others: their
documented answers, cut down to what tells the server and its models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import orjson

CHAT = "/v1/chat/completions"


@dataclass(slots=True)
class Shelf:
    """The models of one endpoint, and where it listens. ``prefix`` is the path they are served below."""

    models: tuple[str, ...]
    loaded: set[str]
    prefix: str
    base_url: str


Show = Callable[[Shelf], Any]
"""The body of an answer: JSON, or plain text where it is a str."""


@dataclass(frozen=True, slots=True)
class Flavour:
    """One kind of server.

    ``at_root`` are its GET routes at the root, ``by_prefix`` those below the prefix of a chat route. ``load`` and
    ``unload`` are GET routes that end in a model's name: its alias where ``by_alias``. A POST to ``load_post`` names
    the model in its body, and unloads it with ``keep_alive`` 0; one to ``pull_post`` has it downloaded.

    ``catalogs`` are the prefixes it has, with an empty shelf where the models are elsewhere; None: one, and any will do
    if the script names none. ``unknown_model`` is the text of the 404 for a model that is not on the shelf,
    ``unloaded_model`` of the 400 for one that is not loaded; None: it is served. ``lost`` answers what is no route.
    """

    at_root: dict[str, Show]
    by_prefix: dict[str, Show]
    server: str = "loadbench-fake"
    load: str | None = None
    unload: str | None = None
    load_post: str | None = None
    pull_post: str | None = None
    by_alias: bool = False
    catalogs: tuple[str, ...] | None = None
    unknown_model: str | None = None
    unloaded_model: str | None = None
    lost: tuple[int, Any] = (404, "404 page not found\n")

    def shelf_below(self, shelf: Shelf, path: str, route: str) -> Shelf | None:
        """The shelf that ``path`` means, if it is ``route`` below a prefix of this server."""
        if not path.endswith(route):
            return None
        prefix = path.removesuffix(route)
        if prefix == shelf.prefix or (self.catalogs is None and not shelf.prefix):
            return shelf
        return Shelf((), set(), prefix, shelf.base_url) if prefix in (self.catalogs or ()) else None

    def get(self, shelf: Shelf, path: str) -> tuple[int, Any]:
        """Answer GET ``path``: the status, and what is to be shown."""
        if path in self.at_root:
            return 200, self.at_root[path](shelf)
        for route, show in self.by_prefix.items():
            if (below := self.shelf_below(shelf, path, route)) is not None:
                return 200, show(below)
        where, _, name = path.rpartition("/")
        if self.load and (below := self.shelf_below(shelf, where, self.load)) is not None:
            return self._move(below, name, loaded=True)
        if self.unload and (below := self.shelf_below(shelf, where, self.unload)) is not None:
            return self._move(below, name, loaded=False)
        return self.lost

    def post(self, shelf: Shelf, path: str, text: bytes) -> tuple[int, Any]:
        """Answer POST ``path``, for what is no chat."""
        if path not in (self.load_post, self.pull_post):
            return self.lost
        try:
            body = orjson.loads(text)
        except orjson.JSONDecodeError:
            return 400, {"error": "invalid JSON"}
        if path == self.pull_post:
            return 200, _pulled(str(body.get("model")), shelf)
        return self._move(shelf, str(body.get("model")), loaded=body.get("keep_alive") != 0)

    def refusal(self, shelf: Shelf, model: str) -> tuple[int, str] | None:
        """The status and text with which a chat with ``model`` is refused; None if it is served."""
        if self.unknown_model is not None and model not in shelf.models:
            return 404, self.unknown_model.format(model)
        if self.unloaded_model is not None and model not in shelf.loaded:
            return 400, self.unloaded_model.format(model)
        return None

    def _move(self, shelf: Shelf, name: str, loaded: bool) -> tuple[int, Any]:
        for model in shelf.models:
            if name == (alias(model) if self.by_alias else model):
                (shelf.loaded.add if loaded else shelf.loaded.discard)(model)
                return 200, {"status": "loaded" if loaded else "unloaded"}
        return 404, {"error": {"code": None, "message": (self.unknown_model or "{}").format(name)}}


def _pulled(model: str, shelf: Shelf) -> str:
    """How Ollama tells of a download, a JSON object a line; with status 200 of what its library has not, too."""
    last = {"status": "success"} if model in shelf.models else {"error": "pull model manifest: file does not exist"}
    return "".join(orjson.dumps(row).decode() + "\n" for row in ({"status": "pulling manifest"}, last))


def alias(model: str) -> str:
    """A model's name without its version, as Foundry Local takes it to load one."""
    return model.rsplit(":", 1)[0]


def _models_of(owner: str, **facts: Any) -> Callable[[Shelf], Any]:
    """GET /v1/models as all of them answer it, with ``facts`` of their own."""

    def answer(shelf: Shelf) -> Any:
        return {
            "object": "list",
            "data": [
                {"id": model, "object": "model", "created": 1795358041, "owned_by": owner, **facts}
                for model in shelf.models
            ],
        }

    return answer


def _foundry_list(shelf: Shelf) -> Any:
    return [
        {
            "name": model, "displayName": alias(model), "providerType": "AzureFoundry", "uri": f"azureml://{model}",
            "version": "1", "modelType": "ONNX", "promptTemplate": {"prompt": "<|user|>{Content}<|end|><|assistant|>"},
            "publisher": "loadbench", "task": "chat-completion",
            "runtime": {"deviceType": "CPU", "executionProvider": "CPUExecutionProvider"}, "fileSizeMb": 822,
            "modelSettings": {"parameters": []}, "alias": alias(model), "supportsToolCalling": False,
            "license": "MIT", "licenseDescription": "", "parentModelUri": "", "maxOutputTokens": 2048,
        }
        for model in shelf.models
    ]  # fmt: skip


def _ollama_models(shelf: Shelf, which: Container[str]) -> Any:
    details = {"format": "gguf", "family": "llama", "parameter_size": "1.2B", "quantization_level": "Q4_K_M"}
    return {
        "models": [
            {"name": model, "model": model, "size": 1321098329, "digest": "0" * 64, "details": details}
            for model in shelf.models
            if model in which
        ]
    }


def _lm_studio_models(shelf: Shelf) -> Any:
    return {
        "object": "list",
        "data": [
            {
                "id": model, "object": "model", "type": "llm", "publisher": "loadbench", "arch": "llama",
                "compatibility_type": "gguf", "quantization": "Q4_K_M", "max_context_length": 4096,
                "state": "loaded" if model in shelf.loaded else "not-loaded",
            }
            for model in shelf.models
        ],
    }  # fmt: skip


def _loaded(shelf: Shelf) -> Any:
    return [model for model in shelf.models if model in shelf.loaded]


FLAVOURS: dict[str, Flavour] = {
    "openai": Flavour({}, {"/v1/models": _models_of("loadbench")}),
    "foundry2": Flavour(
        {
            "/status": lambda shelf: {
                "endpoints": [shelf.base_url], "modelCachePath": "/models", "pid": os.getpid()
            },
        },
        {"/v1/models": _models_of("local"), "/models/loaded": _loaded},
        server="oatpp/1.3.0",
        load="/models/load",
        unload="/models/unload",
        by_alias=True,
        catalogs=("", "/catalogs/local"),
        unknown_model="Model not found: No model matching '{}'",
        unloaded_model="Model not loaded: Model '{}' must be loaded before inference",
        lost=(404, "server=oatpp/1.3.0\ncode=404\ndescription=Not Found\nmessage=No mapping for HTTP-method\n"),
    ),
    "foundry08": Flavour(
        {
            "/openai/status": lambda shelf: {
                "endpoints": [shelf.base_url], "modelDirPath": "/models", "pipeName": "inference_agent"
            },
            "/openai/models": lambda shelf: list(shelf.models),
            "/openai/loadedmodels": _loaded,
            "/foundry/list": _foundry_list,
        },
        {"/v1/models": _models_of("Microsoft")},
        server="Kestrel",
        load="/openai/load",
        unload="/openai/unload",
        unknown_model="Model {} was not found",
        lost=(404, ""),
    ),
    "ollama": Flavour(
        {
            "/": lambda shelf: "Ollama is running",
            "/api/version": lambda shelf: {"version": "0.12.6"},
            "/api/tags": lambda shelf: _ollama_models(shelf, shelf.models),
            "/api/ps": lambda shelf: _ollama_models(shelf, shelf.loaded),
        },
        {"/v1/models": _models_of("library")},
        load_post="/api/generate",
        pull_post="/api/pull",
        unknown_model="model '{}' not found",
    ),
    "llamacpp": Flavour(
        {
            "/health": lambda shelf: {"status": "ok"},
            "/props": lambda shelf: {
                "default_generation_settings": {"n_ctx": 4096}, "total_slots": 4, "build_info": "b6800-0000000",
                "model_path": f"/models/{shelf.models[0]}.gguf",
            },
        },
        {"/v1/models": _models_of("llamacpp", meta={"n_ctx_train": 32768, "n_params": 1235814432, "size": 799862912})},
        server="llama.cpp",
        lost=(404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}),
    ),
    "vllm": Flavour(
        {"/health": lambda shelf: "", "/version": lambda shelf: {"version": "0.11.0"}},
        {"/v1/models": _models_of("vllm", max_model_len=4096, parent=None)},
        server="uvicorn",
        unknown_model="The model `{}` does not exist.",
        lost=(404, {"detail": "Not Found"}),
    ),
    "lmstudio": Flavour(
        {"/api/v0/models": _lm_studio_models},
        {"/v1/models": _models_of("organization_owner")},
        lost=(200, {"error": "Unexpected endpoint or method."}),
    ),
}  # fmt: skip
