"""Run checkpoints: the sharded state of every role, whole or not at all."""

from collections.abc import Mapping
from typing import Any

from infra import storage
from orchestrator.worker_group import WorkerGroup

FORMAT = 1


def save(
    directory: str, iteration: int, groups: Mapping[str, WorkerGroup], metadata: Mapping[str, Any], keep: int
) -> str:
    """Every rank writes its part aside; the manifest comes last. Returns the checkpoint's path."""
    path = f"{directory}/{iteration:07d}"
    staging = storage.begin(path)
    pending = [(group, group.broadcast("save", staging, role)) for role, group in groups.items()]
    for group, references in pending:
        group.wait(references)
    storage.publish(staging, path, {"format": FORMAT, "iteration": iteration, **metadata})
    storage.prune(directory, keep=keep)
    return path


def load(path: str, groups: Mapping[str, WorkerGroup]) -> None:
    """Every rank reads its part; ValueError, naming the file, where the checkpoint is damaged."""
    storage.verify(path)
    for role, group in groups.items():
        group.wait(group.broadcast("load", path, role))


def newest(directory: str) -> tuple[str, dict[str, Any]] | None:
    """The newest complete checkpoint and its metadata."""
    path = storage.newest_complete(directory)
    if path is None:
        return None
    metadata = storage.read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {metadata.get('format')}; this release reads format {FORMAT}."
        )
    return path, metadata
