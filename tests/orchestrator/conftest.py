"""Actors that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from pipelines import distill
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
