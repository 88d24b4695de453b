"""What a level took in energy and money: by the power of its GPUs, read beside it, or by watts that the user states.

Measured is what the GPUs draw that the target uses, idle or not; the processor, the memory and the power supply are not
in it. Stated watts are whatever the user means by them, and come first: who states them knows better than a driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from pydantic_core import PydanticCustomError

from loadbench.analysis.interval import intervals
from loadbench.analysis.memory_columns import columns
from loadbench.analysis.rundir import RunData
from loadbench.analysis.span import Span
from loadbench.analysis.stats import FLOORS, Floats, Range
from loadbench.errors import UsageError
from loadbench.scenario.units import POWER
from loadbench.target.memory_figures import GPU_BYTES

JOULES_PER_KWH = 3.6e6
TOKENS = 1_000_000  # what a price is told for
LEAST_READINGS = 3  # of power, inside the window


@dataclass(frozen=True, slots=True)
class Energy:
    """Mean power over a level's window, what an output token took of it, and what that costs.

    ``source``: measured (``watts`` is the mean of ``readings`` of what ``of`` draws) or stated by the scenario.
    ``firm`` is False for a mean of few readings. ``because`` says why there is no figure, or what it does not hold.
    """

    source: Literal["measured", "stated"] | None
    of: str | None
    watts: float | None
    watts_interval_95: Range | None
    readings: int | None
    firm: bool | None
    joules_per_output_token: float | None
    cost_per_million_output_tokens: float | None
    currency: str | None
    because: str | None


def power_of(run: RunData, span: Span) -> Energy:
    """The level's power, its tokens not counted yet."""
    given = run.facts["scenario"].get("power")
    if given is not None:
        return _power(source="stated", of="the scenario's power", watts=_watts(run, given), firm=True)
    return _measured(span, _device(run, span.plan["model"]))


def with_tokens(energy: Energy, joules_per_token: float | None, scenario: Mapping[str, Any]) -> Energy | None:
    """The same with what a token took; None where nothing was read or stated, and nobody asked."""
    price, currency = scenario.get("price_per_kwh"), scenario.get("currency")
    if energy.watts is None and price is None and energy.readings is None:
        return None
    if energy.watts is not None and joules_per_token is None:
        energy = replace(energy, because="no output token arrived in its window")
    if joules_per_token is None or price is None:
        return replace(energy, joules_per_output_token=joules_per_token)
    cost = joules_per_token * TOKENS / JOULES_PER_KWH * float(price)
    return replace(
        energy, joules_per_output_token=joules_per_token, cost_per_million_output_tokens=cost, currency=currency
    )


def _power(**more: Any) -> Energy:
    absent: dict[str, Any] = dict.fromkeys(field.name for field in fields(Energy))
    return Energy(**absent | more)


def _watts(run: RunData, given: object) -> float:
    try:
        return POWER.read(given)
    except PydanticCustomError as error:
        raise UsageError(f"{run.path / 'run.json'}: scenario.power: {error.message()}, got {given}") from None


def _device(run: RunData, model: str) -> str | None:
    return next((row.get("device") for row in run.facts["models"] if row.get("id") == model), None)


def _measured(span: Span, device: str | None) -> Energy:
    held = columns(span.events.memory)
    inside = (held["t_ns"] >= span.start_ns) & (held["t_ns"] <= span.end_ns)
    held = {name: values[inside] for name, values in held.items()}
    if not held["gpus"].size or not held["gpus"].max() > 0:
        return _power(because="no GPU was read; state what the machine draws with power: 45W")
    used, dedicated = held["gpus_used"] > 0, held["gpu_process"] >= GPU_BYTES
    if used.any():
        watts, count, whose = held["power_used"][used], held["gpus_used"].max(), "GPU"
        times = held["t_ns"][used]
    elif (device or "").upper() == "GPU" or dedicated.any():
        # In a container the driver does not know our processes, and Windows does not say on which device they are.
        watts, count, whose, times = held["power_all"], held["gpus"].max(), "GPU of the machine", held["t_ns"]
    else:
        because = "nobody says that the target uses a GPU; state what the machine draws with power: 45W"
        return _power(readings=0, because=because)
    known = ~np.isnan(watts)
    watts, times, number = watts[known], times[known], int(count)
    of = f"{number} {whose}" if number == 1 else f"{number} {whose.replace('GPU', 'GPUs')}"
    if watts.size < LEAST_READINGS:
        because = f"{watts.size} readings of power inside the window; it takes {LEAST_READINGS}"
        return _power(of=of, readings=int(watts.size), because=because)
    reach = intervals(watts)
    return _power(
        source="measured",
        of=of,
        watts=_mean(watts, times),
        watts_interval_95=None if isinstance(reach, str) else reach.mean,
        readings=int(watts.size),
        firm=watts.size >= FLOORS["p50"],
        because="what the GPU draws; the rest of the machine is not in it",
    )


def _mean(watts: Floats, times_ns: Floats) -> float:
    """Over the time: where memory gets short there are ten readings a second, else one."""
    took_ns = np.diff(times_ns)
    return float(np.dot((watts[1:] + watts[:-1]) / 2, took_ns) / took_ns.sum())
