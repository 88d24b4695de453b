"""Turn a recipe into the files of a language model made of random numbers: graph, configuration and tokenizer.

The one place that writes ONNX. Which recipes there are, and where their models are kept, is ``synthetic``'s.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)  # one token a byte, and the special ones
END_OF_TEXT = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
)
SPOKEN = string.ascii_lowercase + " "


@dataclass(frozen=True, slots=True)
class Batching:
    """The engine's continuous batching: how many requests share a step, and the pool of KV blocks they share."""

    max_batch_size: int
    block_size: int
    num_blocks: int
    max_scheduled_tokens: int = 2048


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a synthetic model is made of; lengths in tokens, widths in values (float32).

    With ``batching`` None the runtime gives each request a generator (a thread and a KV cache) of its own, and the
    model is a llama-like decoder. Otherwise the runtime's engine serves all requests in steps. The paged attention that
    this takes exists for no CPU, so there a layer is its dense part only: KV blocks are handed out but never read.
    ``share_buffer`` reserves the KV cache for prompt + max_tokens when a request starts; without, it grows. ``arena``
    lets the runtime keep what it has allocated in an arena of its own, as it does unless told otherwise. ``broken``:
    the graph has an operator that no runtime knows, so that loading the model fails, and nothing before.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    context_length: int
    share_buffer: bool = False
    arena: bool = True
    batching: Batching | None = None
    broken: bool = False
    seed: int = 0

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def write(recipe: Recipe, folder: Path) -> None:
    """Write the model's files into ``folder``; the same recipe gives the same bytes."""
    import onnx

    onnx.save_model(_engine_graph(recipe) if recipe.batching else _generator_graph(recipe), folder / "model.onnx")
    for name, content in (
        ("genai_config.json", _genai_config(recipe)),
        ("tokenizer.json", _tokenizer()),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "GPT2Tokenizer", "chat_template": CHAT_TEMPLATE, "eos_token": SPECIAL_TOKENS[0]},
        ),
    ):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def parameters(recipe: Recipe) -> int:
    """How many weights the model of ``recipe`` has."""
    attention = 2 * recipe.hidden**2 + 2 * recipe.hidden * recipe.kv_heads * recipe.head_size + recipe.hidden
    feed_forward = 2 * recipe.hidden * recipe.feed_forward + recipe.hidden
    layer = feed_forward if recipe.batching else attention + feed_forward
    return 2 * VOCABULARY * recipe.hidden + recipe.layers * layer + recipe.hidden


