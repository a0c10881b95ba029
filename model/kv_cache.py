"""The KV cache: constant history plus the live chunk.

Denoising reads the history and never writes; only `commit` appends a finished chunk, and what leaves the
window is dropped while the sink stays. There are two backings of one interface:

- `BlockCache` for training: every commit is an immutable block and a `History` is a selection of blocks, so
  activation checkpointing may recompute a call long after the window has moved on.
- `SlotCache` for inference: memory is allocated once and each row has its own length, so streams of
  different ages share a batch. It cannot be read under a gradient, so no graph sees its slots overwritten.

Keys are stored with the rotary phase of their absolute frame, or without any when positions are relative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model import rope

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, L, heads, head_dim] each."""


@dataclass(frozen=True)
class Window:
    """What a chunk attends to besides itself."""

    frames: int | None  # latent frames attended to in all: sink, latest, and the chunk. None is all.
    sink: int  # first frames that are never evicted
    positions: Literal["absolute", "relative"]
    """Rotary frame positions: of the video, as published, or counted from the start of the window."""

    def kept(self, seen: int, chunk: int) -> tuple[int, int]:
        """How many (sink, latest) of `seen` earlier frames a chunk of `chunk` frames attends to."""
        if self.frames is None or seen + chunk <= self.frames:
            return 0, seen
        return self.sink, self.frames - self.sink - chunk


class History(Protocol):
    """The constant context of one chunk, the same for each of its network calls."""

    phase: Tensor  # rotary phase of the live chunk, [1 or B, L, 1, head_dim/2, 2]
    mask: Tensor | None
    """True where a token of the history or the live chunk may be attended to, [B, 1, 1, L_history + L]; None
    where all may."""
    absolute: bool  # whether the cache stores keys rotated

    def joined(self, index: int, key: Tensor, value: Tensor) -> KeyValue:
        """Rotated keys and values of a layer's history, and the live chunk's behind them.

        Without gradient they may lie in memory that the next call with this history writes to.
        """
        ...


class Cache(Protocol):
    """What the rollout needs of a cache."""

    def history(self, chunk: int) -> History:
        """The context of the next `chunk` frames."""
        ...

    def commit(self, live: Sequence[KeyValue], frames: int) -> None:
        """Append the keys and values of a finished chunk, one pair a layer."""
        ...

    def rewind(self) -> None:
        """Forget everything; what is committed next is frame 0."""
        ...

    def skip_to(self, frame: int) -> None:
        """What is committed next is `frame`, whatever came before."""
        ...


@dataclass(frozen=True)
class _Block:
    frames: int
    layers: tuple[KeyValue, ...]


class _BlockHistory:
    mask: Tensor | None = None

    def __init__(
        self,
        spans: list[tuple[_Block, int, int]],
        tokens: int,
        *,
        phase: Tensor,
        key_phase: Tensor | None,
    ):
        """`spans` are blocks with their first and last frame in the window; `tokens` is a frame's."""
        self.phase = phase
        self.absolute = key_phase is None
        self._spans = spans
        self._key_phase = key_phase
        self._tokens = tokens
        self._joined: dict[int, KeyValue] = {}

    def joined(self, index: int, key: Tensor, value: Tensor) -> KeyValue:
        if not self._spans:
            return key, value
        if torch.is_grad_enabled():  # a graph would keep whatever is shared alive
            return self._join(index, key, value)
        if index not in self._joined:
            self._joined[index] = self._join(index, key, value)
        else:
            # The history is the same for all calls of a chunk, so only what is live is written.
            for joined, live in zip(self._joined[index], (key, value), strict=True):
                joined[:, joined.shape[1] - live.shape[1] :] = live
        return self._joined[index]

    def _join(self, index: int, key: Tensor, value: Tensor) -> KeyValue:
        keys, values = (
            [
                block.layers[index][which][:, first * self._tokens : last * self._tokens]
                for block, first, last in self._spans
            ]
            for which in (0, 1)
        )
        if self._key_phase is not None:
            keys = [rope.rotate(torch.cat(keys, dim=1), self._key_phase)]
        return torch.cat([*keys, key], dim=1), torch.cat([*values, value], dim=1)


