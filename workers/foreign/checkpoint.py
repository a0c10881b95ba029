"""Wan transformers in other tools' layouts, read as a `WeightSource` under our names.

A layout is recognised by what lies there: a folder of the Wan 2.1 release, one of diffusers (alone or inside
a pipeline's), or one file of tensors, as Self Forcing and its kin publish them (a pickle whose `generator` or
`generator_ema` is the student). Sizes are read off shapes; only the number of heads is not in them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.families import shapes_of
from model.transformer import TransformerConfig
from model.wan_names import IMAGE_CONDITIONED, from_diffusers, unwrapped
from workers.foreign.files import SUFFIXES, Pickle, TensorFile, open_file, read_json, shards

OTHER_MODELS = ("models_t5", "models_clip", "Wan2.1_VAE", "open_clip", "taew")
"""Beginnings of the names of files in a release folder that are not the transformer's."""

WAN_HEAD_DIM = 128
"""Channels of a head in every Wan model that was released."""

NETWORKS = {"WanModel": False, "WanTransformer3DModel": False, "CausalWanModel": True}
"""`_class_name` in a folder's config.json → whether such a network is causal."""

SHOWN_AT_MOST = 10


@dataclass(frozen=True)
class Layout:
    """Where the files of a checkpoint are and how they name things."""

    kind: str  # what a person calls it
    files: tuple[Path, ...]
    config: Path | None  # its config.json, where it has one
    causal: bool | None
    """Whether it is a causal model; None where neither the layout nor the file says so."""


def recognise(path: str | Path) -> Layout | None:
    """The layout of what lies at `path`, by names alone; None where it is none of them.

    Raises:
        ValueError: an index names a file that is not there, or the folder is of another network.
    """
    place = Path(path)
    if place.is_file():
        return Layout("a checkpoint file", (place,), None, None) if place.suffix in SUFFIXES else None
    if (place / "model_index.json").is_file():
        place = place / "transformer"
    if not place.is_dir() or any((place / name).exists() for name in ("model.json", "adapter_config.json")):
        return None
    files, config = tuple(shards(place, but=OTHER_MODELS)), place / "config.json"
    if not config.is_file():
        return Layout("a folder of weights", files, None, None) if files else None
    network = read_json(config).get("_class_name")
    if network not in NETWORKS:
        raise ValueError(
            f"{place} is a folder of {network or 'an unnamed network'}, and only those of "
            f"{', '.join(NETWORKS)} are read."
        )
    return Layout(f"a folder of {network}", files, config, NETWORKS[network])


class ForeignCheckpoint:
    """An opened checkpoint; a `WeightSource` of our names. Nothing is loaded before it is asked for."""

    def __init__(
        self,
        path: str | Path,
        *,
        part: str | None = None,
        heads: int | None = None,
        text_len: int = 512,
    ):
        """Open what lies at `path` and compare its names and shapes with the model that they make.

        Args:
            part: of a pickle that holds several models (`generator`, `generator_ema`, `critic`); by default
                the averaged generator where there is one.
            heads: attention heads, where no config says so and the width is not one of Wan's.
            text_len: text tokens that the model reads.

        Raises:
            ValueError: the layout is unknown, a file is damaged, the model is of a kind that cannot run here,
                or names are missing, unexpected or of other shapes; one sentence.
        """
        self.path = str(path)
        layout = recognise(path)
        if layout is None:
            raise ValueError(
                f"there is no checkpoint at {path} whose layout is known; name a Wan release folder, a "
                "diffusers folder, or a .safetensors, .pt or .pth file."
            )
        if not layout.files:
            raise ValueError(f"{path} is {layout.kind} without weights in it.")
        self.layout = layout
        self._where: dict[str, tuple[TensorFile, str]] = {}
        self.part: str | None = None
        for file in layout.files:
            opened = open_file(file, part)
            if isinstance(opened, Pickle):
                self.part = opened.part
            for name in opened.shapes:
                self._where[from_diffusers(unwrapped(name))] = opened, name
        self.shapes = {name: file.shapes[own] for name, (file, own) in self._where.items()}
        self._refuse_images()
        self.sizes = self._sizes(heads, text_len)
        check_names(self.path, shapes_of(self.sizes), self.shapes)

    @property
    def causal(self) -> bool | None:
        """Whether the model is causal, as far as its layout says."""
        # What Self Forcing and its kin train is a causal generator; its critic is not.
        return {"critic": False}.get(self.part or "", self.layout.causal)

    def keys(self) -> Iterable[str]:
        return self._where.keys()

    def get(self, name: str) -> Tensor:
        file, own = self._where[name]
        return file.get(own)

    def _refuse_images(self) -> None:
        name = next((name for name in self.shapes if IMAGE_CONDITIONED.search(name)), None)
        patch = self.shapes.get("patch_embedding.weight")
        head = self.shapes.get("head.head.weight")
        wider = patch and head and patch[1] * torch.Size(patch[2:]).numel() != head[0]
        if name or wider:
            why = f"it has {name}" if name else f"it reads {patch[1] if patch else 0} latent channels"
            raise ValueError(
                f"{self.path} is conditioned on images ({why}); only text-to-video models run here, which "
                "generate from a given first frame by starting their cache with it."
            )

    def _sizes(self, heads: int | None, text_len: int) -> TransformerConfig:
        config = read_json(self.layout.config) if self.layout.config else {}
        try:
            dim, in_dim, *patch = self.shapes["patch_embedding.weight"]
            blocks = {int(name.split(".")[1]) for name in self.shapes if name.startswith("blocks.")}
            found = heads or config.get("num_heads") or config.get("num_attention_heads")
            if found is None:
                if dim % WAN_HEAD_DIM:
                    raise ValueError(
                        f"{self.path} does not say how many attention heads it has, and its width of {dim} "
                        f"is not one of Wan's (heads of {WAN_HEAD_DIM}); say so with --heads."
                    )
                found = dim // WAN_HEAD_DIM
            return TransformerConfig(
                dim=dim,
                ffn_dim=self.shapes["blocks.0.ffn.0.weight"][0],
                num_heads=found,
                num_layers=max(blocks) + 1,
                in_dim=in_dim,
                out_dim=self.shapes["head.head.weight"][0] // torch.Size(patch).numel(),
                text_len=config.get("text_len", text_len),
                text_dim=self.shapes["text_embedding.0.weight"][1],
                freq_dim=self.shapes["time_embedding.0.weight"][1],
                patch_size=(patch[0], patch[1], patch[2]),
                cross_attn_norm="blocks.0.norm3.weight" in self.shapes,
                qk_norm="blocks.0.self_attn.norm_q.weight" in self.shapes,
                eps=config.get("eps", 1e-6),
            )
        except KeyError as error:
            raise ValueError(
                f"{self.path} holds no Wan transformer: {error.args[0]} is not among its "
                f"{len(self.shapes)} tensors ({listed(self.shapes, 3)})."
            ) from None


def check_names(
    path: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError, with the first names of each kind and their number, unless both are the same."""
    shaped = {
        f"{name} {list(found[name])} instead of {list(wanted[name])}": ()
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    }
    problems = [
        f"{what} {listed(names, SHOWN_AT_MOST)}"
        for what, names in (
            ("missing", wanted.keys() - found.keys()),
            ("unexpected", found.keys() - wanted.keys()),
            ("of another shape", shaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights at {path} are not those of the model that they seem to be: {'; '.join(problems)}."
        )


def listed(names: Iterable[str], most: int) -> str:
    """The first names in order, and how many there are in all where that is more."""
    names = sorted(names)
    more = f" … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
