"""Videos under the names that VBench's command line expects: `{prompt}-{index}.mp4`, index 0 to 4, by model.

`vbench evaluate --videos_path DIR/MODEL --dimension …` reads the prompt from a file's name (Huang et al.,
VBench, 2024; its prompts/README.md), so a prompt is written as it is, or refused.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from pipelines.console import say
from pipelines.media import write_video
from pipelines.suite import Videos

SAMPLES = 5
"""Videos of each prompt that VBench asks for."""
_LONGEST = 255 - len("..4294967295.mp4")
"""Bytes of a file name without its ending; a file is first written beside its place."""


def check(prompts: Sequence[str], videos: int) -> None:
    """ValueError where there are too few videos, or a prompt cannot be a file's name; nothing is made yet."""
    if videos < SAMPLES * len(prompts):
        raise ValueError(
            f"--export-vbench needs {SAMPLES} videos of each of the {len(prompts)} prompts: evaluate.videos "
            f"is {videos}; make it {SAMPLES * len(prompts)}, or name fewer prompts with evaluate.prompts."
        )
    for prompt in prompts:
        name = f"{prompt}-{SAMPLES - 1}"
        if "/" in prompt or "\0" in prompt or len(name.encode()) > _LONGEST:
            raise ValueError(
                f"--export-vbench: the prompt {prompt[:60]!r} cannot be the name of a file, which has no "
                f"'/' and at most {_LONGEST - 2} bytes; leave it out of evaluate.prompts."
            )


def export(folder: str, videos: Mapping[str, Videos], *, fps: int) -> None:
    """Write the first five videos of each prompt of each model to `folder/MODEL`."""
    for model, made in videos.items():
        if made.pixels is None:
            raise ValueError("--export-vbench needs models with a codec: latents cannot be shown.")
        counts: Counter[str] = Counter()
        for prompt, pixels in zip(made.prompts, made.pixels, strict=True):
            if (index := counts[prompt]) < SAMPLES:
                write_video(f"{folder}/{model}/{prompt}-{index}.mp4", pixels.float() / 127.5 - 1, fps)
            counts[prompt] += 1
    say(f"evaluate: videos for VBench are in {folder}, for each model a directory to name as --videos_path")
