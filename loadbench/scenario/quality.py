"""What a scenario says of prompts whose answers are to be marked. Reading their file is ``quality_prompts``' job."""

from __future__ import annotations

from pydantic import Field

from loadbench.scenario.part import Part
from loadbench.scenario.units import Positive


class Quality(Part):
    """Prompts that every model is asked beside its levels, one after another, for answers that can be marked."""

    prompts: str = Field(
        min_length=1,
        description="A JSON list of prompts with expected aspects, a rubric or checks, relative to the scenario file.",
    )
    max_tokens: Positive | None = Field(
        default=None, description="Instead of request.max_tokens, where a prompt does not state its own."
    )
    repeats: Positive = Field(default=1, description="How often each model is asked each of them.")
