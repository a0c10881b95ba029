"""Every way to an initial student, by the command: all weights learn, and a stopped run ends the same."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model import initialization
from orchestrator.config import RunConfig
from orchestrator.handover import check_roles
from pipelines import cli
from tests.fixtures import TINY_RECIPE, furnished, write_real
from workers.model_directory import ModelDirectory

CAUSAL = ("causal_ode", "causal_consistency")
METHODS = ("ode", *CAUSAL, "teacher_forcing", "diffusion_forcing")
OFTEN = ("ode", "teacher_forcing")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("initialize")
    config = furnished(root)
    write_real(root / "real", config)
    # Every way leaves it out: nothing that is learned from may stumble over it.
    for data in (root / "real", Path(config.data.train)):
        (data / "00001.parquet").write_bytes(b"not Parquet")
    return root


def arguments(root: Path, method: str, output: str, **more: object) -> list[str]:
    # The causal teacher is any model that generates block by block, such as the tests' initial student.
    teacher = "outputs/initial/model" if method in CAUSAL else "outputs/teacher/model"
    settings: dict[str, object] = {
        "root": root,
        "data.real": "real",
        "data.skip_damaged": "true",
        "initialize.method": method,
        "initialize.teacher": teacher,
        "initialize.output": output,
        "initialize.pairs_path": f"pairs-{method}",
        "initialize.role.engine.schedule.warmup": 0,
        **more,
    }
    return ["initialize", str(TINY_RECIPE), *(f"--{name}={value}" for name, value in settings.items())]


def test_every_method_is_here() -> None:
    assert set(METHODS) == set(initialization.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    # The others take the same path with another loss, which is tested in tests/model.
    [pytest.param(each, marks=[] if each in OFTEN else [pytest.mark.by_hand]) for each in METHODS],
)
def test_every_weight_learns_and_a_stopped_run_resumes(reused_rank: None, root: Path, method: str) -> None:
    updates = {"initialize.updates": 3}
    assert cli.main(arguments(root, method, f"{method}-whole", **updates)) == 0
    whole = ModelDirectory(root / f"{method}-whole" / "model")
    start = ModelDirectory(root / ("outputs/initial/model" if method in CAUSAL else "outputs/teacher/model"))
    names = list(start.keys())
    assert [name for name in names if torch.equal(start.get(name), whole.get(name))] == []

    # What an interrupted run leaves: its checkpoints, and no model.
    stopped = root / f"{method}-stopped"
    shutil.copytree(root / f"{method}-whole", stopped)
    shutil.rmtree(stopped / "model")
    shutil.rmtree(stopped / "checkpoints" / "0000003")
    assert cli.main([*arguments(root, method, f"{method}-stopped", **updates), "--resume"]) == 0
    resumed = ModelDirectory(stopped / "model")
    assert [name for name in names if not torch.equal(resumed.get(name), whole.get(name))] == []

    card = resumed.card
    assert card.causal and card.rollout is not None
    many = method.endswith("forcing")
    assert (card.rollout.sampler, card.guidance) == (("ode", 2.0) if many else ("consistency", 0.0))
    assert len(card.rollout.steps) == (4 if many else 2)
    if method == "teacher_forcing":
        told = check_roles(*causal_teacher(root, resumed.path))
        start = f"distill.student at {resumed.path} was made with rollout."
        assert [note.removeprefix(start).split(";")[0] for note in told] == [
            f"steps {list(card.rollout.steps)}",
            "context_noise none",
            "first_steps None",
            "sampler ode",
        ]


@pytest.mark.slow
@pytest.mark.by_hand
def test_an_initial_student_can_be_its_teacher_and_an_adapter(reused_rank: None, root: Path) -> None:
    settings = {"initialize.updates": 1, "initialize.role.adapters.rank": 2}
    assert cli.main(arguments(root, "diffusion_forcing", "adapted", **settings)) == 0
    start, student = (ModelDirectory(root / path) for path in ("outputs/teacher/model", "adapted/model"))
    changed = {name for name in start.keys() if not torch.equal(start.get(name), student.get(name))}  # noqa: SIM118
    adapters = load_file(root / "adapted/model/adapter/adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_B.weight"
    assert changed == {
        f"{name.removeprefix(prefix).removesuffix(suffix)}.weight"
        for name in adapters
        if name.endswith(suffix)
    }


def causal_teacher(root: Path, student: str) -> tuple[RunConfig, dict[str, ModelDirectory]]:
    """The recipe digits-causal-teacher at the tests' size, whose distillation starts from what it
    initialised."""
    tiny = yaml.safe_load(TINY_RECIPE.read_text())
    sizes = {name: tiny[name] for name in ("video", "teacher", "student")}
    overrides = [f"--{part}.{name}={value}" for part in sizes for name, value in sizes[part].items()]
    overrides += ["--rollout.chunk=2", "--rollout.window=4", "--rollout.steps=[1000,500]"]
    config, _ = cli.parse("distill", ["digits-causal-teacher", f"--root={root}", *overrides])
    teacher = ModelDirectory(root / "outputs/teacher/model")
    return config, {"teacher": teacher, "student": ModelDirectory(student), "critic": teacher}


def test_the_teacher_must_fit_the_method(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bidirectional = {"initialize.teacher": "outputs/teacher/model"}
    assert cli.main(arguments(root, "causal_ode", "x", **bidirectional)) == 2
    assert "needs a causal model at initialize.teacher" in capfd.readouterr().err
    assert cli.main(arguments(root, "ode", "x", **{"initialize.teacher": "outputs/initial/model"})) == 2
    assert "needs a bidirectional teacher" in capfd.readouterr().err
    assert (
        cli.main([each for each in arguments(root, "teacher_forcing", "x") if "data.real" not in each]) == 2
    )
    assert (
        "initialize.method teacher_forcing needs real videos: data.real must name" in capfd.readouterr().err
    )
