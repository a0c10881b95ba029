"""What viewers are sent: JPEG frames, or fragments of one MP4."""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

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
            write_h264(container, frames, self.fps, first=self.frames, preset="ultrafast")
        body = data.getvalue()
        if self.chunks:
            body = b"".join(box for kind, box in _boxes(body) if kind not in (b"ftyp", b"moov"))
        self.chunks += 1
        self.frames += len(frames)
        return body


def write_h264(
    container: av.container.OutputContainer,
    frames: np.ndarray,
    fps: int,
    *,
    first: int = 0,
    preset: str = "medium",
) -> None:
    """Encode frames uint8 [f, height, width, 3] into a container's video stream; `first` is the number of the first one.

    Width and height are cut to even numbers, as 4:2:0 needs them.
    """
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    stream = container.add_stream("libx264", rate=fps)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {
        "preset": preset,
        "tune": "zerolatency",
        "profile": "baseline",
        "level": "4.0",
        "crf": "18",
    }
    for number, pixels in enumerate(frames[:, :height, :width], start=first):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = number
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of a file's boxes."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start : start + size]
        start += size
