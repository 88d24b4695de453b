"""Every figure of a run, in the order in which a reader asks: from its Summary and its data, as Vega-Lite specs.

What has nothing to show is left out, and says why. ``figures_load``, ``_percentile``, ``_time``, ``_memory`` and
``_model`` make them, ``picture`` has their vocabulary, ``plots`` turns them into files, ``html`` shows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from loadbench.analysis.percentile_curve import percentile_curves
from loadbench.analysis.rundir import RunData
from loadbench.analysis.summary import Summary
from loadbench.analysis.timeline import timeline
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.report import figures_load, figures_memory, figures_model, figures_percentile, figures_time, plots
from loadbench.report.picture import Figure, LeftOut


def figures(summary: Summary, run: RunData) -> Iterator[Figure | LeftOut]:
    """All of them."""
    yield from figures_model.model_figures(summary.decision)
    yield from figures_load.load_figures(summary)
    yield from figures_percentile.percentile_figures(summary, [*percentile_curves(run, summary)])
    line = timeline(run, {level.index: level.warmup_trimmed_s for level in summary.levels})
    yield from figures_time.time_figures(summary, line)
    yield from figures_memory.memory_figures(summary)
    yield from figures_memory.phase_figures(summary, run)
    yield from figures_model.kind_figures(summary)


def write_figures(folder: Path, drawn: Sequence[Figure | LeftOut]) -> str:
    """The core figures as SVG files; returns a line of which, where, and what had nothing to show.

    UsageError where the plot library or the disk does not let them be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: expected a folder that can be made ({error.strerror})") from error
    made = [figure for figure in drawn if isinstance(figure, Figure) and figure.core]
    for figure in made:
        write_whole(folder / f"{figure.name}.svg", plots.svg(figure.spec, figure.title).encode())
    files = ", ".join(f"{figure.name}.svg" for figure in made) or "none"
    left = "; ".join(f"{one.title} ({one.because})" for one in drawn if isinstance(one, LeftOut))
    return f"figures in {folder}: {files}" + (f". Nothing to show: {left}" if left else "")
