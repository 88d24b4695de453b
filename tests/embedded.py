"""The embedded Foundry Local as a target with one model loaded, and requests to it: what its deaths are tested with."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import perf_counter_ns

from loadbench.records import Prompt, Request, Sample
from loadbench.target.models import Resolved
from loadbench.target.target import Target
from tests.asking import client_to


class Asked:
    """A target of one model, loaded, and requests for it."""

    def __init__(self, target: Target, model: Resolved) -> None:
        self.target = target
        self.model = model

    async def ask(
        self, count: int, prompt_tokens: int, max_tokens: int, first_token_s: float = 10.0, total_s: float = 20.0
    ) -> list[Sample]:
        """So many requests at once, each with a prompt of so many tokens."""
        prompt = Prompt("x", 0, ({"role": "user", "content": "x" * (prompt_tokens - 2)},), max_tokens)
        async with client_to(
            self.target.endpoint.address.port,
            path=self.model.chat_path,
            model=self.model.id,
            first_token_s=first_token_s,
            total_s=total_s,
        ) as client:
            asked = [
                client.send(Request(seq, prompt, perf_counter_ns()), level=0, phase="load") for seq in range(count)
            ]
            return list(await asyncio.gather(*asked))

    async def canary(self, first_token_s: float = 10.0) -> Sample:
        [sample] = await self.ask(1, 8, 4, first_token_s)
        return sample

    async def verdict(self, samples: Sequence[Sample], first_token_s: float = 10.0) -> tuple[str, list[str]]:
        failed = Counter(sample.outcome for sample in samples if sample.outcome != "ok")
        return await self.target.state(await self.canary(first_token_s), failed, attempted=len(samples))


@asynccontextmanager
async def embedded(name: str, limit_bytes: int | None = None, kind: str | None = None) -> AsyncIterator[Asked]:
    target = await Target.embedded([name], "test", memory_limit_bytes=limit_bytes, limit_kind=kind)
    try:
        yield Asked(target, await target.load(await target.resolve(name)))
    finally:
        await target.close()
