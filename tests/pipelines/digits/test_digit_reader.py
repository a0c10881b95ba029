"""The digit reader on scans that it has never seen, and its cache."""

import shutil
from pathlib import Path

import pytest
import torch

from pipelines.digits.digit_reader import DigitReader, load_or_train, read_videos
from pipelines.digits.moving_digits import sample_videos
from pipelines.digits.suite import READER_SEED


def test_features_do_not_depend_on_a_shift_that_the_network_can_follow_exactly() -> None:
    reader = DigitReader().eval()
    pixels, _, _ = next(sample_videos(videos=40, frames=2, seed=0, split="held_out"))
    videos = torch.from_numpy(pixels).float() / 127.5 - 1
    logits, features = read_videos(reader, videos)
    assert logits.shape == (40, 2, 10) and features.shape == (40, 2, 64)
    moved_logits, moved_features = read_videos(reader, videos.roll((8, -4), dims=(-2, -1)))
    torch.testing.assert_close(moved_features, features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moved_logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_held_out_videos_are_read_nearly_without_error_and_the_cache_is_the_trained_reader(
    trained_reader: tuple[DigitReader, Path], tmp_path: Path
) -> None:
    trained, directory = trained_reader
    shutil.copytree(directory, tmp_path / "cache")
    [file] = (tmp_path / "cache").iterdir()
    stored = file.stat().st_mtime_ns
    cached = load_or_train(tmp_path / "cache", READER_SEED)
    assert file.stat().st_mtime_ns == stored

    pixels, digits, _ = zip(*sample_videos(videos=1200, frames=4, seed=1, split="held_out"), strict=True)
    videos = torch.cat([torch.from_numpy(block) for block in pixels]).float() / 127.5 - 1
    labels = torch.cat([torch.from_numpy(block) for block in digits])
    logits, _ = read_videos(trained, videos)
    assert torch.equal(read_videos(cached, videos)[0], logits)
    by_frame = (logits.argmax(-1) == labels[:, None]).float().mean(0)
    assert by_frame.min() >= 0.98
    imperfect = (
        videos * 0.8 - 0.2 + 0.15 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    )
    assert (read_videos(trained, imperfect)[0].argmax(-1) == labels[:, None]).float().mean() >= 0.97
    blank = torch.full((1, 1, 1, 16, 16), -1.0)
    assert read_videos(trained, blank)[0].softmax(-1).max() < 0.95

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged; delete it"):
        load_or_train(tmp_path / "cache", READER_SEED)
