"""`self-forcing serve` on a cluster that serves already."""

import fcntl
import os
from pathlib import Path

import pytest
import requests
from ray import serve

from pipelines import cli
from pipelines import serve as serve_command

pytestmark = pytest.mark.slow


def test_it_ends_alone_and_is_not_silently_elsewhere(
    shared_url: str,
    serve_url: str,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    host, port = serve_url.removeprefix("http://").split(":")
    videos = tmp_path / "videos"
    words = ["serve", "--model", str(student), "--videos.storage", str(videos), "--cpus=0.1", "--drain_s=1"]

    def refused(*more: str) -> str:
        capfd.readouterr()
        assert cli.main([*words, *more]) == 2
        said = capfd.readouterr().err
        assert said.startswith("self-forcing: ") and said.count("\n") == 1, said
        return said

    said = refused(f"--host={host}", "--port=1")
    assert f"port is 1, and Ray Serve runs on this cluster already with {port}; give host {host}" in said
    said = refused("--host=localhost", f"--port={port}")
    assert f"host is localhost, and Ray Serve runs on this cluster already with {host}" in said
    held = os.open(videos, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert f"videos.storage: another server keeps its videos in {videos}" in refused()
    os.close(held)

    def look() -> None:
        assert requests.get(f"{serve_url}/healthz", timeout=60).status_code == 200
        said = refused(f"--host={host}", f"--port={port}", f"--videos.storage={tmp_path}/others")
        assert "serves the application self-forcing at / already; end that first" in said
        raise KeyboardInterrupt

    monkeypatch.setattr(serve_command, "wait", look)
    assert cli.main([*words, f"--host={host}", f"--port={port}"]) == 130
    assert "self-forcing" not in serve.status().applications
    assert requests.get(f"{shared_url}/healthz", timeout=60).status_code == 200
