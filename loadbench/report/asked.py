"""The options of ``run`` and ``report`` that assert something: read before anything is measured or shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from loadbench.analysis.gates import Asked

_ALLOWED = "loadbench.allow_indicative"


def gate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--assert and --allow-indicative, given to the command as ``gates``: what is asserted, None where nothing is."""
    asserted = click.option(
        "--assert",
        "gates",
        multiple=True,
        metavar="'ttft.p95<2s'",
        callback=_asked,
        help="Exit with 99 unless it holds, with 94 where that cannot be told; may be repeated.",
    )
    few = "Let values on too few samples to be firm count, for --assert and the SLO."
    allowed = click.option(
        "--allow-indicative", is_flag=True, is_eager=True, expose_value=False, callback=_allow, help=few
    )
    return asserted(allowed(command))


def _allow(context: click.Context, _: click.Parameter, allowed: bool) -> None:
    context.meta[_ALLOWED] = allowed


def _asked(context: click.Context, _: click.Parameter, texts: tuple[str, ...]) -> Asked | None:
    allowed = bool(context.meta.get(_ALLOWED))
    if not texts and not allowed:
        return None
    from loadbench.analysis.gates import asked

    return asked(texts, allowed)
