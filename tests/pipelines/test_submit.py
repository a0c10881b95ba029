"""Jobs on a real cluster: two nodes, token authentication, our code known only from the working directory."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import submit
from tests.cluster import BIN, TwoNodeCluster, two_node_cluster

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STAND_IN = ["python", "-m", "tests.pipelines.stand_in_job"]
NO_ROOM = (
    "no room for critic within 0.5 s: second: 2 asked for, 1 in the cluster, 1 free;"
    " ask for fewer ranks or less for each, or add nodes."
)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodeCluster]:
    with two_node_cluster() as cluster:
        yield cluster


def python(two_nodes: TwoNodeCluster, code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=ROOT,
        env=two_nodes.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# A pipeline joins this list with what its output must show.
@pytest.mark.parametrize(
    ("words", "shown"), [([*STAND_IN, "place"], ["nodes 2", "same package True", NO_ROOM])]
)
def test_a_job_does_the_same_handed_in_by_us_and_by_ray(
    two_nodes: TwoNodeCluster, capfd, words: list[str], shown: list[str]
):
    command = [str(BIN / "ray"), "job", "submit", "--address", two_nodes.dashboard_url, "--working-dir", "."]
    plain = subprocess.Popen(
        [*command, "--", *words], cwd=ROOT, env=two_nodes.environment, stdout=subprocess.PIPE, text=True
    )
    assert submit.run_job(words, address=two_nodes.dashboard_url, working_dir=ROOT) == 0
    lines = capfd.readouterr().out.splitlines()
    plain_lines = plain.communicate()[0].splitlines()
    assert plain.returncode == 0, plain_lines
    for line in shown:
        assert lines.count(line) == plain_lines.count(line) == 1


def test_a_failed_job_is_resumed_but_bad_input_is_not(two_nodes: TwoNodeCluster, capfd):
    def run(code: str) -> int:
        words = [*STAND_IN, "fail", code]
        return submit.run_job(words, address=two_nodes.dashboard_url, working_dir=ROOT, retries=1)

    with ThreadPoolExecutor() as side_by_side:
        assert list(side_by_side.map(run, ["7", "2"])) == [0, 2]
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("arguments")]
    assert sorted(lines) == ["arguments 2", "arguments 7", "arguments 7 --resume"]


def test_following_ends_with_ctrl_c_and_the_job_with_stop(two_nodes: TwoNodeCluster, capfd):
    address = two_nodes.address
    assert submit.run_job([*STAND_IN, "wait"], address=address, working_dir=ROOT, wait=False) == 0
    job_id = re.search(r"--stop (\S+)", capfd.readouterr().out)[1]
    follower = python(
        two_nodes,
        f"import sys; from pipelines import submit; sys.exit(submit.follow({job_id!r}, address={address!r}))",
    )
    seen = iter(follower.stdout.readline, "")
    assert any(line == "waiting\n" for line in seen)
    follower.send_signal(signal.SIGINT)
    rest = follower.communicate(timeout=30)[0]
    assert follower.returncode == submit.DETACHED
    assert "Traceback" not in rest
    assert f"self-forcing submit --follow {job_id} --address {two_nodes.dashboard_url}" in rest

    assert submit.stop(job_id, address=address) == 0
    assert submit.follow(job_id, address=address) == submit.STOPPED
    with pytest.raises(ValueError, match=r"has no job raysubmit_never: .* shows those"):
        submit.stop("raysubmit_never", address=address)


TRY = """
from orchestrator import cluster
from pipelines import submit
for call in (lambda: cluster.connect({gcs!r}).__enter__(), lambda: submit.job_client({dashboard!r})):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_wrong_token_a_missing_token_and_a_wrong_address_are_one_sentence_each(
    two_nodes: TwoNodeCluster, tmp_path
):
    right = TRY.format(gcs=two_nodes.address, dashboard=two_nodes.dashboard_url)
    swapped = TRY.format(
        gcs=two_nodes.dashboard_url.removeprefix("http://"), dashboard=f"http://{two_nodes.address}"
    )
    nothing = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": ""}
    attempts = {
        "refuses this token": python(two_nodes, right, RAY_AUTH_TOKEN="guess"),
        "asks for a token": python(two_nodes, right, RAY_AUTH_MODE="disabled"),
        "but there is no token": python(two_nodes, right, **nothing),
        "(cannot reach a Ray cluster|no Ray job server answers) at": python(two_nodes, swapped),
    }
    for sentence, attempt in attempts.items():
        lines = attempt.communicate(timeout=60)[0].splitlines()
        assert len(lines) == 2, lines
        assert all(re.search(sentence, line) for line in lines), lines