class BlockCache:
    """Immutable per-chunk blocks; blocks may carry a gradient."""

    def __init__(
        self, window: Window, grid: tuple[int, int], head_dim: int, device: torch.device | str = "cpu"
    ):
        """`grid` is the height and width of a frame in patches."""
        self.window = window
        self.grid = grid
        self.head_dim = head_dim
        self.device = torch.device(device)
        self.seen = 0
        self._blocks: list[_Block] = []

    def _phase(self, first: int, frames: int) -> Tensor:
        return rope.phases([range(first, first + frames)], *self.grid, self.head_dim, self.device)

    def history(self, chunk: int) -> _BlockHistory:
        sink, latest = self.window.kept(self.seen, chunk)
        ranges = [(0, sink), (self.seen - latest, self.seen)]
        spans, start = [], 0
        for block in self._blocks:
            for low, high in ranges:
                first, last = max(low, start), min(high, start + block.frames)
                if first < last and block.layers:  # what was skipped holds nothing to see
                    spans.append((block, first - start, last - start))
            start += block.frames
        tokens = self.grid[0] * self.grid[1]
        if self.window.positions == "absolute":
            return _BlockHistory(spans, tokens, phase=self._phase(self.seen, chunk), key_phase=None)
        held = sum(last - first for _, first, last in spans)
        return _BlockHistory(spans, tokens, phase=self._phase(held, chunk), key_phase=self._phase(0, held))

    def commit(self, live: Sequence[KeyValue], frames: int) -> None:
        self._blocks.append(_Block(frames, tuple(live)))
        self.seen += frames
        self._forget()

    def rewind(self) -> None:
        self._blocks, self.seen = [], 0

    def skip_to(self, frame: int) -> None:
        if frame > self.seen:
            self._blocks.append(_Block(frame - self.seen, ()))
            self.seen = frame

    def _forget(self) -> None:
        """Free blocks that no later chunk can see: all but the sink and the newest `window` frames."""
        if self.window.frames is None:
            return
        start = 0
        for index, block in enumerate(self._blocks):
            stop = start + block.frames
            if start >= self.window.sink and stop <= self.seen - self.window.frames and block.layers:
                self._blocks[index] = _Block(block.frames, ())
            start = stop


