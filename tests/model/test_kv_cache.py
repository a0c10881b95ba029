"""The cache alone: what it shows, what it forgets, and what it refuses."""

import weakref

import pytest
import torch
from torch import Tensor

from model import rope
from model.kv_cache import BlockCache, History, KeyValue, SlotCache, Window
from tests.model.reference import CONFIG, GRID, HEIGHT, TOKENS, WIDTH, difference, normal, prompt, tiny_model

HEADS, HEAD_DIM = CONFIG.num_heads, CONFIG.head_dim
CHUNK = 2
WINDOWS = [
    Window(None, 0, "absolute"),
    Window(5, 1, "absolute"),
    Window(5, 1, "relative"),
    Window(4, 2, "relative"),
    Window(2, 0, "relative"),
]


def name(window: Window) -> str:
    return f"{window.frames}-{window.sink}-{window.positions}"


def marked(first: int, frames: int, rows: int = 1) -> list[KeyValue]:
    """Keys and values of two layers that say which frame, and which layer and side, they belong to."""
    number = torch.arange(first, first + frames).repeat_interleave(TOKENS).float()
    pair = number[None, :, None, None].expand(rows, -1, HEADS, HEAD_DIM)
    return [(pair + 0.25 * layer, pair + 0.25 * layer + 0.125) for layer in range(2)]


def slots(window: Window, *, rows: int = 1, capacity: int | None = 40, chunk: int = CHUNK) -> SlotCache:
    return SlotCache(
        window, GRID, layers=2, heads=HEADS, head_dim=HEAD_DIM, rows=rows, chunk=chunk, capacity=capacity
    )


def blocks(window: Window) -> BlockCache:
    return BlockCache(window, GRID, HEAD_DIM)


def read(history: History, layer: int) -> KeyValue:
    """Keys and values of the history alone."""
    nothing = torch.zeros(1, 0, HEADS, HEAD_DIM)
    return history.joined(layer, nothing, nothing)


def shown(history: History, layer: int = 0) -> list[int]:
    """The frames whose values a history shows, in order."""
    value = read(history, layer)[1][0, :, 0, 0] - 0.25 * layer - 0.125
    return value.reshape(-1, TOKENS)[:, 0].int().tolist()


def visible(window: Window, start: int) -> list[int]:
    """The frames before `start` that a chunk there should see."""
    before = list(range(start))
    if window.frames is None or start + CHUNK <= window.frames:
        return before
    return before[: window.sink] + before[start - (window.frames - window.sink - CHUNK) :]


@pytest.mark.parametrize("window", WINDOWS, ids=name)
@torch.no_grad()
def test_history_shows_the_sink_and_the_latest_frames(window: Window) -> None:
    for cache in (blocks(window), slots(window)):
        for start in range(0, 20, CHUNK):
            history = cache.history(CHUNK)
            for layer in range(2):
                assert shown(history, layer) == visible(window, start)
            context = len(visible(window, start))
            first = start if window.positions == "absolute" else context
            phase = rope.phases([range(first, first + CHUNK)], *GRID, HEAD_DIM, torch.device("cpu"))
            assert torch.equal(history.phase, phase)
            cache.commit(marked(start, CHUNK), CHUNK)


@torch.no_grad()
def test_relative_positions_do_not_know_how_long_the_video_is() -> None:
    """The same keys in the same window look the same at frame 8 and at frame 80."""
    window = Window(5, 1, "relative")
    for cache in (blocks(window), slots(window)):
        seen: list[tuple[Tensor, Tensor]] = []
        cache.commit([(pair[0], pair[1]) for pair in marked(0, CHUNK)], CHUNK)
        for start in range(CHUNK, 82, CHUNK):
            cache.commit(marked(7, CHUNK), CHUNK)
            if start >= 6:
                history = cache.history(CHUNK)
                key, _ = read(history, 1)
                seen.append((history.phase, key))
        assert all(torch.equal(phase, seen[0][0]) and torch.equal(key, seen[0][1]) for phase, key in seen)
    absolute = blocks(Window(5, 1, "absolute"))
    early = absolute.history(CHUNK).phase
    absolute.commit(marked(0, CHUNK), CHUNK)
    assert not torch.equal(absolute.history(CHUNK).phase, early)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_block_history_outlives_later_commits(positions: str) -> None:
    """A call recomputed under checkpointing reads what it read at first, though the window moved on."""
    cache = blocks(Window(5, 1, positions))
    for start in range(0, 8, CHUNK):
        cache.commit(marked(start, CHUNK), CHUNK)
    history = cache.history(CHUNK)
    before = [tensor.clone() for layer in range(2) for tensor in read(history, layer)]
    for start in range(8, 30, CHUNK):
        cache.commit(marked(start, CHUNK), CHUNK)
    after = [tensor for layer in range(2) for tensor in read(history, layer)]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert shown(cache.history(CHUNK)) == [0, 28, 29]


