"""`self-forcing prepare`: the moving-digit data sets."""

from typing import Any

from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.digits.moving_digits import write_dataset
from pipelines.tracked import located


def prepare(config: RunConfig) -> None:
    """Write the data sets that are not there yet."""
    data = config.data
    write_dataset(data.train, videos=data.videos, frames=config.video.frames, seed=config.seed, split="train")
    write_dataset(
        data.held_out,
        videos=data.held_out_videos,
        frames=data.held_out_frames,
        seed=config.seed + 1,
        split="held_out",
    )
    say(
        f"prepare: {data.videos} training videos in {data.train}, {data.held_out_videos} held-out ones in"
        f" {data.held_out}"
    )


def command(config: RunConfig, options: Any) -> None:
    prepare(located("prepare", config))
