"""Ranks that run whatever function they are given."""

from collections.abc import Callable

import ray
import torch

from workers.engine import free_port, init_process_group


@ray.remote(num_cpus=0.1)
class Rank:
    """One rank of a group; runs functions given to it, and keeps nothing between them."""

    def port(self) -> int:
        torch.set_num_threads(1)
        return free_port()

    def join(self, rank: int, world_size: int, port: int) -> None:
        self.place = (rank, world_size)
        init_process_group(
            rank=rank, world_size=world_size, master_addr="127.0.0.1", master_port=port, timeout_s=60
        )

    def run(self, function: Callable, *arguments: object) -> object:
        return function(*self.place, *arguments)


def call(ranks: list, function: Callable, *arguments: object) -> list:
    calls = [actor.run.remote(function, *arguments) for actor in ranks]
    ray.wait(calls, num_returns=len(calls), timeout=120)
    return ray.get(calls, timeout=1)
