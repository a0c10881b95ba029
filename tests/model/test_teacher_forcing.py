"""Autoregressive training on data: teacher forcing and diffusion forcing against the cached rollout."""

import pytest
import torch
from torch import Tensor

from model.kv_cache import BlockCache, Window
from model.transformer import EVERYTHING, WanTransformer
from tests.model.reference import CONFIG, GRID, HEIGHT, WIDTH, difference, normal, prompt, tiny_model

FRAMES, CHUNK = 8, 2
SHAPE = (2, FRAMES, CONFIG.in_dim, HEIGHT, WIDTH)
WINDOWS = [
    EVERYTHING,
    Window(None, 0, "relative"),
    Window(4, 0, "absolute"),
    Window(5, 1, "absolute"),
    Window(5, 1, "relative"),
    Window(6, 2, "relative"),
    Window(2, 0, "relative"),
]


def videos() -> tuple[Tensor, Tensor, Tensor]:
    """A clean video, a noisy one, and a timestep for each of its chunks."""
    timestep = torch.tensor([[900.0, 500, 30, 700], [100.0, 999, 400, 640]])
    return normal(*SHAPE), normal(*SHAPE, seed=1), timestep.repeat_interleave(CHUNK, dim=1)


@torch.no_grad()
def velocity_after_clean_past(model: WanTransformer, window: Window) -> Tensor:
    """Chunk by chunk as in a rollout, but what is committed is the clean video."""
    clean, noisy, timestep = videos()
    cache = BlockCache(window, GRID, CONFIG.head_dim)
    chunks = []
    for x0, x_t, t in zip(*(video.split(CHUNK, 1) for video in (clean, noisy, timestep)), strict=True):
        history = cache.history(CHUNK)
        chunks.append(model(x_t, t, prompt(2), history=history).velocity)
        _, live, *_ = model(x0, torch.zeros_like(t), prompt(2), history=history, return_live=True)
        cache.commit(live, CHUNK)
    return torch.cat(chunks, 1)


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w.frames}-{w.sink}-{w.positions}")
@torch.no_grad()
def test_teacher_forcing_sees_what_a_rollout_after_the_clean_past_sees(window: Window) -> None:
    model, (clean, noisy, timestep) = tiny_model(), videos()
    packed = model(noisy, timestep, prompt(2), chunk=CHUNK, window=window, clean=clean).velocity
    assert difference(packed, velocity_after_clean_past(model, window)) < 1e-5
    # The window has its effect, and so has the clean past: noisy history gives something else.
    everything = model(noisy, timestep, prompt(2), chunk=CHUNK, clean=clean).velocity
    assert (difference(packed, everything) > 1e-3) == (window.frames is not None)
    forced = model(noisy, timestep, prompt(2), chunk=CHUNK, window=window).velocity
    assert (difference(packed, forced) > 1e-3) == (window.frames != CHUNK)


@pytest.mark.parametrize("chunk", [1, 2, 4])
@torch.no_grad()
def test_noisy_chunks_see_earlier_clean_chunks_and_themselves(chunk: int) -> None:
    model, (clean, noisy, timestep) = tiny_model(), videos()
    changed_chunk = slice(chunk, 2 * chunk)

    def changes(clean_change: float, noisy_change: float) -> list[bool]:
        """For each frame, whether its velocity changes with the second chunk of a stream."""
        streams = clean.clone(), noisy.clone()
        for stream, change in zip(streams, (clean_change, noisy_change), strict=True):
            stream[:, changed_chunk] += change
        before = model(noisy, timestep, prompt(2), chunk=chunk, clean=clean).velocity
        after = model(streams[1], timestep, prompt(2), chunk=chunk, clean=streams[0]).velocity
        return ((before - after).abs().amax((0, 2, 3, 4)) > 0).tolist()

    assert changes(1.0, 0.0) == [frame >= 2 * chunk for frame in range(FRAMES)]
    assert changes(0.0, 1.0) == [chunk <= frame < 2 * chunk for frame in range(FRAMES)]


@torch.no_grad()
def test_without_noise_both_streams_are_one() -> None:
    """Clean frames at timestep 0 as the noisy stream: teacher forcing is then the plain block-causal pass."""
    model, (clean, _, _) = tiny_model(), videos()
    packed = model(clean, torch.zeros(2), prompt(2), chunk=CHUNK, clean=clean).velocity
    assert difference(packed, model(clean, torch.zeros(2), prompt(2), chunk=CHUNK).velocity) < 1e-6


@torch.no_grad()
def test_one_timestep_a_sample_is_that_timestep_in_every_frame() -> None:
    model, (clean, noisy, _) = tiny_model(), videos()
    timestep = torch.tensor([900.0, 30.0])
    by_frame = model(
        noisy, timestep[:, None].expand(-1, FRAMES), prompt(2), chunk=CHUNK, clean=clean
    ).velocity
    assert torch.equal(model(noisy, timestep, prompt(2), chunk=CHUNK, clean=clean).velocity, by_frame)


@torch.no_grad()
def test_diffusion_forcing_noises_each_chunk_alone() -> None:
    """A chunk's timestep reaches that chunk and, through its keys and values, the later ones."""
    model, (_, noisy, timestep) = tiny_model(), videos()
    other = timestep.clone()
    other[:, CHUNK : 2 * CHUNK] = 250.0
    one, two = (model(noisy, t, prompt(2), chunk=CHUNK).velocity for t in (timestep, other))
    assert torch.equal(one[:, :CHUNK], two[:, :CHUNK])
    assert ((one - two).abs().amax((0, 2, 3, 4))[CHUNK:] > 1e-4).all()


def test_clean_frames_need_a_chunk_and_the_same_shape() -> None:
    model, (clean, noisy, timestep) = tiny_model(), videos()
    with pytest.raises(ValueError, match="clean frames need a chunk, not None"):
        model(noisy, timestep, prompt(2), clean=clean)
    with pytest.raises(ValueError, match=r"shape \(2, 8, 2, 4, 4\), not \(2, 7, 2, 4, 4\)"):
        model(noisy, timestep, prompt(2), chunk=CHUNK, clean=clean[:, 1:])


def test_the_clean_stream_gets_its_gradient() -> None:
    """It is context, not a constant: later chunks train the keys and values of earlier clean ones."""
    model, (clean, noisy, timestep) = tiny_model(), videos()
    clean.requires_grad_()
    model(noisy, timestep, prompt(2), chunk=CHUNK, clean=clean).velocity.square().sum().backward()
    assert clean.grad is not None and clean.grad[:, :-CHUNK].abs().amax((2, 3, 4)).all()
    assert not clean.grad[:, -CHUNK:].any()
    assert all(weight.grad is not None for weight in model.parameters())
