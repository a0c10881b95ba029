"""What each chunk of a block-causal sequence attends to, as slices, so that no mask is ever materialised."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from model.kv_cache import Window


@dataclass(frozen=True)
class ChunkView:
    """What one chunk looks at, in tokens."""

    queries: slice
    keys: tuple[slice, ...]  # the sink, the latest tokens before the chunk, and the chunk itself
    phases: tuple[Tensor, Tensor] | None
    """Of queries and keys, by their places in the window; None where positions are absolute, at which both
    are rotated once for all chunks."""


def uniform(frames: int, chunk: int) -> list[int]:
    """Sizes of the chunks of a video; ValueError where `chunk` does not divide its `frames`."""
    if frames % chunk:
        raise ValueError(f"a chunk of {chunk} frames does not divide {frames} frames.")
    return [chunk] * (frames // chunk)


def chunk_views(sizes: Sequence[int], window: Window, phase: Tensor, *, streams: int = 1) -> list[ChunkView]:
    """The chunks, of `sizes` frames, of a sequence of `streams` equal videos, one after the other.

    A chunk sees itself and what `window` holds of the first video before it; so with two streams, clean and
    noisy, the noisy chunks see clean history. `phase` [1, L, 1, head_dim/2, 2] is that of one video from
    frame 0; all streams share it.
    """
    frames = sum(sizes)
    tokens = phase.shape[1] // frames
    return [
        _view(start, size, window, phase, slice(place * tokens, (place + size) * tokens), place * tokens)
        for offset in range(0, streams * frames, frames)
        for start, size in zip(accumulate([0, *sizes[:-1]]), sizes, strict=True)
        for place in [offset + start]
    ]


def replay_views(
    sizes: Sequence[int], chosen: Sequence[int], window: Window, phase: Tensor, seen: int
) -> list[ChunkView]:
    """Some chunks of a video, one after the other, behind `seen` clean frames from the video's first on.

    Their queries are counted from the first of them, their keys from the first clean frame. `sizes` and
    `phase` are those of the whole video.
    """
    tokens = phase.shape[1] // sum(sizes)
    starts, views, place = list(accumulate([0, *sizes])), [], 0
    for chunk in chosen:
        queries = slice(place * tokens, (place + sizes[chunk]) * tokens)
        views.append(_view(starts[chunk], sizes[chunk], window, phase, queries, (seen + place) * tokens))
        place += sizes[chunk]
    return views


def _view(start: int, size: int, window: Window, phase: Tensor, queries: slice, own: int) -> ChunkView:
    """Of a chunk of `size` frames that begins at frame `start`, whose own keys begin at token `own`."""
    tokens = (queries.stop - queries.start) // size
    sink, latest = window.kept(start, size)
    keys = (
        slice(0, sink * tokens),
        slice((start - latest) * tokens, start * tokens),
        slice(own, own + size * tokens),
    )
    if window.positions == "absolute":
        return ChunkView(queries, keys, None)
    seen, end = (sink + latest) * tokens, (sink + latest + size) * tokens
    return ChunkView(queries, keys, (phase[:, seen:end], phase[:, :end]))
