"""Actors that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.orchestrator.groups import Groups, all_groups


@pytest.fixture(scope="package")
def groups(ray_cluster: object) -> Iterator[Groups]:
    with all_groups() as made:
        yield made
