"""Frames → what viewers are sent: JPEG files, fragments of one MP4, or an MP4 file."""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image

QUALITY = 90
CODECS = "avc1.42C028"
"""H.264 in the constrained baseline profile, which browsers play everywhere, at level 4."""
H264 = {
    # No frame waits for a later one.
    "tune": "zerolatency",
    "profile": "baseline",
    "level": "4.0",
    "crf": "18",
    # Slices depend on the number of threads, and so would the file on the machine.
    "threads": "1",
}


def jpegs(frames: np.ndarray, last: bool) -> list[bytes]:
    """Frames uint8 [f, height, width, 3] as JPEG, one by one."""
    return [_jpeg(frame) for frame in frames]


def _jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


class Fragments:
    """Chunk by chunk, a fragmented MP4 (ISO 14496-12) that plays through Media Source Extensions, and is a
    file.

    Every chunk is sent at once and begins with a key frame.
    """

    def __init__(self, fps: int, mark: str):
        """`mark` is what the file says of its making."""
        self._fps = fps
        self._mark = mark
        self._codec: av.VideoCodecContext | None = None
        self._chunks = 0
        self._frames = 0

    def __call__(self, frames: np.ndarray, last: bool) -> bytes:
        """The fragment of frames uint8 [f, height, width, 3]; the first one begins with the file's header."""
        height, width = even(frames.shape[1]), even(frames.shape[2])
        # One encoder for all chunks: to open one takes longer than to encode a small chunk.
        codec = self._codec = self._codec or self._open(height, width)
        data = io.BytesIO()
        options = {
            "movflags": "+empty_moov+default_base_moof+frag_discont+delay_moov+skip_trailer",
            "fragment_index": str(self._chunks + 1),
        }
        with av.open(data, "w", format="mp4", options=options) as container:
            container.metadata["comment"] = self._mark
            stream = container.add_mux_stream(
                "h264", rate=self._fps, width=width, height=height, time_base=codec.time_base
            )
            for number, frame in enumerate(_video_frames(frames, self._frames)):
                frame.time_base = codec.time_base
                frame.pict_type = PictureType.NONE if number else PictureType.I
                for packet in codec.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
        body = data.getvalue()
        if self._chunks:
            body = b"".join(box for kind, box in _boxes(body) if kind not in (b"ftyp", b"moov"))
        self._chunks += 1
        self._frames += len(frames)
        return body

    def _open(self, height: int, width: int) -> av.VideoCodecContext:
        codec = av.VideoCodecContext.create("libx264", "w")
        codec.height, codec.width = height, width
        codec.pix_fmt = "yuv420p"
        codec.framerate, codec.time_base = Fraction(self._fps), Fraction(1, self._fps)
        codec.options = {**H264, "preset": "ultrafast", "forced-idr": "1"}
        return codec


class Mp4:
    """One MP4 file with its index at the front, written as frames come."""

    def __init__(self, path: Path, fps: int, mark: str):
        """`mark` is what the file says of its making."""
        self._container = av.open(path, "w", format="mp4", options={"movflags": "+faststart"})
        self._container.metadata["comment"] = mark
        self._stream = self._container.add_stream("libx264", rate=fps, options=H264)
        self._stream.pix_fmt = "yuv420p"
        self._frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Encode frames uint8 [f, height, width, 3]."""
        if not self._frames:
            self._stream.height, self._stream.width = even(frames.shape[1]), even(frames.shape[2])
        for frame in _video_frames(frames, self._frames):
            self._container.mux(self._stream.encode(frame))
        self._frames += len(frames)

    def close(self) -> None:
        """Finish the file."""
        self._container.mux(self._stream.encode())
        self._container.close()


def _video_frames(frames: np.ndarray, first: int) -> Iterator[av.VideoFrame]:
    """Frames from number `first` on. Width and height are cut to even numbers, as 4:2:0 needs them."""
    height, width = even(frames.shape[1]), even(frames.shape[2])
    for number, pixels in enumerate(frames[:, :height, :width], first):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = number
        yield frame


def even(size: int) -> int:
    return size // 2 * 2


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of a file's boxes."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start : start + size]
        start += size
