"""The loop that trains one model: the device of a rank, and what becomes of numbers that are not finite."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from orchestrator import single_model
from workers import zero


def test_a_rank_computes_on_the_device_that_ray_train_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train shows every rank all GPUs of its node."""
    chosen: list[Any] = []
    started: list[dict[str, Any]] = []
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    fake = SimpleNamespace(init_distributed=lambda **how: started.append(how))
    monkeypatch.setattr(zero, "deepspeed", lambda: fake)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # restored afterwards
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")

    assert single_model.join() == (1, 2)
    assert zero.device() == torch.device("cuda:1")
    assert chosen == [1] and os.environ["LOCAL_RANK"] == "1"
    assert (started[0]["dist_backend"], started[0]["rank"]) == ("nccl", 1)
