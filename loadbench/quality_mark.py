"""Walks a person through the answers of a run: shows one, takes a mark from 1 to 5, keeps it at once.

Lines, not keys: the same works in every terminal, over ssh and from a pipe.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from rich.text import Text

from loadbench.analysis import quality_rows as rows
from loadbench.analysis.quality_rows import Answer, Key, Mark
from loadbench.quality_answers import append
from loadbench.report.console import console_on
from loadbench.report.escape import plain
from loadbench.report.quality import block
from loadbench.report.words import count

PRESS = "1 to 5 marks · n TEXT notes · s skips · b goes back · q quits · Enter after each"


def to_mark(answers: Sequence[Answer], blind: bool, seed: int) -> list[list[Answer]]:
    """What is to be marked, prompt by prompt; those with one text to one prompt are marked once.

    Blind, a seeded draw says in which order the answers to each prompt come; otherwise models come as they ran. It is
    the same every time, whatever has been marked already.
    """
    by_prompt: dict[str, dict[str | None, list[Answer]]] = {}
    for answer in answers:
        if answer.can_be_marked:
            by_prompt.setdefault(answer.id, {}).setdefault(answer.hash, []).append(answer)
    items: list[list[Answer]] = []
    for prompt, by_text in by_prompt.items():
        # Sorted by what says nothing of the model, so that the draw alone decides.
        alike = [by_text[text] for text in sorted(by_text, key=str)] if blind else list(by_text.values())
        if blind:
            random.Random(f"blind {seed} {prompt}").shuffle(alike)
        items += alike
    return items


class Marking:
    """One sitting of one rater. ``come`` gives what is typed, line by line; what is shown goes to ``out``."""

    def __init__(self, folder: Path, rater: str, *, blind: bool, seed: int, come: Iterator[str], out: TextIO) -> None:
        self.items = to_mark(rows.answers(folder), blind, seed)
        self._file = folder / rows.MARKS
        self._rater = rater
        self._blind = blind
        self._come = come
        self._out = console_on(out)
        self._marks: dict[tuple[Key, str | None], Mark] = {
            (mark.key, mark.hash): mark for mark in rows.marks(folder) if mark.rater == rater
        }

    @property
    def marked(self) -> int:
        """How many are, by this rater."""
        return sum(self._mark_of(item) is not None for item in self.items)

    def run(self) -> None:
        """From the first that has no mark to the end, or until it is quit; where input ends, too."""
        at = self._next(0)
        while at < len(self.items):
            self._show(at)
            step = self._take(self.items[at])
            if step is None:
                return
            at = max(0, at - 1) if step < 0 else self._next(at + 1)

    def _next(self, at: int) -> int:
        """The first place from ``at`` on that has no mark."""
        while at < len(self.items) and self._mark_of(self.items[at]) is not None:
            at += 1
        return at

    def _mark_of(self, item: Sequence[Answer]) -> Mark | None:
        """What all of the item have, where they do: one that came later, with a text that is known, has none yet."""
        marks = [self._marks.get((answer.key, answer.hash)) for answer in item]
        return None if None in marks else marks[0]

    def _take(self, item: Sequence[Answer]) -> int | None:
        """Where to go from here: 1 on, -1 back, None away."""
        before = self._mark_of(item)
        note = before.note if before else None
        while True:
            self._out.print(Text(f"{PRESS} > "), end="")
            self._out.file.flush()
            typed = next(self._come, None)
            if typed is None:
                self._out.print()
                return None
            word, _, rest = typed.strip().partition(" ")
            match word.lower():
                case "1" | "2" | "3" | "4" | "5":
                    self._keep(item, int(word), rest.strip() or note)
                    return 1
                case "n":
                    note = rest.strip() or self._ask_note()
                    if before:
                        self._keep(item, before.mark, note)
                    self._say("noted" if before else "noted; the mark?")
                case "s":
                    return 1
                case "b":
                    return -1
                case "q":
                    return None
                case _:
                    self._say(f"{plain(typed.strip(), 20) or 'nothing'} is none of these")

    def _ask_note(self) -> str | None:
        self._out.print(Text("note > "), end="")
        self._out.file.flush()
        return next(self._come, "").strip() or None

    def _keep(self, item: Sequence[Answer], mark: int, note: str | None) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for answer in item:
            model, prompt, repeat = answer.key
            row = {"model": model, "id": prompt, "repeat": repeat, "answer_hash": answer.hash, "mark": mark}
            append(self._file, row | {"note": note, "rater": self._rater, "at": now})
            self._marks[answer.key, answer.hash] = Mark(answer.key, answer.hash, mark, note, self._rater)

    def _show(self, at: int) -> None:
        item, out = self.items[at], self._out
        answer, mark = item[0], self._mark_of(item)
        who = "" if self._blind else f" · {', '.join(dict.fromkeys(plain(one.model) for one in item))}"
        category = f" · {plain(answer.category)}" if answer.category else ""
        out.print()
        out.rule(
            Text(f"{at + 1} of {len(self.items)} · {self.marked} marked · prompt {plain(answer.id)}{category}{who}")
        )
        for message in answer.messages:
            self._part(str(message.get("role")), str(message.get("content")))
        if answer.aspects:
            self._part("expected", "\n".join(f"- {aspect}" for aspect in answer.aspects))
        if answer.rubric:
            self._part("rubric", answer.rubric)
        self._part("answer", answer.text, "bold")
        if answer.finish_reason == "length":
            self._say("(cut at max_tokens)")
        if len(item) > 1:
            self._say(f"(the same words {count(len(item), 'time')}: marked together)")
        if mark is not None:
            self._say(f"marked {mark.mark}{f', note: {plain(mark.note)}' if mark.note else ''}")

    def _part(self, name: str, text: str, style: str = "") -> None:
        self._out.print(Text(plain(name, 40), "dim"))
        self._out.print(Text(block(text), style), overflow="fold")
        self._out.print()

    def _say(self, line: str) -> None:
        self._out.print(Text(line, "dim"))