def _chosen(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index of some rows: neighbours are read where they lie, others are gathered."""
    span = range(rows[0], rows[0] + len(rows))
    return slice(span.start, span.stop) if list(rows) == list(span) else torch.tensor(rows, device=device)


class _SlotHistory:
    def __init__(
        self,
        keys: Tensor,
        slots: Tensor,
        rows: slice | Tensor,
        length: int,
        *,
        phase: Tensor,
        mask: Tensor | None,
        absolute: bool,
    ):
        """`keys` are those of `slots`, rotated; `length` is how many tokens the longest of `rows` holds."""
        self.phase = phase
        self.mask = mask
        self.absolute = absolute
        self._keys = keys
        self._slots = slots
        self._rows = rows
        self._length = length

    def joined(self, index: int, key: Tensor, value: Tensor) -> KeyValue:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "slots are overwritten in place and cannot be read under a gradient; use BlockCache."
            )
        if self._length == 0:
            return key, value
        length, end = self._length, self._length + key.shape[1]
        past = self._keys[index], self._slots[index, 1]
        if isinstance(self._rows, slice) and end <= past[0].shape[1]:
            # There is room behind the history, so the live chunk is written where attention reads.
            for slots, live in zip(past, (key, value), strict=True):
                slots[self._rows, length:end] = live
            return past[0][self._rows, :end], past[1][self._rows, :end]
        keys, values = (slots[self._rows, :length] for slots in past)
        return torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)


class SlotCache:
    """Preallocated memory, a length per row. For inference only."""

    def __init__(
        self,
        window: Window,
        grid: tuple[int, int],
        *,
        layers: int,
        heads: int,
        head_dim: int,
        rows: int,
        chunk: int,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """`capacity`, in frames, is needed where the window is None; else it is the window less the chunk."""
        if window.frames is not None:
            capacity = window.frames - chunk
        if capacity is None:
            raise ValueError("a cache of slots without a window needs a capacity in frames.")
        self.window = window
        self.grid = grid
        self.head_dim = head_dim
        self.capacity = capacity
        self.tokens = grid[0] * grid[1]
        shape = (layers, 2, rows, capacity * self.tokens, heads, head_dim)
        self.slots = torch.zeros(shape, device=device, dtype=dtype)
        self.keys = self.slots[:, 0]
        """As attention reads them, [layers, rows, L, heads, head_dim]."""
        if window.positions == "relative":
            # A row's places in the window change with a commit only, so that is when its keys are turned, not
            # at every call.
            self.keys = torch.zeros_like(self.keys)
        self.held = [0] * rows
        self.seen = [0] * rows

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + (self.keys.nbytes if self.window.positions == "relative" else 0)

    def history(self, chunk: int) -> _SlotHistory:
        rows = range(len(self.held))
        return self.join(rows, [self._phase(row, chunk) for row in rows])

    def join(self, rows: Sequence[int], phases: Sequence[Tensor]) -> _SlotHistory:
        """The context of some rows, perhaps of different ages, in that order; `phases` are of their
        histories."""
        device = self.slots.device
        held = [self.held[row] for row in rows]
        length = max(held) * self.tokens
        mask: Tensor | None = None
        if min(held) < max(held):
            there = (
                torch.arange(length, device=device) < torch.tensor(held, device=device)[:, None] * self.tokens
            )
            mask = F.pad(there, (0, phases[0].shape[1]), value=True)[:, None, None]
        return _SlotHistory(
            self.keys,
            self.slots,
            _chosen(rows, device),
            length,
            phase=phases[0] if all(phase is phases[0] for phase in phases) else torch.cat([*phases]),
            mask=mask,
            absolute=self.window.positions == "absolute",
        )

    def row(self, index: int) -> "SlotRow":
        """One row as a cache of its own."""
        return SlotRow(self, index)

    def park(self, row: int) -> "Parked":
        """A copy in host memory of what a row holds."""
        tokens = self.held[row] * self.tokens
        return Parked(self.slots[:, :, row, :tokens].to("cpu", copy=True), self.held[row], self.seen[row])

    def unpark(self, row: int, parked: "Parked") -> None:
        """Let a row hold what was parked."""
        self.slots[:, :, row, : parked.slots.shape[2]] = parked.slots
        self.held[row], self.seen[row] = parked.held, parked.seen
        self._turn(row)

    def _phase(self, row: int, chunk: int) -> Tensor:
        """Of the next `chunk` frames of a row."""
        start = self.held[row] if self.window.positions == "relative" else self.seen[row]
        return self.phases(start, chunk)

    def phases(self, start: int, frames: int) -> Tensor:
        """Rotary phase of `frames` frames from position `start` on."""
        return rope.phases([range(start, start + frames)], *self.grid, self.head_dim, self.slots.device)

    def _turn(self, row: int, first: int = 0) -> None:
        """Rotate a row's keys from frame `first` on by their places in the window, if positions are
        relative."""
        if self.window.positions == "absolute":
            return
        part = slice(first * self.tokens, self.held[row] * self.tokens)
        phase = self.phases(first, self.held[row] - first)
        for keys, slots in zip(self.keys[:, row, part], self.slots[:, 0, row, part], strict=True):
            keys.copy_(rope.rotate(slots[None], phase)[0])

    def commit(self, live: Sequence[KeyValue], frames: int) -> None:
        if any(tensor.requires_grad for pair in live for tensor in pair):
            raise RuntimeError("slots refuse keys and values that carry a gradient; use BlockCache.")
        for row in range(len(self.held)):
            self.append(row, [(key[row], value[row]) for key, value in live], frames)

    def rewind(self) -> None:
        self.held, self.seen = [0] * len(self.held), [0] * len(self.seen)

    def skip_to(self, frame: int) -> None:
        self.seen = [max(seen, frame) for seen in self.seen]

    def append(self, row: int, live: Sequence[KeyValue], frames: int) -> None:
        """Commit a finished chunk of one row; its keys and values are [L, heads, head_dim]."""
        held, sink, token = self.held[row], self.window.sink, self.tokens
        total = held + frames
        if total > self.capacity and self.window.frames is None:
            raise RuntimeError(
                f"the cache holds {self.capacity} frames and without a window none may be evicted."
            )
        latest = self.capacity - sink
        # Layer by layer, so that what is copied on the way is never as large as the cache.
        for place, pair in zip(self.slots[:, :, row], live, strict=True):
            new = torch.stack(pair)
            if total <= self.capacity:
                place[:, held * token : total * token] = new
                continue
            # The sink stays in front, in order, so that attention sums as it does over blocks.
            kept = torch.cat([place[:, : held * token], new], dim=1)
            place[:, : sink * token] = kept[:, : sink * token]
            place[:, sink * token :] = kept[:, (total - latest) * token :]
        self.held[row] = min(total, self.capacity)
        self.seen[row] += frames
        self._turn(row, held if total <= self.capacity else sink)


class PromptSlots:
    """What the cross-attention reads of prompts: preallocated memory, a prompt per row, for inference."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        rows: int,
        text_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.slots = torch.zeros(layers, 2, rows, text_len, heads, head_dim, device=device, dtype=dtype)

    def write(self, row: int, prompt: Sequence[KeyValue]) -> None:
        """Let a row hold the keys and values of one prompt, [1, text_len, heads, head_dim] each."""
        self.slots[:, :, row] = torch.cat([tensor for pair in prompt for tensor in pair]).unflatten(
            0, (-1, 2)
        )

    def join(self, rows: Sequence[int]) -> list[KeyValue]:
        """Keys and values of each layer for some rows, in that order."""
        chosen = _chosen(rows, self.slots.device)
        return [(slots[0, chosen], slots[1, chosen]) for slots in self.slots]


@dataclass(frozen=True)
class Parked:
    """What one row of a `SlotCache` held."""

    slots: Tensor  # keys and values of all layers, [layers, 2, L, heads, head_dim]
    held: int
    seen: int


@dataclass(frozen=True)
class SlotRow:
    """One row of a `SlotCache`, as a `Cache` of one sample."""

    cache: SlotCache
    index: int

    def history(self, chunk: int) -> _SlotHistory:
        return self.cache.join([self.index], [self.cache._phase(self.index, chunk)])

    def commit(self, live: Sequence[KeyValue], frames: int) -> None:
        self.cache.append(self.index, [(key[0], value[0]) for key, value in live], frames)

    def rewind(self) -> None:
        self.cache.held[self.index] = self.cache.seen[self.index] = 0

    def skip_to(self, frame: int) -> None:
        self.cache.seen[self.index] = max(self.cache.seen[self.index], frame)
