"""Wan's causal video VAE, through diffusers' `AutoencoderKLWan` (Wan 2.1, arXiv 2503.20314).

The first latent frame is one frame of pixels and each later one four. Latents are normalised per channel by
the mean and the deviation in the VAE's config, as Wan's transformer takes them. Decoding is causal: what the
convolutions remember of earlier frames (two frames of each one's input) continues a video chunk by chunk.
"""

import inspect
import math
import shutil
import threading
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from infra.storage import files_digest
from model.codec import StreamDecoder
from model.pickles import first_line, read_pickle

RELEASED = "Wan2.1_VAE.pth"
"""The VAE in a folder of Wan's release."""


class WanVae:
    """A codec of frames [B, T, 3, 8 H, 8 W] and latents [B, F, C, H, W], T = 1 + 4 (F − 1). Nothing is loaded
    before it is used, and then once in a process."""

    def __init__(self, path: str):
        """`path` is a folder of the VAE in diffusers' layout, one of a pipeline that has it in `vae/`, or one
        of Wan's release, with its file.

        Whatever is asked first raises ValueError where there is no such VAE, or diffusers is missing.
        """
        self.path = path

    @cached_property
    def _config(self) -> dict[str, Any]:
        place = _place(self.path)
        if Path(place).is_file():  # the release has no config: its VAE is the class's defaults
            signature = inspect.signature(_class().__init__).parameters
            return {name: each.default for name, each in signature.items() if name != "self"}
        config = _class().load_config(place)
        # Wan 2.2's VAE has patches.
        known = {"dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std"}
        if (
            config.get("_class_name") != "AutoencoderKLWan"
            or config.get("patch_size")
            or not known <= config.keys()
        ):
            raise ValueError(f"{self.path} is no VAE of Wan 2.1: its config.json says so.")
        return config

    @property
    def channels(self) -> int:
        """Of a latent."""
        return len(self._config["latents_mean"])

    @property
    def spatial(self) -> int:
        """Pixels in a row of one latent."""
        return 2 ** (len(self._config["dim_mult"]) - 1)

    @property
    def temporal(self) -> int:
        """Frames of pixels of each latent frame but the first."""
        return 2 ** sum(self._config["temperal_downsample"])

    @property
    def receptive(self) -> int:
        """Latent frames, from the last one back, on which what a stream remembers depends at most.

        In the decoder every residual block has two convolutions of three frames; at a stage with `rate`
        frames a latent, each reaches 2 / rate latents further back.
        """
        config, rate = self._config, 1
        reach = 2.0 * (1 + 4)  # conv_in and the two blocks in the middle, at a frame a latent
        for doubled in (*reversed(config["temperal_downsample"]), None):
            reach += 2 * 2 * (config["num_res_blocks"] + 1) / rate
            if doubled:
                reach += 2 / rate
                rate *= 2
        return math.ceil(reach + 2 / rate)

    @property
    def _vae(self) -> Any:
        return _loaded(_place(self.path), "cuda" if torch.cuda.is_available() else "cpu")

    def _normaliser(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of a channel, [C, 1, 1] each."""
        return tuple(
            torch.tensor(self._config[name], device=like.device)[:, None, None]
            for name in ("latents_mean", "latents_std")
        )  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """The mode of the latents' distribution; ValueError unless T is 1 + 4 k."""
        count = frames.shape[1]
        if (count - 1) % self.temporal:
            near = self.frames(self.latents(count))
            raise ValueError(
                f"the VAE encodes 1 + {self.temporal} k frames, not {count}; use {near - self.temporal} or "
                f"{near}."
            )
        vae = self._vae
        pixels = frames.transpose(1, 2).to(vae.device, vae.dtype)
        with _lock:
            latents = vae.encode(pixels).latent_dist.mode().float().transpose(1, 2)
        mean, deviation = self._normaliser(latents)
        return ((latents - mean) / deviation).to(frames.device)

    def decode(self, latents: Tensor) -> Tensor:
        return self.unclamped(latents).clamp(-1, 1)

    @torch.no_grad()
    def unclamped(self, latents: Tensor) -> Tensor:
        frames, _ = self._decode(latents, None)
        return frames

    def _decode(self, latents: Tensor, memory: list[Any] | None) -> tuple[Tensor, list[Any]]:
        """Frames [B, T, 3, h, w] in float32 of latents [B, F, C, H, W], and what is remembered after them."""
        vae = self._vae
        mean, deviation = self._normaliser(latents)
        z = (latents.float() * deviation + mean).transpose(1, 2).to(vae.device, vae.dtype)
        first = memory is None
        memory = [None] * len(vae._feat_map) if memory is None else list(memory)
        z, parts = vae.post_quant_conv(z), []
        for frame in z.split(1, dim=2):
            # Frame by frame, as the release decodes: so memory does not grow with a chunk.
            parts.append(vae.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=first))
            first = False
        return torch.cat(parts, 2).transpose(1, 2).float().to(latents.device), memory

    def frames(self, latents: int) -> int:
        return 1 + self.temporal * (latents - 1) if latents else 0

    def latents(self, frames: int) -> int:
        return 1 - (1 - frames) // self.temporal if frames else 0

    def shape(self, latents: Sequence[int]) -> tuple[int, int, int, int]:
        frames, _, height, width = latents
        return self.frames(frames), 3, self.spatial * height, self.spatial * width

    def stream(self) -> "WanStream":
        return WanStream(self)

    def digest(self) -> str:
        """SHA-256 of its files: two with the same one are one."""
        return _digest(_place(self.path))


