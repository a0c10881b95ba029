"""`register` and `promote`, from the command line to a served alias: what is worse, unmeasured or wrong
does not get there.
"""

import json
import socket
from pathlib import Path

import pytest
import torch

from infra import storage
from infra.registry import Registry
from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig
from pipelines import cli, suites
from pipelines.promote import Refused, compared_by, gate
from tests.fixtures import write_model
from tests.mlflow_server import Server, free_port
from workers.model_directory import VideoConfig
from workers.streamer import Streamer

SIZES = TransformerConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, text_len=8, text_dim=16, freq_dim=16)
VIDEO = VideoConfig(frames=4)
ROLLOUT = RolloutConfig(steps=(1000, 500), chunk=2, window=4, positions="relative")
GOOD = {
    "digit_accuracy_inside": 0.8,
    "digit_accuracy_beyond": 0.85,
    "motion_following_overall": 0.96,
    "kernel_distance_overall": 0.04,
}
SHIPPED = Path(__file__).parents[2] / "docs/results/quickstart/metrics.json"
"""An evaluation that `self-forcing evaluate` wrote."""


def write_student(path: Path, seed: int, **overrides: RolloutConfig | None) -> Path:
    write_model(path, SIZES, seed=seed, video=VIDEO, **({"rollout": ROLLOUT} | overrides))
    return path


def write_evaluation(folder: Path, model: Path, values: dict[str, float | None], frames: int = 27) -> Path:
    """The shipped evaluation, of other weights, with other values."""
    body = json.loads(SHIPPED.read_text())
    body["models"]["distilled"]["manifest"] = storage.manifest_digest(model)
    body["settings"]["frames"] = frames
    for name, value in values.items():
        metric, _, span = name.rpartition("_")
        body["rows"]["distilled"][span][metric]["value"] = value
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(body))
    return folder


