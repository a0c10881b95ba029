"""A light decoder of a VAE's latents, in the layout of TAEHV (github.com/madebyollin/taehv).

It takes a small part of the VAE's time and memory; what its pictures are like depends on its weights. Each of
its blocks remembers one frame, so a video is decoded chunk by chunk. It reads latents as the transformer
makes them, normalised, and makes as many frames as the VAE: four of a latent, and one of the first.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.codec import Codec, StreamDecoder
from model.pickles import read_pickle

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)
"""Frames of each frame, stage by stage; each also doubles rows and columns."""
SCALE = 3.0
"""Latents are squashed to ± this."""


def _conv(before: int, after: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


class _Remembering(nn.Module):
    """A residual block over a frame and the one before it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([frames, before], 1)) + frames)


class _Growing(nn.Module):
    """Each frame becomes `count`."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width * count, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        return self.conv(frames).reshape(-1, *frames.shape[1:])


class _Squash(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / SCALE) * SCALE


class TinyDecoder(nn.Module):
    """Latents [F, C, H, W] and what was remembered → frames [4 F, 3, 8 H, 8 W] in [0, 1], and what is now."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        layers: list[nn.Module] = [_Squash(), _conv(channels, WIDTHS[0]), nn.ReLU()]
        for width, after, count in zip(WIDTHS, WIDTHS[1:], GROWTH, strict=False):
            layers += [_Remembering(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), _Growing(width, count), _conv(width, after, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(WIDTHS[-1], 3))

    def forward(self, latents: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`memory` is the last frame that each block read, [1, width, h, w]; empty for a new video."""
        frames, kept = latents, list[Tensor]()
        for layer in self.decoder:
            if isinstance(layer, _Remembering):
                last = memory[len(kept)] if memory else torch.zeros_like(frames[:1])
                kept.append(frames[-1:].clone())
                frames = layer(frames, torch.cat([last, frames[:-1]]))
            else:
                frames = layer(frames)
        return frames, kept


class LightDecoder:
    """The codec of a model, with a light decoder in place of its own."""

    def __init__(self, codec: Codec, path: str):
        """`path` is a file of weights, safetensors or `.pth`. ValueError where it is none of this layout, or
        makes other frames than the codec."""
        self.codec = codec
        self.network = _loaded(path, "cuda" if torch.cuda.is_available() else "cpu")
        channels = self.network.channels
        wanted = codec.shape((3, channels, 8, 8))
        if wanted != (9, 3, 64, 64):
            raise ValueError(
                f"the light decoder at {path} makes 8 x 8 pixels and 4 frames of a latent, as Wan 2.1's VAE "
                "does; the model's codec does not."
            )
        self.channels = channels

    def encode(self, frames: Tensor) -> Tensor:
        return self.codec.encode(frames)

    def decode(self, latents: Tensor) -> Tensor:
        return self.unclamped(latents).clamp(-1, 1)

    def unclamped(self, latents: Tensor) -> Tensor:
        return torch.stack([self.run(video, [])[0] for video in latents])

    @torch.no_grad()
    def run(self, latents: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Frames [T, 3, h, w] in float32 of the next latents [F, C, H, W] of a video, and what it
        remembers."""
        weight = next(self.network.parameters())
        parts: list[Tensor] = []
        for latent in latents.to(weight.device, weight.dtype).split(1):
            # Latent by latent: so memory does not grow with a chunk.
            frames, kept = self.network(latent, memory)
            # The first latent is one frame; the others that it grew into come before the video.
            parts.append(frames if memory else frames[-1:])
            memory = kept
        return torch.cat(parts).float().to(latents.device) * 2 - 1, list(memory)

    def frames(self, latents: int) -> int:
        return self.codec.frames(latents)

    def latents(self, frames: int) -> int:
        return self.codec.latents(frames)

    def shape(self, latents: Sequence[int]) -> tuple[int, int, int, int]:
        return self.codec.shape(latents)

    def stream(self) -> "LightStream":
        return LightStream(self)


class LightStream(StreamDecoder):
    """One video's memory: a frame of each block's input."""

    def __init__(self, decoder: LightDecoder):
        self.decoder = decoder
        self.memory: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        frames, self.memory = self.decoder.run(latents, self.memory)
        return frames.clamp(-1, 1)

    def to(self, device: torch.device | str) -> None:
        self.memory = [each.to(device) for each in self.memory]


@cache
def _loaded(path: str, device: str) -> TinyDecoder:
    try:
        file = Path(path)
        weights = load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
        weights = {name: each for name, each in weights.items() if name.startswith("decoder.")}
        network = TinyDecoder(weights["decoder.1.weight"].shape[1])
        for name, own in network.state_dict().items():
            # A stage that does not grow may be stored as one that does; its last frame is the one made.
            if ".conv.weight" in name and weights[name].shape[0] > own.shape[0]:
                weights[name] = weights[name][-own.shape[0] :]
        network.load_state_dict(weights)
    except OSError as error:
        raise ValueError(f"the light decoder at {path} cannot be read: {error.strerror or error}.") from None
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, SafetensorError):
        raise ValueError(
            f"the file at {path} is no light decoder: it has not the weights of TAEHV's plain variant."
        ) from None
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return network.to(device, dtype).requires_grad_(False).eval()
