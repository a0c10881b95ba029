"""The source `digits`: the moving-digit data sets that a recipe trains on and evaluates against."""

from dataclasses import dataclass

from infra.settings import at_least
from orchestrator.config import RunConfig
from pipelines.digits.moving_digits import write_dataset


@dataclass(frozen=True)
class Settings:
    """What `data.source_settings` may hold."""

    videos: int = 16384
    """Training videos."""
    held_out_videos: int = 1024
    """Evaluation videos, from scans that training never sees."""
    held_out_frames: int = 27
    """Frames of each evaluation video."""

    def __post_init__(self) -> None:
        at_least(self, 1, "videos", "held_out_videos", "held_out_frames")


def prepare(config: RunConfig, settings: Settings) -> str:
    """Write the data sets that are not there yet, and say what there is."""
    data, frames, seed = config.data, config.video.frames, config.seed
    write_dataset(data.train, videos=settings.videos, frames=frames, seed=seed, split="train")
    count, frames = settings.held_out_videos, settings.held_out_frames
    write_dataset(data.held_out, videos=count, frames=frames, seed=seed + 1, split="held_out")
    return f"{settings.videos} training videos in {data.train}, {count} held-out ones in {data.held_out}"
