"""Frames → files: MP4 through PyAV, GIF and contact sheets through Pillow."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from model.codec import enlarge, to_uint8

SUFFIXES = (".mp4", ".gif")


def read_image(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file as one frame [channels, height, width] of that shape in [−1, 1], scaled to fill it and cut at the longer side."""
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            image = ImageOps.fit(file.convert("L" if channels == 1 else "RGB"), (width, height))
    except OSError as error:
        raise ValueError(f"--image {path} cannot be read as an image: {error}.") from None
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).reshape(height, width, channels)
    return rearrange(pixels / 127.5 - 1, "h w c -> c h w")


def check_suffix(path: str | Path) -> Path:
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"the output {path} must end in {' or '.join(SUFFIXES)}.")
    return Path(path)


def write_video(path: str | Path, frames: Tensor, fps: int) -> None:
    """Write frames [T, channels, height, width] in [−1, 1] as MP4 or GIF, whole or not at all."""
    path = check_suffix(path)
    pixels = enlarge(to_uint8(frames))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    if path.suffix == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in pixels]
        first.save(aside, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    else:
        with av.open(aside, "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    os.replace(aside, path)


def contact_sheet(path: str | Path, videos: list[Tensor], scale: int = 3) -> None:
    """One row of frames a video, each [T, channels, height, width] in [−1, 1], as PNG."""
    rows = [rearrange(to_uint8(video), "t h w c -> h (t w) c") for video in videos]
    sheet = np.concatenate(rows).repeat(scale, axis=0).repeat(scale, axis=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def grid(videos: list[Tensor]) -> Tensor:
    """Videos [T, channels, height, width] side by side, as one video."""
    return rearrange([*videos], "n t c h w -> t c h (n w)")
