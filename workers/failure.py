"""What went wrong in a worker, told by the worker: whoever waits for its answer sees a message alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from infra.storage import StorageError

Kind = Literal["memory", "peer", "code"]
"""Out of memory; a collective that another rank did not come to, or left; anything else."""


class Failed(RuntimeError):
    """A call that failed, with the kind of its failure."""

    def __init__(self, kind: Kind, what: str):
        super().__init__(kind, what)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[1]


@contextmanager
def classified() -> Iterator[None]:
    """Errors that the block raises are `Failed`, but for those whose type says enough: a mistake in what was
    given (ValueError), a number that is not finite (FloatingPointError), storage (StorageError)."""
    try:
        yield
    except (ValueError, FloatingPointError, StorageError, Failed):
        raise
    except Exception as error:
        name = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        raise Failed(kind_of(error), f"{name}{error}") from error


def kind_of(error: Exception) -> Kind:
    """PyTorch tells most of what goes wrong by RuntimeError and a text."""
    text = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory")
    ):
        return "memory"
    if isinstance(error, torch.distributed.DistError) or "gloo" in text or "nccl" in text:
        return "peer"
    return "code"
