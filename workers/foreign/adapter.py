"""Low-rank adapters in other tools' layouts: read and merged, and written for diffusers.

Read are PEFT's own (`base_model.model.….lora_A.weight`, with an adapter_config.json), diffusers'
(`transformer.….lora_A.weight`), those of trainers that say `lora_down`, `lora_up` and `alpha`, and the
pickles of LongLive (a `generator_lora` in PEFT's names).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from model.backbone import WeightSource
from model.wan_names import from_diffusers, to_diffusers, unwrapped
from workers.foreign.checkpoint import SHOWN_AT_MOST, listed
from workers.foreign.files import open_file, read_json, shards

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_SIDES = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?$")
_DOWN, _UP = ("lora_A", "lora_down"), ("lora_B", "lora_up")


@dataclass(frozen=True)
class LowRank:
    """What is added to one layer's weight: `scale` · `up` @ `down`."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    scale: float


class ForeignAdapter:
    """An opened adapter, its layers under our names."""

    def __init__(self, path: str | Path):
        """ValueError where the file is damaged or holds no adapter of linear layers."""
        self.path, place = str(path), Path(path)
        files = shards(place) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise ValueError(
                f"there is no adapter at {path}; name a .safetensors or .pt file, or its folder."
            )
        config = place / "adapter_config.json"
        settings = read_json(config) if config.is_file() else {}
        sides: dict[str, dict[str, Tensor]] = {}
        others: list[str] = []
        for file in map(open_file, files):
            for name in file.shapes:
                match = _SIDES.search(name)
                if match is None:
                    others.append(name)
                    continue
                # Our name of the layer: that of its weight, without the weight.
                layer = from_diffusers(f"{unwrapped(name[: match.start()])}.weight").removesuffix(".weight")
                side = "down" if match[1] in _DOWN else "up" if match[1] in _UP else "alpha"
                sides.setdefault(layer, {})[side] = file.get(name)
        if others or not sides:
            what = f"also has {listed(others, 3)}" if others else "has no lora_A or lora_down"
            raise ValueError(f"{path} is no adapter of linear layers: it {what}.")
        if half := [layer for layer, pair in sides.items() if not {"down", "up"} <= pair.keys()]:
            raise ValueError(f"{path} has only one half of the adapters of {listed(half, SHOWN_AT_MOST)}.")
        self.layers = {layer: _low_rank(pair, settings.get("lora_alpha")) for layer, pair in sides.items()}


def _low_rank(pair: Mapping[str, Tensor], alpha: float | None) -> LowRank:
    rank = pair["down"].shape[0]
    given = pair["alpha"].item() if "alpha" in pair else alpha
    return LowRank(pair["down"], pair["up"], 1.0 if given is None else given / rank)


class Merged:
    """A base with an adapter added to it, one tensor at a time, in fp32 and then the base's type."""

    def __init__(self, base: WeightSource, adapter: ForeignAdapter):
        """ValueError where the adapter is of layers that the base does not have."""
        self.base, self.adapter = base, adapter
        if strange := [name for name in adapter.layers if f"{name}.weight" not in set(base.keys())]:
            raise ValueError(
                f"the adapter at {adapter.path} is of layers that the model does not have: "
                f"{listed(strange, SHOWN_AT_MOST)}."
            )

    def keys(self) -> Iterable[str]:
        return self.base.keys()

    def get(self, name: str) -> Tensor:
        weight = self.base.get(name)
        low = self.adapter.layers.get(name.removesuffix(".weight"))
        if low is None:
            return weight
        if (low.up.shape[0], low.down.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"the adapter at {self.adapter.path} does not fit {name}, which is {list(weight.shape)}."
            )
        return (weight.float() + low.scale * (low.up.float() @ low.down.float())).to(weight.dtype)


def for_diffusers(adapter: ForeignAdapter) -> dict[str, Tensor]:
    """The adapter's tensors in diffusers' names, for `WanPipeline.load_lora_weights`.

    Its scale is multiplied into the upper half: without a word on alpha, a loader takes it for the rank.
    """
    tensors = {}
    for layer, low in adapter.layers.items():
        name = to_diffusers(f"{layer}.weight").removesuffix(".weight")
        tensors[f"transformer.{name}.lora_A.weight"] = low.down.contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = (
            (low.scale * low.up.float()).to(low.up.dtype).contiguous()
        )
    return tensors
