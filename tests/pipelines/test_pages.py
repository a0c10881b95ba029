"""The commands of docs/data.md and docs/storage.md, from a shell, on small models and an S3 server."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.storage import s3
from orchestrator.serving.client import Client
from tests.cluster import free_ports
from tests.fixtures import PROMPTS, TINY_RECIPE, furnished
from tests.orchestrator.serving.conftest import eventually
from tests.pipelines.test_s3 import copy_model, copy_up
from tests.s3_server import S3Server, reached
from tests.workers.test_video_files import write

pytestmark = [pytest.mark.slow, pytest.mark.by_hand, pytest.mark.timeout(1500)]
DOCS = Path(__file__).parents[2] / "docs"


def commands(page: str) -> Iterator[str]:
    for block in re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ self-forcing"):
                yield line.removeprefix("$ ").partition(" #")[0].strip()


@pytest.fixture
def server() -> Iterator[S3Server]:
    server = S3Server()
    server.create("team")
    with reached(server, SELF_FORCING_CACHE="cache"):
        yield server
    server.stop()


def test_every_command_runs(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    config = furnished(tmp_path)
    recipe = {"base": str(TINY_RECIPE), "distill": {"iterations": 2, "checkpoint_every": 2}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    Path("clips").mkdir()
    rows = []
    for number, prompt in enumerate(PROMPTS[:2]):
        clip = write(Path(f"clips/{number}.mp4"), [i / 8 for i in range(8)])
        clip.with_suffix(".txt").write_text(prompt)
        rows.append({"video": f"clips/{number}.mp4", "caption": prompt})
    pq.write_table(pa.Table.from_pylist(rows), "videos.parquet")
    lines = [f"{number}.mp4,{prompt}" for number, prompt in enumerate(PROMPTS[:2])]
    Path("captions.csv").write_text("\n".join(["video,caption", *lines]))
    with tarfile.open("0.tar", "w") as archive:
        for file in sorted(Path("clips").iterdir()):
            archive.add(file, file.name)
    s3.upload(Path("0.tar"), s3.Place("team", "tars/0.tar"))
    copy_up(Path("clips"), "s3://team/clips")
    copy_up(Path(config.data.train), "s3://team/prompts")
    copy_model(config.distill.teacher, "s3://team/teacher")
    copy_model(config.distill.student, "s3://team/initial/model")

    ran = 0
    for command in [*commands("data.md"), *commands("storage.md")]:
        if "serve" in command.split():
            (port,) = free_ports(1)
            process = subprocess.Popen([*command.split(), f"--port={port}", "--cpus=0.5"])
            try:
                eventually(lambda port=port: up(port))
                with Client(f"http://127.0.0.1:{port}").stream(PROMPTS[0], seed=1, frames=4) as frames:
                    assert len(list(frames)) == 4
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
        else:
            shutil.rmtree("data", ignore_errors=True)
            subprocess.run(command, shell=True, check=True)
        ran += 1
    assert ran == 7


def up(port: int) -> bool:
    import requests

    try:
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=2).status_code == 200
    except requests.RequestException:
        return False
