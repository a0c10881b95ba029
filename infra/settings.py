"""How a part of a configuration refuses a value: it names its field, and its composer names the part.

A part is a frozen dataclass. It knows its fields and not under which name it is used (`student.dim`,
`teacher.dim`), so it raises `Invalid`; `part` puts the name before the field's, level by level.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar


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


def check_local(path: str, name: str) -> None:
    """Invalid where the setting `name` holds a URL, which a file system would take for a directory."""
    if "://" in path:
        raise Invalid(name, f"is {path}; only paths of local and shared file systems work here.")


def check_stored(path: str, name: str) -> None:
    """Invalid where the setting `name` holds a URL of another kind than s3://BUCKET/PREFIX."""
    if "://" in path and not path.startswith("s3://"):
        raise Invalid(name, f"is {path}; use a path, or s3://BUCKET/PREFIX.")


def local(config: Any, *names: str) -> None:
    """`check_local` of each named field of `config`; None is no path."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            check_local(value, name)


@dataclass(frozen=True)
class Places:
    """A part that holds paths of a file system."""

    OUTPUTS: ClassVar[tuple[str, ...]] = ()  # settings whose paths lie below `root`
    INPUTS: ClassVar[tuple[str, ...]] = ()  # those whose paths may also lie in the working directory
    STORED: ClassVar[tuple[str, ...]] = ()  # those of both that may be s3:// addresses

    def __post_init__(self) -> None:
        for name in (*self.OUTPUTS, *self.INPUTS):
            if (value := getattr(self, name)) is not None:
                (check_stored if name in self.STORED else check_local)(value, name)
