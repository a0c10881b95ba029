"""UMT5 embeds prompts as Wan's pipeline of diffusers does."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from model import umt5
from model.umt5 import Umt5Encoder, clean, digest
from tests.fixtures import PROMPTS
from tests.wan import write_release, write_umt5

LONG = "a caf&eacute; &amp;amp; more   white\n space"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_umt5(tmp_path_factory.mktemp("umt5")))


def test_embeddings_are_those_of_the_pipeline(folder: str) -> None:
    encoder, prompts = Umt5Encoder(folder, 32), [PROMPTS[0], "", LONG, PROMPTS[4]]
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(f"{folder}/tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(f"{folder}/text_encoder"),
        transformer=None,
        vae=None,
        scheduler=None,
    )
    theirs = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=32, device=torch.device("cpu"))
    ours = encoder.encode(prompts)
    assert ours.shape == theirs.shape == (4, 32, 16)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    assert clean(LONG) == "a café & more white space"
    # The end token of the empty prompt is not nothing, but what comes after it is.
    assert ours[1, 0].abs().sum() > 0 and not ours[1, 1:].any()
    assert [len(each) for each in encoder.embed(prompts)] == [
        encoder.tokenizer.tokens(prompt) for prompt in prompts
    ]


def test_what_was_embedded_lately_is_not_embedded_again(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, asked = Umt5Encoder(folder, 32), []
    model = encoder._model

    def counted(ids: torch.Tensor, mask: torch.Tensor) -> object:
        asked.append(len(ids))
        return model(ids, mask)

    encoder._model = counted
    monkeypatch.setattr(umt5, "RECENT", 2)
    first = encoder.embed(["one", "two", "one"])
    assert asked == [2] and torch.equal(first[0], first[2])
    again = encoder.embed(["two", "three"])
    assert asked == [2, 1] and torch.equal(again[0], first[1])
    assert torch.allclose(encoder.embed(["one"])[0], first[0], atol=1e-6) and asked == [2, 1, 1]


def test_the_releases_file_is_read(folder: str, tmp_path: Path) -> None:
    write_release(tmp_path, Path(folder))
    assert torch.equal(
        Umt5Encoder(str(tmp_path), 32).encode(PROMPTS), Umt5Encoder(folder, 32).encode(PROMPTS)
    )
    whole, (file,) = digest(str(tmp_path)), tmp_path.glob("models_t5*")
    content = file.read_bytes()
    assert len(whole) == 64 and whole != digest(folder)
    for damaged in (content[:5000], pickle.dumps(print), b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"the text encoder at .* cannot be loaded"):
            Umt5Encoder(str(tmp_path), 32)
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="does not hold the weights of Wan's UMT5"):
        Umt5Encoder(str(tmp_path), 32)
    shutil.rmtree(tmp_path / "google")
    with pytest.raises(ValueError, match=r"no UMT5 encoder with its tokenizer at .*tokenizer_config"):
        Umt5Encoder(str(tmp_path), 32)


def test_a_prompt_that_is_too_long_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than the 8 that this model reads"):
        Umt5Encoder(folder, 8).encode(["six seven " * 20])


def test_what_is_no_encoder_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no UMT5 encoder with its tokenizer at .*config\.json is missing"):
        Umt5Encoder(str(tmp_path), 8)
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
        for file in Path(folder, name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    assert digest(str(tmp_path)) == digest(folder)
    (weights,) = (tmp_path / "text_encoder").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be loaded"):
        Umt5Encoder(str(tmp_path), 8)
