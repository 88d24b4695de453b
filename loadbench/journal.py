"""The run's directory and its run.json: what is known of a run so far, written whole whenever there is more of it."""

from __future__ import annotations

import contextlib
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from loadbench import __version__
from loadbench.calibrate import read_calibration
from loadbench.engine.environment import environment
from loadbench.engine.load import Clock
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.scenario.load import Loaded
from loadbench.scenario.redaction import REDACTED
from loadbench.target.target import Target

ANSWERS = "answers.jsonl"
FILES = ("run.json", "samples.jsonl", "telemetry.jsonl", "histograms.hlog", ANSWERS)
"""What a run writes while it goes on."""

UNKNOWN = (
    *("id", "how", "failed_at", "alias", "device", "execution_provider", "licence", "size_bytes"),
    *("downloaded_ms", "load_ms", "first_ms", "rss_idle_bytes", "rss_loaded_bytes"),
)
"""Of a model, until it is found, loaded and answers."""


class Journal:
    """One run's directory, made with it. ``facts`` is what run.json says beside the scenario and the clock."""

    def __init__(
        self,
        loaded: Loaded,
        command: str,
        results: Path,
        out: Path | None,
        *,
        zero_wall_ns: int | None = None,
        suffix: str = "",
    ) -> None:
        """``out``: the directory that is asked for; None: one below ``results``, named for the time and scenario.

        ``zero_wall_ns`` is when the run's clock begins, None: now. ``suffix`` is the end of the directory's name.
        """
        self.clock = Clock()
        self.started_wall_ns = time.time_ns() if zero_wall_ns is None else zero_wall_ns
        name = f"{loaded.scenario.name}{suffix}"
        self.folder, self._made_folder = _claim_folder(name, results, out, self.started_wall_ns)
        self.facts: dict[str, Any] = {}
        self._loaded = loaded
        self._command = command

    def describe(self, target: Target) -> None:
        """Note what is known before the first request."""
        machine = environment()
        self.facts = {
            "environment": machine,
            "calibration": read_calibration(machine),
            "endpoint": target.facts(),
            "models": [
                {
                    "asked": asked,
                    "synthetic": target.is_synthetic(asked),
                    "status": "skipped",
                    "reason": "the run ended before its turn",
                    "capabilities": [],
                    **dict.fromkeys(UNKNOWN),
                }
                for asked in self._loaded.scenario.models
            ],
            "model_order": list(range(len(self._loaded.scenario.models))),
            "levels": [],
            "not_run": [],
            "find": None,
            "memory": None,
        }

    def write(self, status: str, reason: str | None = None, ended: bool = False) -> None:
        """Write run.json whole."""
        scenario = self._loaded.scenario
        now = {"wall_ns": time.time_ns(), "monotonic_ns": self.clock.origin_ns + self.clock.now_ns()}
        document = {
            "schema": 1,
            "loadbench": __version__,
            "name": scenario.name,
            "status": status,
            "reason": reason,
            "started": datetime.fromtimestamp(self.started_wall_ns / 1e9, UTC).isoformat().replace("+00:00", "Z"),
            "command": self._command,
            "scenario": _without_header_values(scenario.public_json()),
            "scenario_file": str(self._loaded.path),
            "seed": scenario.seed,
            "anchors": {
                "start": {"wall_ns": self.started_wall_ns, "monotonic_ns": self.clock.origin_ns},
                "end": now if ended else None,
            },
            **self.facts,
        }
        write_whole(self.folder / "run.json", orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")

    def abandon(self) -> None:
        """Leave nothing of ours behind: nothing was measured."""
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "shards", ignore_errors=True)
        if self._made_folder:
            with contextlib.suppress(OSError):  # somebody put something there meanwhile: it is theirs
                self.folder.rmdir()


def _without_header_values(scenario: dict[str, Any]) -> dict[str, Any]:
    """Results are for showing around: of headers they keep the names, whatever a value looks like."""
    headers = scenario["request"].get("headers", {})
    return scenario | {"request": scenario["request"] | {"headers": dict.fromkeys(headers, REDACTED)}}


def _claim_folder(scenario: str, results: Path, out: Path | None, wall_ns: int) -> tuple[Path, bool]:
    """The run's directory, the one asked for or results/<UTC time>-<scenario>, and whether we made it.

    The first file of it is made here, and only if there is none: of two runs that want one directory, one gets it.
    """
    stamp = datetime.fromtimestamp(wall_ns / 1e9, UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{stamp}-{scenario}"
    names = [out] if out is not None else [results / name]
    names += [] if out is not None else [results / f"{name}-{attempt}" for attempt in range(2, 100)]
    for folder in names:
        try:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            if made or not any(folder.iterdir()):
                (folder / "samples.jsonl").open("xb").close()
                return folder, made
        except FileExistsError:
            continue
        except OSError as error:
            asked = "--out " if out is not None else ""
            raise UsageError(f"{asked}{folder}: cannot be made: {error.strerror}") from error
    raise UsageError(f"--out {names[0]}: expected a new or an empty directory")
