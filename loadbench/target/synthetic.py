"""Language models made of random numbers, so that a real engine can be measured offline and at once.

What such a model says means nothing; what it costs is real: the engine reads the weights, keeps a KV cache, batches and
streams as for any other. It says lower-case letters and spaces, and never ends by itself: every answer has exactly
``max_tokens`` tokens. One ASCII character of a prompt is one token; the chat template adds one token a message and one
for the answer.

What the files are is ``synthetic_graph``'s, serving them ``foundry``'s, loading the served ones ``endpoint``'s.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from loadbench.errors import UsageError
from loadbench.target import synthetic_graph
from loadbench.target.synthetic_graph import Batching, Recipe

_KV = Recipe(hidden=128, layers=16, heads=2, kv_heads=2, feed_forward=128, context_length=8192, share_buffer=True)

# Timings are of one request at a time on the two-core machine that they were chosen on.
SYNTHETIC: dict[str, Recipe] = {
    # About 10,000 tok/s: for tests.
    "tiny": Recipe(hidden=64, layers=2, heads=4, kv_heads=2, feed_forward=128, context_length=2048),
    # A size between its neighbours that is registered like any other and fails when it is loaded: for runs of several
    # models, one of which does not serve.
    "broken": Recipe(
        hidden=256, layers=4, heads=4, kv_heads=2, feed_forward=512, context_length=2048, share_buffer=True, broken=True
    ),
    # 5 ms a token. A prompt takes 0.5 ms a token, 1 ms where it has 4,000. 80 MB of weights, read for every token.
    "edge": Recipe(
        hidden=512, layers=7, heads=8, kv_heads=2, feed_forward=2048, context_length=8192, share_buffer=True
    ),
    # 6 ms a step of one request, 8 ms of four. The pool holds four requests of full length, so it cannot wedge.
    "batching": Recipe(
        hidden=1024,
        layers=6,
        heads=16,
        kv_heads=1,
        feed_forward=2048,
        context_length=4096,
        batching=Batching(max_batch_size=4, block_size=16, num_blocks=1024),
    ),
    # 16 KiB of KV cache a token, which dwarfs the weights: where memory is what is measured. Here it is reserved for
    # prompt + max_tokens when a request starts.
    "kv": _KV,
    # The same with a cache that grows with every token: the old one and the new one are there at once, so its peak is
    # twice the arithmetic. With the runtime's arena it would be 3 to 6 times, which is fragments and no arithmetic;
    # what glibc would add, `foundry.MAPPED` takes away.
    "kv-growing": replace(_KV, share_buffer=False, arena=False),
    # A pool of 256 tokens, in which one request of 224 fits and two never end. 2 ms a token: slow enough for them to
    # meet.
    "wedge": Recipe(
        hidden=512,
        layers=4,
        heads=4,
        kv_heads=1,
        feed_forward=2048,
        context_length=4096,
        batching=Batching(max_batch_size=4, block_size=16, num_blocks=16),
    ),
}


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """A synthetic model on disk, ready to be registered as ``model_id`` from the folder ``path``."""

    name: str
    alias: str
    model_id: str
    path: Path
    parameters: int
    context_length: int
    layers: int
    kv_heads: int
    head_size: int
    kv_bytes_per_value: int

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in the KV cache, in bytes: a key and a value for every layer and head."""
        return self.layers * 2 * self.kv_heads * self.head_size * self.kv_bytes_per_value


def ensure(name: str, cache_dir: Path) -> SyntheticModel:
    """Return the synthetic model ``name``, made in ``cache_dir`` unless it is there. Several processes may ask at once.

    Raises UsageError for a name that is not in ``SYNTHETIC``.
    """
    recipe = SYNTHETIC.get(name)
    if recipe is None:
        raise UsageError(f"synthetic:{name}: expected one of {', '.join(SYNTHETIC)}, got {name!r}")
    path = cache_dir / "synthetic" / f"{name}-{_fingerprint(recipe)}"
    if not path.is_dir():
        _write_whole(recipe, path)
    return SyntheticModel(
        name=name,
        alias=f"synthetic-{name}",
        model_id=f"synthetic-{name}:1",
        path=path,
        parameters=synthetic_graph.parameters(recipe),
        context_length=recipe.context_length,
        layers=recipe.layers,
        kv_heads=recipe.kv_heads,
        head_size=recipe.head_size,
        kv_bytes_per_value=4,  # float32
    )


def _fingerprint(recipe: Recipe) -> str:
    """Twelve hexadecimal digits that change with the recipe and with the code that follows it."""
    code = Path(synthetic_graph.__file__).read_bytes()
    return hashlib.blake2b(repr(recipe).encode() + code, digest_size=6).hexdigest()


def _write_whole(recipe: Recipe, path: Path) -> None:
    """Write the model beside its place and rename it there: nobody ever loads half a model."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=path.parent) as draft:
            folder = Path(draft, path.name)
            folder.mkdir()
            synthetic_graph.write(recipe, folder)
            folder.rename(path)
    except OSError as error:
        if not path.is_dir():  # else another process was faster, with the same bytes
            raise UsageError(
                f"{path}: expected a place to write a model to, got {error.strerror} (LOADBENCH_CACHE names another)"
            ) from error
