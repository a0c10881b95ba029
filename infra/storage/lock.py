"""A place that one run at a time writes to: a lock with an owner and a sign of life.

The lock is a file in the place, made so that one of several wins: locally by a hard link, in S3 by a put that
asks for no such object. Its owner writes it anew every few seconds. Whoever finds one watches it: if it does
not change for longer than that, or its owner was a process of this machine that is gone, it is taken over.
"""

import getpass
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.storage import s3
from infra.storage.local import Location, StorageError, explained, host, local, new_aside, started

NAME = "lock.json"
BEAT_S = 5.0
"""Seconds between two signs of life."""
PATIENCE_S = 30.0
"""Seconds without one after which an owner counts as dead."""


@contextmanager
def owned(place: Location, what: str, lost: Callable[[str], None]) -> Iterator[None]:
    """No other process owns `place` inside the block.

    Args:
        place: directory or S3 prefix, made where it is not there.
        what: what this process does there, in words for others.
        lost: called, on another thread, if another process took the place all the same, as it does where
            this one could not give a sign of life for long.

    Raises:
        StorageError: a living process owns it, and who that is; or the place cannot be written to.
    """
    lock = _InS3(_key(place)) if s3.at(place) is not None else _OnDisk(local(place) / NAME)
    mine = _Mine(what)
    _acquire(lock, mine, str(place))
    gone = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, mine, gone, str(place), lost), daemon=True)
    beating.start()
    try:
        yield
    finally:
        gone.set()
        beating.join()
        with suppress(StorageError):
            if (found := lock.read()) is not None and found[0]["token"] == mine.token:
                lock.remove()


class _Mine:
    """What this process writes into a lock."""

    def __init__(self, what: str):
        self.token, self.beats = secrets.token_hex(8), 0
        self._told = {
            "token": self.token, "what": what, "host": host(), "machine": socket.gethostname(),
            "pid": os.getpid(), "start": started(os.getpid()), "user": _user(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }  # fmt: skip

    def content(self) -> bytes:
        self.beats += 1
        return json.dumps({**self._told, "beats": self.beats}).encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())


def _acquire(lock: "_OnDisk | _InS3", mine: _Mine, place: str) -> None:
    seen: tuple[dict[str, Any], str] | None = None
    since = time.monotonic()
    while not lock.put(mine.content(), instead_of=None):
        found = lock.read()
        if found is None:  # its owner has just ended
            continue
        owner, mark = found
        if owner["token"] == mine.token:  # the store had taken it, and said that it had not
            return
        if seen is None or seen[0]["token"] != owner["token"]:
            seen, since = found, time.monotonic()
        alive = seen[0]["beats"] != owner["beats"]
        if owner["host"] == host():
            alive = alive or started(owner["pid"]) == owner["start"]
            dead = not alive
        else:
            dead = time.monotonic() - since > PATIENCE_S
        if alive:
            raise StorageError(
                f"{place} is in use: {owner['what']} of {owner['user']}, process {owner['pid']} on "
                f"{owner['machine']}, since {owner['since']}; wait for it, stop it, or choose another output."
            )
        if dead and lock.put(mine.content(), instead_of=mark):
            return
        time.sleep(min(1.0, BEAT_S / 5))


def _beat(
    lock: "_OnDisk | _InS3", mine: _Mine, gone: threading.Event, place: str, lost: Callable[[str], None]
) -> None:
    while not gone.wait(BEAT_S):
        with suppress(StorageError):  # a store that is down takes no other process's sign either
            found = lock.read()
            if found is None or found[0]["token"] == mine.token:
                lock.write(mine.content())
                continue
            owner = found[0]
            lost(f"{place} was taken over by process {owner['pid']} on {owner['machine']}")
            return


def _read(content: bytes | None) -> dict[str, Any] | None:
    """What a lock says; None for none. Of one that cannot be read the owner is nobody."""
    if content is None:
        return None
    nobody = {"token": "", "what": "something", "host": "", "machine": "?", "pid": 0, "start": 0, "user": "?"}
    try:
        return {**nobody, "since": "?", "beats": 0, **json.loads(content)}
    except (ValueError, TypeError):
        return {**nobody, "since": "?", "beats": 0}


@dataclass
class _OnDisk:
    path: Path
    _made: list[Path] = field(default_factory=list)
    """Directories that were not there before, the deepest first."""

    def read(self) -> tuple[dict[str, Any], str] | None:
        """What it says, and what tells this content from another."""
        with explained(self.path.parent):
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                return None
        said = _read(content)
        assert said is not None
        return said, said["token"]

    def put(self, content: bytes, *, instead_of: str | None) -> bool:
        """Make it, in place of the one with this mark if there is any; whether nobody was faster."""
        with explained(self.path.parent):
            if not self.path.parent.exists():
                self._made += [
                    each for each in (self.path.parent, *self.path.parent.parents) if not each.exists()
                ]
                self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = new_aside(self.path)
            if instead_of is not None:
                try:
                    os.rename(self.path, aside)
                except FileNotFoundError:
                    return False
                taken = _read(aside.read_bytes())
                if (
                    taken is not None and taken["token"] != instead_of
                ):  # another one's, which is as good as new
                    with suppress(FileExistsError):
                        os.link(aside, self.path)
                    aside.unlink()
                    return False
            aside.write_bytes(content)
            try:
                os.link(aside, self.path)
                return True
            except FileExistsError:
                return False
            finally:
                aside.unlink()

    def write(self, content: bytes) -> None:
        with explained(self.path.parent):
            aside = new_aside(self.path)
            aside.write_bytes(content)
            os.replace(aside, self.path)

    def remove(self) -> None:
        with explained(self.path.parent):
            self.path.unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # something is in it now
                folder.rmdir()


def _key(place: Location) -> s3.Place:
    there = s3.at(place)
    assert there is not None
    return there / NAME


@dataclass
class _InS3:
    place: s3.Place

    def read(self) -> tuple[dict[str, Any], str] | None:
        found = s3.get_marked(self.place)
        if found is None:
            return None
        said = _read(found[0])
        assert said is not None
        return said, found[1]

    def put(self, content: bytes, *, instead_of: str | None) -> bool:
        return s3.put_if(self.place, content, instead_of)

    def write(self, content: bytes) -> None:
        s3.put(self.place, content)

    def remove(self) -> None:
        s3.delete(self.place.parent, [NAME])
