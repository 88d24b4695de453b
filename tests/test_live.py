"""The live view: what it shows, that it stays small and cheap, and that nobody who reads it can hold up the run."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

import pytest

from loadbench.report.frame import Bracket, LevelProgress, Progress
from loadbench.report.live import PlainView, QuietView, TerminalView, choose_view

LEVELS = tuple(LevelProgress(f"{2**n} users", "synthetic-edge:1") for n in range(4))
DONE = replace(LEVELS[0], ended=True, requests_per_s=5.93, tokens_per_s=189.7, p50_ms=11.2, p95_ms=14.3)
PROGRESS = Progress(
    name="edge",
    levels=(DONE, *LEVELS[1:]),
    current=1,
    phase="load",
    elapsed_s=20.0,
    remaining_s=40.0,
    share=0.5,
    in_flight=2,
    requests_per_s=6.01,
    tokens_per_s=192.2,
    p50_ms=22.2,
    p95_ms=31.0,
    failures={"context_exceeded": 2},
    target_rss_bytes=512 << 20,
    message="random weights",
)


class Terminal(io.StringIO):
    """Keeps what a terminal would have been sent."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)


def settle(view: PlainView | TerminalView) -> None:
    """Until its thread has written everything; yields the processor to it."""
    while view.busy:
        time.sleep(0)


def frame(progress: Progress) -> list[str]:
    """The lines of the picture, as they stand when the run has ended."""
    terminal = Terminal()
    view = TerminalView(terminal, keep=True)
    view.start()
    settle(view)
    view.update(progress)
    view.stop()
    # Stopping draws the picture once more over the first.
    last = terminal.getvalue().split("\x1b[2K")[-1]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).replace("\r", "").rstrip("\n").split("\n")


def lines(*told: Progress, interval_s: float = 5.0) -> list[str]:
    """What the plain view writes of these, one after the other."""
    stream = io.StringIO()
    view = PlainView(stream, interval_s)
    view.start()
    for progress in told:
        settle(view)
        view.update(progress)
    view.stop()
    return stream.getvalue().splitlines()


def test_of_several_load_processes_the_one_whose_loop_is_latest_is_named() -> None:
    told = replace(PROGRESS, sickest=("worker 3 on node-b", 12.4), message=None)
    assert "worker 3 on node-b up to 12.4 ms late" in "\n".join(frame(told))
    assert "worker 3 on node-b up to 12.4 ms late" in "\n".join(lines(told))
    assert "late" not in "\n".join(frame(PROGRESS))


# The terminal


def test_the_frame_shows_done_levels_the_current_one_with_a_bar_and_those_to_come() -> None:
    head, heading, done, current, *to_come, now, failures, message = frame(PROGRESS)
    assert head == "edge  0:20, about 0:40 left"
    assert heading.split() == ["load", "req/s", "tok/s", "TTFT", "p50", "p95", "failed"]
    assert done.split() == ["■", "1", "users", "5.93", "190", "11.2", "ms", "14.3", "ms", "–"]
    assert re.fullmatch(r" ▶ 2 users +6\.01 +192 +22\.2 ms +31\.0 ms +2  (━+)(╌+)", current)
    assert current.count("━") == current.count("╌")
    assert [line.split() for line in to_come] == [["·", "4", "users"], ["·", "8", "users"]]
    assert now.split(" · ") == ["   load", "2 in flight", "target 512 MiB"]
    assert failures.strip() == "failures: context_exceeded 2"
    assert message.strip() == "random weights"


def test_what_is_not_known_yet_is_a_dash_and_never_zero() -> None:
    current = frame(replace(PROGRESS, requests_per_s=None, tokens_per_s=None, p50_ms=None, p95_ms=None, share=None))[3]
    assert current.split() == ["▶", "2", "users", "–", "–", "–", "–", "2"]


def test_answers_that_do_not_stream_show_the_latency_they_have() -> None:
    assert "E2E p50" in frame(replace(PROGRESS, latency="E2E"))[1]


@pytest.mark.parametrize("current", [None, 0, 1, 20, 38, 39])
@pytest.mark.parametrize("models", [1, 3])
def test_a_long_run_of_several_models_stays_within_twenty_lines_of_the_terminal(
    current: int | None, models: int
) -> None:
    levels = tuple(
        LevelProgress(f"{n} users {'x' * 30}", f"model-{n * models // 40}{'y' * 100}", ended=n < (current or 0))
        for n in range(40)
    )
    shown = frame(replace(PROGRESS, levels=levels, current=current, message="z" * 300, name="n" * 200))
    assert len(shown) <= 20
    assert max(map(len, shown)) <= 80
    if current is not None:
        assert any(line.startswith(f" ▶ {current} users") for line in shown)


