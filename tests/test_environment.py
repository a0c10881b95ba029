"""The Makefile's environment: made once, and made anew where it is not whole."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PYTHON = """#!/bin/sh
# Stands for Python: says what it is asked, and makes an environment that does the same.
echo "$(basename "$0") $*" >> log
if [ "$2" = venv ]; then rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
case "$*" in *constraints*) if [ -f fail ]; then exit 1; fi ;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "stand-in").write_text(PYTHON)
    (tmp_path / "stand-in").chmod(0o755)
    return tmp_path


def install(checkout: Path) -> tuple[int, list[str]]:
    """The exit status of make, and what it asked of Python."""
    log = checkout / "log"
    log.write_text("")
    command = ["make", ".venv/installed", f"PYTHON={checkout}/stand-in"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, timeout=60)
    return result.returncode, [line.split(" -q")[0] for line in log.read_text().splitlines()]


NEW = ["stand-in -m venv --clear .venv", "python -m pip install", "python -m pip install"]


def test_an_environment_is_made_once(checkout: Path) -> None:
    assert install(checkout) == (0, NEW)
    assert install(checkout) == (0, [])


@pytest.mark.parametrize("left", ["no python", "no pip", "killed while installing"])
def test_an_environment_that_is_not_whole_is_made_anew(checkout: Path, left: str) -> None:
    binaries = checkout / ".venv" / "bin"
    if left == "killed while installing":
        (checkout / "fail").touch()
        assert install(checkout)[0] != 0
        (checkout / "fail").unlink()
    else:
        binaries.mkdir(parents=True)
        if left == "no pip":
            shutil.copy("/bin/false", binaries / "python")
    assert install(checkout) == (0, NEW)


def test_a_whole_environment_is_brought_up_to_date(checkout: Path) -> None:
    install(checkout)
    asked = ["python -m pip --version", *NEW[1:]]
    marker = checkout / ".venv" / "installed"
    os.utime(marker, (0, 0))
    assert install(checkout) == (0, asked)
    # One that is killed while it is brought up to date is no longer whole.
    (checkout / "fail").touch()
    os.utime(marker, (0, 0))
    assert install(checkout)[0] != 0
    (checkout / "fail").unlink()
    assert install(checkout) == (0, NEW)
