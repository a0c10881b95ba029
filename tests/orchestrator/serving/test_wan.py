"""A student that decodes by Wan's VAE and reads prompts by UMT5, served."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import ray
import torch
from ray import serve

from orchestrator.serving.client import Client, ReceivedChunk, ServerError
from orchestrator.serving.messages import Applied, VideoStart
from tests.orchestrator.serving.conftest import CONFIG, play
from tests.wan import write_pipeline, write_student
from workers.generator import Generator

pytestmark = pytest.mark.slow
FPS = 100  # the server sends no faster
SIX, TWO = "a six drifting left", "a two drifting up"
CHUNKS = 40
FRAMES = 1 + 4 * (3 * CHUNKS - 1)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wan")
    return write_student(place / "student", write_pipeline(place / "pipeline"), fps=FPS)


@pytest.fixture(scope="module")
def client(wan: Path, deploy: object) -> Iterator[Client]:
    with deploy("wan", replace(CONFIG, model=str(wan))) as url:  # type: ignore[operator]
        yield Client(url)


def frames_of(chunks: list[ReceivedChunk]) -> tuple[np.ndarray, list[float]]:
    with av.open(io.BytesIO(b"".join(chunk.data for chunk in chunks))) as container:
        frames = list(container.decode(video=0))
    times = [float(frame.pts * frame.time_base) for frame in frames]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), times


def alone(model: Path, prompt: str, seed: int, chunks: int) -> np.ndarray:
    """The frames of one stream by itself, whole."""
    generator = Generator(str(model))
    latents = generator.student([prompt], [(seed, "generate", 0)], 3 * chunks)
    frames = generator.shown.decode(latents)[0]
    pixels = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels.repeat(8, axis=1).repeat(8, axis=2)


def test_two_viewers_see_what_each_would_see_alone(client: Client, wan: Path) -> None:
    torch.set_num_threads(1)
    with client.session() as one, client.session() as two:
        one.start(SIX, seed=1, num_frames=30)
        two.start(TWO, seed=2, num_frames=21)
        for session, prompt, seed, count in ((one, SIX, 1, 30), (two, TWO, 2, 21)):
            assert session.wait_for(VideoStart).config.fps == FPS
            chunks, done = play(session)
            # The first latent frame makes one frame of pixels, so the first chunk nine and others twelve.
            assert [chunk.about.num_frames for chunk in chunks] == [9, 12, count - 21][: done.chunks]
            seen, times = frames_of(chunks)
            assert times == pytest.approx([frame / FPS for frame in range(count)])
            expected = alone(wan, prompt, seed, 3)[:count]
            assert seen.shape == expected.shape == (count, 256, 384, 3)
            # H.264 loses a little.
            assert np.abs(seen.astype(int) - expected).mean() < 4


def encoders(application: str) -> int:
    """How many replicas of the text encoder an application has."""
    deployments = serve.status().applications[application].deployments
    return deployments["PromptEncoder"].replica_states.get("RUNNING", 0)


@pytest.mark.by_hand
def test_the_text_encoder_is_shared_and_mended(client: Client, wan: Path, shared_url: str) -> None:
    assert encoders("wan") == 1 and encoders("shared") == 0
    too_long = r"has \d+ tokens, more than the 32 that this model reads"
    with pytest.raises(ServerError, match=too_long), client.stream("six " * 40, frames=3):
        pass
    actors = ray.util.list_named_actors(all_namespaces=True)
    (actor,) = (each for each in actors if "#PromptEncoder#" in each["name"])
    ray.kill(ray.get_actor(**actor))
    with client.session() as session:
        session.start(TWO, seed=6, num_frames=9)
        chunks, _ = play(session)
    seen, _ = frames_of(chunks)
    assert np.abs(seen.astype(int) - alone(wan, TWO, 6, 1)[:9]).mean() < 4


@pytest.mark.by_hand
def test_a_stream_that_was_parked_goes_on_as_if_it_had_not_been(client: Client, wan: Path) -> None:
    with client.session() as session:
        session.start(SIX, seed=3, num_frames=93)
        chunks = [session.wait_for(ReceivedChunk) for _ in range(2)]
        session.control("pause")
        with client.session() as other, client.session() as another:  # who take both slots
            other.start(TWO, num_frames=12)
            another.start(TWO, num_frames=12)
            play(other), play(another)
        session.control("resume")
        rest, _ = play(session)
    seen, _ = frames_of([*chunks, *rest])
    assert len(seen) == 93
    expected = alone(wan, SIX, 3, 8)[:93]
    assert np.abs(seen.astype(int) - expected).mean(axis=(1, 2, 3)).max() < 6  # no frame is another's


@pytest.mark.by_hand
def test_a_prompt_changes(client: Client, wan: Path) -> None:
    with client.session() as session:
        session.start(SIX, seed=3, num_frames=200)
        session.wait_for(ReceivedChunk)
        session.change_prompt(TWO, "turn")
        applied = session.wait_for(Applied)
        rest, done = play(session)
    assert applied.event_id == "turn" and 1 <= applied.chunk_index < done.chunks
    turned = [chunk.about.generation_chunk_index for chunk in rest if chunk.about.started_event_ids]
    assert turned == [applied.chunk_index]


@pytest.mark.by_hand
def test_a_long_video_rolls_its_window(client: Client) -> None:
    with client.session() as session:
        session.start(SIX, seed=4, num_frames=FRAMES)
        chunks, done = play(session)
    assert done.chunks == CHUNKS
    assert sum(chunk.about.num_frames for chunk in chunks) == FRAMES
    frames, times = frames_of(chunks)
    assert len(frames) == FRAMES and times[-1] == pytest.approx((FRAMES - 1) / FPS)
    assert np.isfinite(frames).all() and frames[-1].std() > 1


def test_a_stream_begins_in_the_middle(client: Client) -> None:
    """What comes before is decoded and not sent: later frames depend on it."""
    with client.stream(SIX, seed=5, frames=30) as frames:
        whole = list(frames)
    with client.session() as session:
        session.start(SIX, seed=5, num_frames=30, first_frame=14, format="jpeg")
        chunks, _ = play(session)
    sent = [size for chunk in chunks for size in chunk.about.frame_bytes or ()]
    assert len(whole) == 30 and len(sent) == 16
    assert b"".join(chunk.data for chunk in chunks) == b"".join(whole[14:])