class Console:
    """The command line, and what it said."""

    def __init__(self, uri: str, capture: pytest.CaptureFixture[str]):
        self.uri, self.capture = uri, capture

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Exit code, and everything that was printed."""
        self.capture.readouterr()
        code = cli.main([str(argument) for argument in arguments] + [f"--tracking.uri={self.uri}"])
        printed = self.capture.readouterr()
        return code, printed.out + printed.err


@pytest.fixture
def run(mlflow_server: Server, capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(mlflow_server.uri, capsys)


@pytest.mark.slow
def test_a_better_version_is_served_a_worse_one_is_not_and_one_command_goes_back(
    run: Console, mlflow_server: Server, tmp_path: Path
) -> None:
    registry, client = Registry(mlflow_server.uri), mlflow_server.client()

    def serving() -> int:
        return registry.resolve("models:/gated@serving").version

    def register(number: int, values: dict[str, float | None] | None, *options: str) -> tuple[int, str]:
        model = write_student(tmp_path / f"student-{number}", number)
        if values is not None:
            values = GOOD | values
            frames = 27 if number < 5 else 90
            evaluation = write_evaluation(tmp_path / f"evaluation-{number}", model, values, frames)
            options = (*options, f"--metrics={evaluation}")
        return run("register", model, "--name=gated", *options)

    # The first needs no metrics where there is nothing to compare with.
    code, said = register(1, None, "--alias=serving")
    assert (
        code == 0 and "is models:/gated/1 in the registry" in said and "serving names models:/gated/1" in said
    )
    assert register(2, {})[0] == 0
    assert serving() == 1
    code, said = run("promote", "gated", 2)
    assert code == 0 and "serving names models:/gated/2 instead of models:/gated/1" in said
    assert serving() == 2
    run_data = client.get_run(registry.resolve("models:/gated/2").run_id).data
    assert run_data.metrics == GOOD
    assert (
        json.loads(run_data.params.pop("evaluation.suite"))["name"] == "digits"
    )  # which the shipped file does not say
    assert run_data.params == {
        "recipe": "{}",
        "evaluation.seed": "0",
        "evaluation.videos": "128",
        "evaluation.frames": "27",
    }

    # Worse in one metric, whichever way is worse; and not measured in one, or at all.
    for number, values, sentence in (
        (
            3,
            {"digit_accuracy_beyond": 0.8},
            "digit_accuracy_beyond of models:/gated/3 is 0.8, worse than 0.85 of models:/gated/2 by more "
            "than 0.02",
        ),
        (
            4,
            {"kernel_distance_overall": 0.07, "digit_accuracy_inside": 0.9},
            "kernel_distance_overall of models:/gated/4 is 0.07, worse than 0.04",
        ),
        (
            5,
            {"digit_accuracy_beyond": None},
            "digit_accuracy_beyond of models:/gated/5 was not measured, and is 0.85 of models:/gated/2",
        ),
        (6, None, "models:/gated/6 was registered without metrics, and models:/gated/2 serves"),
    ):  # fmt: skip
        assert register(number, values)[0] == 0
        code, said = run("promote", "gated", number)
        assert (code, said.count("\n"), sentence in said) == (1, 1, True), said
        assert serving() == 2
    code, said = run("register", tmp_path / "student-6", "--name=gated", "--alias=serving")
    assert code == 1 and "is models:/gated/7" in said and "without metrics" in said and serving() == 2

    # Within the margin, and beside it where the margin is wider; what was measured unlike is said.
    code, said = register(
        8, {"digit_accuracy_inside": 0.78, "kernel_distance_overall": 0.06}, "--alias=serving"
    )
    assert code == 0 and serving() == 8
    assert "digit_accuracy_inside 0.8 -> 0.78" in said
    assert "measured with evaluation.frames 27 and 90" in said
    assert run("promote", "gated", 3, "--margin=0.05")[0] == 0 and serving() == 3
    assert "serving names models:/gated/3 already" in run("promote", "gated", 3)[1]

    for version, before in ((3, 8), (8, 2), (2, 1)):
        code, said = run("promote", "gated", "--rollback")
        assert (
            code == 0
            and f"serving names models:/gated/{before} again instead of models:/gated/{version}" in said
        )
        assert serving() == before
    code, said = run("promote", "gated", "--rollback")
    assert code == 2 and "nothing to go back to: serving names version 1 of gated" in said and serving() == 1


@pytest.mark.slow
def test_a_registered_student_streams_what_it_streamed_before(
    run: Console, mlflow_server: Server, tmp_path: Path
) -> None:
    model = write_student(tmp_path / "student", 1)
    assert run("register", model, "--name=streamed", "--alias=serving")[0] == 0
    registry = Registry(mlflow_server.uri)
    fetched = registry.fetch(registry.resolve("models:/streamed@serving"), tmp_path / "cache")

    def first_chunk(path: Path) -> torch.Tensor:
        streamer = Streamer(str(path), slots=1)
        streamer.open("a one drifting left", seed=0)
        while True:
            for event in streamer.tick():
                assert event.chunk is not None
                return event.chunk

    assert first_chunk(fetched).equal(first_chunk(model))


@pytest.mark.slow
def test_bad_input_is_one_sentence(run: Console, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, other = write_student(tmp_path / "student", 1), write_student(tmp_path / "other", 2)
    teacher = write_student(tmp_path / "teacher", 1, rollout=None)
    many_step = write_student(tmp_path / "open", 1, rollout=RolloutConfig(chunk=2))
    broken = write_student(tmp_path / "broken", 1)
    next(broken.glob("*.safetensors")).unlink()
    evaluation = write_evaluation(tmp_path / "evaluation", other, GOOD)
    assert run("register", student, "--name=asked", "--alias=serving")[0] == 0
    for arguments, sentence in (
        (["promote", "unknown", 1], "there is no model unknown in the registry at"),
        (["promote", "unknown", "--rollback"], "there is no model unknown in the registry at"),
        (["promote", "asked", 9], "asked has no version 9 in the registry at"),
        (
            ["promote", "asked", 1, "--rollback", "--alias=canary"],
            "the number of a version, or --rollback, and not both",
        ),
        (["promote", "asked"], "the number of a version, or --rollback, and not both"),
        (["promote", "asked", "--rollback", "--alias=canary"], "asked has no alias canary"),
        (["promote", "asked", 1, "--margin=-0.1"], "margin is -0.1; it must be at least 0"),
        (["promote", "asked", 1, "--margin=.nan"], "margin is nan; it must be at least 0"),
        (["promote", "asked", "first"], "version"),
        (["promote", "asked", 1, "--alias=latest"], "an alias cannot be called 'latest'"),
        (["register", tmp_path / "nowhere", "--name=asked"], "there is no complete model at"),
        (["register", broken, "--name=asked"], "is damaged: "),
        (["register", teacher, "--name=asked"], "is no few-step student; streaming needs one"),
        (["register", many_step, "--name=asked"], "has no rollout.window"),
        (["register", student], "name"),
        (["register", student, "--name=my/model"], "a registered model cannot be called 'my/model'"),
        (["register", student, "--name=asked", f"--metrics={student}"], "there is no evaluation at"),
        (["register", student, "--name=asked", f"--metrics={evaluation}"], "measured other weights than"),
    ):  # fmt: skip
        code, said = run(*arguments)
        assert (code, said.count("\n")) == (2, 1), said
        assert said.startswith("self-forcing: ") and sentence in said
    assert run("register", other, "--name=asked", f"--metrics={evaluation / 'metrics.json'}")[1].count(
        "models:/asked/2"
    )

    # Nobody there; somebody who says nothing; and no registry yet.
    with socket.socket() as silent, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (free_port(), silent.getsockname()[1]):
            nobody = Console(f"http://127.0.0.1:{port}", capsys)
            for arguments in (
                ["promote", "asked", 1],
                ["promote", "asked", "--rollback"],
                ["register", student, "--name=asked"],
            ):
                code, said = nobody(*arguments)
                assert (code, said.count("\n")) == (2, 1) and "does not answer" in said, said
    assert cli.main(["promote", "asked", "1", f"--root={tmp_path}/none"]) == 2
    assert (
        f"sqlite:///{tmp_path}/none/outputs/mlflow.db; `self-forcing register` makes one"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "none").exists()


def test_the_gate_compares_each_metric_in_its_own_direction() -> None:
    compared = suites.find("digits").compared
    assert GOOD.keys() == compared.keys()

    def passes(values: dict[str, float], margin: float | None = None, now: dict[str, float] = GOOD) -> bool:
        try:
            gate(GOOD | values, now, compared=compared, margin=margin, names=("new", "old"))
        except Refused:
            return False
        return True

    for name, how in compared.items():
        sign = how.sign
        assert passes({name: GOOD[name] + sign})
        assert passes({name: GOOD[name] - sign * 0.02})
        assert not passes({name: GOOD[name] - sign * 0.021})
        assert not passes({name: GOOD[name] - sign * 0.001}, margin=0)
        assert passes(
            {name: GOOD[name] - sign * 0.1},
            now={other: value for other, value in GOOD.items() if other != name},
        )
    assert passes({}, margin=0) and passes({}, now={})


def test_numbers_that_do_not_mean_the_same_are_not_compared() -> None:
    def params(name: str, **basis: str) -> dict[str, str]:
        return {"evaluation.suite": json.dumps(suites.described(name, suites.find(name), basis))}

    video = params("video", features="none", reference="held_out")
    names = ("new", "old")
    assert compared_by(video, video, names) == suites.find("video").compared
    # A version that was registered before suites had names.
    assert compared_by(params("digits", reference="held_out"), {}, names) == suites.find("digits").compared
    for new, now, what in (
        (video, {}, "evaluate.suite video and old with digits"),
        (params("video", features="abc"), video, "features of the suite abc and old with none"),
        (params("video", reference="teacher"), video, "reference of the suite teacher and old with held_out"),
    ):
        with pytest.raises(Refused, match=f"there is nothing to compare: .*{what}; evaluate both alike"):
            compared_by(new, now, names)
