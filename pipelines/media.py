"""Frames → files: MP4 through PyAV, GIF and contact sheets through Pillow."""

import os
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from infra import storage
from infra.settings import in_store
from model.codec import enlarge, to_uint8

SUFFIXES = (".mp4", ".gif")
SHEET_FRAMES, SHEET_HEIGHT = 24, 96
"""Of a contact sheet: frames of a video at most, and rows of pixels of each."""


def read_image(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file as a frame [channels, height, width] in [−1, 1], turned as its camera says.

    It is scaled to fill the frame and cut at the longer side. ValueError where it cannot be read.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            image = ImageOps.fit(_eight_bits(ImageOps.exif_transpose(file), channels), (width, height))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path} cannot be read as an image: {str(error).rstrip('.')}.") from None
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).reshape(height, width, channels)
    return rearrange(pixels / 127.5 - 1, "h w c -> c h w")


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        eight = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
        image = Image.fromarray(eight.astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def check_output(place: str | Path) -> str:
    """The place of a video to be written; ValueError where its ending or its place cannot be."""
    location = str(place)
    if not location.endswith(SUFFIXES):
        raise ValueError(f"the output {location} must end in {' or '.join(SUFFIXES)}.")
    if in_store(location):
        return location
    path = Path(location)
    if path.is_dir():
        raise ValueError(f"the output {path} is a directory; name a file.")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = f"the output {path} cannot be written"
        raise ValueError(f"{what}: {above} is no directory that can be written to.")
    return location


def write_video(path: str | Path, frames: Tensor, fps: int) -> None:
    """Write frames [T, channels, height, width] in [−1, 1] as MP4 or GIF, whole or not at all."""
    write_pixels(check_output(path), enlarge(to_uint8(frames)), fps)


def write_pixels(path: str | Path, pixels: np.ndarray, fps: int) -> None:
    """Write frames uint8 [T, height, width, 3], likewise; `path` may also be in S3."""
    storage.write_bytes(path, encoded(pixels, fps, ".gif" if str(path).endswith(".gif") else ".mp4"))


def encoded(pixels: np.ndarray, fps: int, suffix: str) -> bytes:
    """Frames uint8 [T, height, width, 3] as the content of a file with this suffix, one of SUFFIXES."""
    content = BytesIO()
    if suffix == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in pixels]
        # A GIF counts hundredths of a second: rounded where each frame ends, so that they add up.
        ends = [round(100 * frame / fps) for frame in range(len(pixels) + 1)]
        durations = [10 * (end - start) for start, end in pairwise(ends)]
        first.save(content, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    else:
        with av.open(content, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return content.getvalue()


def contact_sheet(path: str | Path, videos: Sequence[np.ndarray]) -> None:
    """Frames of videos uint8 [T, height, width, 3], a row each, as PNG: all, or some from first to last."""
    rows = []
    for video in videos:
        _, height, width, _ = video.shape
        chosen = np.linspace(0, len(video) - 1, min(len(video), SHEET_FRAMES)).round().astype(int)
        size = (max(1, SHEET_HEIGHT * width // height), SHEET_HEIGHT)
        how = Image.Resampling.NEAREST if height < SHEET_HEIGHT else Image.Resampling.LANCZOS
        rows.append(np.hstack([np.asarray(Image.fromarray(video[i]).resize(size, how)) for i in chosen]))
    content = BytesIO()
    Image.fromarray(np.vstack(rows)).save(content, "PNG")
    storage.write_bytes(path, content.getvalue())


def grid(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Videos [T, height, width, 3] of one shape as one video, up to four in a row."""
    columns = max(count for count in (1, 2, 3, 4) if len(videos) % count == 0)
    return rearrange(np.stack(videos), "(r n) t h w c -> t (r h) (n w) c", n=columns)
