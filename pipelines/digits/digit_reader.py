"""A small classifier that reads the digit in one frame of the moving-digits canvas, wherever it is.

It is what evaluation measures generated frames with, so it is trained on the training scans only, wrapped
around the canvas at random and made a little worse the way generated frames are: fainter, blurred, noisy.
Held-out scans, which no generator has seen either, tell how far it can be trusted.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra import storage
from pipelines.digits.moving_digits import CANVAS, DIRECTIONS, render, scans

FILE = Path(__file__).with_suffix(".safetensors")

_UPDATES = 500
_BATCH = 128
_PEAK_LEARNING_RATE = 4e-3


def _wrapping_convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode="circular", bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class DigitReader(nn.Module):
    """Frames `[N, 1, 16, 16]` in [-1, 1] to `(logits [N, 10], features [N, 64])`.

    Convolutions wrap around the edges as the videos do, and the features are averaged over the canvas, so
    they say which digit it is and how it is written rather than where it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _wrapping_convolution(1, 16),
            _wrapping_convolution(16, 32, stride=2),
            _wrapping_convolution(32, 48),
            _wrapping_convolution(48, 64, stride=2),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(frames).mean((2, 3))
        return self.head(features), features


def train(seed: int) -> DigitReader:
    """A reader trained from scratch: about 20 seconds on one idle core; a function of `seed`."""
    numpy_generator = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = DigitReader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=_UPDATES)
    images, digits = scans("train")
    for _ in range(_UPDATES):
        chosen = numpy_generator.integers(len(images), size=_BATCH)
        starts = numpy_generator.integers(CANVAS, size=(_BATCH, 2))
        frames = render(images[chosen], [DIRECTIONS[0]] * _BATCH, starts, 1)[:, 0]
        logits, _ = reader(_degrade(torch.from_numpy(frames) / 255, generator))
        loss = F.cross_entropy(logits, torch.from_numpy(digits[chosen]), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval().requires_grad_(False)


def _degrade(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames in 0..1, each fainter, blurred and noisy by amounts of its own; returned in [-1, 1]."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(frames), 1, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    frames = torch.lerp(frames, blurred, uniform(0.0, 0.6)) * uniform(0.6, 1.1)
    frames = frames + uniform(0.0, 0.12) * torch.randn(frames.shape, generator=generator)
    return frames.clamp(0, 1) * 2 - 1


def load() -> DigitReader:
    """The reader that comes with the package: one instrument for all runs, whatever their seed.

    `python -m pipelines.digits.digit_reader` makes its file again.
    """
    reader = DigitReader()
    try:
        reader.load_state_dict(load_file(FILE))
    except Exception as error:
        raise ValueError(
            f"the digit reader {FILE} is missing or damaged; install the package anew, or make it again with "
            "`python -m pipelines.digits.digit_reader`"
        ) from error
    return reader.eval().requires_grad_(False)


@torch.inference_mode()
def read_videos(reader: DigitReader, videos: Tensor) -> tuple[Tensor, Tensor]:
    """Videos `[N, F, 1, 16, 16]` in [-1, 1] to logits `[N, F, 10]` and features `[N, F, 64]`."""
    outputs = [reader(frames) for frames in videos.flatten(0, 1).split(2048)]
    logits, features = (
        torch.cat(parts).unflatten(0, videos.shape[:2]) for parts in zip(*outputs, strict=True)
    )
    return logits, features


if __name__ == "__main__":
    with storage.write_file(FILE) as aside:
        save_file(train(seed=0).state_dict(), aside)
