"""Jobs on a real cluster: two nodes, token authentication, our code known only from the working directory."""

import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from ray.experimental import internal_kv

from infra import storage
from infra.provenance import git_commit
from pipelines import cli, submit
from tests.cluster import BIN, TwoNodeCluster, two_node_cluster
from tests.fixtures import TINY_RECIPE, furnished
from workers.model_directory import ModelDirectory

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = str(TINY_RECIPE.relative_to(ROOT))
ROLES = {"student", "teacher", "critic"}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodeCluster]:
    with two_node_cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def start(two_nodes: TwoNodeCluster, *command: str, **environment: str) -> subprocess.Popen[str]:
    """A process of a user who has the cluster's token; its output goes to one pipe."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=two_nodes.environment | {"PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run in the background of a shell hands an ignored Ctrl-C down to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def handed_in_by_ray(two_nodes: TwoNodeCluster, *words: str) -> subprocess.Popen[str]:
    """`ray job submit` as Ray documents it, with the command that `pip install` puts on the path."""
    options = ["--address", two_nodes.dashboard_url, "--working-dir", "."]
    return start(two_nodes, str(BIN / "ray"), "job", "submit", *options, "--", "self-forcing", *words)


def job_in(output: str) -> str:
    return re.search(r"raysubmit_\w+", output)[0]


def nodes_in(output: str) -> dict[str, str]:
    """Role → the node that it says it runs on."""
    return dict(re.findall(r"^distill: (\w+) on node (\w+)$", output, re.MULTILINE))


def handed_in(arguments: list[str]) -> int:
    """`self-forcing submit ARGUMENTS`, with a user's mistake as the exception that it is."""
    return submit.command(*cli.parse("submit", arguments))


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.by_hand)])
def test_the_tiny_recipe_as_a_job_followed_stopped_and_resumed(
    two_nodes: TwoNodeCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str], resumed: bool
) -> None:
    """Resumed, it is compared with a job that Ray's own command handed in."""
    address = ["--address", two_nodes.dashboard_url]

    def settings(name: str, iterations: int) -> list[str]:
        return [
            RECIPE,
            "--root",
            str(tmp_path / name),
            "--placement.mode=disaggregated",
            "--distill.checkpoint_every=100000",
            f"--distill.iterations={iterations}",
        ]

    def model(name: str) -> ModelDirectory:
        return ModelDirectory(tmp_path / name / "outputs/distilled/model")

    for name in ("ours", "rays"):
        furnished(tmp_path / name)

    whole = handed_in_by_ray(two_nodes, "distill", *settings("rays", 2)) if resumed else None
    # More iterations than it will get to. It runs on while nobody follows it.
    assert handed_in([*settings("ours", 100_000), *address, "--no-wait"]) == 0
    job = job_in(capfd.readouterr().out)
    follower = start(two_nodes, str(BIN / "self-forcing"), "submit", "--follow", job, *address)
    seen = ""
    for line in follower.stdout:
        seen += line
        if re.match(r"distill +\d+/100000 .* critic \d", line):
            break
    else:
        pytest.fail(f"no progress arrived:\n{seen}")
    follower.send_signal(signal.SIGINT)
    rest = follower.communicate(timeout=120)[0]
    assert follower.returncode == submit.DETACHED
    assert "Traceback" not in rest
    assert f"self-forcing submit --follow {job} --address {two_nodes.dashboard_url}" in rest
    assert set(nodes_in(seen)) == ROLES
    assert len(set(nodes_in(seen).values())) == 2

    checkpoints = tmp_path / "ours/outputs/distilled/checkpoints"
    assert storage.newest_complete(checkpoints) is None  # one is made when the job is stopped
    assert handed_in(["--stop", job, *address]) == 0
    assert handed_in(["--follow", job, *address]) == submit.STOPPED
    newest = storage.newest_complete(checkpoints)
    assert newest is not None
    reached = int(Path(newest).name)
    if whole is None:
        return

    capfd.readouterr()
    assert handed_in([*settings("ours", reached + 2), *address, "--resume"]) == 0
    gone_on, plain = capfd.readouterr().out, whole.communicate()[0]
    assert whole.returncode == 0, plain
    assert f"distill: resuming from update {reached} " in gone_on
    for output, last in ((gone_on, reached + 2), (plain, 2)):
        assert len(re.findall(rf"^distill +{last}/{last} .*$", output, re.MULTILINE)) == 1
        assert output.count("Distilled student") == 1
        assert set(nodes_in(output)) == ROLES
        assert len(set(nodes_in(output).values())) == 2
    ours, rays = model("ours"), model("rays")
    assert set(ours.keys()) == set(rays.keys())
    with closing(sqlite3.connect(tmp_path / "ours/outputs/mlflow.db")) as tracked:
        assert tracked.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        commit = git_commit().get(
            "mlflow.source.git.commit"
        )  # of what was handed in, which has no history there
        asked = "SELECT value FROM tags WHERE key = 'mlflow.source.git.commit'"
        assert tracked.execute(asked).fetchall() == ([(commit,)] if commit else [])


