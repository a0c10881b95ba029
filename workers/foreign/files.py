"""Files of named tensors: safetensors, and PyTorch's pickles, of which nothing but tensors is ever loaded.

A tensor is read when it is asked for, so that a checkpoint passes through in pieces; a pickle is mapped into
memory, which comes to the same.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.pickles import read_pickle

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)


class Safetensors:
    """A safetensors file; ValueError where its header is truncated or promises what is not there."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self.shapes: Mapping[str, tuple[int, ...]] = {
                    name: tuple(file.get_slice(name).get_shape())
                    for name in file.keys()  # noqa: SIM118 (not a mapping)
                }
                self.metadata: Mapping[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from None

    def get(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


class Pickle:
    """What `torch.save` wrote: a mapping of tensors, perhaps one of several beside each other."""

    PARTS = ("generator_ema", "generator", "critic", "generator_lora", "model", "module", "state_dict")
    """Names that mappings of tensors have in checkpoints, that which is taken by default first."""

    def __init__(self, path: Path, part: str | None = None):
        """ValueError where the file is damaged, holds more than tensors, or has no `part`."""
        self.path = path
        body = read_pickle(path)
        parts = [name for name in self.PARTS if isinstance(body.get(name), Mapping)]
        if parts:
            if part is not None and part not in parts:
                raise ValueError(f"{path} has no part {part}; it has {', '.join(parts)}.")
            self.part: str | None = part or parts[0]
            body = body[self.part]
        elif part is not None:
            raise ValueError(f"{path} has no parts, only tensors; leave the part out.")
        else:
            self.part = None
        self._tensors = {str(name): value for name, value in body.items() if isinstance(value, Tensor)}
        if not self._tensors:
            raise ValueError(f"{path} holds no tensors.")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


TensorFile = Safetensors | Pickle


def open_file(path: Path, part: str | None = None) -> TensorFile:
    """The file at `path` by its suffix; `part` is one of `Pickle.PARTS`. ValueError as they."""
    if path.suffix in PICKLES:
        return Pickle(path, part)
    if part is not None:
        raise ValueError(f"{path} has no parts; leave {part} out.")
    return Safetensors(path)


def shards(folder: Path, *, but: Iterable[str] = ()) -> list[Path]:
    """The weight files of a folder: those that its index names, or all of one kind, safetensors first.

    Args:
        but: beginnings of the names of files that are other models' (a text encoder, a VAE).

    Raises:
        ValueError: the index cannot be read, or names a file that is not there.
    """
    # Hidden files are leftovers of copying tools.
    if indices := _shown(folder, "*.index.json"):
        named = sorted(set(read_json(indices[0]).get("weight_map", {}).values()))
        for name in named:
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is incomplete: {indices[0].name} names {name}, which is missing.")
        return [folder / name for name in named]
    for suffix in SUFFIXES:
        if found := [path for path in _shown(folder, f"*{suffix}") if not path.name.startswith(tuple(but))]:
            return found
    return []


def _shown(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; ValueError for anything else."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(body, dict):
        raise ValueError(f"{path} must hold a mapping.")
    return body
