"""Writes a file whole: a reader, or a power cut, finds the old one or the new one and never half."""

from __future__ import annotations

from pathlib import Path

from loadbench.errors import UsageError


def write_whole(path: Path, data: bytes) -> None:
    """Under a temporary name first, then renamed. UsageError where the disk does not take it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: expected a file that can be written, found {error.strerror}") from error
