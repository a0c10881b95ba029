"""The suite `digits`: metrics of videos whose answer is known, and all of it on tiny models in a real Ray."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from infra import storage
from infra.tracking import Tracker, TrackingConfig, sqlite_uri
from model.metrics import Estimate
from model.rollout_plan import RolloutConfig
from model.text import ByteEncoder
from model.transformer import TransformerConfig, WanTransformer
from orchestrator.config import RunConfig
from orchestrator.stages import DistillConfig, EvaluateConfig
from pipelines import cli
from pipelines.digits.digit_reader import load, read_videos
from pipelines.digits.moving_digits import PROMPTS, write_dataset
from pipelines.digits.suite import SUITE, Prepared, numbers
from pipelines.evaluate import evaluate
from pipelines.register import measured
from pipelines.report import summary_table
from pipelines.suite import Row, Videos
from workers.model_directory import ModelCard, ModelWriter, TextConfig, VideoConfig

SIZES = TransformerConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, text_dim=16)
VIDEO = VideoConfig(frames=4)
ROLLOUT = RolloutConfig(steps=(1000, 500), chunk=2, window=4, positions="relative")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with held-out videos of 6 frames."""
    root = tmp_path_factory.mktemp("root")
    write_dataset(root / "outputs" / "data" / "held_out", videos=480, frames=6, seed=1, split="held_out")
    return root


def run_config(root: Path) -> RunConfig:
    return RunConfig(
        root=str(root),
        video=VIDEO,
        teacher=SIZES,
        student=SIZES,
        rollout=ROLLOUT,
        distill=DistillConfig(
            teacher=f"{root}/outputs/teacher/model", student=f"{root}/outputs/initial/model"
        ),
        evaluate=EvaluateConfig(suite="digits", videos=80, frames=6, batch=48, teacher_steps=2),
        tracking=TrackingConfig(uri=sqlite_uri(root / "mlflow.db"), system_metrics_every_s=0),
    )


