"""Frames → what viewers are sent: JPEG files, fragments of one MP4, or an MP4 file."""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

QUALITY = 90
CODECS = "avc1.42C028"
"""H.264 in the constrained baseline profile, which browsers play everywhere, at level 4."""


def jpegs(frames: np.ndarray, last: bool) -> list[bytes]:
    """Frames uint8 [f, height, width, 3] as JPEG, one by one."""
    return [_jpeg(frame) for frame in frames]


def _jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


@dataclass
class Fragments:
    """Chunk by chunk, a fragmented MP4 (ISO 14496-12) that plays through Media Source Extensions, and is a file when put together.

    Every chunk is encoded for itself, so that it can be sent at once and begins with a key frame.
    """

    fps: int
    mark: str
    """What the file says of its making."""
    chunks: int = 0
    frames: int = 0

    def __call__(self, frames: np.ndarray, last: bool) -> bytes:
        """The fragment of frames uint8 [f, height, width, 3]; the first one begins with the file's header."""
        data = io.BytesIO()
        options = {
            "movflags": "+empty_moov+default_base_moof+frag_discont+delay_moov+skip_trailer",
            "fragment_index": str(self.chunks + 1),
        }
        with av.open(data, "w", format="mp4", options=options) as container:
            container.metadata["comment"] = self.mark
            h264 = H264(container, self.fps, first=self.frames, preset="ultrafast")
            h264.write(frames)
            h264.flush()
        body = data.getvalue()
        if self.chunks:
            body = b"".join(box for kind, box in _boxes(body) if kind not in (b"ftyp", b"moov"))
        self.chunks += 1
        self.frames += len(frames)
        return body


class Mp4:
    """One MP4 file with its index at the front, written as frames come."""

    def __init__(self, path: Path, fps: int, mark: str):
        """`mark` is what the file says of its making."""
        self._container = av.open(path, "w", format="mp4", options={"movflags": "+faststart"})
        self._container.metadata["comment"] = mark
        self._h264 = H264(self._container, fps)

    def write(self, frames: np.ndarray) -> None:
        """Encode frames uint8 [f, height, width, 3]."""
        self._h264.write(frames)

    def close(self) -> None:
        """Finish the file."""
        self._h264.flush()
        self._container.close()


class H264:
    """Frames, as many at a time as there are, → a container's video stream."""

    def __init__(
        self, container: av.container.OutputContainer, fps: int, *, first: int = 0, preset: str = "medium"
    ):
        """`first` is the number of the first frame."""
        self._container = container
        self._stream = container.add_stream("libx264", rate=fps, options={
            "preset": preset,
            "tune": "zerolatency",
            "profile": "baseline",
            "level": "4.0",
            "crf": "18",
            # Slices depend on the number of threads, and so would the file on the machine.
            "threads": "1",
        })  # fmt: skip
        self._stream.pix_fmt = "yuv420p"
        self._next = first

    def write(self, frames: np.ndarray) -> None:
        """Encode frames uint8 [f, height, width, 3]. Width and height are cut to even numbers, as 4:2:0 needs them."""
        height, width = even(frames.shape[1]), even(frames.shape[2])
        if not self._stream.codec_context.is_open:
            self._stream.height, self._stream.width = height, width
        for pixels in frames[:, :height, :width]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, self._next = self._next, self._next + 1
            self._container.mux(self._stream.encode(frame))

    def flush(self) -> None:
        """What the encoder still holds."""
        self._container.mux(self._stream.encode())


def even(size: int) -> int:
    return size // 2 * 2


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of a file's boxes."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start : start + size]
        start += size
