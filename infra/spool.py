"""An append-only file of records on their way to somewhere else, and how far they have got.

`spool.jsonl` holds every record of a run, in order; `state.json` holds the offset up to which they have
arrived, and the identity that the far side has given to the run. Both outlive the process. The offset moves
after a delivery, so a process killed in between delivers those records again: deliveries must be idempotent.

One process writes and reads a spool; calls are not synchronised here.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infra import storage

Record = dict[str, Any]


def record(kind: str, **fields: Any) -> Record:
    """A record of now; its time is in milliseconds since 1970."""
    return {"kind": kind, "time": int(time.time() * 1000), **fields}


class Spool:
    """The records of one run in `folder`, which is created, or taken up where an earlier process left it."""

    def __init__(self, folder: Path, *, run_id: str | None = None) -> None:
        """`run_id`: what the far side calls the run, where that is known and this folder is new."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / "spool.jsonl"
        self._state = folder / "state.json"
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  open for as long as the run is
        # A process killed while it wrote leaves half a line.
        self._size = self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(self._size)
        state = json.loads(self._state.read_text()) if self._state.exists() else {}
        self.run_id: str | None = state.get("run_id", run_id)
        self.offset: int = min(state.get("offset", 0), self._size)
        """Bytes of the spool that have arrived."""

    def append(self, records: Sequence[Record]) -> None:
        """Writes whole records or none; they survive this process. OSError where nothing could be written."""
        rest = memoryview(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size = size

    def read(self, start: int) -> Iterator[tuple[Record, int]]:
        """The records from byte `start` on, each with the offset of its end."""
        with open(self.path, "rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                if start > self._size:  # still being written
                    return
                yield json.loads(line), start

    def arrived(self, offset: int, run_id: str) -> None:
        """Notes, durably, that the records before `offset` have been delivered to the run `run_id`."""
        storage.write_text(self._state, json.dumps({"run_id": run_id, "offset": offset}))
        self.offset, self.run_id = offset, run_id


def find_spool(root: Path, run_id: str) -> Path | None:
    """The folder under `root` whose own name, or the far side's for its run, is `run_id`."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        state = folder / "state.json"
        if folder.name == run_id or (state.exists() and json.loads(state.read_text())["run_id"] == run_id):
            return folder
    return None
