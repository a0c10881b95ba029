"""The embedded codec loses nothing; the embedded encoder reads words."""

import pytest
import torch

from model.codec import SpaceToDepth
from model.text import ByteEncoder
from tests.model.reference import difference, normal


def encoder() -> ByteEncoder:
    torch.manual_seed(0)
    model = ByteEncoder(text_len=6, text_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            # As if trained: a fresh norm has no bias that could leak into the padding.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_frames_survive_the_codec() -> None:
    frames = normal(2, 3, 1, 16, 16).clamp(-1, 1)
    codec = SpaceToDepth(2)
    latents = codec.encode(frames)
    assert latents.shape == (2, 3, 4, 8, 8)
    assert torch.equal(codec.decode(latents), frames)
    # A latent position holds the block of pixels that it covers, and no other frame's.
    assert torch.equal(latents[1, 2, :, 3, 5], frames[1, 2, 0, 6:8, 10:12].flatten())


def test_decoded_frames_are_in_range() -> None:
    frames = SpaceToDepth(4).decode(3 * normal(1, 2, 32, 4, 4))
    assert frames.shape == (1, 2, 2, 16, 16)
    assert frames.min() == -1 and frames.max() == 1


def test_no_prompt_is_all_zeros() -> None:
    assert not encoder().encode(["", " "]).any()


def test_a_prompt_reads_the_same_in_any_batch() -> None:
    prompts = ["a seven drifting left", "a one", "", "ein Ä"]
    model = encoder()
    together = model.encode(prompts)
    assert together.shape == (4, 6, 16) and together.dtype == torch.float32 and not together.requires_grad
    for row, prompt in enumerate(prompts):
        assert torch.allclose(model.encode([prompt])[0], together[row], atol=1e-6)
        words = len(prompt.split())
        assert not together[row, words:].any()
        assert (together[row, :words].abs().amax(-1) > 0).all()


def test_only_the_word_that_changes_reads_differently() -> None:
    one, two, three = encoder().encode(
        ["a seven drifting left", "a seven drifting lift", "a seven drifting felt"]
    )
    for other in (two, three):  # three has the letters of one in another order
        assert ((one - other).abs().amax(-1) > 1e-2).tolist() == [False, False, False, True, False, False]


def test_a_long_word_takes_several_tokens() -> None:
    tokens = encoder().tokenize(["an " + "ü" * 20])
    assert (tokens > 0).sum(-1).tolist() == [[2, 16, 16, 8, 0, 0]]


def test_a_prompt_that_is_too_long_is_one_sentence() -> None:
    encoder().encode(["ü" * 48])
    with pytest.raises(ValueError, match=r"has 7 words, more than the 6 that this model reads; shorten it"):
        encoder().encode(["a", "one two three four five six seven"])


def test_training_reaches_every_weight_of_the_encoder() -> None:
    model = encoder()
    tokens = model.tokenize(["a seven drifting left", "sixteen-letters-", "one two three four five six"])
    (model(tokens) * normal(3, 6, 16)).sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert model.place.grad.abs().amax(-1).all() and model.position.grad.abs().amax(-1).all()
    assert not model.byte.weight.grad[0].any(), "padding is no text"
    assert difference(model.encode(["sixteen-letters-"])[0], model(tokens)[1].detach()) < 1e-6
