"""Which code made a result: versions of what was installed and the commit of this project, as tags."""

import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

CARRIED = "SELF_FORCING_COMMIT"
"""Environment variable that tells a job, which runs in a copy without a history, what it was copied from."""


def versions() -> dict[str, str]:
    """Tags that name what was installed."""
    tags = {"version.python": platform.python_version()}
    for package in ("torch", "ray", "deepspeed", "mlflow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    return tags


def git_commit() -> dict[str, str]:
    """Tags that name the commit of the code that runs; none where it is installed rather than checked out."""
    if CARRIED in os.environ:
        return json.loads(os.environ[CARRIED])

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git.uncommitted_changes": str(changed).lower()}


def carried() -> dict[str, str]:
    """Environment variables with which a copy of this code elsewhere knows its commit."""
    return {CARRIED: json.dumps(git_commit())}
