"""Facts about the machine that sends, for the run's record: nothing that identifies a person."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from loadbench import __version__
from loadbench.platform import loop_name

PACKAGES = ("aiohttp", "foundry-local-sdk", "httptools", "numpy", "orjson", "psutil")


def environment() -> dict[str, Any]:
    """Operating system, processor, memory in bytes, Python, event loop (the running one) and package versions."""
    return {
        "os": platform.platform(aliased=True, terse=True),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "event_loop": loop_name(),
        "versions": {"loadbench": __version__} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name: /proc/cpuinfo on Linux, elsewhere what the platform module knows."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
