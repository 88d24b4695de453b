"""The child process that is the embedded Foundry Local: started by ``foundry``, ended when its parent ends.

A conversation in JSON lines. The first line on stdin says what to serve, and where; each further one asks for something
(``{"do": "list"}``). Every one is answered on stdout by ``{"progress": percent}`` lines, if any, and one of ``{"done":
…}`` or ``{"error": …}``. At the end of stdin the process ends. It is a process of its own because the runtime is a
singleton, and because an engine that has wedged can only be killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from queue import SimpleQueue
from time import monotonic
from typing import Any

PROGRESS_EVERY_S = 0.1  # the runtime calls back after every piece of 64 in flight


def main() -> None:
    """Serve and answer until the parent closes stdin or is gone."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # native libraries print to fd 1: that belongs in the log, which is stderr
    die_with_parent()
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    cancelled = threading.Event()
    threading.Thread(target=listen, args=(requests, cancelled), daemon=True).start()
    with os.fdopen(answer_fd, "w", encoding="utf-8") as out:
        speaking = threading.Lock()

        def say(**answer: Any) -> None:
            with speaking:  # progress comes from the runtime's threads
                print(json.dumps(answer), file=out, flush=True)

        try:
            served = Served(requests.get(), cancelled)
            say(done=served.facts())
        except Exception as error:
            traceback.print_exc()  # into the log first: the parent ends us when it has read the answer
            say(error=in_words(error))
            raise SystemExit(1) from error
        while True:
            request = requests.get()
            try:
                say(done=served.do(request, lambda percent: say(progress=percent)))
            except Exception as error:  # noqa: BLE001  the runtime's errors are answers; it goes on serving
                traceback.print_exc()
                say(error=in_words(error))


def listen(requests: SimpleQueue[dict[str, Any]], cancelled: threading.Event) -> None:
    """Take requests until the parent closes stdin or dies, then end this process without asking the runtime.

    ``os._exit``, since an orderly end waits for sessions, and those of a wedged engine never end. ``cancel`` is for
    what is being done, so it does not wait for its turn.
    """
    try:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if request.get("do") == "cancel":
                cancelled.set()
            else:
                requests.put(request)
    finally:  # half a line is the end as well
        os._exit(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, where it can: it needs no thread of ours to run.

    Only Linux can; on Windows and macOS it is the end of stdin alone that ends this process.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def in_words(error: Exception) -> str:
    """One line; the runtime's own errors without the name of their Python class, which tells nothing."""
    text = " ".join(str(error).split())
    return text if type(error).__name__ == "FoundryLocalException" else f"{type(error).__name__}: {text}"


class Served:
    """The runtime with its web service, and what can be asked of it."""

    def __init__(self, request: dict[str, Any], cancelled: threading.Event) -> None:
        from foundry_local_sdk import CatalogType, Configuration, FoundryLocalManager

        url = request["catalog_url"]
        FoundryLocalManager.initialize(
            Configuration(
                app_name="loadbench",
                app_data_dir=request["app_data_dir"],
                model_cache_dir=request["model_cache_dir"],
                logs_dir=request["logs_dir"],
                web=Configuration.WebService(urls=f"http://{request['host']}:{request['port']}"),
                catalog_urls=[(url, None)] if url else None,
                disable_nonessential_telemetry=True,
            )
        )
        self.runtime = FoundryLocalManager.instance
        self.own = self.runtime.get_catalog(CatalogType.LOCAL)
        self.public = self.runtime.get_catalog(CatalogType.PUBLIC)
        self.cancelled = cancelled
        self.refused = {model_id: said for model_id, said in self.register(request["models"]) if said is not None}
        self.runtime.start_web_service()

    def register(self, models: dict[str, str]) -> Iterator[tuple[str, str | None]]:
        """Each with the runtime's reason where it does not take the model: the others are served all the same."""
        from foundry_local_sdk import ModelInfoBuilder
        from foundry_local_sdk.exception import FoundryLocalException

        for model_id, path in models.items():
            with ModelInfoBuilder() as metadata:
                metadata.set_string_property("task", "chat-completion")
                try:
                    self.own.register_model(path, model_id, metadata)
                except FoundryLocalException as error:
                    traceback.print_exc()
                    yield model_id, in_words(error)
                else:
                    yield model_id, None

    def facts(self) -> dict[str, Any]:
        """Where it serves, what it is, and which models it refused."""
        packages = ("foundry-local-sdk", "onnxruntime", "onnxruntime-genai-core")
        return {
            "url": self.runtime.urls[0],
            "pid": os.getpid(),
            "versions": {package: version(package) for package in packages},
            "refused": self.refused,
        }

    def do(self, request: dict[str, Any], progress: Callable[[float], None]) -> Any:
        """What ``request`` asks for. All but ``list`` are about one variant of the catalogue, by its exact id."""
        match request["do"]:
            case "list":
                return [row for model in self.public.list_models() for row in self.variants(model)]
            case "download":
                return self.download(self.variant(request["id"]), progress)
            case "load":
                self.variant(request["id"]).load()
            case "unload":
                self.variant(request["id"]).unload()
            case "remove":
                self.variant(request["id"]).remove_from_cache()
            case other:
                raise ValueError(f"nothing to do by the name of {other}")
        return None

    def variant(self, model_id: str) -> Any:
        found = self.public.get_model_variant(model_id)
        if found is None:
            raise ValueError(f"{model_id} is not in the catalogue")
        return found

    def variants(self, model: Any) -> Iterator[dict[str, Any]]:
        """A row for each device; ``preferred`` marks the one that the alias stands for on this machine."""
        for variant in model.variants:
            info, cached = variant.info, variant.is_cached
            yield {
                "id": info.id,
                "alias": info.alias,
                "device": info.runtime.device_type and info.runtime.device_type.value,
                "execution_provider": info.runtime.execution_provider or None,
                "size_bytes": (info.file_size_mb or 0) << 20 or None,
                "licence": info.license,
                "capabilities": [word for word in (info.capabilities or info.task or "").split(",") if word],
                "cached": cached,
                "loaded": variant.is_loaded,
                "path": variant.get_path() if cached else None,
                "preferred": info.id == model.id,
            }

    def download(self, variant: Any, progress: Callable[[float], None]) -> dict[str, str]:
        """Fetch it, or find it in the cache. What was fetched before it broke off, the runtime does not fetch again."""
        self.cancelled.clear()
        told = [-1.0, 0.0]  # percent, when

        def tell(percent: float) -> None:
            if percent > told[0] and (percent >= 100 or monotonic() - told[1] > PROGRESS_EVERY_S):
                told[:] = [percent, monotonic()]
                progress(percent)

        variant.download(tell, self.cancelled)
        return {"path": variant.get_path()}


if __name__ == "__main__":
    main()
