"""What each name of a run means to the embedded service: a folder of one's own or a model of the public catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from loadbench.errors import TargetError, UsageError
from loadbench.target.catalogue import Catalogue
from loadbench.target.models import ModelInfo, refuse_other_device, split_device
from loadbench.target.register import Register, at_home, read_folder
from loadbench.target.synthetic import ensure


@dataclass(slots=True)
class Chosen:
    """By what was asked: the ``ids`` that are meant, or why there is none. By id: folders to register, downloads."""

    ids: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    listed: dict[str, ModelInfo] = field(default_factory=dict)

    def downloaded(self) -> dict[str, Path]:
        """The models of the catalogue that are in the cache: id → folder."""
        return {model_id: info.path for model_id, info in self.listed.items() if info.path is not None}


async def choose(asked: Sequence[str], cache: Path) -> Chosen:
    """Find out what is meant. The catalogue is asked only for names that nothing here has.

    What is not to be had has its reason in ``failed``. Raises UsageError for a synthetic model that does not exist,
    and for a device that does not.
    """
    chosen, others = Chosen(), []
    for name in asked:
        try:
            found = folder_of(name, cache)
        except TargetError as error:
            chosen.failed[name] = str(error)
            continue
        if found is None:
            refuse_other_device(name)
            others.append(name)
        else:
            chosen.ids[name], chosen.folders[found[0]] = found[0], found[1]
    if others:
        catalogue = await Catalogue.read(cache)
        for name in others:
            try:
                info = catalogue.obtain(name)
            except TargetError as error:
                chosen.failed[name] = str(error)
            else:
                chosen.ids[name], chosen.listed[info.id] = info.id, info
    return chosen


def folder_of(asked: str, cache: Path) -> tuple[str, Path] | None:
    """(id, folder) of a model of our own: synthetic:NAME, auto, a folder's path, or a registered name or id.

    None for a name that may be the catalogue's. TargetError for a folder that holds no model, or not for that device.
    """
    name, device = split_device(asked)
    if not name.strip():
        raise TargetError(f"expected the name of a model, got {asked!r}")
    if name == "auto" or name.startswith("synthetic:"):
        made = ensure("edge" if name == "auto" else name.removeprefix("synthetic:"), cache)
        found = made.model_id, made.path
    elif (model_id := (register := Register(cache)).find(name)) is not None:
        found = model_id, register.read()[model_id]
    elif _is_path(name):
        found = "", Path(name)
    else:
        return None
    try:
        if not found[0]:
            folder = at_home(found[1])
            found = f"{folder.name}:1", folder
        told = read_folder(found[1])
    except UsageError as error:
        raise TargetError(str(error) if str(error).startswith(str(found[1])) else f"{asked}: {error}") from None
    if device is not None and told.device not in (device, None):
        raise TargetError(f"{asked}: its genai_config.json is for the {told.device}: add a folder that is for {device}")
    return found


def _is_path(name: str) -> bool:
    """Whether a name is a folder's: as it is written, or because a model lies there, and not only something so called.

    No name of a model has a separator: neither Foundry's aliases and ids nor those that are registered.
    """
    written = name[0] in ".~" or any(separator in name for separator in "/\\") or bool(PureWindowsPath(name).drive)
    return written or (Path(name) / "genai_config.json").is_file()
