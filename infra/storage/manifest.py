"""The manifest of a directory: which files it has, what is in them, and what its writer says of it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from infra.storage.local import StorageError

FORMAT_VERSION = 1
"""Version of the manifest's layout; a newer one is refused, not guessed at."""

MANIFEST = "manifest.json"
"""Name of the file whose presence says that a directory was finished."""


def new_manifest(
    files: Mapping[str, Mapping[str, Any]], sequence: int, metadata: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A manifest of `files` (name → sha256 and size); `more` is a store's own."""
    body = {
        "format_version": FORMAT_VERSION,
        # A logical clock, so that "newest" depends neither on names nor on the clocks of different machines.
        "sequence": sequence,
        "files": files,
        "metadata": dict(metadata),
        **more,
    }
    return {**body, "sha256": hash_json(body)}


def check_manifest(content: bytes, where: str) -> dict[str, Any]:
    """The body of the manifest of `where`; StorageError where it is damaged, or of another version."""
    try:
        manifest = json.loads(content)
        digest = manifest.pop("sha256")
        version = manifest["format_version"]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StorageError(f"{where} is damaged: {MANIFEST} is not a manifest.") from None
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{where} has format version {version}, and this installation reads {FORMAT_VERSION}; "
            "use the release that wrote it."
        )
    if digest != hash_json(manifest):
        raise StorageError(f"{where} is damaged: the content of {MANIFEST} is not what was written.")
    return manifest


def file_digest(file_path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync`, of what is on the disk."""
    with open(file_path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 that tells what a set of files holds, by their names."""
    return hash_json({file.name: file_digest(file) for file in files})


def hash_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
