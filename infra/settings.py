"""How a part of a configuration refuses a value: it names its field, and its composer names the part.

A part is a frozen dataclass. It knows its fields and not under which name it is used (`student.dim`,
`teacher.dim`), so it raises `Invalid`; `part` puts the name before the field's, level by level.
"""

import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import url2pathname


class Invalid(ValueError):
    """A setting has a value that cannot work: one sentence, the setting's name and then the problem."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.problem)  # actors send it by pickle


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is refused inside the block is refused as a setting of the part `name`."""
    try:
        yield
    except Invalid as error:
        raise Invalid(f"{name}.{error.name}", error.problem) from None


def at_least(config: Any, least: float, *names: str) -> None:
    """Invalid unless each named field of `config` is finite and at least `least`; None is no value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise Invalid(name, f"is {value}; it must be at least {least:g}.")


def positive(config: Any, *names: str) -> None:
    """Invalid unless each named field of `config` is finite and above 0; None is no value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise Invalid(name, f"is {value}; it must be positive.")


def share(config: Any, *names: str) -> None:
    """Invalid unless each named field of `config` lies in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise Invalid(name, f"is {value}; it must lie between 0 and 1.")


ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins, also one that a path has taken a slash from."""


def place(text: str, name: str, *, stored: bool) -> str:
    """The place that the setting `name` holds: `~` is a person's home, file:// a path of this machine.

    Invalid for a URL of another kind, which a file system would take for a directory; `stored` places may
    also be s3://BUCKET/PREFIX.
    """
    if text.startswith("file:"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise Invalid(name, f"is {text}, a file of another machine; use a path that this one has.")
        return url2pathname(url.path)
    # With one slash too: the file system would make a directory called s3: for that.
    if ADDRESS.match(text) and not (stored and in_store(text)):
        ways = "a path, or s3://BUCKET/PREFIX" if stored else "a path of a local or shared file system"
        raise Invalid(name, f"is {text}; use {ways}.")
    return os.path.expanduser(text)


def in_store(text: str) -> bool:
    """Whether a place lies in an object store."""
    return text.startswith("s3://")


def absolute(text: str) -> str:
    """A place that means the same in every directory and process."""
    return text if in_store(text) else os.path.abspath(text)


def set_places(config: Any, *names: str, stored: Collection[str] = ()) -> None:
    """Have fields of a frozen dataclass hold their `place`; None is none."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            object.__setattr__(config, name, place(value, name, stored=name in stored))


@dataclass(frozen=True)
class Places:
    """A part that holds places."""

    OUTPUTS: ClassVar[tuple[str, ...]] = ()  # settings whose paths lie below `root`
    INPUTS: ClassVar[tuple[str, ...]] = ()  # those whose paths may also lie in the working directory
    STORED: ClassVar[tuple[str, ...]] = ()  # those of both that may be s3:// addresses

    def __post_init__(self) -> None:
        set_places(self, *self.OUTPUTS, *self.INPUTS, stored=self.STORED)
