"""Actors that the tests of this folder share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import cli, distill
from tests.fixtures import TINY_RECIPE
from tests.orchestrator.groups import Groups, all_groups, reused_roles


@pytest.fixture(scope="package")
def groups(ray_cluster: object) -> Iterator[Groups]:
    with all_groups() as made:
        yield made


@pytest.fixture
def reused_actors(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """`distill` in this process finds its actors started."""
    monkeypatch.setattr(
        distill,
        "placed_roles",
        lambda config, grows, reference: reused_roles(groups, config, reference),
    )


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
