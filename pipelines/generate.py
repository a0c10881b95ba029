"""`self-forcing generate`: a video from a prompt, of any length."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from infra import storage
from infra.registry import find
from infra.tracking import tracking_uri
from pipelines.console import say
from pipelines.media import check_output, read_image, write_video
from workers.generator import Generator


def command(_: None, options: Any) -> None:
    """Write one video.

    ValueError for an empty prompt, a place that cannot be written to, an image that cannot be read, or a
    model that cannot do it.
    """
    path = check_output(options.output)
    if not options.prompt.strip():
        raise ValueError("--prompt is empty; say what the video shows, for example 'a seven drifting left'.")
    if options.frames is not None and options.frames < 1:
        raise ValueError(f"--frames must be at least 1, not {options.frames}.")
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {options.seed}.")
    with ExitStack() as held:
        image = None
        if options.image is not None:
            image = held.enter_context(storage.fetched(options.image))
            if not image.is_file():
                raise ValueError(f"--image: there is no file {options.image}.")
        _write(path, image, options)


def _write(path: str, image: Path | None, options: Any) -> None:
    model = find(options.model, tracking_uri(options.registry, "."))[1]
    generator = Generator(model, light_decoder=options.light_decoder)
    codec, video = generator.shown, generator.card.video
    wanted = codec.frames(video.frames) if options.frames is None else options.frames
    initial: Tensor | None = None
    given = 0
    if image is not None:
        if not generator.card.recipe.get("distill", {}).get("given_frames"):
            raise ValueError(
                f"--image: the model at {options.model} was not trained to go on from an image; leave it "
                "out, or name a student that was distilled with distill.given_frames."
            )
        first = read_image(image, codec.shape((1, *video.shape[1:]))[1:])
        initial = codec.encode(first[None, None])
        given = initial.shape[1]
    length = generator.frames_of_chunks(max(codec.latents(wanted), given + 1), given)
    latents = generator.student([options.prompt], [(options.seed, "generate", 0)], length, initial)
    write_video(path, codec.decode(latents)[0, :wanted], video.fps)
    say(f"wrote {path}")