class _Graph:
    """An ONNX graph in the making: every call adds something and returns the name of what it yields."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._random = np.random.default_rng(seed)

    def node(self, op: str, *inputs: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        import onnx

        outputs = outputs or (f"{op}_{len(self.nodes)}",)
        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def constant(self, values: npt.NDArray[Any], kind: str = "constant") -> str:
        import onnx

        name = f"{kind}_{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(values, name))
        return name

    def weight(self, rows: int, columns: int) -> str:
        import numpy as np

        values = self._random.standard_normal((rows, columns), dtype=np.float32)
        return self.constant(values / np.float32(rows**0.5), "weight")  # keeps the size of what flows through

    def dense(self, x: str, rows: int, columns: int) -> str:
        return self.node("MatMul", x, self.weight(rows, columns))

    def norm(self, x: str, width: int) -> str:
        import numpy as np

        return self.node(
            "SimplifiedLayerNormalization", x, self.constant(np.ones(width, np.float32), "weight"), axis=-1
        )

    def feed_forward(self, x: str, recipe: Recipe) -> str:
        inner = self.node("Relu", self.dense(self.norm(x, recipe.hidden), recipe.hidden, recipe.feed_forward))
        return self.node("Add", x, self.dense(inner, recipe.feed_forward, recipe.hidden))

    def embedding(self, tokens: str, recipe: Recipe) -> str:
        return self.node("Gather", self.weight(VOCABULARY, recipe.hidden), tokens)

    def logits(self, x: str, recipe: Recipe) -> None:
        """End the graph: a score for every token, out of reach for all that is not to be spoken."""
        import numpy as np

        bias = np.full(VOCABULARY, -1e4, np.float32)
        bias[[ord(character) for character in SPOKEN]] = 0
        scores = self.dense(self.norm(x, recipe.hidden), recipe.hidden, VOCABULARY)
        self.node("Add", scores, self.constant(bias), outputs=["logits"])

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        from onnx import helper

        graph = helper.make_graph(self.nodes, "synthetic", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, ir_version=9, opset_imports=opsets)


def _tensor(name: str, kind: str, *shape: int | str) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)


def _generator_graph(recipe: Recipe) -> Any:
    """A llama-like decoder: what the runtime calls once a token, for each request by itself."""
    import numpy as np

    graph = _Graph(recipe.seed)
    one = graph.constant(np.array([1], np.int64))
    last = graph.node("Sub", graph.node("ReduceSum", "attention_mask", one, keepdims=0), one)
    last_position = graph.node("Cast", last, to=6)  # 6: int32
    total = graph.node("Gather", graph.node("Shape", "attention_mask"), graph.constant(np.array(1, np.int64)))
    total_length = graph.node("Cast", total, to=6)
    angles = np.outer(
        np.arange(recipe.context_length), 10_000.0 ** (-2 * np.arange(recipe.head_size // 2) / recipe.head_size)
    )
    rotary = [graph.constant(np.cos(angles).astype(np.float32)), graph.constant(np.sin(angles).astype(np.float32))]

    x = graph.embedding("input_ids", recipe)
    if recipe.broken:
        x = graph.node("BrokenOnPurpose", x)
    for layer in range(recipe.layers):
        normed = graph.norm(x, recipe.hidden)
        attended = graph.node(
            "GroupQueryAttention",
            graph.dense(normed, recipe.hidden, recipe.hidden),
            graph.dense(normed, recipe.hidden, recipe.kv_heads * recipe.head_size),
            graph.dense(normed, recipe.hidden, recipe.kv_heads * recipe.head_size),
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
            last_position,
            total_length,
            *rotary,
            outputs=[f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"],
            domain="com.microsoft",
            num_heads=recipe.heads,
            kv_num_heads=recipe.kv_heads,
            do_rotary=1,
        )
        x = graph.node("Add", x, graph.dense(attended, recipe.hidden, recipe.hidden))
        x = graph.feed_forward(x, recipe)
    graph.logits(x, recipe)

    past = ("batch_size", recipe.kv_heads, "past_sequence_length", recipe.head_size)
    present = ("batch_size", recipe.kv_heads, "total_sequence_length", recipe.head_size)
    return graph.model(
        [
            _tensor("input_ids", "INT64", "batch_size", "sequence_length"),
            _tensor("attention_mask", "INT64", "batch_size", "total_sequence_length"),
            *_cache_tensors("past_key_values", recipe.layers, past),
        ],
        [
            _tensor("logits", "FLOAT", "batch_size", "sequence_length", VOCABULARY),
            *_cache_tensors("present", recipe.layers, present),
        ],
    )


def _engine_graph(recipe: Recipe) -> Any:
    """Dense layers over the tokens of all requests of a step, packed one after another; one row of logits a request."""
    import numpy as np

    graph = _Graph(recipe.seed)
    x = graph.embedding("input_ids", recipe)
    for layer in range(recipe.layers):
        x = graph.feed_forward(x, recipe)
        for side in ("key", "value"):
            # The engine binds both to one buffer, so this copies nothing.
            graph.node("Identity", f"past_key_values.{layer}.{side}", outputs=[f"present.{layer}.{side}"])
    one = graph.constant(np.array([1], np.int64))
    end = graph.constant(np.array([np.iinfo(np.int64).max], np.int64))
    last_rows = graph.node(
        "Sub", graph.node("Slice", "cumulative_sequence_lengths", one, end), graph.constant(np.array([1], np.int32))
    )
    graph.logits(graph.node("Gather", x, last_rows), recipe)

    blocks = ("num_blocks", "block_size", recipe.kv_heads, recipe.head_size)
    return graph.model(
        [
            _tensor("input_ids", "INT64", "num_tokens"),
            _tensor("cumulative_sequence_lengths", "INT32", "batch_size_plus_one"),
            _tensor("past_sequence_lengths", "INT32", "batch_size"),
            _tensor("block_table", "INT32", "batch_size", "max_num_blocks"),
            _tensor("attention_metadata", "INT32", 3),
            *_cache_tensors("past_key_values", recipe.layers, blocks),
        ],
        [
            # The engine looks for this very name: one row of logits a request, not one a token.
            _tensor("logits", "FLOAT", "batch_size", VOCABULARY),
            *_cache_tensors("present", recipe.layers, blocks),
        ],
    )


def _cache_tensors(prefix: str, layers: int, shape: Sequence[int | str]) -> list[Any]:
    return [
        _tensor(f"{prefix}.{layer}.{side}", "FLOAT", *shape) for layer in range(layers) for side in ("key", "value")
    ]


def _genai_config(recipe: Recipe) -> dict[str, Any]:
    inputs = {
        "input_ids": "input_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    if recipe.batching is None:
        inputs["attention_mask"] = "attention_mask"
    else:
        for name in ("cumulative_sequence_lengths", "past_sequence_lengths", "block_table", "attention_metadata"):
            inputs[name] = name
    config: dict[str, Any] = {
        "model": {
            "type": "decoder" if recipe.batching else "llama",
            "vocab_size": VOCABULARY,
            "context_length": recipe.context_length,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": [], "enable_cpu_mem_arena": recipe.arena},
                "hidden_size": recipe.hidden,
                "head_size": recipe.head_size,
                "num_attention_heads": recipe.heads,
                "num_key_value_heads": recipe.kv_heads,
                "num_hidden_layers": recipe.layers,
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": recipe.context_length, "past_present_share_buffer": recipe.share_buffer},
    }
    if recipe.batching is not None:
        config["engine"] = {"dynamic_batching": asdict(recipe.batching)}
    return config


def _tokenizer() -> dict[str, Any]:
    """Byte-level BPE without merges: a token is a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's table: bytes that are printable stand for themselves, the others for the code points from 256 on.
    others = iter(range(256, 512))
    symbols = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
    special = [
        {
            "id": 256 + index,
            "content": content,
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for index, content in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {symbol: byte for byte, symbol in symbols.items()}
            | {entry["content"]: entry["id"] for entry in special},
            "merges": [],
        },
    }
