"""Every recipe, at tiny size: two student updates change every weight in reach, and resume to the same."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.adapters import AdaptedWeights, AdapterConfig
from model.backbone import WeightSource
from model.discriminator import ClassificationBranch
from model.objectives.gan import DiscriminatorConfig
from model.transformer import TransformerConfig
from orchestrator.checkpoints import Checkpoints, load
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.run_state import RunState
from orchestrator.worker_group import WorkerGroup
from pipelines import cli
from pipelines.recipe import RECIPES
from tests.fixtures import furnished
from tests.orchestrator.groups import Groups, weights_of
from workers.build import meta
from workers.model_directory import ModelDirectory

TINY = [
    *(f"--{role}.{name}={value}" for role in ("teacher", "student") for name, value in [
        ("dim", 24), ("ffn_dim", 48), ("num_heads", 2), ("num_layers", 2), ("text_len", 8), ("text_dim", 16),
        ("freq_dim", 32),
    ]),
    *(f"--video.{name}={value}" for name, value in [("frames", 9), ("height", 4), ("width", 4)]),
    *(f"--distill.roles.{role}.{name}={value}" for role in ("student", "teacher", "critic")
        for name, value in [("cpus", 0.1), ("gpus", 0), ("threads", 1)]),
    "--distill.batch=8",
]  # fmt: skip
"""Sizes and devices only: what and how a recipe learns stays as it says."""


def at_tiny_size(recipe: Path, root: Path, ranks: int) -> RunConfig:
    """A recipe of more ranks than one gets two of each role."""
    overrides = [f"--distill.roles.{role}.ranks={ranks}" for role in ("student", "teacher", "critic")]
    distill = cli.parse("distill", [str(recipe)])[0].distill
    if recipe.stem.startswith("wan"):  # there is no VAE of this size, and no encoder
        overrides += ["--video.codec=none", "--video.vae=null", "--text={encoder: embedded, path: null}"]
    overrides += ["--distill.discriminator.taps=[0,1]"] if distill.discriminator.taps else []
    for role in ("student", "critic"):
        if getattr(distill.roles, role).adapters.rank:
            parts = [
                f"--distill.roles.{role}.engine.accumulation=2",
                f"--distill.roles.{role}.adapters.rank=4",
            ]
            overrides += parts
    return furnished(root, recipe, [*TINY, *overrides])


def start_of(
    model: str, sizes: TransformerConfig, discriminator: DiscriminatorConfig, adapters: AdapterConfig
) -> dict[str, Tensor]:
    """The weights that a role starts from; a critic's branch is drawn, the same on every rank."""
    directory = ModelDirectory(model)
    source: WeightSource = directory
    if adapters.rank:
        source = AdaptedWeights(directory, adapters, adapters.layers(meta(directory)))
    weights = {name: source.get(name) for name in source.keys()}  # noqa: SIM118 (not a mapping)
    if not discriminator.taps:
        return weights
    with torch.random.fork_rng():
        torch.manual_seed(0)
        branch = ClassificationBranch(sizes, discriminator).state_dict()
    return {
        **{f"transformer.{name}": tensor for name, tensor in weights.items()},
        **{f"branch.{name}": tensor for name, tensor in branch.items()},
    }


def unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert sorted(before) == sorted(after)
    return {name for name in after if torch.equal(before[name], after[name])}


OFTEN = ["digits-gan", "wan-1.3b-dmd-14b"]
"""The other recipes repeat their paths, or those of test_equivalence, where SiD and given frames are, and of
test_lora."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in OFTEN else [pytest.mark.by_hand])
        for path in sorted(RECIPES.glob("*.yaml"))
    ],
)
def test_two_student_updates_change_every_weight_and_resume_to_the_same(
    groups: Groups, tmp_path: Path, recipe: Path
) -> None:
    config = at_tiny_size(recipe, tmp_path, 1 if recipe.stem == "quickstart" else 2)
    distill = config.distill
    saved = distill.student_every - 1
    state = RunState("distill", str(tmp_path), {}, keep=1)

    def roles(coordinator: Coordinator) -> dict[str, WorkerGroup]:
        return {"student": coordinator.student, "critic": coordinator.critic}

    coordinator = groups.coordinator(config)
    losses = []
    for done, metrics in coordinator.run(0):
        losses += [metrics["student/loss"]] if "student/loss" in metrics else []
        if done == saved:
            with Checkpoints(state, coordinator.groups) as checkpoints:
                checkpoints.begin(done, 0)
        if len(losses) == 2:
            break
    assert done == distill.student_every + 1
    learned = {name: weights_of(group) for name, group in roles(coordinator).items()}
    average = weights_of(coordinator.student, ema=True)
    adapters = distill.roles.student.adapters
    student = start_of(distill.student, config.student, DiscriminatorConfig(), adapters)
    critic = start_of(distill.critic or distill.teacher, config.student, distill.discriminator, adapters)
    frozen = {name for name in student if "lora_" not in name} if adapters.rank else set()
    # Whole fp32 weights: a step of 2e-6 is lost in the bf16 copies that compute.
    assert unchanged(student, learned["student"]) - frozen == set()
    assert unchanged(student, average) - frozen == set()
    # A relativistic discriminator compares logits, so their last bias cancels.
    beyond_reach = {"branch.cls_pred_branch.3.bias"} if "data_logits" in distill.objective.reads else set()
    assert unchanged(critic, learned["critic"]) - frozen <= beyond_reach

    # On the same actors, whose every number has moved on: what a checkpoint does not hold would show.
    resumed = Coordinator(config, coordinator.groups)
    load(state.path(saved), resumed.groups)
    for done, metrics in resumed.run(saved):
        losses += [metrics["student/loss"]] if "student/loss" in metrics else []
        if done == distill.student_every + 1:
            break
    assert losses[2:] == losses[1:2]
    for name, group in roles(resumed).items():
        again = weights_of(group)
        assert [each for each in again if not torch.equal(again[each], learned[name][each])] == [], name
    again = weights_of(resumed.student, ema=True)
    assert [each for each in again if not torch.equal(again[each], average[each])] == []
