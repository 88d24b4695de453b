"""Reads what a user has noted of models beforehand: ``models.json``, ``{alias: {capabilities, size_mb}}``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadbench.errors import UsageError
from loadbench.scenario.reading import read_json, shown_json

MB = 1_000_000
_SHAPE = "an object of {alias: {capabilities, size_mb}}"


@dataclass(frozen=True, slots=True)
class ModelNote:
    """What a user has written down of a model: what it is good for, and its size on disk. None: not said."""

    capabilities: tuple[str, ...] = ()
    size_bytes: int | None = None


def read_models_file(path: Path) -> dict[str, ModelNote]:
    """The notes by alias, in the file's order; keys beside ``capabilities`` and ``size_mb`` are somebody else's.

    Raises UsageError that names the file and the place in it.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object with each key once: JSON would keep the last and lose what the first one says."""
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UsageError(f"{path}: {twice}: expected this key once, got it {keys.count(twice)} times")
        return dict(pairs)

    document, _ = read_json(path, _SHAPE, once)
    if not isinstance(document, dict) or not document:
        raise UsageError(f"{path}: expected {_SHAPE}, got {shown_json(document)}")
    return {alias: _note(found, f"{path}: {alias}") for alias, found in document.items()}


def _note(found: Any, where: str) -> ModelNote:
    if not isinstance(found, dict):
        raise UsageError(f"{where}: expected an object with capabilities and size_mb, got {shown_json(found)}")
    tags, size_mb = found.get("capabilities"), found.get("size_mb")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) and tag.strip() for tag in tags)):
        raise UsageError(f"{where}.capabilities: expected a list of texts, got {shown_json(tags)}")
    if size_mb is not None and not (type(size_mb) in (int, float) and 0 < size_mb < 1e9):
        raise UsageError(f"{where}.size_mb: expected a number of megabytes above 0, got {shown_json(size_mb)}")
    return ModelNote(tuple(tags or ()), None if size_mb is None else round(size_mb * MB))
