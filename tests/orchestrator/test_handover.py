"""Models of one run fit each other and its config, and what a student does otherwise than its start is
told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.text import ByteEncoder
from orchestrator.config import RunConfig
from orchestrator.handover import check_roles, check_start
from pipelines import cli
from tests.fixtures import TINY_RECIPE, furnished, write_model
from workers.model_directory import ModelDirectory, TextConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return furnished(tmp_path_factory.mktemp("handover"))


def models(config: RunConfig, **other: str | Path) -> dict[str, ModelDirectory]:
    paths = {
        "teacher": config.distill.teacher,
        "student": config.distill.student,
        "critic": config.distill.teacher,
    }
    return {role: ModelDirectory(path) for role, path in (paths | other).items()}


def test_models_of_one_recipe_fit_and_differ_in_nothing(config: RunConfig) -> None:
    assert check_roles(config, models(config)) == []
    assert check_start(config, ModelDirectory(config.initialize.teacher)) == []


@pytest.mark.parametrize("role", ["teacher", "student", "critic"])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"pixel_mean": 0.5},
            r"was made with video.pixel_mean 0.5, and this recipe says -0.85; its latents mean",
        ),
        (
            {"pixel_std": 1.0},
            r"was made with video.pixel_std 1.0, and this recipe says 0.5; its latents mean",
        ),
        (
            {"codec": "none"},
            r"was made with video.codec none, and this recipe says space_to_depth; its latents",
        ),
        ({"height": 4}, r"makes latents of \(4, 4, 8\), and `video` says \(4, 8, 8\)\.$"),
    ],
)
def test_latents_of_other_pixels_are_refused(
    config: RunConfig, tmp_path: Path, role: str, changed: dict[str, Any], says: str
) -> None:
    path = tmp_path / "model"
    rollout = config.rollout if role == "student" else None
    write_model(path, config.student, seed=3, rollout=rollout, video=replace(config.video, **changed))
    with pytest.raises(ValueError, match=f"^distill.{role} at {path} {says}"):
        check_roles(config, models(config, **{role: path}))
    if role == "teacher":
        with pytest.raises(ValueError, match=f"^initialize.teacher at {path} {says}"):
            check_start(config, ModelDirectory(path))


@pytest.mark.parametrize("role", ["teacher", "critic"])
def test_prompts_of_another_encoder_are_refused(
    config: RunConfig, tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = tmp_path / "embedded"
    write_model(embedded, config.student, seed=3, video=config.video, text=TextConfig("embedded"))
    with pytest.raises(
        ValueError, match=f"^distill.{role} at {embedded} has text.encoder embedded, and this recipe"
    ):
        check_roles(config, models(config, **{role: embedded}))
    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(
            "tests.fixtures.ByteEncoder", lambda *sizes: ByteEncoder(*sizes).requires_grad_(False).half()
        )
        write_model(other, config.student, seed=3, video=config.video)
    with pytest.raises(
        ValueError, match=f"^distill.{role} at {other} and distill.student at .* encoders of other w"
    ):
        check_roles(config, models(config, **{role: other}))


def test_a_distillation_whose_encoders_differ_is_refused_by_its_command(
    config: RunConfig, ray_cluster: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = torch.manual_seed
    path = tmp_path / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.manual_seed", lambda seed: draw(seed + 1))
        write_model(path, config.teacher, seed=1, video=config.video)
    assert cli.main(["distill", str(TINY_RECIPE), f"--root={config.root}", f"--distill.teacher={path}"]) == 2
    said = capfd.readouterr().err
    assert (
        said.startswith(f"self-forcing: distill.teacher at {path} and distill.student at ")
        and said.count("\n") == 1
    )


def test_what_a_student_may_do_otherwise_is_told(config: RunConfig, tmp_path: Path) -> None:
    rollout = replace(config.rollout, steps=(1000.0, 600.0, 300.0), window=None, context_noise="none")
    path = tmp_path / "student"
    write_model(path, config.student, seed=3, rollout=rollout, video=config.video)
    start = f"distill.student at {path} was made with rollout."
    assert check_roles(config, models(config, student=path)) == [
        f"{start}steps [1000.0, 600.0, 300.0]; this run has [1000.0, 500.0].",
        f"{start}window None; this run has 4.",
        f"{start}context_noise none; this run has nearest.",
    ]
