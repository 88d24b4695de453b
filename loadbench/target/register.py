"""Models of one's own: folders in ONNX Runtime GenAI's format, and the register in which they have a name.

The register is a file of ours in the cache folder. A registered folder stays where it is and is never written to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from loadbench.errors import UsageError
from loadbench.files import write_whole

SCHEMA_VERSION = 1
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*:(0|[1-9]\d*)")  # Foundry's own rule

# The name in genai_config.json's provider_options → onnxruntime's, and the device that it stands for.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "CPU"),
    "cuda": ("CUDAExecutionProvider", "GPU"),
    "dml": ("DmlExecutionProvider", "GPU"),
    "webgpu": ("WebGpuExecutionProvider", "GPU"),
    "rocm": ("ROCMExecutionProvider", "GPU"),
    "nvtensorrtrtx": ("NvTensorRTRTXExecutionProvider", "GPU"),
    "openvino": ("OpenVINOExecutionProvider", None),  # which device it is, its own options say
    "qnn": ("QNNExecutionProvider", "NPU"),
    "vitisai": ("VitisAIExecutionProvider", "NPU"),
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a folder says of the model in it. ``size_bytes`` is that of all its files."""

    path: Path
    execution_provider: str | None
    device: str | None
    size_bytes: int


def read_folder(path: Path) -> ModelFolder:
    """Look at a folder as far as can be seen without loading it. UsageError with the first thing that is missing."""
    config_path = path / "genai_config.json"
    if not path.is_dir():
        raise UsageError(f"{path}: expected a folder, found {'a file' if path.exists() else 'nothing'} there")
    if not config_path.is_file():
        raise UsageError(f"{path}: expected an ONNX Runtime GenAI model, found no genai_config.json in it")
    try:
        config = orjson.loads(config_path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UsageError(f"{config_path}: expected JSON: {error}") from None
    decoder = _within(config, "model", "decoder")
    file = decoder.get("filename") or _first_stage(decoder)
    if not isinstance(file, str):
        raise UsageError(f"{config_path}: model.decoder.filename: expected the name of an ONNX file, got {file!r}")
    if not (path / file).is_file():
        raise UsageError(f"{path / file}: expected the model that genai_config.json names, found no such file")
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise UsageError(f"{path}: expected a tokenizer ({', '.join(TOKENIZERS)}), found none")
    provider, device = _provider(decoder)
    return ModelFolder(path, provider, device, folder_bytes(path))


def _within(config: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def _first_stage(decoder: Mapping[str, Any]) -> Any:
    """A decoder in a pipeline (for NPUs) names a file for each stage: [{"stage": {"filename": …}}, …]."""
    stages = decoder.get("pipeline")
    named = next(iter(stages), None) if isinstance(stages, list) else None
    first = next(iter(named.values()), None) if isinstance(named, dict) else None
    return first.get("filename") if isinstance(first, dict) else None


def _provider(decoder: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(execution provider, device) that the model asks for; without any it runs on the CPU."""
    options = _within(decoder, "session_options").get("provider_options")
    asked = next((name for entry in options if isinstance(entry, dict) for name in entry), None) if options else "cpu"
    return PROVIDERS.get(str(asked).lower(), (str(asked), None))


def at_home(path: Path) -> Path:
    """The path, absolute, with ~ as somebody's home. UsageError for the home of somebody who is not known."""
    try:
        return path.expanduser().resolve()
    except RuntimeError:
        raise UsageError(f"{path}: expected a folder, found no home of that user") from None


def folder_bytes(path: Path) -> int:
    """The size of all files in it."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Register:
    """The models that ``models add`` has put there: id → folder."""

    def __init__(self, cache: Path) -> None:
        self.path = cache / "models.json"

    def read(self) -> dict[str, Path]:
        """Every registered model. UsageError for a file that is not ours to read."""
        try:
            document = orjson.loads(self.path.read_bytes())
            return {row["id"]: Path(row["path"]) for row in document["models"]}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageError(f"{self.path}: expected the register of models, got {error.strerror}") from error
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{self.path}: expected the register of models: {error}; mend or remove it") from None

    def add(self, model_id: str, path: Path) -> ModelFolder:
        """Register a folder. UsageError for one that is no model, and for an id that another folder has."""
        if MODEL_ID.fullmatch(model_id) is None:
            raise UsageError(f"--id: expected NAME:VERSION, such as my-model:1, got {model_id}")
        if model_id.startswith("synthetic-") or model_id.rpartition(":")[0].lower() == "auto":
            raise UsageError(f"--id: expected a name that means no synthetic model, got {model_id}")
        folder = read_folder(at_home(path))
        models = self.read()
        if models.get(model_id, folder.path) != folder.path:
            raise UsageError(f"--id: {model_id} is {models[model_id]}: choose another version, or `models rm` it first")
        self._write(models | {model_id: folder.path})
        return folder

    def remove(self, model_id: str) -> Path:
        """Forget a model; its folder stays. The id must be registered."""
        models = self.read()
        path = models.pop(model_id)
        self._write(models)
        return path

    def find(self, asked: str) -> str | None:
        """The id that is meant: itself, or the newest version of a name."""
        models = self.read()
        if asked in models:
            return asked
        named = [model_id for model_id in models if model_id.rpartition(":")[0].lower() == asked.lower()]
        return max(named, key=lambda model_id: int(model_id.rpartition(":")[2]), default=None)

    def name_of(self, path: Path) -> str | None:
        """The id of a folder, if it is registered."""
        folder = path.expanduser().resolve()
        return next((model_id for model_id, known in self.read().items() if known == folder), None)

    def _write(self, models: Mapping[str, Path]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": model_id, "path": str(path)} for model_id, path in sorted(models.items())]
        document = {"schema_version": SCHEMA_VERSION, "models": rows}
        write_whole(self.path, orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
