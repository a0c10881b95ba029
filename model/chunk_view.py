"""What each chunk of a block-causal sequence attends to, as slices, so that no mask is ever materialised."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import Window


@dataclass(frozen=True)
class ChunkView:
    """What one chunk looks at, in tokens."""

    queries: slice
    keys: tuple[slice, ...]  # the sink, the latest tokens before the chunk, and the chunk itself
    query_phase: Tensor
    key_phase: Tensor


def chunk_views(
    frames: int, chunk: int, window: Window, phase: Tensor, *, streams: int = 1
) -> list[ChunkView]:
    """The chunks of a sequence of `streams` videos of `frames` frames each, one after the other.

    A chunk sees itself and what `window` holds of the first video before it; so with two streams, clean and
    noisy, the noisy chunks see clean history. `phase` [1, L, 1, head_dim/2, 2] is that of one video from
    frame 0; all streams share it. Raises ValueError where `chunk` does not divide `frames`.
    """
    if frames % chunk:
        raise ValueError(f"a chunk of {chunk} frames does not divide {frames} frames.")
    tokens = phase.shape[1] // frames
    views = []
    for offset in range(0, streams * frames, frames):
        for start in range(0, frames, chunk):
            sink, latest = window.kept(start, chunk)
            past = (slice(0, sink * tokens), slice((start - latest) * tokens, start * tokens))
            place = slice(start * tokens, (start + chunk) * tokens)
            queries = slice((offset + start) * tokens, (offset + start + chunk) * tokens)
            if window.positions == "absolute":
                query_phase = phase[:, place]
                key_phase = torch.cat([phase[:, span] for span in (*past, place)], dim=1)
            else:
                seen, end = (sink + latest) * tokens, (sink + latest + chunk) * tokens
                query_phase, key_phase = phase[:, seen:end], phase[:, :end]
            views.append(ChunkView(queries, (*past, queries), query_phase, key_phase))
    return views
