"""Lays out what is told of the quality of answers: a row a model, and how far judges agree with people.

Formats and escaping are ``console``'s and ``markdown``'s; `block` is for answers and prompts that are shown whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loadbench.analysis.agreement import Agreement
from loadbench.analysis.quality import LEAST_PROMPTS, Checked, Judged, Mean, Quality
from loadbench.analysis.stats import Range
from loadbench.analysis.summary import Summary
from loadbench.report.content import Cells, Table
from loadbench.report.escape import plain, visible
from loadbench.report.findings import Finding, Row
from loadbench.report.words import NONE, count, share

ALL = "all models"


def tables(summary: Summary) -> list[Table]:
    """One, a row a model; none where no model was asked."""
    told = summary.quality
    if not told:
        return []
    judges = list(dict.fromkeys(judged.judge for quality in told for judged in quality.judges))
    columns = [
        Cells(("model",), 0, tuple(quality.model for quality in told), left=True),
        Cells(("prompts",), 7, tuple(f"{quality.prompts:,}" for quality in told)),
        Cells(("answers",), 6, tuple(f"{quality.answers:,}" for quality in told)),
        Cells(("failed",), 4, tuple(f"{quality.failed:,}" for quality in told)),
        Cells(("cut at", "max_tokens"), 8, tuple(f"{quality.cut:,}" for quality in told)),
        Cells(("checks", "passed (95 %)"), 2, tuple(_passed(quality.checks) for quality in told)),
        Cells(("mark by", "people (95 %)"), 1, tuple(_mark(quality.human, quality.prompts) for quality in told)),
    ]
    for number, judge in enumerate(judges):
        name = "judge" if len(judges) == 1 else f"judge {number + 1}"
        found = [next((one for one in quality.judges if one.judge == judge), None) for quality in told]
        cells = tuple(
            _mark(one.marks if one else None, quality.prompts) for one, quality in zip(found, told, strict=True)
        )
        columns.append(Cells(("mark by", f"{name} (95 %)"), 1, cells))
    kept = [column for column in columns if column.rank in (0, 6) or not {*column.cells} <= {NONE, "0"}]
    return [Table("quality", "marks from 1 to 5, a mean over prompts", tuple(kept), _note(told, judges))]


def _note(told: Iterable[Quality], judges: list[str]) -> str | None:
    notes = []
    if len(judges) == 1:
        notes.append(f"the judge is {plain(judges[0])}")
    elif judges:
        notes.append(", ".join(f"judge {number + 1} is {plain(judge)}" for number, judge in enumerate(judges)))
    means = [mean for quality in told for mean in (quality.human, *(judged.marks for judged in quality.judges))]
    if any(mean.mean is not None and not mean.firm for mean in means):
        notes.append(f"~ stands on fewer than {LEAST_PROMPTS} prompts")
    notes += _missing(told)
    absent = dict.fromkeys(mean.not_told for mean in means if mean.not_told and mean.marks)
    notes += [f"{NONE}: {why}" for why in absent if why]
    outdated = sum(quality.outdated for quality in told)
    if outdated:
        notes.append(f"{count(outdated, 'mark')} of answers that have since been given again count nowhere")
    if any(quality.checks and quality.checks.undecided for quality in told):
        notes.append("checks whose regular expression took too long, or failed, on an answer count as not passed")
    return "; ".join(notes) or None


def _missing(told: Iterable[Quality]) -> Iterator[str]:
    """Of whose means some prompts are missing: what has no mark may well be what is worst."""
    for quality in told:
        for by, mean in (("people", quality.human), *((judged.judge, judged.marks) for judged in quality.judges)):
            if mean.mean is not None and mean.prompts < quality.prompts:
                left = quality.prompts - mean.prompts
                yield f"{plain(quality.model)}: no mark by {plain(by)} for {left} of {quality.prompts} prompts"


def _mark(mean: Mean | None, prompts: int) -> str:
    """With the prompts that it stands on: a mean whose number is left out for want of room would be worth nothing."""
    if mean is None or mean.mean is None:
        return NONE
    n = f"n {mean.prompts:,}" + (f" of {prompts:,}" if mean.prompts < prompts else "")
    return f"{'' if mean.firm else '~'}{mean.mean:.2f}{_between(mean.interval_95)} {n}"


def _passed(checks: Checked | None) -> str:
    if checks is None:
        return NONE
    low, high = checks.interval_95
    return f"{checks.passed:,} of {checks.of:,} ({100 * low:.0f} to {100 * high:.0f} %)"


def _between(reach: Range | None) -> str:
    return "" if reach is None else f" ({reach[0]:.2f} to {reach[1]:.2f})"


def findings(summary: Summary) -> list[Finding]:
    """For each judge, how far it agrees with people, and what it said that is no mark."""
    judges = dict.fromkeys(judged.judge for quality in summary.quality for judged in quality.judges)
    return [_judge(summary, judge) for judge in judges]


_HEADINGS = ("answers of", "both marked", "equal", "within 1", "judge − people", "weighted kappa (95 %)", "because")


def _judge(summary: Summary, judge: str) -> Finding:
    rows: list[Row] = []
    headings: tuple[str, ...] = _HEADINGS
    overall = [found for found in summary.agreements if found.judge == judge]
    each = [found for quality in summary.quality for found in quality.agreements if found.judge == judge]
    for found in [*overall, *(each if len(each) > 1 else [])]:
        rows.append(_agreement(found))
    said = [(quality, one) for quality in summary.quality for one in quality.judges if one.judge == judge]
    notes = [note for quality, one in said if (note := _oddities(quality.model, one))]
    if not overall:
        headings, rows = ("answers of", "both marked", "because"), [(ALL, "0", "nobody knows what its marks are worth")]
    notes += [f"{plain(one.judge)} judges answers of its own here" for _, one in said if one.itself]
    return Finding(judge, "as a judge, against people", headings, tuple(rows), tuple(notes))


def _agreement(found: Agreement) -> Row:
    kappa = NONE if found.kappa is None else f"{'' if found.kappa_interval_95 else '~'}{found.kappa:.2f}"
    return (
        found.model or ALL,
        f"{found.pairs:,}",
        share(found.equal_share),
        share(found.within_1_share),
        f"{'−' if found.above < 0 else '+'}{abs(found.above):.2f}",
        kappa + _between(found.kappa_interval_95),
        found.not_told or "",
    )


def _oddities(model: str, judged: Judged) -> str:
    counts = (("malformed", judged.malformed), ("refused", judged.refused), ("failed", judged.failed))
    told = ", ".join(f"{number:,} {name}" for name, number in counts if number)
    return f"no mark for answers of {plain(model)}: {told}" if told else ""


def reasons(summary: Summary) -> list[Finding]:
    """For each judge and model why it gave the marks that it gave, the lowest first."""
    return [
        Finding(
            quality.model,
            f"why {plain(one.judge)} gave its marks",
            ("prompt", "repeat", "mark", "reason"),
            tuple((told.prompt, f"{told.repeat:,}", str(told.mark), told.reason) for told in one.reasons),
            (),
        )
        for quality in summary.quality
        for one in quality.judges
        if one.reasons
    ]


def block(text: str) -> str:
    """Foreign text line by line as it is laid out, every other unprintable character a visible escape."""
    return "\n".join(map(visible, text.expandtabs(4).splitlines()))
