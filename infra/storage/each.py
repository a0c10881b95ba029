"""Many small questions of a slow place, several at a time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
THREADS = 16


def each(work: Callable[[T], U], items: Iterable[T], threads: int = THREADS) -> list[U]:
    """`work` on every item, in their order; most of it is waiting."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
