"""What every test file shares: the event loops that a test may ask for."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Mapping

import pytest

NewLoop = Callable[[], asyncio.AbstractEventLoop]

LOOPS: dict[str, NewLoop] = {
    "asyncio": asyncio.new_event_loop,
    "fast": importlib.import_module("winloop" if sys.platform == "win32" else "uvloop").new_event_loop,
}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, NewLoop]:
    """asyncio's own, unless a test names its loops: ``pytest.mark.asyncio(loop_factories=["fast"])``."""
    marker = item.get_closest_marker("asyncio")
    named = marker is not None and "loop_factories" in marker.kwargs
    return LOOPS if named else {"asyncio": asyncio.new_event_loop}
