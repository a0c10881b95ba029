"""What takes a while to make, made once."""

from pathlib import Path

import pytest

from pipelines.digit_reader import load_or_train
from pipelines.evaluate import READER_SEED


@pytest.fixture(scope="session")
def digit_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a trained digit reader, for copies."""
    directory = tmp_path_factory.mktemp("digit_reader") / "outputs"
    load_or_train(directory, READER_SEED)
    return directory
