"""What the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import cli
from tests.fixtures import TINY_RECIPE


@pytest.fixture
def distilled(
    reused_actors: None, ray_cluster: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What `distill` says, given its own settings (`keep=1`) and others (`--seed=1`); it ends with `code`."""

    def run(*settings: str, code: int = 0) -> str:
        given = [each if each.startswith("-") else f"--distill.{each}" for each in settings]
        capfd.readouterr()
        assert cli.main(["distill", str(TINY_RECIPE), f"--root={tmp_path}", *given]) == code
        said = capfd.readouterr()
        return " ".join((said.out + said.err).split())

    return run
