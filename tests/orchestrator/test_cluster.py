"""A Ray of our own needs nothing of this machine that a person may not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
from orchestrator import cluster
from ray._raylet import AuthenticationTokenLoader

def started(**_):
    found = AuthenticationTokenLoader.instance().has_token()
    print(os.environ["RAY_AUTH_MODE"], found, "RAY_AUTH_TOKEN" in os.environ)
    raise OSError(28, "No space left on device", "/tmp/ray")

cluster.ray.init = started
try:
    with cluster.connect("local"):
        pass
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_home_that_cannot_be_written_is_not_needed(tmp_path: Path, writable: bool) -> None:
    home = tmp_path if writable else Path("/proc/none")  # where root cannot write either
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    mode, says = ran.stdout.splitlines()
    assert mode == f"token True {not writable}"
    assert (tmp_path / ".ray" / "auth_token").exists() == writable
    # The true reason, and not that the machine is busy.
    assert says.startswith("Ray did not start on this machine: [Errno 28] No space left on device")