def write_model(path: str, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    transformer, text = WanTransformer(SIZES), ByteEncoder(SIZES.text_len, SIZES.text_dim)
    rollout = ROLLOUT if kind == "student" else None
    staging = storage.begin(path)
    with storage.writing(staging) as directory:
        writer = ModelWriter(directory)
        for name, tensor in transformer.state_dict().items():
            # A fresh transformer's last layer is zero, and it would make the same videos whatever its other
            # weights are.
            writer.write(name, tensor + 0.1 * torch.randn_like(tensor))
        writer.finish(
            ModelCard(kind == "student", SIZES, VIDEO, TextConfig(), rollout=rollout), text.state_dict()
        )
    storage.publish(staging, path, {})


@pytest.mark.slow
def test_metrics_and_their_averages_on_videos_whose_answer_is_known(root: Path) -> None:
    held_out = SUITE.held_out(run_config(root).located(), {})
    assert held_out is not None
    real, reference = held_out
    assert real.pixels is not None
    assert len(real.prompts) == 80 and len(reference.prompts) == 400
    reader = load()
    features = read_videos(reader, reference.frames())[1]
    prepared = Prepared(reader, features, numbers(reference.prompts))

    def row(videos: Videos) -> Row:
        return SUITE.measure(prepared, videos, chunk=2, trained=4, seed=0)

    whole = row(real)
    assert whole.by_frame["digit_accuracy"].value.min() >= 0.95
    assert whole.by_frame["motion_following"].value[0].isnan() and whole.inside["motion_following"].value == 1
    assert 0.8 < whole.overall["diversity"].value < 1.2
    assert whole.overall["kernel_distance"].low < 0.05 < whole.overall["kernel_distance"].high + 0.05

    # From the fifth frame on another digit stands still.
    spoiled = real.pixels.clone()
    spoiled[:, 4:] = real.pixels[[real.prompts.index(PROMPTS[(i + 8) % 40]) for i in numbers(real.prompts)]][
        :, 4:5
    ]
    drifted = row(Videos(real.prompts, spoiled))
    for metric in SUITE.metrics:
        found, expected = drifted.inside[metric].value, whole.inside[metric].value
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert whole.overall["clamped"].value.isnan()  # nobody decoded these
    assert drifted.beyond["digit_accuracy"].high < 0.2
    assert (
        drifted.by_chunk["digit_accuracy"].value[:2].min() > 0.9 > drifted.by_chunk["digit_accuracy"].high[2]
    )
    assert drifted.beyond["motion_following"].value < 0.2

    # One video for each prompt: no diversity; and too few videos to have any.
    first = [real.prompts.index(prompt) for prompt in real.prompts]
    assert row(Videos(real.prompts, real.pixels[first])).overall["diversity"].high < 1e-6
    single = row(Videos(real.prompts[:40], real.pixels[:40]))
    assert single.overall["diversity"].value.isnan() and single.overall["digit_accuracy"].value > 0.9
    short = row(Videos(real.prompts, real.pixels[:, :4]))
    assert short.beyond["digit_accuracy"].value.isnan() and len(short.by_chunk["diversity"].value) == 2


@pytest.mark.slow
@pytest.mark.by_hand
def test_tiny_models_are_measured_reported_and_not_generated_twice(
    ray_cluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)  # models are also looked for in the working directory
    config = run_config(root)
    located = config.located()
    with pytest.raises(
        ValueError, match=r"no student to evaluate, neither at .*; run `self-forcing initialize`"
    ):
        evaluate(config, tracker=None, resume=False)
    paths = (located.distill.teacher, located.distill.student, f"{located.distill.output}/model")
    write_model(paths[0], "teacher", 0)
    write_model(paths[1], "student", 1)
    write_model(paths[2], "student", 2)
    with pytest.raises(ValueError, match=r"evaluate.frames is 8, .* have 6; use at most 6"):
        evaluate(replace(config, evaluate=replace(config.evaluate, frames=8)), tracker=None, resume=False)
    with pytest.raises(ValueError, match=r"evaluate.frames is 3, less than the 4 frames"):
        evaluate(replace(config, evaluate=replace(config.evaluate, frames=3)), tracker=None, resume=False)

    output = Path(located.evaluate.output)
    with Tracker(
        config.tracking, folder=output, run_name="evaluate", stage="evaluate", params=asdict(config)
    ) as tracker:
        report = evaluate(config, tracker=tracker, resume=False)
    assert list(report.rows) == ["real", "teacher", "initial", "distilled"] and report.steps == 2
    assert [row.frames for row in report.rows.values()] == [6, 4, 6, 6]

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["rows"]["distilled"]["by_frame"]["digit_accuracy"]["value"] == pytest.approx(
        report.rows["distilled"].by_frame["digit_accuracy"].value.tolist()
    )
    assert metrics["rows"]["teacher"]["beyond"]["digit_accuracy"] == dict.fromkeys(["value", "low", "high"])
    assert (
        len(metrics["verdicts"]) == 8 and metrics["rows"]["real"]["overall"]["digit_accuracy"]["value"] > 0.95
    )
    values, how = measured(output / "metrics.json", paths[2])
    assert values["digit_accuracy_beyond"] == report.rows["distilled"].beyond["digit_accuracy"].value.item()
    assert values.keys() == SUITE.compared.keys()
    assert json.loads(how.pop("suite")) == metrics["suite"] and how == {"seed": 0, "videos": 80, "frames": 6}
    text = (output / "report.md").read_text()
    assert str(root) not in text + (output / "metrics.json").read_text()
    for picture in re.findall(r"\]\((.+?\.png)\)", text):
        assert min(Image.open(output / picture).size) > 300
    again, _ = cli.parse("evaluate", [str(output / "config.yaml"), "--root", str(root)])
    assert again.located() == replace(located, tracking=again.located().tracking)

    console = Console(width=80, record=True)
    console.print(summary_table(report))
    assert re.search(r"4–5 .* – .* ± ", console.export_text())

    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    curve = client.get_metric_history(tracker.run_id, "evaluation/distilled/digit_accuracy")
    expected = report.rows["distilled"].by_frame["digit_accuracy"].value
    assert [(point.step, point.value) for point in curve] == [(i, float(v)) for i, v in enumerate(expected)]
    artifacts = {item.path for item in client.list_artifacts(tracker.run_id, "evaluation")}
    assert {"evaluation/drift.png", "evaluation/metrics.json"} <= artifacts

    # A new distilled student is measured; the other two models' videos are kept, and the numbers with them.
    def made() -> dict[str, int]:
        return {
            name: (output / "videos" / name / "videos.safetensors").stat().st_mtime_ns
            for name in ("teacher", "initial", "distilled")
        }

    before = made()
    write_model(paths[2], "student", 3)
    resumed = evaluate(config, tracker=None, resume=True)
    assert {name for name, time in made().items() if time != before[name]} == {"distilled"}
    for name, row in report.rows.items():
        same = torch.equal(
            resumed.rows[name].overall["kernel_distance"].value, row.overall["kernel_distance"].value
        )
        assert same == (name != "distilled")
    evaluate(replace(config, seed=1), tracker=None, resume=True)
    assert not set(made().values()) & set(before.values())


def test_verdicts_follow_from_the_numbers() -> None:
    def row(accuracy: list[float], diversity: float, frames: int = 6) -> Row:
        value = torch.tensor(accuracy)
        curve = Estimate(value, value - 0.05, value + 0.05)

        def scalars(part: torch.Tensor) -> dict[str, Estimate]:
            mean = part.mean()
            other = torch.tensor(diversity)
            motion = torch.tensor(0.95)
            return {
                "digit_accuracy": Estimate(mean, mean - 0.05, mean + 0.05),
                "motion_following": Estimate(motion, motion, motion),
                "diversity": Estimate(other, other, other),
            }

        chunks = {"digit_accuracy": curve}
        return Row(frames, {}, chunks, scalars(value[:2]), scalars(value[2:]), scalars(value))

    def met(distilled: Row) -> list[bool]:
        rows = {
            "real": row([1.0, 1.0, 1.0], 1.0),
            "teacher": row([0.95, 0.95], 0.9, 4),
            "initial": row([0.8, 0.4, 0.2], 0.9),
            "distilled": distilled,
        }
        return [verdict.met for verdict in SUITE.verdicts(rows)]

    assert met(row([0.9, 0.9, 0.85], 0.7)) == [True] * 8
    assert met(row([0.9, 0.45, 0.85], 0.5)) == [True, True, False, True, False, False, True, True]
    assert met(row([0.1, 0.1, 0.1], float("nan"))) == [True, True, False, True, False, False, False, False]