def test_foreign_text_cannot_command_the_terminal() -> None:
    terminal = Terminal()
    view = TerminalView(terminal, keep=True)
    view.start()
    settle(view)
    view.update(replace(PROGRESS, name="\x1b]0;owned\x07", message="[red]x[/] \x1b[2J"))
    view.note("a\x1b[2J\nb")
    view.stop()
    assert "\x1b]0" not in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
    assert r"[red]x[/] \x1b[2J" in terminal.getvalue()


def test_a_note_stays_above_the_frame() -> None:
    terminal = Terminal()
    view = TerminalView(terminal)
    view.start()
    settle(view)
    view.update(PROGRESS)
    view.note("the model is loaded")
    view.stop()
    assert terminal.getvalue().index("the model is loaded") < terminal.getvalue().rindex("edge")


def test_a_refresh_costs_less_than_five_milliseconds_of_cpu() -> None:
    view = TerminalView(Terminal())
    view.start()
    costs_ms = []
    for _ in range(21):
        settle(view)
        begun_ns = time.thread_time_ns()
        view.update(PROGRESS)
        costs_ms.append((time.thread_time_ns() - begun_ns) / 1e6)
    view.stop()
    assert sorted(costs_ms)[10] < 5


def test_refreshes_that_cost_more_than_one_percent_of_the_time_become_rarer() -> None:
    view = TerminalView(Terminal())
    view.start()
    settle(view)
    view.update(PROGRESS)
    usual_s = view.interval_s
    settle(view)
    begun_ns = time.perf_counter_ns()
    view.update(replace(PROGRESS, message="long " * 400_000))
    cost_s = (time.perf_counter_ns() - begun_ns) / 1e9
    view.stop()
    assert usual_s >= 0.25
    assert view.interval_s > max(0.25, 50 * cost_s)


def test_levels_that_a_rule_left_out_say_so() -> None:
    left_out = replace(LEVELS[3], left_out=True)
    shown = frame(replace(PROGRESS, levels=(*PROGRESS.levels[:3], left_out)))
    assert [line.split() for line in shown[4:6]] == [["·", "4", "users"], ["·", "8", "users", "not", "run"]]


SEARCH = Bracket("users", 8, 16, 11, left=6)


@pytest.mark.parametrize(
    ("search", "line"),
    [
        (SEARCH, "search   8 passes ────●─────── 16 fails · next 11 · about 6 probes"),
        (Bracket("users", None, None, 1), "search   next 1"),
        (Bracket("/s", 2.5, None, 5), "search   2.5/s passes ──────────── · next 5/s"),
        (Bracket("users", None, 16, 4), "search   ──────────── 16 fails · next 4"),
        (replace(SEARCH, next=8, purpose="confirmation", left=1), "confirming 8 · about 1 probe"),
    ],
)
def test_a_search_shows_its_bracket_closing(search: Bracket, line: str) -> None:
    assert line in frame(replace(PROGRESS, search=search))[-2].strip()


def test_a_search_says_what_came_of_each_level() -> None:
    levels = tuple(replace(DONE, result=result) for result in ("pass", "fail", "undecided"))
    shown = frame(replace(PROGRESS, levels=levels, current=None, search=SEARCH))[2:5]
    assert [(line.split()[0], line.split()[-1]) for line in shown] == [
        ("✓", "passes"),
        ("✗", "fails"),
        ("?", "undecided"),
    ]
    assert max(map(len, shown)) <= 80


def test_a_long_search_with_failures_stays_within_twenty_lines() -> None:
    levels = tuple(replace(DONE, result="pass", model=f"m{n // 5}") for n in range(20))
    shown = frame(replace(PROGRESS, levels=levels, current=19, search=SEARCH))
    assert len(shown) <= 20
    assert max(map(len, shown)) <= 80


def test_what_is_good_is_shown_beside_what_failed() -> None:
    ended = replace(DONE, good_share=0.97)
    shown = frame(replace(PROGRESS, levels=(ended, *LEVELS[1:]), good_share=0.5))
    assert shown[2].endswith("good 97 %")
    assert "2 in flight · good 50 %" in shown[-3]
    (line, current) = lines(replace(PROGRESS, levels=(ended, *LEVELS[1:]), good_share=0.5))
    assert line.endswith("0 failed · good 97 %")
    assert "good 50 %" in current


# Plain lines


def test_a_search_is_told_in_words_and_its_levels_are_not_counted_down() -> None:
    (line,) = lines(replace(PROGRESS, levels=LEVELS, search=SEARCH, remaining_s=None))
    assert line.startswith("0:20 level 1 · 2 users")
    assert line.endswith(" · search: 8 passes, 16 fails, next 11, about 6 probes · random weights")


