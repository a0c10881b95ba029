"""Clips of video files, whatever a camera made of them."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from infra.storage import Stored
from workers.video_files import ClipShape, clips

SHAPE = ClipShape(frames=4, channels=3, height=32, width=48, fps=10)


def write(
    path: Path,
    times: list[float],
    *,
    size: tuple[int, int] = (64, 96),
    codec: str = "libx264",
    format: str = "yuv420p",
    draw: Any = None,
) -> Path:
    """A video whose frames are shown from these times on; frame i is of brightness 10 i, or as `draw` is."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=30, options={"crf": "1"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *size, format
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            pixels = np.full((*size, 3), 10 * number % 250, np.uint8) if draw is None else draw(number)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, matrix: list[int]) -> None:
    """Have an MP4 say how it is to be shown (ISO/IEC 14496-12, the matrix of the track header)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(bytes(content))


def of(path: Path, shape: ClipShape = SHAPE, most: int = 9) -> list[np.ndarray]:
    return list(clips(Stored(str(path), path.stat().st_size), shape, most))


def brightness(clip: np.ndarray) -> list[float]:
    return [float(frame.mean()) for frame in clip]


def test_frames_are_taken_at_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    # 20 a second: every second one is left out.
    found = of(write(tmp_path / "twice.mp4", [i / 20 for i in range(16)]))
    assert [clip.shape for clip in found] == [(4, 3, 32, 48)] * 2 and found[0].dtype == np.uint8
    assert brightness(found[0]) == pytest.approx([0, 20, 40, 60], abs=3)
    assert brightness(found[1]) == pytest.approx([80, 100, 120, 140], abs=3)
    assert len(of(tmp_path / "twice.mp4", most=1)) == 1
    # 5 a second: each is shown twice.
    (first, *_) = of(write(tmp_path / "half.mp4", [i / 5 for i in range(8)]))
    assert brightness(first) == pytest.approx([0, 0, 10, 10], abs=3)
    # A rate that changes: a frame is shown until the next one's time.
    (first, *_) = of(write(tmp_path / "varies.mp4", [0, 0.25, 0.3, 0.31, 0.32, 0.4, 0.8]))
    assert brightness(first) == pytest.approx([0, 0, 0, 20], abs=3)


def test_frames_cover_the_clip_and_are_cut_in_the_middle(tmp_path: Path) -> None:
    def columns(_: int) -> np.ndarray:  # black, white, black: a third of the width each
        pixels = np.zeros((64, 192, 3), np.uint8)
        pixels[:, 64:128] = 255
        return pixels

    (clip, *_) = of(write(tmp_path / "wide.mp4", [i / 10 for i in range(4)], size=(64, 192), draw=columns))
    # Half the size is 32 × 96, of which the middle 48 columns are shown: 8 black, 32 white, 8 black.
    row = clip[0, :, 16].mean(0)
    assert row[:6].max() < 20 and row[12:36].min() > 235 and row[-6:].max() < 20
    (grey, *_) = of(tmp_path / "wide.mp4", ClipShape(4, 1, 32, 48, 10))
    assert grey.shape == (4, 1, 32, 48) and np.abs(grey[:, 0] - clip.mean(1)).mean() < 4


@pytest.mark.parametrize(
    ("matrix", "lit"),
    [
        (
            [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30],
            "right",
        ),  # a quarter clockwise: the top comes to the right
        ([-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30], "bottom"),
        ([0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30], "left"),
    ],
    ids=["90", "180", "270"],
)
def test_a_video_is_turned_as_it_says(matrix: list[int], lit: str, tmp_path: Path) -> None:
    def top(_: int) -> np.ndarray:
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[:16] = 255
        return pixels

    path = write(tmp_path / "turned.mp4", [i / 10 for i in range(4)], size=(64, 64), draw=top)
    turn(path, matrix)
    (clip, *_) = of(path, ClipShape(4, 1, 32, 32, 10))
    sides = {
        "top": clip[0, 0, :6],
        "bottom": clip[0, 0, -6:],
        "left": clip[0, 0, :, :6],
        "right": clip[0, 0, :, -6:],
    }
    assert {side for side, pixels in sides.items() if pixels.mean() > 200} == {lit}


@pytest.mark.parametrize(
    ("name", "codec", "format", "size"),
    [
        ("a.mkv", "libx265", "yuv420p10le", (64, 96)),
        ("a.webm", "libvpx-vp9", "yuv420p", (64, 96)),
        ("a.avi", "mpeg4", "yuv420p", (64, 96)),
        ("a.mov", "libx264", "yuv444p", (63, 97)),
    ],
)
def test_other_codecs_depths_and_odd_sizes_are_read(
    name: str, codec: str, format: str, size: tuple[int, int], tmp_path: Path
) -> None:
    path = write(tmp_path / name, [i / 10 for i in range(4)], codec=codec, format=format, size=size)
    (clip,) = of(path)
    assert brightness(clip) == pytest.approx([0, 10, 20, 30], abs=6)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    one = write(tmp_path / "one.mp4", [0])
    with pytest.raises(ValueError, match=r"it has 1 frames at 10 a second, and 4 make a clip"):
        of(one)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    long = write(tmp_path / "long.mp4", [i / 10 for i in range(40)])
    (tmp_path / "cut.mp4").write_bytes(long.read_bytes()[: long.stat().st_size // 2])
    for name in ("text.mp4", "empty.mp4", "cut.mp4"):
        with pytest.raises(ValueError, match="it is damaged or no video"):
            of(tmp_path / name)
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="it has no video stream"):
        of(tmp_path / "sound.mp4")


def test_a_clip_lies_within_one_shot_where_that_is_asked_for(tmp_path: Path) -> None:
    def draw(number: int) -> Any:
        colour = [(200, 40, 40), (40, 60, 200)][number >= 10]
        return np.tile(np.array(colour, np.uint8), (64, 96, 1))

    file = write(tmp_path / "cut.mp4", [i / 8 for i in range(24)], draw=draw)
    whole, within = (ClipShape(8, 3, 16, 16, 8, scenes) for scenes in (False, True))
    stored = Stored(str(file), file.stat().st_size)
    reds = [clip[:, 0].mean((1, 2)) for clip in clips(stored, whole, 9)]
    assert len(reds) == 3 and reds[1].max() - reds[1].min() > 100  # over the cut
    reds = [clip[:, 0].mean((1, 2)) for clip in clips(stored, within, 9)]
    assert len(reds) == 2 and all(each.max() - each.min() < 10 for each in reds)
    assert reds[0].mean() > 150 > 100 > reds[1].mean()


def test_hdr_is_left_out_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "hdr.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx265", rate=8, options={"x265-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p10le"
        stream.codec_context.color_trc = 16
        for _ in range(8):
            frame = av.VideoFrame(96, 64, "yuv420p10le")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"it is HDR \(PQ\), which needs tone mapping; convert it to SDR"):
        list(clips(Stored(str(path), path.stat().st_size), ClipShape(4, 3, 16, 16, 8), 1))
