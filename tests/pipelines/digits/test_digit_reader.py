"""The digit reader on scans that it has never seen, and its file."""

from pathlib import Path

import pytest
import torch

from pipelines.digits import digit_reader
from pipelines.digits.digit_reader import DigitReader, load, read_videos, train
from pipelines.digits.moving_digits import sample_videos


def test_features_do_not_depend_on_a_shift_that_the_network_can_follow_exactly() -> None:
    reader = DigitReader().eval()
    pixels, _, _ = next(sample_videos(videos=40, frames=2, seed=0, split="held_out"))
    videos = torch.from_numpy(pixels).float() / 127.5 - 1
    logits, features = read_videos(reader, videos)
    assert logits.shape == (40, 2, 10) and features.shape == (40, 2, 64)
    moved_logits, moved_features = read_videos(reader, videos.roll((8, -4), dims=(-2, -1)))
    torch.testing.assert_close(moved_features, features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moved_logits, logits, atol=1e-5, rtol=1e-4)


def test_held_out_videos_are_read_nearly_without_error() -> None:
    reader = load()
    pixels, digits, _ = zip(*sample_videos(videos=1200, frames=4, seed=1, split="held_out"), strict=True)
    videos = torch.cat([torch.from_numpy(block) for block in pixels]).float() / 127.5 - 1
    labels = torch.cat([torch.from_numpy(block) for block in digits])
    by_frame = (read_videos(reader, videos)[0].argmax(-1) == labels[:, None]).float().mean(0)
    assert by_frame.min() >= 0.98
    imperfect = (
        videos * 0.8 - 0.2 + 0.15 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    )
    assert (read_videos(reader, imperfect)[0].argmax(-1) == labels[:, None]).float().mean() >= 0.97
    blank = torch.full((1, 1, 1, 16, 16), -1.0)
    assert read_videos(reader, blank)[0].softmax(-1).max() < 0.95


def test_a_damaged_file_is_named_with_what_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "digit_reader.safetensors"
    damaged.write_bytes(digit_reader.FILE.read_bytes()[:1000])
    monkeypatch.setattr(digit_reader, "FILE", damaged)
    with pytest.raises(ValueError, match=r"missing or damaged; .*python -m pipelines\.digits\.digit_reader"):
        load()


@pytest.mark.slow
@pytest.mark.by_hand
def test_training_makes_such_a_reader_again() -> None:
    pixels, _, _ = next(sample_videos(videos=400, frames=2, seed=2, split="held_out"))
    videos = torch.from_numpy(pixels).float() / 127.5 - 1
    (made, _), (shipped, _) = read_videos(train(seed=0), videos), read_videos(load(), videos)
    assert (made.argmax(-1) == shipped.argmax(-1)).float().mean() >= 0.98