@pytest.mark.by_hand
def test_bad_input_is_one_sentence_and_exit_code_2_on_the_cluster_too(
    two_nodes: TwoNodeCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address = ["--address", two_nodes.dashboard_url]
    furnished(tmp_path)
    room = ["--root", str(tmp_path), "--distill.roles.critic.cpus=64", "--placement.timeout_s=0.5"]
    stage_5 = "--distill.roles.student.engine.zero_stage=5"
    rays = handed_in_by_ray(two_nodes, "distill", RECIPE, stage_5)
    direct = start(
        two_nodes, str(BIN / "self-forcing"), "distill", RECIPE, *room, "--address", two_nodes.address
    )
    assert handed_in([RECIPE, stage_5, *address]) == 2
    ours = capfd.readouterr().out
    assert direct.wait() == 2
    # Ray's own command ends with 1 for whatever failed, and prints the log twice; the job itself knows
    # better.
    output = rays.communicate()[0]
    client, job = submit.job_client(two_nodes.dashboard_url), job_in(output)
    assert (rays.returncode, client.get_job_info(job).driver_exit_code) == (1, 2), output
    plain = client.get_job_logs(job)

    for output, sentence in (
        (ours, "zero_stage is 5: use 0, 1, 2 or 3"),
        (plain, "zero_stage is 5: use 0, 1, 2 or 3"),
        (direct.stdout.read(), r"no room for .*critic.* within 0\.5 s: CPU: 65 asked for, 8 in the cluster"),
    ):
        said = [line for line in output.splitlines() if line.startswith("self-forcing: ")]
        assert len(said) == 1, output
        assert re.search(sentence, said[0]), said
        assert "Traceback" not in output


def test_a_relative_root_in_a_job_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as in a process that a job starts
    # The models are not there, so that it ends at once.
    assert cli.main(["distill", RECIPE, "--root=outputs/never"]) == 2
    output, said = (" ".join(text.split()) for text in capfd.readouterr())
    assert output.count("distill: root 'outputs/never' lies in this job's working directory") == 1
    assert "there is no complete model at" in said


def test_what_cannot_run_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    nowhere = ["--address", "http://127.0.0.1:9"]
    outside = tmp_path / "tiny.yaml"
    outside.write_text(TINY_RECIPE.read_text())
    for arguments, sentence in (
        (["never"], "there is no recipe 'never'; name a YAML file or one of .*quickstart"),
        ([str(outside)], f"recipe {outside} lies outside {ROOT}"),
        ([RECIPE, "--command", "distil"], "'distil' is no command for a job; use one of .*distill"),
        ([RECIPE, "--retries=1", "--no-wait"], "retries need someone who waits"),
        ([], "submit needs a recipe"),
        ([RECIPE], "no Ray job server answers at http://127.0.0.1:9"),
    ):
        with pytest.raises(ValueError, match=sentence):
            handed_in([*arguments, *nowhere])


def test_a_driver_of_one_cluster_that_submits_to_another_stays_its_driver(
    ray_cluster: object, two_nodes: TwoNodeCluster
) -> None:
    own = internal_kv.internal_kv_get_gcs_client()
    assert submit.job_client(two_nodes.address).list_jobs() is not None
    assert own is not None and internal_kv.internal_kv_get_gcs_client() is own


FAIL_UNLESS_RESUMED = (
    "import sys; print('arguments', *sys.argv[1:]); sys.exit('--resume' not in sys.argv and int(sys.argv[1]))"
)


def test_a_failed_job_is_handed_in_again_but_bad_input_is_not(
    two_nodes: TwoNodeCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(code: str) -> int:
        words = ["python", "-c", FAIL_UNLESS_RESUMED, code]
        return submit.run_job(words, address=two_nodes.address, working_dir=ROOT, retries=1)

    with ThreadPoolExecutor() as side_by_side:
        assert list(side_by_side.map(run, ["7", "2"])) == [0, 2]
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("arguments")]
    assert sorted(lines) == ["arguments 2", "arguments 7", "arguments 7 --resume"]
    with pytest.raises(ValueError, match=r"has no job raysubmit_never: .* shows those"):
        submit.stop("raysubmit_never", address=two_nodes.address)


TRY = """
from infra.provenance import git_commit
from orchestrator import cluster
from pipelines import submit
for call in (lambda: cluster.connect({gcs!r}).__enter__(), lambda: submit.job_client({dashboard!r})):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_wrong_token_a_missing_token_and_a_wrong_address_are_one_sentence_each(
    two_nodes: TwoNodeCluster, tmp_path: Path
) -> None:
    def attempt(code: str, **environment: str) -> subprocess.Popen[str]:
        return start(two_nodes, sys.executable, "-c", code, **environment)

    right = TRY.format(gcs=two_nodes.address, dashboard=two_nodes.dashboard_url)
    swapped = TRY.format(
        gcs=two_nodes.dashboard_url.removeprefix("http://"), dashboard=f"http://{two_nodes.address}"
    )
    attempts = {
        "refuses this token": attempt(right, RAY_AUTH_TOKEN="guess"),
        "asks for a token": attempt(right, RAY_AUTH_MODE="disabled"),
        "but there is no token": attempt(right, HOME=str(tmp_path), RAY_AUTH_TOKEN=""),
        "(cannot reach a Ray cluster|no Ray job server answers) at": attempt(swapped),
    }
    for sentence, process in attempts.items():
        lines = process.communicate(timeout=180)[0].splitlines()
        assert len(lines) == 2, lines
        assert all(re.search(sentence, line) for line in lines), lines
