"""The page docs/from-wan-to-served.md, command by command, on small models."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from orchestrator.serving.client import Client
from pipelines import cli
from tests.cluster import free_ports
from tests.fixtures import PROMPTS, write_model
from tests.orchestrator.serving.conftest import eventually
from tests.wan import ROLLOUT, SIZES, write_pipeline
from workers.foreign.writer import write
from workers.model_directory import ModelDirectory, TextConfig, VideoConfig, save

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-wan-to-served.md").read_text()
VIDEO = {"frames": 9, "channels": 4, "height": 4, "width": 6}
SMALL = {
    "dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4, "text_len": 32,
    "text_dim": 16, "freq_dim": 32,
}  # fmt: skip


def small_recipe(page: str) -> str:
    """The page's recipe, at a size that runs here."""
    match = re.search(r"```yaml\n(# my\.yaml.*?)```", page, re.S)
    assert match
    body = yaml.safe_load(match[1])
    role = {"cpus": 0.2, "gpus": 0, "threads": 1}
    learns = {**role, "adapters": {"rank": 4}, "engine": {"accumulation": 2}}
    body["video"] |= VIDEO
    body |= {"teacher": SMALL, "student": SMALL}
    body["rollout"] = {"steps": [1000, 500], "window": 6}
    body["initialize"] |= {
        "pairs": 4, "ode_steps": 4, "samplers": 1, "updates": 2, "batch": 2, "checkpoint_every": 1,
        "role": {**role, "ranks": 1},
    }  # fmt: skip
    body["distill"] |= {"iterations": 600, "batch": 2, "student_every": 300, "checkpoint_every": 600}
    teacher = {**role, **body["distill"]["roles"]["teacher"]}
    body["distill"]["roles"] = {"student": learns, "critic": learns, "teacher": teacher}
    body["evaluate"] |= {"videos": 4, "frames": 12, "teacher_steps": 2, "batch": 2}
    body["placement"] = {"timeout_s": 60}
    return yaml.safe_dump(body)


@pytest.mark.slow
@pytest.mark.by_hand
def test_every_command_of_the_page_runs(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pipeline(Path("wan2.1-t2v-1.3b"))
    write_model("teacher", SIZES, seed=1, text=TextConfig("embedded"), video=VideoConfig(9, codec="none"))
    Path("wan2.1-t2v-1.3b/transformer").mkdir()
    source, transformer = ModelDirectory("teacher"), Path("wan2.1-t2v-1.3b/transformer")
    write(source, SIZES, transformer, "diffusers", causal=False, dtype=None, save=save)
    weights = {f"model.{name}": source.get(name) for name in source.keys()}  # noqa: SIM118
    torch.save({"generator_ema": weights}, "self_forcing_dmd.pt")
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("my.yaml").write_text(small_recipe(PAGE))
    small = [f"--video={{{', '.join(f'{name}: {value}' for name, value in VIDEO.items())}}}", "--text_len=32"]

    commands = [shlex.split(line) for line in re.findall(r"^\$ self-forcing (.+)$", PAGE, re.M)]
    *before, serve = commands
    order = "import import embed initialize distill generate evaluate export export export serve"
    assert [command[0] for command in commands] == order.split()
    settings = {"import": [*small, "--heads=2"], "embed": ["--text_len=32", "--cpus=0.5"]}
    for command in before:
        assert cli.main([*command, *settings.get(command[0], [])]) == 0, command
    with av.open("six.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 81
    student = ModelDirectory("runs/wan-1.3b-lora/model")
    assert student.card.rollout is not None and student.card.rollout.window == 6 != ROLLOUT.window
    (last,) = Path("runs/wan-1.3b-lora/samples").glob("0000600.mp4")
    with av.open(str(last)) as container:  # nine latent frames are 33 of pixels
        assert sum(1 for _ in container.decode(video=0)) == 33
    exported = WanTransformer3DModel.from_pretrained("exported").state_dict()
    assert torch.equal(exported["blocks.0.attn1.to_q.weight"], student.get("blocks.0.self_attn.q.weight"))
    assert len(load_file("exported-lora/pytorch_lora_weights.safetensors")) == 2 * 2 * 10
    assert Path("exported-current/model.pt").exists()

    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *serve, f"--port={port}", "--cpus=0.1", "--drain_s=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        client = Client(f"http://127.0.0.1:{port}")

        def up() -> bool:
            assert process.poll() is None
            try:
                return bool(client.get("/healthz"))
            except Exception:
                return False

        eventually(up)
        with client.stream(PROMPTS[0], frames=22) as frames:
            assert len(list(frames)) == 22
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
