"""A checkpoint of any sharding is exported whole, without the ranks that wrote it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra import storage
from model.adapters import AdapterConfig
from orchestrator.checkpoints import Checkpoints
from orchestrator.run_state import open_run
from pipelines import cli
from tests.fixtures import furnished
from tests.orchestrator.groups import Groups, weights_of
from workers.engine import EngineConfig
from workers.foreign.checkpoint import ForeignCheckpoint
from workers.model_directory import ModelDirectory


def export(path: str, output: Path, *more: str) -> int:
    return cli.main(["export", path, "--format=wan", f"--output={output}", *more])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "rank"),
    [
        (0, 0),
        pytest.param(2, 0, marks=pytest.mark.by_hand),
        (3, 0),
        pytest.param(3, 2, marks=pytest.mark.by_hand),
    ],
    ids=["zero-0", "zero-2", "zero-3", "adapters"],
)
def test_a_checkpoint_is_exported_whole(
    groups: Groups, tmp_path: Path, stage: int, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    config = furnished(tmp_path, overrides=["--distill.iterations=2", "--distill.student_every=1"])
    roles = config.distill.roles
    engine = EngineConfig(learning_rate=1e-2, zero_stage=stage, ema_decay=0.5)
    student = replace(roles.student, ranks=2, engine=engine, adapters=AdapterConfig(rank, targets=("q", "o")))
    config = replace(config, distill=replace(config.distill, roles=replace(roles, student=student)))
    state = open_run(config, "distill", resume=False)
    coordinator = groups.coordinator(config)
    for done, _ in coordinator.run(0):
        last = done
    with Checkpoints(state, coordinator.groups) as checkpoints:
        checkpoints.begin(last, 8)
    path, base = state.path(last), [f"--base={config.distill.student}"] if rank else []
    source = ModelDirectory(config.distill.student)
    for which, ema in (("average", True), ("current", False)):
        assert export(path, tmp_path / which, f"--weights={which}", *base) == 0
        assert f"the {which} weights of a student after 2 iterations" in " ".join(
            capfd.readouterr().out.split()
        )
        expected, found = weights_of(coordinator.student, ema=ema), ForeignCheckpoint(tmp_path / which)
        assert found.sizes == config.student and found.causal
        changed = 0
        for name in found.keys():  # noqa: SIM118 (not a mapping)
            wanted, layer = expected[name], name.removesuffix(".weight")
            if f"{layer}.lora_A" in expected:
                wanted = wanted + expected[f"{layer}.lora_B"] @ expected[f"{layer}.lora_A"]
            assert torch.allclose(found.get(name), wanted, atol=1e-6), name
            assert rank or torch.equal(found.get(name), wanted)
            changed += not torch.equal(found.get(name), source.get(name))
        assert changed > 5
    # By default the average, where one was kept.
    assert export(path, tmp_path / "default", *base) == 0
    whole = [storage.digests(tmp_path / name) for name in ("default", "average")]
    assert whole[0] == whole[1]
    if rank:
        assert export(path, tmp_path / "none") == 2
        assert "holds adapters only; name the model that they are of with --base" in capfd.readouterr().err
    elif stage == 3:  # what is missing or damaged is said
        Path(path, "student", "engine-00001-of-00002.pt").unlink()
        assert export(path, tmp_path / "none") == 2
        assert "is damaged: student/engine-00001-of-00002.pt is missing" in capfd.readouterr().err
