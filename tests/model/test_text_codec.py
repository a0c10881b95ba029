"""The embedded codec loses nothing; the embedded encoder reads words wherever they are."""

import pytest
import torch

from model.codec import SpaceToDepth
from model.text import ByteEncoder
from tests.model.reference import difference, normal


def encoder() -> ByteEncoder:
    torch.manual_seed(0)
    model = ByteEncoder(text_len=32, text_dim=16)
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
    assert not encoder().encode(["", ""]).any()


def test_a_prompt_reads_the_same_in_any_batch() -> None:
    prompts = ["a seven drifting left", "a one", "", "ein Ä"]
    model = encoder()
    together = model.encode(prompts)
    assert together.shape == (4, 32, 16) and together.dtype == torch.float32 and not together.requires_grad
    for row, prompt in enumerate(prompts):
        assert torch.allclose(model.encode([prompt])[0], together[row], atol=1e-6)
        length = len(prompt.encode())
        assert not together[row, length:].any()
        assert (together[row, :length].abs().amax(-1) > 0).all()


def test_prompts_that_differ_in_one_letter_differ() -> None:
    one, two = encoder().encode(["a seven drifting left", "a seven drifting lift"])
    changed = (one - two).abs().amax(-1) > 1e-6
    # Two layers of five bytes reach four bytes to each side of the changed one.
    assert changed[18] and not changed[: 18 - 4].any() and changed.sum() <= 9


def test_a_prompt_that_is_too_long_is_one_sentence() -> None:
    encoder().encode(["ü" * 16])
    with pytest.raises(ValueError, match=r"has 34 bytes, more than the 32 that this model reads; shorten it"):
        encoder().encode(["a", "ü" * 17])


def test_training_reaches_every_weight_of_the_encoder() -> None:
    model = encoder()
    tokens, present = model.tokenize(["a seven drifting left", "an eight"])
    assert tokens.shape == (2, 32) and present.shape == (2, 32, 1)
    (model(tokens, present) * normal(2, 32, 16)).sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert not model.token.weight.grad[0].any(), "padding is no text"
    assert difference(model.encode(["an eight"])[0], model(tokens, present)[1].detach()) < 1e-6
