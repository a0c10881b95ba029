"""Pictures of an evaluation: curves by frame, and samples side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.metrics import Estimate


@dataclass(frozen=True)
class Look:
    """How a row is drawn."""

    label: str
    color: str
    style: str


# Okabe and Ito's palette, which stays apart for colour-blind readers; line styles for those who print in grey.
LOOKS = {
    "real": Look("real videos", "#6e6e6e", ":"),
    "teacher": Look("teacher", "#0072B2", "--"),
    "initial": Look("initial student", "#E69F00", "-."),
    "distilled": Look("distilled student", "#009E73", "-"),
}


def plot_curves(
    path: Path,
    curves: Mapping[str, Estimate],
    *,
    label: str,
    trained: int,
    share: bool,
    looks: Mapping[str, Look] = LOOKS,
) -> None:
    """One metric by frame with its intervals, a curve for each row; `share` is whether it lies between 0 and 1."""
    from matplotlib.figure import Figure

    rows = -(-len(curves) // 4)
    figure = Figure(figsize=(8, 4 + 0.2 * rows), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, estimate in curves.items():
        look = looks[name]
        frames = np.arange(len(estimate.value))
        axes.fill_between(frames, estimate.low, estimate.high, color=look.color, alpha=0.18, linewidth=0)
        axes.plot(frames, estimate.value, look.style, color=look.color, linewidth=2, label=look.label)
    axes.axvline(trained - 0.5, color="0.3", linewidth=1)
    axes.annotate(
        "trained length",
        (trained - 0.5, 1.01),
        xycoords=("data", "axes fraction"),
        ha="right",
        color="0.3",
        fontsize=9,
    )
    if share:
        axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(0, max(len(estimate.value) for estimate in curves.values()) - 1)
    axes.set_xlabel("frame")
    axes.set_ylabel(label)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4 if rows == 1 else 3, frameon=False)
    figure.savefig(path)


def plot_samples(
    path: Path,
    samples: Mapping[str, Tensor],
    prompts: Sequence[str],
    *,
    trained: int,
    chunk: int,
    looks: Mapping[str, Look] = LOOKS,
) -> None:
    """The P videos uint8 `[P, F, 1, H, W]` of each row frame by frame, prompt by prompt."""
    from matplotlib.figure import Figure

    frames = max(videos.shape[1] for videos in samples.values())
    figure = Figure(
        figsize=(0.42 * frames + 2, (0.4 + 0.43 * len(samples)) * len(prompts)), dpi=100, layout="constrained"
    )
    for index, prompt in enumerate(prompts):
        axes = figure.add_subplot(len(prompts), 1, index + 1)
        strips = [_strip(videos[index], frames) for videos in samples.values()]
        height = strips[0].shape[0]
        axes.imshow(np.concatenate(strips), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.axvline(trained * height - 1, color="#D55E00", linewidth=2)
        axes.set_yticks(
            [height * (row + 0.5) for row in range(len(strips))], [looks[name].label for name in samples]
        )
        starts = range(0, frames, chunk)
        axes.set_xticks([height * (frame + 0.5) for frame in starts], [str(frame) for frame in starts])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(prompt, loc="left", fontsize=10)
    figure.savefig(path, bbox_inches="tight")


def _strip(video: Tensor, frames: int) -> np.ndarray:
    """Frames `[F, 1, H, W]` side by side with grey between and behind them, `[H + 1, frames · (W + 1)]`."""
    padded = torch.nn.functional.pad(video[:, 0], (0, 1, 0, 1), value=96)
    missing = torch.full((frames - len(padded), *padded.shape[1:]), 96, dtype=padded.dtype)
    return torch.cat([padded, missing]).permute(1, 0, 2).flatten(1).numpy()
