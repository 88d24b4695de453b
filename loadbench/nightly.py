"""The command ``nightly``: every scenario of a folder in a run of its own, one page about all, the worst exit code.

A run is a process, `loadbench run`, with its own bound on time: what breaks one leaves the night going. Before each the
night is on the disk, so that one cut short by a kill or a power cut goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import click

from loadbench.analysis import history
from loadbench.analysis.night import (
    BROKE,
    INTERRUPTED,
    INVALID,
    MISSED,
    REGRESSED,
    Night,
    Turn,
    nights,
)
from loadbench.chronicle import working_tree
from loadbench.errors import LoadbenchError, UsageError
from loadbench.files import locked, write_whole
from loadbench.nightly_compare import environment, hold
from loadbench.platform import apart
from loadbench.report.escape import as_line, plain
from loadbench.report.github import SUMMARY_FILE
from loadbench.report.night import front, page
from loadbench.report.night_words import lead, step_summary, told
from loadbench.report.words import clock, octets
from loadbench.target.processes import Born, end_tree

RESUMED_WITHIN_S = 12 * 3600.0  # a night that began before is another one
LEAST_FREE_BYTES = 1 << 30  # a soak's samples and telemetry are some hundred MB
GRACE_S = 60.0  # to finish what is in flight and write the report
SPARE_S = 600.0  # downloads, loads and warm-ups are no part of a plan's time
TIMES = 3.0  # a plan's time: min_requests take a slow target longer

LOCK = ".lock"
OURS = "loadbench: "
RUN = re.compile(r"run \d+ of \d+")  # which of a group's runs begins


@click.command("nightly")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("scenarios/nightly"))
@click.option("--limit", metavar="TIME", help="Most time for each run; else 10 minutes and 3 times its plan's.")
@click.option("--fresh", is_flag=True, help="Begin a new night though one of today was cut short.")
@click.option(
    "--accept", metavar="SCENARIO", help="Run nothing: what regressed last night is what is good from now on."
)
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path), help="Where to.")
def nightly_command(folder: Path, limit: str | None, fresh: bool, accept: str | None, results: Path) -> None:
    """Run every scenario in FOLDER, by name, each in a process of its own, and go on after a failure.

    Each that is good is compared with its last good night of the same thing. Writes results/nightly/DATE/index.html,
    as it goes on. The same command goes on with a night that was cut short, where the commit is still the same. Exits
    with the worst exit code of the runs, or 95 where one regressed; 130 where it was interrupted.
    """
    limit_s = None if limit is None else _limit(limit)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml")) if folder.is_dir() else []
    if not files:
        raise UsageError(f"{folder}: expected scenarios, found {'none' if folder.is_dir() else 'no such directory'}")
    if twice := next((path for path in files if [other.stem for other in files].count(path.stem) > 1), None):
        raise UsageError(f"{twice}: expected one scenario of that name, found two")
    root = results / "nightly"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{root}: cannot be made: {error.strerror}") from error
    with _alone(root / LOCK):
        sweep = Sweep(root, results, limit_s)
        code = sweep.go(folder, files, fresh=fresh) if accept is None else sweep.accept(accept)
    raise SystemExit(code)


def _limit(text: str) -> float:
    from pydantic_core import PydanticCustomError

    from loadbench.scenario.units import DURATION

    try:
        return DURATION.read(text)
    except PydanticCustomError as error:
        raise UsageError(f"--limit: {error.message()}, got {text}") from None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One night at a time. The system drops the lock of a process that has died, whatever the file says."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked(path))
        except BlockingIOError:
            raise UsageError(f"{path}: another nightly is at work here: {_read(path)}") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} since {_now()}".encode())
        yield


def _read(path: Path) -> str:
    try:
        return plain(path.read_text(encoding="utf-8", errors="replace"), 80)
    except OSError as error:
        return str(error.strerror)


def _now() -> str:
    return _at(time.time())


def _at(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Sweep:
    """One night's work. Ctrl-C, or SIGTERM, is passed on to the run that is under way, and with that it ends."""

    def __init__(self, root: Path, results: Path, limit_s: float | None) -> None:
        self.root = root
        self._results = results
        self._limit_s = limit_s
        self._earlier: list[Night] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def go(self, folder: Path, files: list[Path], *, fresh: bool) -> int:
        """Do all that is to do; returns the exit code."""
        night = self._open(folder, files, fresh=fresh)
        try:
            self._do(night)
        except UsageError as error:  # the disk is full: what is known is told here, and the same command goes on
            click.echo(as_line(f"loadbench: {error}"), err=True)
            self._tell(night)
            return BROKE
        self._tell(night)
        return night.code

    def _do(self, night: Night) -> None:
        with self._listening():
            for turn in night.turns:
                if not turn.is_over and not self._stopping:
                    self._take(night, turn)
        interrupted = self._stopping and any(not turn.is_over for turn in night.turns)
        night.status, night.ended = "interrupted" if interrupted else "complete", _now()
        self._write(night)

    def _tell(self, night: Night) -> None:
        """The worst first; to GitHub, too, where the runs' own summaries would hide the night's."""
        earlier = self._before(night)
        for turn in night.worst_first:
            self._say(night, turn, err=False)
        click.echo(as_line(f"Night    {lead(night)}, {clock(night.took_s)}: {night.folder / 'index.html'}"))
        if path := os.environ.get(SUMMARY_FILE):
            try:
                with Path(path).open("a", encoding="utf-8") as file:
                    file.write(step_summary(night, earlier))
            except OSError as error:
                click.echo(as_line(f"loadbench: {path}: cannot be written: {error.strerror}"), err=True)

    def _say(self, night: Night, turn: Turn, *, err: bool) -> None:
        click.echo(as_line(f"{turn.name}: {told(turn, self._before(night))}"), err=err)
        if turn.why:
            click.echo(as_line(f"    {turn.why}", 400), err=err)

    def accept(self, name: str) -> int:
        """Take the last night's regression of a scenario for good."""
        known = nights(self.root)
        turn = next((turn for night in known[:1] for turn in night.turns if turn.name == name), None)
        if turn is None or turn.code != REGRESSED:
            raise UsageError(f"--accept: expected a scenario that regressed last night, got {name}")
        turn.accepted = True
        self._earlier = known[1:]
        self._write(known[0])
        click.echo(as_line(f"{name}: what {known[0].name} measured is what the next night is compared with"))
        return 0

    def _open(self, folder: Path, files: list[Path], *, fresh: bool) -> Night:
        """The night to go on with, or a new one; one that can no longer be gone on with is marked as cut short."""
        commit, known = working_tree(Path()), nights(self.root)
        names = [(path.stem, str(path)) for path in files]
        last = known[0] if known else None
        self._earlier = known
        if last is not None and last.status in ("running", "interrupted"):
            same = last.at == commit and [(turn.name, turn.file) for turn in last.turns] == names
            if same and not fresh and _age_s(last) < RESUMED_WITHIN_S:
                self._earlier = known[1:]
                return self._resume(last)
            self._clear(last)
            last.status = "cut_short"
            self._earlier = known[1:]
            self._write(last)
            self._earlier = known
            click.echo(as_line(f"{last.folder}: was cut short; what it measured is kept"), err=True)
        at = None if commit is None else commit.id
        dirty = None if commit is None else commit.dirty
        turns = [Turn(*name) for name in names]
        night = Night(self._claim(), _now(), str(folder), commit=at, dirty=dirty, turns=turns)
        self._write(night)
        return night

    def _resume(self, night: Night) -> Night:
        self._clear(night)
        done = sum(turn.is_over for turn in night.turns)
        click.echo(as_line(f"{night.folder}: going on; {done} of {len(night.turns)} are done"), err=True)
        night.status, night.ended = "running", None
        self._write(night)
        return night

    def _clear(self, night: Night) -> None:
        """End what a nightly that was killed has left running, and set its turn back."""
        for turn in night.turns:
            if turn.process is not None:
                if end_tree(turn.process):
                    click.echo(as_line(f"{turn.name}: ended the run that was left behind"), err=True)
                turn.process = None
            if turn.state == "running":
                turn.state, turn.path, turn.exit_code = "waiting", None, None

    def _claim(self) -> Path:
        """A folder of its own, named for the day."""
        day = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d")
        for name in (day, *(f"{day}-{number}" for number in range(2, 100))):
            with contextlib.suppress(FileExistsError):
                (self.root / name).mkdir()
                return self.root / name
        raise UsageError(f"{self.root / day}: expected fewer than 100 nights of a day")

    def _take(self, night: Night, turn: Turn) -> None:
        """Run one scenario, and compare it."""
        free_bytes = shutil.disk_usage(self.root).free
        if free_bytes < LEAST_FREE_BYTES:
            turn.state, turn.exit_code = "no_room", BROKE
            turn.why = f"{octets(free_bytes)} are left on the disk of {self._results}: make clean-results KEEP=30"
            click.echo(as_line(f"{turn.name}: {turn.why}"), err=True)
            self._write(night)
            return
        turn.path, turn.log = _free(night.folder, turn.name), f"{turn.name}.txt"
        plan_s, limit_s = self._times_s(turn)
        about = "" if plan_s is None else f"about {clock(plan_s)}, "
        place = f"{night.turns.index(turn) + 1} of {len(night.turns)}"
        click.echo(as_line(f"{turn.name}: {place}, {about}at most {clock(limit_s)}"), err=True)
        began_s = time.monotonic()
        self._run(night, turn, limit_s)
        if not turn.is_over:  # interrupted: it is run again
            self._write(night)
            return
        turn.took_s = round(time.monotonic() - began_s, 1)
        if not (night.folder / turn.path).is_dir():
            turn.path = None
        if turn.exit_code not in (0, INTERRUPTED) and turn.why is None:
            turn.why = _last_line(night.folder / turn.log)
        if turn.exit_code in (0, MISSED) and turn.path is not None:
            hold(self._earlier, night, turn)
        self._say(night, turn, err=True)
        self._write(night)

    def _run(self, night: Night, turn: Turn, limit_s: float) -> None:
        """`loadbench run`, to its end or its bound; what it prints goes to a file."""
        command = [sys.executable, "-m", "loadbench", "run", turn.file, "--out", str(night.folder / str(turn.path))]
        # On Windows there is no signal to pass on that it would end tidily at: it has the terminal's Ctrl-C itself.
        alone = {} if sys.platform == "win32" else apart()
        with (night.folder / str(turn.log)).open("wb") as log:
            process = self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment(), **alone
            )
            try:
                turn.state, turn.process, turn.until = "running", Born.of(process.pid), _at(time.time() + limit_s)
                self._write(night)
                if self._stopping:
                    self._pass_on()
                try:
                    turn.exit_code, turn.state = process.wait(limit_s), "done"
                except subprocess.TimeoutExpired:
                    self._end_overtime(turn, process, limit_s)
            finally:
                if process.poll() is None:  # the disk is full: nobody would know of it any more
                    end_tree(Born.of(process.pid))
                    process.wait()
                    turn.state = "waiting"
                self._process = turn.process = turn.until = None
        if turn.exit_code == INTERRUPTED and self._stopping:
            turn.state, turn.exit_code = "waiting", None

    def _end_overtime(self, turn: Turn, process: subprocess.Popen[bytes], limit_s: float) -> None:
        turn.why = f"stopped after {clock(limit_s)}, the most that it may take"
        self._pass_on()
        try:
            process.wait(GRACE_S if sys.platform != "win32" else 0.1)
        except subprocess.TimeoutExpired:
            end_tree(Born.of(process.pid))
            process.wait()
        turn.state, turn.exit_code = "overtime", INVALID

    def _times_s(self, turn: Turn) -> tuple[float | None, float]:
        """How long it should take, and may; a scenario that cannot be read says so itself."""
        from loadbench.scenario.load import Overrides, load_scenario
        from loadbench.scenario.plan import describe, levels

        try:
            loaded = load_scenario(Path(turn.file), Overrides(), os.environ)
            plan = describe(loaded.scenario, levels(loaded.scenario, loaded.scenario.models, loaded.traces))
        except LoadbenchError:
            return None, self._limit_s or SPARE_S
        times = loaded.scenario.repeat
        return times * plan.estimated_s, self._limit_s or times * (TIMES * plan.estimated_s + SPARE_S)

    def _write(self, night: Night) -> None:
        night.write()
        rows: dict[str, history.Row] = {}
        with contextlib.suppress(UsageError):  # there is no history
            prefix = self.root.relative_to(self._results).as_posix() + "/"
            known, _ = history.read(self._results / history.HISTORY)
            rows = {row.path.removeprefix(prefix): row for row in known if row.path.startswith(prefix)}
        write_whole(night.folder / "index.html", page(night, self._before(night), rows).encode())
        write_whole(self.root / "index.html", front(night).encode())

    def _before(self, night: Night) -> list[Night]:
        return [other for other in self._earlier if other.started < night.started]

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Pass signals on to the run; they are as they were afterwards."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            if not self._stopping:
                click.echo("stopping: waiting for the run that is under way (Ctrl-C again quits it)", err=True)
            self._stopping = True
            self._pass_on()

        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {getattr(signal, name): signal.signal(getattr(signal, name), on_signal) for name in names}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self) -> None:
        process = self._process
        if process is not None and sys.platform != "win32":
            process.send_signal(signal.SIGINT)


def _age_s(night: Night) -> float:
    return time.time() - datetime.fromisoformat(night.started).timestamp()


def _free(folder: Path, name: str) -> str:
    """A directory that a cut run has not filled."""
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(one for one in names if not (folder / one).exists())


def _last_line(log: Path) -> str | None:
    """What a run said last of why it failed; of a group also how many of its runs said something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    told = [line.removeprefix(OURS) for line in lines if line.startswith(OURS)]
    why = [line for line in told if not RUN.fullmatch(line)]
    if not why:
        return next((plain(line, 400) for line in reversed(lines) if line.strip() and not line.startswith(OURS)), None)
    runs = len(told) - len(why)
    return plain(why[-1], 400) + (f" ({len(why)} of {runs} runs)" if runs >= len(why) > 0 else "")
