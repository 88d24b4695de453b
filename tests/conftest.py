"""What every test file shares: the event loops that a test may ask for, and a working directory of its own."""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

NewLoop = Callable[[], asyncio.AbstractEventLoop]

LOOPS: dict[str, NewLoop] = {
    "asyncio": asyncio.new_event_loop,
    "fast": importlib.import_module("winloop" if sys.platform == "win32" else "uvloop").new_event_loop,
}


# A shell that starts us in the background (`make test &`) has us ignore Ctrl-C, and whoever we start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, so that errors name files as a user would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, NewLoop]:
    """asyncio's own, unless a test names its loops: ``pytest.mark.asyncio(loop_factories=["fast"])``."""
    marker = item.get_closest_marker("asyncio")
    named = marker is not None and "loop_factories" in marker.kwargs
    return LOOPS if named else {"asyncio": asyncio.new_event_loop}
