"""Pictures of an evaluation: curves by frame, and samples side by side."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from infra import storage
from infra.storage import Location
from model.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Look:
    """How a row is drawn."""

    label: str
    color: str
    style: str


# Okabe and Ito's palette stays apart for colour-blind readers; line styles for those who print in grey.
LOOKS = {
    "real": Look("real videos", "#6e6e6e", ":"),
    "teacher": Look("teacher", "#0072B2", "--"),
    "initial": Look("initial student", "#E69F00", "-."),
    "distilled": Look("distilled student", "#009E73", "-"),
}


@dataclass(frozen=True)
class Panel:
    """One metric by frame."""

    label: str
    curves: Mapping[str, Estimate]  # row → `[F]`
    share: bool = False  # whether it lies between 0 and 1


def _figure(width: float, height: float, dpi: int) -> "Figure":
    """An empty figure that is drawn in memory, whatever backend the environment names: that of a notebook or
    a desktop, which may not even be installed, would end the import of matplotlib."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def plot_curves(
    path: Location, panels: Sequence[Panel], *, trained: int, looks: Mapping[str, Look] = LOOKS
) -> None:
    """Metrics by frame with their intervals: a panel for each, two abreast, and a curve for each row."""
    names = list(panels[0].curves)
    lines, columns = -(-len(panels) // 2), min(2, len(panels))
    rows = -(-len(names) // 4)
    figure = _figure(8 if columns == 1 else 13, (3.4 if lines > 1 else 4) * lines + 0.2 * rows, 150)
    for index, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, index)
        for name, estimate in panel.curves.items():
            look = looks[name]
            frames = np.arange(len(estimate.value))
            axes.fill_between(frames, estimate.low, estimate.high, color=look.color, alpha=0.18, linewidth=0)
            label = look.label if index == 1 else None
            axes.plot(frames, estimate.value, look.style, color=look.color, linewidth=2, label=label)
        axes.axvline(trained - 0.5, color="0.3", linewidth=1)
        place, units = (trained - 0.5, 1.01), ("data", "axes fraction")
        axes.annotate("trained length", place, xycoords=units, ha="right", color="0.3", fontsize=9)
        if panel.share:
            axes.set_ylim(-0.02, 1.04)
        axes.set_xlim(0, max(len(estimate.value) for estimate in panel.curves.values()) - 1)
        axes.set(xlabel="frame", ylabel=panel.label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4 if rows == 1 else 3, frameon=False)
    with storage.write_file(path) as aside:
        figure.savefig(aside)


def plot_samples(
    path: Location,
    samples: Mapping[str, Tensor],
    prompts: Sequence[str],
    *,
    trained: int,
    chunk: int,
    looks: Mapping[str, Look] = LOOKS,
) -> None:
    """The P videos uint8 `[P, F, channels, H, W]` of each row frame by frame, prompt by prompt."""
    frames = max(videos.shape[1] for videos in samples.values())
    figure = _figure(0.42 * frames + 2, (0.4 + 0.43 * len(samples)) * len(prompts), 100)
    for index, prompt in enumerate(prompts):
        axes = figure.add_subplot(len(prompts), 1, index + 1)
        strips = [_strip(videos[index], frames) for videos in samples.values()]
        height, width = strips[0].shape[0], strips[0].shape[1] // frames
        axes.imshow(np.concatenate(strips), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.axvline(trained * width - 1, color="#D55E00", linewidth=2)
        rows = [height * (row + 0.5) for row in range(len(strips))]
        axes.set_yticks(rows, [looks[name].label for name in samples])
        starts = range(0, frames, chunk)
        axes.set_xticks([width * (frame + 0.5) for frame in starts], [str(frame) for frame in starts])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(prompt, loc="left", fontsize=10)
    with storage.write_file(path) as aside:
        figure.savefig(aside, bbox_inches="tight")


def _strip(video: Tensor, frames: int) -> np.ndarray:
    """Frames `[F, channels, H, W]` abreast, grey between and behind: `[H + 1, frames (W + 1)(, 3)]`."""
    padded = torch.nn.functional.pad(video, (0, 1, 0, 1), value=96)
    missing = torch.full((frames - len(padded), *padded.shape[1:]), 96, dtype=padded.dtype)
    strip = torch.cat([padded, missing]).permute(2, 0, 3, 1).flatten(1, 2)
    return strip.squeeze(-1).numpy()
