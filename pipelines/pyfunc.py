"""A registered student as `mlflow.pyfunc.load_model` gives it: a table of prompts in, MP4s out.

    model = mlflow.pyfunc.load_model("models:/digits@serving")
    model.predict(pandas.DataFrame({"prompt": ["a six drifting left"]}))["video"][0]  # bytes of an MP4

The environment needs this package; the model's folder is the one that `self-forcing serve` reads.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from infra.registry import Flavor
from model.codec import enlarge, to_uint8
from pipelines.media import encoded
from workers.generator import Generator

if TYPE_CHECKING:
    from pandas import DataFrame

FLAVOR = Flavor(
    loader=__name__,
    inputs={"prompt": ("string", True), "seed": ("double", False), "frames": ("double", False)},
    outputs={"video": "binary"},
    example={"prompt": "a video of something", "seed": 0.0, "frames": 9.0},
    requirements=(f"self-forcing=={version('self-forcing')}",),
)
"""Prompts, the seed of each (0) and the frames of each (the trained length); one MP4 a row.

Numbers are doubles, as columns of a table with empty cells are."""


class VideoModel:
    """A student that plays whole videos."""

    def __init__(self, path: str):
        """ValueError where the model at `path` is no student whose latents can be shown."""
        self._generator = Generator(path)
        self._codec = self._generator.shown

    def predict(self, model_input: "DataFrame", params: dict[str, Any] | None = None) -> "DataFrame":
        """A row with the column `video`, bytes of an MP4, for each row of `prompt`, `seed` and `frames`.

        The same prompt and seed make the same video. ValueError for a length below 1.
        """
        import pandas

        rows = model_input.to_dict("records")
        return pandas.DataFrame({"video": [self._video(**row) for row in rows]}, index=model_input.index)

    def _video(self, prompt: str, seed: float | None = None, frames: float | None = None) -> bytes:
        """Columns that are not given, or hold NaN as tables have it, mean the default."""
        generator, video = self._generator, self._generator.card.video
        wanted = int(frames) if frames == frames and frames is not None else self._codec.frames(video.frames)
        if wanted < 1:
            raise ValueError(f"frames is {wanted}; it must be at least 1.")
        chosen = int(seed) if seed == seed and seed is not None else 0
        length = generator.frames_of_chunks(self._codec.latents(wanted))
        latents = generator.student([prompt], [(chosen, "generate", 0)], length)
        return encoded(enlarge(to_uint8(self._codec.decode(latents)[0, :wanted])), video.fps, ".mp4")


def _load_pyfunc(path: str) -> VideoModel:
    """What MLflow calls with the model's directory."""
    return VideoModel(path)
