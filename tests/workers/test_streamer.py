"""Streams of one batch, each against itself alone: joining, leaving, pausing, parking, a new prompt, and a
row that fails."""

from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from model.rollout import NetworkCall
from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig
from orchestrator.serving.models import load
from tests.fixtures import write_model
from tests.model.reference import difference
from workers.generator import Generator
from workers.model_directory import VideoConfig
from workers.streamer import NoSlot, Stream, Streamer

SIZES = TransformerConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_len=8, text_dim=16, freq_dim=32)
VIDEO = VideoConfig(frames=6, height=4, width=4)
CHUNK, FRAMES = 2, 12
ROLLOUTS = {
    "relative": RolloutConfig(steps=(1000, 500), chunk=CHUNK, window=6, positions="relative"),
    "sink": RolloutConfig(steps=(1000, 500), chunk=CHUNK, window=7, sink=1, positions="relative"),
    "absolute": RolloutConfig(steps=(1000, 500), chunk=CHUNK, window=6, sink=2),
}
PROMPTS = ["a six drifting left", "a two drifting up", "a one drifting down"]


@pytest.fixture(scope="module", params=ROLLOUTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("streamer") / "model"
    write_model(path, SIZES, seed=1, rollout=ROLLOUTS[request.param], video=VIDEO)
    return str(path)


def alone(model: str, viewer: int, frames: int = FRAMES) -> Tensor:
    return Generator(model).student([PROMPTS[viewer]], [(viewer, "generate", 0)], frames)[0]


def watch(streamer: Streamer, made: dict[int, list[Tensor]], ticks: int = 1, **options: object) -> None:
    for _ in range(ticks):
        for event in streamer.tick(**options):  # type: ignore[arg-type]
            assert event.error is None and event.chunk is not None
            made.setdefault(event.stream.number, []).append(event.chunk.cpu())


def video(made: dict[int, list[Tensor]], stream: Stream) -> Tensor:
    return torch.cat(made[stream.number])


def test_a_stream_by_itself_is_the_generated_video_to_the_bit(model: str) -> None:
    streamer, made = Streamer(model, slots=3), {}
    stream = streamer.open(PROMPTS[0], 0, FRAMES)
    watch(streamer, made, 3 * FRAMES // CHUNK - 1)
    assert torch.equal(video(made, stream), alone(model, 0))
    assert streamer.streams == {} and streamer.free == [0, 1, 2]
    assert streamer.tick() == []


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_a_model_plays_in_the_type_that_it_was_trained_in(tmp_path: Path, rollout: str) -> None:
    path = str(tmp_path / "model")
    write_model(path, SIZES, seed=1, rollout=ROLLOUTS[rollout], video=VIDEO, dtype="bf16")
    streamer, made = Streamer(path, slots=2), {}
    cache, prompts = streamer.cache, streamer.prompts
    for held in (*streamer.network.parameters(), cache.slots, cache.keys, prompts.slots):
        assert held.dtype == torch.bfloat16
    stream = streamer.open(PROMPTS[0], 0, FRAMES)
    watch(streamer, made, 4)
    streamer.park(stream)
    assert stream.parked is not None and stream.parked.slots.dtype == torch.bfloat16
    streamer.unpark(stream)
    watch(streamer, made, 3 * FRAMES // CHUNK - 5)
    seen = video(made, stream)
    assert seen.dtype == torch.float32 and torch.equal(seen, alone(path, 0))
    # The same weights in fp32 make nearly the same video, and not the same.
    wide = str(tmp_path / "wide")
    write_model(wide, SIZES, seed=1, rollout=ROLLOUTS[rollout], video=VIDEO)
    assert 1e-4 < difference(seen[:CHUNK], alone(wide, 0)[:CHUNK]) < 0.1


def test_streams_of_different_ages_and_steps_share_a_batch(model: str) -> None:
    """One joins in the middle of another's chunk, one leaves, and a third takes its slot: nobody else
    notices."""
    streamer, made = Streamer(model, slots=2), {}
    first = streamer.open(PROMPTS[0], 0, FRAMES)
    watch(streamer, made, 4)
    second = streamer.open(PROMPTS[1], 1)
    with pytest.raises(NoSlot, match="all 2 slots are taken"):
        streamer.open(PROMPTS[2], 2)
    watch(streamer, made, 6)
    waiting = [stream.rollout.pending for stream in (first, second)]
    assert [call.timestep for call in waiting if isinstance(call, NetworkCall)] != [0.0]
    assert [stream.between_chunks for stream in (first, second)] == [False, True]
    streamer.close(second)
    streamer.close(second)
    third = streamer.open(PROMPTS[2], 2, FRAMES)
    assert third.row == 1
    watch(streamer, made, 3 * FRAMES // CHUNK)
    for viewer, stream in ((0, first), (2, third)):
        assert difference(video(made, stream), alone(model, viewer)) < 1e-4
    seen = video(made, second)
    assert difference(seen, alone(model, 1)[: len(seen)]) < 1e-4 and 0 < len(seen) < FRAMES


def test_paused_and_parked_streams_go_on_where_they_were(model: str) -> None:
    streamer, made = Streamer(model, slots=2), {}
    first, second = (streamer.open(PROMPTS[viewer], viewer, FRAMES) for viewer in (0, 1))
    watch(streamer, made, 4)
    watch(streamer, made, 5, paused={first.number})
    streamer.park(first)
    third = streamer.open(PROMPTS[2], 2, FRAMES)
    assert (first.row, third.row) == (None, 0)
    with pytest.raises(NoSlot):
        streamer.unpark(first)
    watch(streamer, made, 30)
    assert [*streamer.streams] == [first.number]
    streamer.unpark(first)
    streamer.unpark(first)
    watch(streamer, made, 30)
    for viewer, stream in enumerate((first, second, third)):
        assert difference(video(made, stream), alone(model, viewer)) < 1e-4


def test_a_new_prompt_holds_from_the_next_chunk_on(model: str) -> None:
    def run(prompt: str | None, *, reencode: bool = True) -> tuple[Tensor, list[bool]]:
        streamer = Streamer(model, slots=1)
        streamer.open(PROMPTS[0], 0, FRAMES)
        chunks, marks = [], []
        for tick in range(60):
            if tick == 7 and prompt:  # in the middle of the third chunk
                streamer.change_prompt(next(iter(streamer.streams.values())), prompt, reencode=reencode)
            for event in streamer.tick():
                assert event.chunk is not None
                chunks.append(event.chunk)
                marks.append(event.new_prompt)
        return torch.cat(chunks), marks

    same, _ = run(None)
    again, marks = run(PROMPTS[0])
    assert marks == [False] * 3 + [True] + [False] * 2
    changed, _ = run(PROMPTS[1])
    kept, _ = run(PROMPTS[1], reencode=False)
    until = 3 * CHUNK
    for other in (again, changed, kept):
        assert torch.equal(other[:until], same[:until])
    # Under the same prompt writing the cache anew changes little, and nothing where no chunk's past had been
    # cut by the window.
    assert difference(again, same) < 0.2 * difference(changed, same)
    assert difference(changed[until:], same[until:]) > 1e-3 < difference(kept[until:], same[until:])
    assert not torch.equal(changed, kept)


def test_a_stream_that_cannot_be_adopted_takes_no_slot(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = Streamer(model, slots=1), Streamer(model, slots=1)
    stream, made = before.open(PROMPTS[0], 0, FRAMES), {}
    watch(before, made, 3)
    before.close(stream)

    def fails(prompts: list[str]) -> Tensor:
        raise ValueError("too long")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="too long"):
        patch.setattr(after.text, "encode", fails)
        after.adopt(stream)
    assert after.free == [0] and after.streams == {}
    after.adopt(stream)
    assert after.free == [] and list(after.streams.values()) == [stream]


def test_a_row_that_is_not_finite_ends_alone(model: str) -> None:
    streamer, made = Streamer(model, slots=2), {}
    good, bad = (streamer.open(PROMPTS[viewer], viewer, FRAMES) for viewer in (0, 1))
    watch(streamer, made, 4)
    bad.context = bad.context * torch.nan
    events = {event.stream.number: event for event in streamer.tick()}
    made[good.number] += [events[good.number].chunk] if good.number in events else []
    assert events[bad.number].error == "the model's answer is not finite" and streamer.free == [1]
    watch(streamer, made, 40)
    assert difference(video(made, good), alone(model, 0)) < 1e-4


def test_memory_and_history_stay_what_they_are(model: str) -> None:
    streamer, made = Streamer(model, slots=1), {}
    stream = streamer.open(PROMPTS[0], 0)
    watch(streamer, made, 60)
    slots = [each.data_ptr() for each in streamer.cache.slots]
    held, past = streamer.cache.held, sum(frames.shape[1] for _, frames in stream.rollout.past)
    watch(streamer, made, 60)
    assert [each.data_ptr() for each in streamer.cache.slots] == slots
    assert streamer.cache.held == held == [past]
    assert sum(frames.shape[1] for _, frames in stream.rollout.past) == past


def test_what_cannot_stream_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "teacher", SIZES, seed=1, video=VIDEO)
    write_model(tmp_path / "open", SIZES, seed=1, video=VIDEO, rollout=RolloutConfig(chunk=CHUNK))
    with pytest.raises(ValueError, match="is no few-step student; streaming needs one"):
        Streamer(str(tmp_path / "teacher"), slots=1)
    with pytest.raises(ValueError, match=r"has no rollout.window, and its cache would grow for ever"):
        Streamer(str(tmp_path / "open"), slots=1)


@pytest.mark.slow
@pytest.mark.by_hand
def test_compiled_streams_are_the_same_and_nothing_is_compiled_once_viewers_come(model: str) -> None:
    dynamo.reset()
    counters.clear()
    streamer = load(model, 3, compiled=True)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= 2 and streamer.free == [0, 1, 2]
    made: dict[int, list[Tensor]] = {}
    streams = []
    for viewer in range(3):
        streams.append(streamer.open(PROMPTS[viewer], viewer, FRAMES))
        watch(streamer, made, 2 + viewer)
    watch(streamer, made, 60)
    for viewer, stream in enumerate(streams):
        assert difference(video(made, stream), alone(model, viewer)) < 1e-5
    assert counters["stats"]["unique_graphs"] == compiled
