"""What the tests hand in as a job: `python -m tests.pipelines.stand_in_job WHAT`. Small, but on the real cluster."""

import os
import sys
import time

import ray

from orchestrator import cluster


@ray.remote(num_cpus=1)
class Role:
    def where(self) -> tuple[str, str, str]:
        return ray.get_runtime_context().get_node_id(), os.getcwd(), cluster.__file__


def place() -> int:
    """Two actors on two nodes, then a reservation that cannot be had."""
    with cluster.connect():
        group = cluster.reserve(
            [{"CPU": 1}, {"CPU": 1}], purpose="student, teacher", strategy="STRICT_SPREAD"
        )
        roles = [
            Role.options(
                scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    group, index
                )
            ).remote()
            for index in range(2)
        ]
        places = ray.get([role.where.remote() for role in roles])
        print(f"nodes {len({node for node, _, _ in places})}")
        print(f"same package {all(code.startswith(directory) for _, directory, code in places)}")
        cluster.release(group)
        try:
            cluster.reserve([{"CPU": 1, "second": 1}, {"second": 1}], purpose="critic", timeout_s=0.5)
        except ValueError as error:
            print(error)
    return 0


def fail(code: str, *rest: str) -> int:
    """Fail with `code`, unless resumed."""
    print("arguments", code, *rest)
    return 0 if "--resume" in rest else int(code)


def wait() -> int:
    print("waiting")
    while True:
        time.sleep(1)


if __name__ == "__main__":
    sys.exit({"place": place, "fail": fail, "wait": wait}[sys.argv[1]](*sys.argv[2:]))
