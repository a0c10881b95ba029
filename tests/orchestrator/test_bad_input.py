"""A user's mistake is one sentence and exit code 2; a loss that is not finite is exit code 1."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from infra import storage
from pipelines import cli
from pipelines.pretrain import Pretrain, check_data
from tests.fixtures import PROMPTS, TINY_RECIPE, furnished, random_weights, write_model, write_real

Refused = Callable[..., str]


@pytest.fixture
def complaint(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail; what it says, which has to be one sentence and no trace."""

    def refused(*arguments: object, code: int = 2) -> str:
        capfd.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == code
        said = capfd.readouterr().err
        assert said.startswith("self-forcing: ") and said.endswith("\n") and said.count("\n") == 1, said
        assert "Traceback" not in said
        return said.removeprefix("self-forcing: ").strip()

    return refused


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("rollout.chunks=3", r"there is no setting rollout.chunks; the nearest is rollout.chunk."),
        ("distil.batch=3", r"there is no setting distil.batch; the nearest is distill.batch."),
        ("rollout.chunk=4", r"rollout.chunk of 4 does not divide 6 frames; use 4 frames or another chunk."),
        (
            "rollout={sink: 3}",
            r"rollout.window of 4 frames is smaller than the chunk of 2 plus the sink of 3; use at least 5.",
        ),
        (
            "distill.roles.student.engine.zero_stage=5",
            r"distill.roles.student.engine.zero_stage is 5: use 0, 1, 2 or 3",
        ),
        (
            "distill.roles.teacher.zero_stage=1",
            r"distill.roles.teacher.zero_stage is 1: use 0 (replicated) or 3 (sharded)",
        ),
        (
            "distill.roles.student.ranks=3",
            r"distill.batch of 4 is not divisible by distill.roles.student.ranks",
        ),
        ("distill.roles.teacher.ranks=3", r"distill.roles.teacher.ranks of 3 does not divide the 4 videos"),
        ("distill.batch=many", r"distill.batch"),
        (
            "distill.objective.weights={vsd: 1}",
            r"distill.objective.weights names 'vsd', which is no loss; use dmd, gan",
        ),
        (
            "distill.objective.weights={gan: 1}",
            r"distill.discriminator.taps must name blocks of the critic where",
        ),
        (
            "distill.inputs=teacher_forcing",
            r"distill.inputs teacher_forcing needs real videos: data.real must name a data set of them.",
        ),
        (
            "initialize.method=causal_consistency",
            r"initialize.method causal_consistency needs real videos: data.real must name",
        ),
        (
            "distill.rollout_frames=7",
            r"distill.rollout_frames of 7 must be the 6 video.frames and any number of chunks of 2 more.",
        ),
        (
            "distill={inputs: diffusion_forcing, rollout_frames: 8}",
            r"distill.inputs diffusion_forcing needs real videos",
        ),
        ("distill.given_frames=6", r"rollout.chunk of 2 does not divide 0 frames"),
        ("rollout.first_steps=[500, 1000]", r"rollout.first_steps [500.0, 1000.0] must fall strictly"),
        ("distill.roles.student.adapters.rank=-1", r"distill.roles.student.adapters.rank is -1; it must be"),
        ("text.encoder=embedded", r"distill.roles.teacher.negative_embedding must name a file"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_starts(complaint: Refused, setting: str, says: str) -> None:
    assert says in complaint("run", TINY_RECIPE, f"--{setting}")


def test_a_wrong_setting_in_a_recipe_is_named(complaint: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("distill: {roles: {critic: {engine: {learning_rat: 1.0}}}}")
    says = complaint("distill", recipe)
    assert "learning_rat" in says and "the nearest is distill.roles.critic.engine.learning_rate." in says
    assert "there is no recipe 'quickstrat'" in complaint("distill", "quickstrat")
    assert "there is no command 'distil'" in complaint("distil")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_model_that_is_missing_or_damaged_is_named(
    complaint: Refused, ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # models are also looked for in the working directory
    config = furnished(tmp_path)
    arguments = ("distill", TINY_RECIPE, f"--root={tmp_path}")
    generate = ("generate", f"--model={config.distill.student}", "--prompt=a two drifting up")
    assert "sizes" in complaint(*arguments, "--student.num_layers=3")
    lora = [f"--distill.roles.critic.adapters.{setting}" for setting in ("rank=2", "targets=[to_q]")]
    says = complaint(*arguments, *lora)
    assert says.startswith(
        "distill.roles.critic.adapters.targets names 'to_q', and no linear layer is called so; "
    )
    shard = Path(config.distill.student) / "transformer-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    for command in (arguments, generate):
        says = complaint(*command)
        assert says == (
            f"{config.distill.student} is damaged: "
            f"{shard.name} has {len(whole) - 100} bytes instead of {len(whole)}."
        )
    shard.write_bytes(whole)
    flip_a_byte(shard)
    for command in (arguments, generate):
        says = complaint(*command)
        assert says.startswith(config.distill.student) and "damaged" in says and shard.name in says
    shard.write_bytes(whole)
    manifest = Path(config.distill.student) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"causal"', '"casual"'))
    for command in (arguments, generate):
        says = complaint(*command)
        assert says == (
            f"{config.distill.student} is damaged: the content of manifest.json is not what was written."
        )
    manifest.unlink()
    for command in (arguments, generate):
        assert complaint(*command) == f"{config.distill.student} was never finished: it has no manifest.json."
    shutil.rmtree(config.distill.student)
    for command in (arguments, generate):
        assert complaint(*command).startswith(f"there is no complete model at {config.distill.student};")


def test_generate_refuses_what_it_cannot_show(complaint: Refused, tmp_path: Path) -> None:
    config = furnished(tmp_path)
    model, prompt = f"--model={config.distill.student}", "--prompt=a two drifting up"
    assert complaint("generate", model, "--prompt= ").startswith("--prompt is empty;")
    assert complaint("generate", model).startswith("generate needs --prompt")
    assert complaint("generate", prompt).startswith("generate needs --model")
    assert "--frames" in complaint("generate", model, prompt, "--frames=0")
    assert ".mp4" in complaint("generate", model, prompt, "--output=video.avi")
    assert "shorten it" in complaint("generate", model, f"--prompt={'a two ' * 9}")


def test_real_videos_that_do_not_fit_are_named(
    complaint: Refused, ray_cluster: object, tmp_path: Path
) -> None:
    config = furnished(tmp_path)
    real, forced = tmp_path / "real", "--distill.inputs=teacher_forcing"
    arguments = ("distill", TINY_RECIPE, f"--root={tmp_path}", "--data.real=real", forced)
    assert "real does not exist" in complaint(*arguments)
    write_real(real, config)
    other = replace(config, video=replace(config.video, frames=8))
    write_real(tmp_path / "other", other)
    shutil.copy(tmp_path / "other" / "00000.parquet", real / "00001.parquet")
    says = complaint(*arguments)
    assert says.startswith(
        f"data.real at {real} holds videos of [8, 1, 16, 16] (row 0 of 00001.parquet), and 6 × 1"
    )
    (real / "00001.parquet").write_bytes(b"not Parquet")
    assert "real/00001.parquet is damaged or not a Parquet file" in complaint(*arguments)
    long = f"--distill.roles.teacher.negative_prompt={'a two ' * 9}"
    for command in ("distill", "initialize"):
        says = complaint(command, TINY_RECIPE, f"--root={tmp_path}", long)
        assert says.startswith("distill.roles.teacher.negative_prompt has 18 words, more than the 8 that")
    short = ("--video.frames=8", "--distill.given_frames=0")
    assert "is trained on 6 frames, too short for the 8 video.frames" in complaint(*arguments[:3], *short)


def test_videos_that_do_not_fit_are_named_by_pretraining_too(
    complaint: Refused, ray_cluster: object, tmp_path: Path
) -> None:
    config = furnished(tmp_path)
    train = tmp_path / "videos"
    write_real(train, config)
    arguments = ("pretrain", TINY_RECIPE, f"--root={tmp_path}", "--data.train=videos")
    says = complaint(*arguments, "--video.frames=4")
    assert says.startswith(
        f"data.train at {train} holds videos of [6, 1, 16, 16] (row 0 of 00000.parquet), and 4 × 1"
    )
    assert not (tmp_path / "outputs/teacher/checkpoints").exists()
    says = complaint(*arguments, "--teacher.text_len=2", "--student.text_len=2")
    assert "has a prompt of 4 words (row 0 of 00000.parquet), more than the 2 that the model reads" in says
    (train / "00001.parquet").write_bytes(b"not Parquet")
    assert "00001.parquet is damaged or not a Parquet file" in complaint(*arguments)
    task = Pretrain(replace(config, data=replace(config.data, train=str(train), skip_damaged=True)))
    check_data(task.config)
    task.open(torch.device("cpu"))
    assert len(task.data) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.usefixtures("reused_actors")
@pytest.mark.by_hand
def test_damaged_shards_are_left_out_where_the_recipe_says_so(
    ray_cluster: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = furnished(tmp_path)
    write_real(tmp_path / "real", config)
    whole = (tmp_path / "real" / "00000.parquet").read_bytes()
    (tmp_path / "real" / "00001.parquet").write_bytes(b"not Parquet")
    # Damage inside a page, which only reading it shows.
    (tmp_path / "real" / "00002.parquet").write_bytes(
        bytes(byte ^ 1 if 200 < i < 240 else byte for i, byte in enumerate(whole))
    )
    arguments = ["distill", str(TINY_RECIPE), f"--root={tmp_path}", "--data.real=real"]
    arguments += ["--distill.inputs=diffusion_forcing", "--distill.iterations=1", "--distill.sample_every=0"]
    assert cli.main([*arguments, "--data.skip_damaged=true"]) == 0
    assert "left out 2 damaged shards of data.real" in re.sub(r"\s+", " ", capfd.readouterr().out)


@pytest.mark.slow
def test_more_ranks_than_the_cluster_has(complaint: Refused, ray_cluster: object, tmp_path: Path) -> None:
    furnished(tmp_path)
    says = complaint(
        "distill",
        TINY_RECIPE,
        f"--root={tmp_path}",
        "--distill.roles.teacher.cpus=99",
        "--placement.timeout_s=1",
    )
    assert says.startswith("no room for 1 student rank, 1 teacher rank, 1 critic rank")
    assert "CPU: 100 asked for, 16 in the cluster" in says and "fewer ranks" in says


@pytest.mark.slow
@pytest.mark.usefixtures("reused_actors")
def test_a_loss_that_is_not_finite_stops_the_run_with_advice_that_works(
    complaint: Refused, ray_cluster: object, tmp_path: Path
) -> None:
    output = furnished(tmp_path).distill.output
    rate = "distill.roles.critic.engine.learning_rate"
    settings = ("checkpoint_every=1", "sample_every=0", "iterations=4")
    arguments = [
        "distill",
        str(TINY_RECIPE),
        f"--root={tmp_path}",
        *(f"--distill.{each}" for each in settings),
    ]
    assert cli.main([*arguments, "--distill.iterations=2"]) == 0
    assert cli.main([*arguments, "--distill.iterations=1", "--resume"]) == 2
    # The next critic update is made of finite numbers and leaves weights that no number survives.
    says = complaint(*arguments, f"--{rate}=1e30", f"--allow-change={rate}", "--resume", code=1)
    assert re.match(
        r"(student|critic) \w+ is \w+ in iteration 3 \(prompt batch 4\); go on with a lower ", says
    ), says
    assert f"({output}/checkpoints/0000003 led there and is kept in {output}/not-finite)." in says
    found = storage.newest_complete(f"{output}/checkpoints")
    assert found == f"{output}/checkpoints/0000002"

    advised = re.search(r"as in (.+ --resume)", says)
    assert advised is not None and rate in advised[1]
    assert cli.main([*arguments, *advised[1].replace("VALUE", "1e-4").split()]) == 0
    saved = storage.read_metadata(f"{output}/checkpoints/0000004")
    assert saved["stretches"] == [{"from": 2, "setting": rate, "old": 2e-4, "new": 1e-4}]
    assert storage.is_complete(f"{output}/model")
    tags = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db").get_run(saved["run_id"]).data.tags
    assert json.loads(tags["stretches"]) == saved["stretches"]


@pytest.mark.slow
@pytest.mark.usefixtures("reused_actors")
@pytest.mark.by_hand
def test_a_model_that_is_not_finite_is_blamed_on_its_role(
    complaint: Refused, ray_cluster: object, tmp_path: Path
) -> None:
    config = furnished(tmp_path)
    weights = random_weights(config.student, 1)
    weights["head.head.bias"][0] = torch.nan
    write_model(
        config.distill.student,
        config.student,
        seed=1,
        rollout=config.rollout,
        video=config.video,
        weights=weights,
    )
    says = complaint("distill", TINY_RECIPE, f"--root={tmp_path}", code=1)
    assert says.startswith("student loss is nan in iteration 0 (prompt batch 0)")
