"""A distillation that trains adapters: the base stays, the run resumes to the bit, and what it exports is
what it learned."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from infra import storage
from model.adapters import AdapterConfig
from model.families import new_backbone
from orchestrator.checkpoints import Checkpoints, load
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.run_state import RunState
from tests.fixtures import furnished
from tests.orchestrator.groups import Groups, measured, weights_of
from workers.build import whole
from workers.engine import EngineConfig
from workers.model_directory import ModelCard, ModelDirectory
from workers.zero import DTYPES

ADAPTERS = AdapterConfig(rank=3, alpha=6.0, targets=("q", "v", "ffn.0"))
UPDATES, HALF = 4, 2
ROLES = ("student", "critic")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    overrides = [f"--distill.iterations={UPDATES}", "--distill.student_every=2"]
    return furnished(tmp_path_factory.mktemp("lora"), overrides=overrides)


def adapted(config: RunConfig, engine: EngineConfig) -> RunConfig:
    """Student and critic on two ranks each, with adapters."""
    roles = config.distill.roles
    made = {
        name: replace(
            getattr(roles, name), ranks=2, engine=engine, adapters=ADAPTERS, activation_checkpointing=True
        )
        for name in ROLES
    }
    return replace(config, distill=replace(config.distill, roles=replace(roles, **made)))


def learned(coordinator: Coordinator, *, ema: bool = False) -> dict[str, dict[str, Tensor]]:
    return {role: weights_of(coordinator.groups[role], ema=ema) for role in ROLES}


def exported(coordinator: Coordinator, config: RunConfig, path: Path) -> ModelDirectory:
    card = ModelCard(True, config.student, config.video, config.text, rollout=config.rollout)
    staging = storage.begin(path)
    coordinator.student.wait(coordinator.student.broadcast("export", staging, card))
    storage.publish(staging, path, {})
    return ModelDirectory(path)


def input_of(config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes, video = config.student, config.video
    return torch.randn(1, *video.shape), torch.tensor([500.0]), torch.randn(1, sizes.text_len, sizes.text_dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "fp32"), (2, "fp32"), (3, "fp32"), pytest.param(3, "bf16", marks=pytest.mark.by_hand)],
)
def test_adapters_alone_are_trained(
    groups: Groups, config: RunConfig, tmp_path: Path, stage: int, dtype: str
) -> None:
    engine = EngineConfig(learning_rate=1e-2, zero_stage=stage, dtype=dtype, ema_decay=0.5)
    config = adapted(config, engine)
    coordinator = groups.coordinator(config)
    before, metrics = learned(coordinator), []
    state = RunState("distill", str(tmp_path), {}, keep=1)
    for done, values in coordinator.run(0):
        metrics.append(measured(values))
        if done == HALF:
            with Checkpoints(state, coordinator.groups) as checkpoints:
                checkpoints.begin(done, 0)
    after, average = learned(coordinator), learned(coordinator, ema=True)

    for role, path in (("student", config.distill.student), ("critic", config.distill.teacher)):
        source = ModelDirectory(path)
        base = set(source.keys())
        assert base < after[role].keys()
        for name, tensor in after[role].items():
            if name in base:  # the model's own bits, held in the engine's type
                assert torch.equal(tensor, source.get(name).to(DTYPES[dtype]).float())
            else:
                assert not torch.equal(tensor, before[role][name]), name

    # Resumed, it is the run that never stopped. A checkpoint holds the adapters alone.
    (file, _) = sorted(Path(state.path(HALF), "student").glob("engine-*"))
    kept = torch.load(file, weights_only=True)["parameters"]
    assert kept.keys() == after["student"].keys() - base
    again = groups.coordinator(config)
    load(state.path(HALF), again.groups)
    assert [measured(values) for _, values in again.run(HALF)] == metrics[HALF:]
    for role, tensors in learned(again).items():
        assert all(torch.equal(tensor, after[role][name]) for name, tensor in tensors.items())

    # Exported, it is the base that lies on disk plus the averaged adapter.
    student, source = exported(again, config, tmp_path / "model"), ModelDirectory(config.distill.student)
    assert set(student.keys()) == set(source.keys())
    changed = set()
    for name in source.keys():  # noqa: SIM118 (not a mapping)
        expected, layer = source.get(name), name.removesuffix(".weight")
        if f"{layer}.lora_A" in average["student"]:
            changed.add(layer)
            low = average["student"][f"{layer}.lora_B"] @ average["student"][f"{layer}.lora_A"]
            expected = expected + 2.0 * low
        assert (student.get(name) - expected).abs().max() < 1e-6
    assert changed == {
        f"blocks.{block}.{layer}"
        for block in range(config.student.num_layers)
        for layer in ("self_attn.q", "self_attn.v", "cross_attn.q", "cross_attn.v", "ffn.0")
    }

    # PEFT puts the adapter file on a module of the same names, and answers what the merged model answers.
    adapter = student.directory / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == source.path
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * len(changed)
    base_model = new_backbone(config.student)
    base_model.load_state_dict({name: source.get(name) for name in source.keys()})  # noqa: SIM118
    loaded = peft.PeftModel.from_pretrained(base_model, str(adapter))
    with torch.no_grad():
        merged, through_peft = (network(*input_of(config)).velocity for network in (whole(student), loaded))
        plain = whole(source)(*input_of(config)).velocity
    assert (through_peft - merged).norm() < 1e-5 * merged.norm()
    assert (plain - merged).norm() > 1e-4 * merged.norm()