def test_plain_lines_come_once_an_interval_however_often_the_view_is_updated() -> None:
    told = [replace(PROGRESS, levels=LEVELS, elapsed_s=quarters / 4) for quarters in range(61)]
    assert [line.split()[0] for line in lines(*told)] == ["0:00", "0:05", "0:10", "0:15"]


def test_a_plain_line_tells_where_the_run_is_in_one_line() -> None:
    (line,) = lines(replace(PROGRESS, levels=LEVELS))
    assert line == (
        "0:20 level 1, 2 to come · 2 users · load · 2 in flight · target 512 MiB · 6.01 req/s · 192 tok/s"
        " · TTFT p50 22.2 ms p95 31.0 ms · 2 failed · about 0:40 left · random weights"
    )


def test_each_level_that_ended_gets_its_line_once() -> None:
    told = lines(PROGRESS, PROGRESS, replace(PROGRESS, elapsed_s=21.0), interval_s=60.0)
    ended = [line for line in told if "ended" in line]
    assert ended == [
        "level 0 ended: synthetic-edge:1 · 1 users · 5.93 req/s · 190 tok/s · TTFT p50 11.2 ms p95 14.3 ms · 0 failed"
    ]


def test_levels_that_a_rule_left_out_are_not_to_come() -> None:
    (line,) = lines(replace(PROGRESS, levels=(*LEVELS[:3], replace(LEVELS[3], left_out=True))))
    assert line.startswith("0:20 level 1, 1 to come · 2 users")
    (last,) = lines(replace(PROGRESS, levels=LEVELS, current=3))
    assert last.startswith("0:20 level 3 · 8 users")


def test_what_a_search_makes_of_a_level_is_told_once_when_it_is_known() -> None:
    searched = replace(PROGRESS, search=SEARCH)
    failed = replace(searched, levels=(replace(DONE, result="fail"), *LEVELS[1:]))
    told = lines(searched, searched, failed, failed, interval_s=60.0)
    assert [line for line in told if line.startswith("level 0")][1:] == ["level 0 · 1 users · fails"]


def test_plain_lines_are_free_of_control_characters() -> None:
    assert not any("\x1b" in line for line in lines(replace(PROGRESS, message="\x1b[31mred")))


def test_a_stream_that_cannot_show_a_sign_gets_a_question_mark() -> None:
    raw = io.BytesIO()
    view = PlainView(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    view.start()
    view.note("4 users · 2 in flight")
    view.stop()
    assert raw.getvalue().strip() == b"4 users ? 2 in flight"


# Whoever reads it


@pytest.fixture
def unread() -> Iterator[tuple[TextIO, int]]:
    """A pipe whose buffer is full, for writing, and its other end, which nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    stream = os.fdopen(writer, "w", encoding="utf-8")
    yield stream, reader
    os.close(reader)


def test_a_reader_that_does_not_read_holds_nothing_up_and_is_spared_what_it_missed(unread: tuple[TextIO, int]) -> None:
    stream, reader = unread
    view = PlainView(stream)
    view.start()
    begun_ns = time.perf_counter_ns()
    for second in range(100):
        view.update(replace(PROGRESS, elapsed_s=5.0 * second))
    assert time.perf_counter_ns() - begun_ns < 0.5e9
    assert view.busy
    received: list[bytes] = []
    reading = threading.Thread(target=lambda: received.extend(iter(lambda: os.read(reader, 1 << 16), b"")))
    reading.start()
    view.stop()
    stream.close()
    reading.join()
    assert b"".join(received).count(b" in flight") == 1


def test_a_reader_that_goes_away_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", encoding="utf-8")
    view = PlainView(stream)
    view.start()
    view.update(PROGRESS)
    view.note("nobody hears this")
    view.stop()
    assert not view.busy
    with pytest.raises(BrokenPipeError):
        stream.close()


# Which view


def test_a_pipe_gets_plain_lines_and_quiet_gets_nothing() -> None:
    stream = io.StringIO()
    assert isinstance(choose_view(stream), PlainView)
    quiet = choose_view(stream, quiet=True)
    assert isinstance(quiet, QuietView)
    quiet.start()
    quiet.update(PROGRESS)
    quiet.note("x")
    quiet.stop()
    assert stream.getvalue() == ""


def test_a_terminal_gets_the_live_view_unless_it_is_dumb_or_belongs_to_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_view(Terminal()), TerminalView)
    monkeypatch.setenv("CI", "true")
    assert isinstance(choose_view(Terminal()), PlainView)
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_view(Terminal()), PlainView)
