"""A model with Wan 1.3B's whole configuration and random weights: in, one LoRA update, out, one chunk."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from model.noise import SampleNoise
from model.rollout import Rollout, generate
from model.rollout_plan import RolloutPlan
from model.transformer import TransformerConfig
from pipelines import cli
from tests.orchestrator.groups import Groups
from tests.wan import RandomWeights
from workers.build import whole
from workers.dataset import dataset_schema, encode_tensor, tensor_fields
from workers.foreign.writer import write
from workers.model_directory import ModelDirectory, save

SIZES = TransformerConfig(
    dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16, text_len=512, text_dim=4096,
    freq_dim=256,
)  # fmt: skip
GB = 2**30


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most host memory in GB that each kind of actor had resident."""
    most: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in psutil.process_iter(["name", "memory_info"]):
                name = (process.info["name"] or "").removeprefix("ray::")
                # Ray's names of processes are cut, and change with what an actor is doing.
                role = next(
                    (each for each in ("Student", "Teacher", "Critic") if name.startswith(each)), None
                )
                if role is not None and process.info["memory_info"]:
                    most[role] = max(most.get(role, 0.0), process.info["memory_info"].rss / GB)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.timeout(2400)
def test_the_whole_configuration_of_wan_is_imported_distilled_exported_and_run(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    groups.close()  # other tests' actors, whose memory is needed
    monkeypatch.setattr("workers.foreign.writer.SHARD_BYTES", GB)
    release = tmp_path / "release"
    release.mkdir()
    write(RandomWeights(SIZES), SIZES, release, "wan", causal=False, dtype=None, save=save)
    assert len(list(release.glob("*.safetensors"))) == 3
    small = "--video={frames: 6, channels: 16, height: 8, width: 8, codec: none, fps: 16}"
    for name, more in (("teacher", []), ("student", ["--preset=self-forcing", "--rollout.window=3"])):
        assert cli.main(["import", str(release), f"--output={tmp_path}/{name}", small, *more]) == 0
    model = ModelDirectory(tmp_path / "student")
    assert model.card.transformer == SIZES

    fields = tensor_fields("embedding")
    rows = [encode_tensor("embedding", torch.randn(20, 4096).bfloat16()) for _ in range(4)]
    (tmp_path / "prompts").mkdir()
    schema = dataset_schema(fields, kind="prompts", provenance={})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "prompts" / "0.parquet")
    save_file({"embedding": torch.randn(8, 4096).bfloat16()}, tmp_path / "negative.safetensors")
    roles = {
        "student": {"gpus": 0, "threads": 2, "engine": {"accumulation": 1}},
        "teacher": {"gpus": 0, "threads": 2, "negative_embedding": "negative.safetensors"},
        "critic": {"gpus": 0, "threads": 2, "engine": {"accumulation": 1}},
    }
    settings = {"teacher": "teacher", "student": "student", "critic": "teacher", "output": "run"}
    numbers = {"iterations": 1, "student_every": 1, "batch": 1, "checkpoint_every": 1}
    recipe = {
        "base": "wan-1.3b-lora", "root": str(tmp_path), "data": {"train": "prompts"},
        "video": {"frames": 6, "height": 8, "width": 8, "codec": "none", "vae": None},
        "text": {"encoder": "embedded", "path": None}, "rollout": {"window": 3},
        "distill": {**settings, **numbers, "roles": roles},
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    with watched() as most:
        assert cli.main(["distill", str(tmp_path / "my.yaml")]) == 0
    with capfd.disabled():
        print("\nGiB resident at most:", {role: round(value, 1) for role, value in sorted(most.items())})
    assert most.keys() == {"Student", "Teacher", "Critic"}

    learned = ModelDirectory(tmp_path / "run" / "model")
    assert torch.equal(learned.get("head.modulation"), model.get("head.modulation"))
    assert learned.shapes == model.shapes
    assert cli.main(["export", f"{tmp_path}/run/model", "--format=peft", f"--output={tmp_path}/lora"]) == 0
    out = f"--output={tmp_path}/out"
    assert cli.main(["export", f"{tmp_path}/run/model", "--format=diffusers", "--dtype=bf16", out]) == 0

    rollout = learned.card.rollout
    assert rollout is not None
    network = whole(learned, dtype=torch.bfloat16)
    torch.set_num_threads(2)
    cache = network.new_slots(rollout.context_window(), 8, 8, rows=1, chunk=3, capacity=3)
    plan, noise = RolloutPlan.full(rollout, 3), SampleNoise([(0, "x", 0)])
    made = Rollout(rollout, plan, noise=noise, cache=cache, shape=(1, 16, 8, 8), initial=None)
    with torch.no_grad():
        (chunk,) = generate(network, made, torch.randn(1, 512, 4096))
    assert chunk.shape == (1, 3, 16, 8, 8) and chunk.isfinite().all()
