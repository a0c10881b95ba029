"""Where the numbers that watch training find videos to compare the student's with."""

import torch

from model.watch import Reference
from workers.dataset import ParquetDataset, is_there
from workers.model_directory import VideoConfig

VIDEOS = 64
BYTES = 256 * 2**20
"""Videos that are looked at, and how much memory they may take: 32 of Wan's 21 × 16 × 60 × 104 in fp32."""


def reference_of(
    video: VideoConfig, held_out: str, pairs: str, *, skip_damaged: bool = False
) -> Reference | None:
    """What held-out videos are like, else the ends of the teacher's ODE trajectories; None without either."""
    column = video.column
    codec = video.make_codec() if column == "video" else None
    one = 4 * torch.Size(video.shape).numel()
    most = max(1, min(VIDEOS, BYTES // one))
    for path, name, source in (
        (held_out, column, "held-out videos"),
        (pairs, "trajectory", "samples of the teacher"),
    ):
        if not is_there(path):
            continue
        names = ParquetDataset(path, [], skip_damaged=skip_damaged).schema.names
        if name not in names:
            continue
        data = ParquetDataset(path, [name], skip_damaged=skip_damaged)
        read = (data.row(i)[name] for i in range(min(most, len(data))))
        # Copies: a view would keep its whole trajectory alive.
        rows = [(each[-1] if name == "trajectory" else each[: video.frames]).clone() for each in read]
        if name == "trajectory":
            latents, wanted = rows, torch.Size(video.shape)
        else:
            shown = video.shape if codec is None else codec.shape(video.shape)
            latents, wanted = rows, torch.Size(shown)
        if any(each.shape != wanted for each in latents):
            continue
        stacked = torch.stack(latents).float()
        if name != "trajectory" and codec is not None:
            stacked = codec.encode(stacked)
        return Reference.of(stacked, f"{len(rows)} {source}")
    return None