def test_blocks_keep_only_what_a_later_chunk_can_see() -> None:
    cache = blocks(Window(5, 1, "relative"))
    committed: list[weakref.ref[Tensor]] = []

    def alive() -> int:
        return sum(tensor() is not None for tensor in committed)

    counts = []
    for start in range(0, 60, CHUNK):
        live = [(key.clone(), value.clone()) for key, value in marked(start, CHUNK)]
        committed += [weakref.ref(tensor) for pair in live for tensor in pair]
        cache.commit(live, CHUNK)
        del live
        counts.append(alive())
    # Two layers, two sides, the block with the sink and at most three others that touch the last five frames.
    assert max(counts) <= 2 * 2 * 4
    assert len(set(counts[5:])) == 1
    endless = blocks(Window(None, 0, "relative"))
    endless.commit(marked(0, CHUNK), CHUNK)
    endless.commit(marked(2, CHUNK), CHUNK)
    assert shown(endless.history(CHUNK)) == [0, 1, 2, 3]


@torch.no_grad()
def test_slots_never_move_or_grow() -> None:
    cache = slots(Window(5, 1, "relative"), rows=2)
    places = [slot.data_ptr() for slot in cache.slots]
    size = sum(slot.numel() for slot in cache.slots)
    assert size == 2 * 2 * 2 * (5 - CHUNK) * TOKENS * HEADS * HEAD_DIM
    for start in range(0, 60, CHUNK):
        cache.commit(marked(start, CHUNK, rows=2), CHUNK)
    assert [slot.data_ptr() for slot in cache.slots] == places
    assert sum(slot.numel() for slot in cache.slots) == size


@pytest.mark.parametrize("window", WINDOWS, ids=name)
@torch.no_grad()
def test_rows_of_different_ages_share_a_batch(window: Window) -> None:
    """Row 0 starts again while row 1 goes on; each gets the answers it gets alone."""
    model, context = tiny_model(), prompt(2)
    inputs = normal(7, 2, CHUNK, CONFIG.in_dim, HEIGHT, WIDTH)

    def turn(cache: SlotCache, x: Tensor, text: Tensor) -> Tensor:
        timestep = torch.full(x.shape[:2], 700.0)
        velocity, live, *_ = model(x, timestep, text, history=cache.history(CHUNK), return_live=True)
        cache.commit(live, CHUNK)
        return velocity

    def alone(row: int, turns: range) -> list[Tensor]:
        cache = slots(window)
        return [turn(cache, inputs[index, row : row + 1], context[row : row + 1]) for index in turns]

    together = slots(window, rows=2)
    answers = []
    for index in range(7):
        if index == 2:
            together.held[0] = together.seen[0] = 0
        answers.append(turn(together, inputs[index], context))
    for index, expected in enumerate(alone(1, range(7))):
        assert difference(answers[index][1:], expected) < 1e-5
    for index, expected in zip(range(2, 7), alone(0, range(2, 7)), strict=True):
        assert difference(answers[index][:1], expected) < 1e-5


def test_slots_refuse_whatever_could_reach_a_graph() -> None:
    cache = slots(Window(None, 0, "absolute"))
    live = marked(0, CHUNK)
    with pytest.raises(RuntimeError, match="carry a gradient"):
        cache.commit([live[0], (live[1][0], live[1][1].clone().requires_grad_())], CHUNK)
    assert cache.held == [0], "a refused commit leaves nothing behind"
    cache.commit(live, CHUNK)
    history = cache.history(CHUNK)
    with pytest.raises(RuntimeError, match="under a gradient"):
        read(history, 0)
    with torch.no_grad():
        assert shown(history) == [0, 1]


def test_slots_without_a_window_say_when_they_are_full() -> None:
    with pytest.raises(ValueError, match="capacity in frames"):
        slots(Window(None, 0, "absolute"), capacity=None)
    cache = slots(Window(None, 0, "absolute"), capacity=3)
    cache.commit(marked(0, 2), 2)
    with pytest.raises(RuntimeError, match="holds 3 frames"):
        cache.commit(marked(2, 2), 2)


def test_joined_keys_are_shared_by_calls_but_never_by_a_graph() -> None:
    cache = blocks(Window(None, 0, "absolute"))
    cache.commit([(key.clone().requires_grad_(), value) for key, value in marked(0, CHUNK)], CHUNK)
    cache.commit(marked(2, CHUNK), CHUNK)
    history = cache.history(CHUNK)
    with torch.no_grad():
        joined = read(history, 0)[0]
        assert read(history, 0)[0] is joined
    assert read(history, 0)[0].requires_grad, "the gradient of a released cache still passes"
    # What a graph read lives as long as the graph, not as long as the history.
    alive = weakref.ref(read(history, 1)[0])
    assert alive() is None
