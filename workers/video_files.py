"""Video files of any codec that PyAV reads → clips of frames, turned, timed, scaled and cut for training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from infra.storage import Stored


@dataclass(frozen=True)
class ClipShape:
    """What a clip is."""

    frames: int
    channels: int  # 1 is grey, 3 is colour
    height: int
    width: int
    fps: float
    scenes: bool = False
    """Whether a clip lies within one shot, as PySceneDetect sees them."""


HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions by their numbers in ITU-T H.273."""


def clips(file: Stored, shape: ClipShape, most: int) -> Iterator[np.ndarray]:
    """Clips uint8 [frames, channels, height, width] of a file, one after the other, at most `most` of them.

    A frame is shown until the next one's time, whatever the file's rate, constant or not; frames are turned
    as the file says, scaled to cover the clip and cut in the middle. What is left over at the end is dropped.

    Raises:
        ValueError: the file has no video, is HDR, is damaged before the first clip is whole, or is too short.
    """
    clip: list[np.ndarray] = []
    found = 0
    try:
        cuts = _cuts(file) if shape.scenes else []
        with file.open() as opened, av.open(opened) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            transfer = HDR.get(container.streams.video[0].codec_context.color_trc)
            if transfer is not None:
                raise ValueError(f"it is HDR ({transfer}), which needs tone mapping; convert it to SDR")
            for number, pixels in enumerate(_timed(container, shape)):
                while cuts and number / shape.fps > cuts[0] - 1e-6:
                    cuts, clip = cuts[1:], []
                clip.append(pixels)
                if len(clip) == shape.frames:
                    yield np.stack(clip)
                    found, clip = found + 1, []
                    if found == most:
                        return
    except (av.FFmpegError, OSError) as error:
        if not found:  # else what comes after the damage is lost, and what came before is good
            raise ValueError(f"it is damaged or no video ({str(error).splitlines()[0]})") from None
    if not found:
        raise ValueError(
            f"it has {len(clip)} frames at {shape.fps:g} a second"
            f"{' in its last shot' if shape.scenes else ''}, and {shape.frames} make a clip"
        )


def _cuts(file: Stored) -> list[float]:
    """Seconds from the first frame at which a shot begins, but the first; by PySceneDetect's content
    detector."""
    from scenedetect import ContentDetector, SceneManager
    from scenedetect.backends import VideoStreamAv

    with file.open() as opened:
        manager = SceneManager()
        manager.add_detector(ContentDetector(min_scene_len=1))  # a clip must not cross any cut
        # It would have PyAV print what FFmpeg says, in this process from then on.
        manager.detect_scenes(VideoStreamAv(opened, suppress_output=True))
    starts = [start.seconds for start, _ in manager.get_scene_list()]
    return [start - starts[0] for start in starts[1:]]


def _timed(container: Any, shape: ClipShape) -> Iterator[np.ndarray]:
    """Frames at multiples of 1 / fps from the first one on."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    length = 1 / float(stream.average_rate or shape.fps)  # of a frame that does not say how long it is shown
    start, time, shown, number = None, 0.0, None, 0
    for count, frame in enumerate(container.decode(stream)):
        at = count * length if frame.time is None else frame.time
        start = at if start is None else start
        time = at - start
        while shown is not None and number / shape.fps < time - 1e-6:
            yield shown
            number += 1
        shown = _fitted(frame, shape)
    while shown is not None and number / shape.fps < time + length - 1e-6:
        yield shown
        number += 1


def _fitted(frame: Any, shape: ClipShape) -> np.ndarray:
    """A frame's pixels [channels, height, width]."""
    turns = round(frame.rotation / 90) % 4
    # As the file has it, before it is turned.
    height, width = (shape.width, shape.height) if turns % 2 else (shape.height, shape.width)
    scale = max(height / frame.height, width / frame.width)
    rows, columns = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    how = "gray" if shape.channels == 1 else "rgb24"
    pixels = frame.reformat(columns, rows, how, interpolation="AREA").to_ndarray()
    top, left = (rows - height) // 2, (columns - width) // 2
    pixels = np.rot90(pixels[top : top + height, left : left + width], turns)
    return pixels[None] if shape.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
