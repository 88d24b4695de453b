"""The child process that is the embedded Foundry Local: started by ``foundry``, ended when its parent ends.

It reads one JSON line from stdin (what to serve, and where), answers in JSON on stdout, closes that, and then waits for
stdin to close. It is a process of its own because the runtime is a singleton, and because an engine that has
wedged can only be killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Serve until the parent closes stdin or is gone."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # native libraries print to fd 1: that belongs in the log, which is stderr
    die_with_parent()
    request = json.loads(sys.stdin.buffer.readline())
    watch = threading.Thread(target=exit_at_end_of_stdin, daemon=True)
    watch.start()
    with os.fdopen(answer_fd, "w", encoding="utf-8") as answer:
        try:
            answer.write(json.dumps(serve(request)))
        except Exception as error:
            traceback.print_exc()  # into the log first: the parent ends us when it has read the answer
            answer.write(json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())}))
            raise SystemExit(1) from error
    watch.join()


def exit_at_end_of_stdin() -> None:
    """Wait for the parent to close stdin or die, and end this process without asking the runtime.

    ``os._exit``, since an orderly end waits for sessions, and those of a wedged engine never end.
    """
    while os.read(0, 4096):
        pass
    os._exit(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, where it can: it needs no thread of ours to run.

    Only Linux can; on Windows and macOS it is the end of stdin alone that ends this process.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Start the service and register the models of ``request``; say where they are served."""
    from foundry_local_sdk import CatalogType, Configuration, FoundryLocalManager, ModelInfoBuilder

    FoundryLocalManager.initialize(
        Configuration(
            app_name="loadbench",
            app_data_dir=request["app_data_dir"],
            model_cache_dir=request["model_cache_dir"],
            logs_dir=request["logs_dir"],
            web=Configuration.WebService(urls=f"http://{request['host']}:{request['port']}"),
            disable_nonessential_telemetry=True,
        )
    )
    runtime = FoundryLocalManager.instance
    catalog = runtime.get_catalog(CatalogType.LOCAL)
    for model_id, path in request["models"].items():
        with ModelInfoBuilder() as metadata:
            metadata.set_string_property("task", "chat-completion")
            catalog.register_model(path, model_id, metadata)
    runtime.start_web_service()
    return {
        "url": runtime.urls[0],
        "pid": os.getpid(),
        "versions": {
            package: version(package) for package in ("foundry-local-sdk", "onnxruntime", "onnxruntime-genai-core")
        },
    }


if __name__ == "__main__":
    main()