class WanStream(StreamDecoder):
    """What the decoder remembers of one video: of every convolution its last two frames of input.

    At 480 × 832 in float32 that is 3.8 GB, and half of that in bfloat16.
    """

    def __init__(self, vae: WanVae):
        self.vae = vae
        self.memory: list[Any] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        frames, self.memory = self.vae._decode(latents[None], self.memory)
        return frames[0].clamp(-1, 1)

    def rebuild(self, latents: Tensor) -> None:
        """Remember what decoding the whole video would leave, from its last `WanVae.receptive` latents."""
        self.memory = None
        self.decode(latents)

    def to(self, device: torch.device | str) -> None:
        if self.memory is not None:
            self.memory = [each.to(device) if isinstance(each, Tensor) else each for each in self.memory]


def copy_vae(path: str, target: Path) -> None:
    """Copy the files of the VAE at `path` into the new folder `target`."""
    target.mkdir()
    for file in _files(_place(path)):
        shutil.copyfile(file, target / file.name)


_lock = threading.Lock()
"""The encoder keeps what it remembers of a video in the module."""


def _class() -> Any:
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        raise ValueError("video.codec wan_vae needs diffusers: pip install 'self-forcing[wan]'.") from None
    return AutoencoderKLWan


def _place(path: str) -> str:
    """A folder in diffusers' layout, or the release's file; ValueError where neither is there."""
    for place in (Path(path), Path(path) / "vae"):
        if (place / RELEASED).is_file():
            return str(place / RELEASED)
        if (place / "config.json").is_file() and not (place / "model_index.json").is_file():
            return str(place)
    raise ValueError(
        f"there is no VAE at {path}; name a folder with its config.json, a pipeline's, or one with "
        f"{RELEASED}."
    )


@cache
def _loaded(place: str, device: str) -> Any:
    try:
        if Path(place).is_file():
            vae = _released(place)
        else:
            vae = _class().from_pretrained(place, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise ValueError(f"the VAE at {place} cannot be loaded: {first_line(error)}.") from None
    vae.clear_cache()  # which also makes it
    return vae.to(device).requires_grad_(False).eval()


def _released(file: str) -> Any:
    """The VAE of Wan's release, under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights = read_pickle(Path(file))
    vae = _class()(base_dim=weights["encoder.conv1.weight"].shape[0])
    vae.load_state_dict(convert_wan_vae_to_diffusers(weights))
    return vae.float()


@cache
def _digest(place: str) -> str:
    return files_digest(_files(place))


def _files(place: str) -> list[Path]:
    if Path(place).is_file():
        return [Path(place)]
    return sorted(file for file in Path(place).iterdir() if file.suffix in (".json", ".safetensors"))
