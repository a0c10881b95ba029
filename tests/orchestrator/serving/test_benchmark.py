"""The benchmark of streaming runs; its figures are none of a test's."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import streaming


@pytest.mark.slow
@pytest.mark.by_hand
def test_everything_but_the_network_is_measured_in_seconds(tmp_path: Path) -> None:
    streaming.main(["--quick", f"--out={tmp_path}/streaming"])
    (small,) = json.loads((tmp_path / "streaming.json").read_text())["results"]
    assert {each["viewers"] for each in small["latency"]} == {1, 2}
    assert all(each["recomputed"]["median"] > 0 for each in small["recomputing"])
    assert "| viewers | first frames, ms |" in (tmp_path / "streaming.md").read_text()
