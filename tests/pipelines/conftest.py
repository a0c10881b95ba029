"""What takes a while to make, made once."""

from pathlib import Path

import pytest

from pipelines.digits.digit_reader import DigitReader, load_or_train
from pipelines.digits.suite import READER_SEED


@pytest.fixture(scope="session")
def trained_reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[DigitReader, Path]:
    """A digit reader as it came from its training, and the directory where it was stored."""
    directory = tmp_path_factory.mktemp("digit_reader")
    return load_or_train(directory, READER_SEED), directory


@pytest.fixture(scope="session")
def digit_reader(trained_reader: tuple[DigitReader, Path]) -> Path:
    """The directory of a trained digit reader, for copies."""
    return trained_reader[1]
