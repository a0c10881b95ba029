"""`self-forcing generate`: a video from a prompt, of any length."""

from pathlib import Path

import torch

from workers.generator import Generator


def generate_video(
    *, model: str, prompt: str, frames: int | None, seed: int, output: str, image: str | None = None
) -> Path:
    """Write one video, `image` its first frame if there is one.

    ValueError for an empty prompt, another ending than .mp4 or .gif, an image that cannot be read, or a model that cannot do it.
    """
    from pipelines.media import check_suffix, read_image, write_video

    path = check_suffix(output)
    if not prompt.strip():
        raise ValueError("--prompt is empty; say what the video shows, for example 'a seven drifting left'.")
    generator = Generator(model)
    wanted = generator.card.video.frames if frames is None else frames
    if wanted < 1:
        raise ValueError(f"--frames must be at least 1, not {wanted}.")
    initial, given = None, 0
    if image is not None:
        shape = generator.decode(torch.zeros(1, 1, *generator.card.video.shape[1:])).shape[2:]
        assert generator.codec is not None, "decoding has shown that there is one"
        initial = generator.codec.encode(read_image(image, (shape[0], shape[1], shape[2]))[None, None])
        given = initial.shape[1]
    length = generator.frames_of_chunks(max(wanted, given + 1), given)
    latents = generator.student([prompt], [(seed, "generate", 0)], length, initial)
    write_video(path, generator.decode(latents)[0, :wanted], generator.card.video.fps)
    return path
