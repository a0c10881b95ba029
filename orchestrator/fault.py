"""What can go wrong with a group in a run that is under way, and how Ray tells it."""

from typing import Literal

import ray

from infra.storage import StorageError
from workers.failure import Failed

Kind = Literal["lost", "node", "hung", "memory", "peer", "storage", "code"]
"""A process that is gone, by itself or with its node; one that gives no sign of life or stays in one call;
out of memory; a rank that another one left waiting; storage that failed for long; anything else."""


class Fault(RuntimeError):
    """A group that cannot go on as it is."""

    def __init__(self, role: str, kind: Kind, what: str):
        super().__init__(what)
        self.role, self.kind = role, kind


class StorageFault(Fault, StorageError):
    """The same of storage."""


def told(role: str, error: ray.exceptions.RayError) -> Exception:
    """What to raise for an error of Ray's: a Fault, or what a worker says of data and numbers."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, StorageError):
            return StorageFault(role, "storage", f"{role}: {cause}")
        for known in (FloatingPointError, ValueError):
            if isinstance(cause, known):
                return known(f"{role}: {cause}")
        if isinstance(cause, Failed):
            return Fault(role, cause.kind, f"{role}: {cause}")
        if not isinstance(cause, ray.exceptions.RayError):
            return Fault(role, "code", f"{role}: {type(cause).__name__}: {cause}")
        error = cause  # an argument is gone, for whoever made it is
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if "because" in line), lines[0] if lines else type(error).__name__)
    kind: Kind = "lost"
    if "node has died" in text or getattr(error, "preempted", False):
        kind = "node"
    elif "out of memory" in text.lower() or "running low on memory" in text:
        kind = "memory"
    short = reason.split(" Some common causes")[0].rstrip(".")  # Ray goes on with advice on its own settings
    return Fault(role, kind, f"a {role} rank was lost ({short})")
