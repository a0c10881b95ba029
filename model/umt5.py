"""UMT5 as Wan uses it, through transformers: prompts → embeddings [text_len, text_dim], zero past their end.

Unlike the byte encoder's, the embedding of the empty prompt is not all zeros: it has an end token. Training
never loads this: prompts come embedded in its data sets (`self-forcing embed`).
"""

import hashlib
import html
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from infra.storage import files_digest
from model.pickles import first_line, read_pickle
from model.text import pad

RELEASED = "models_t5_*.pth"
"""The encoder's weights in a folder of Wan's release, whose tokenizer lies in `google/`."""
RECENT = 256
"""Prompts whose embeddings are kept: of 40 tokens each in bfloat16, 84 MB at the size of UMT5-XXL."""


class Tokenizer:
    """The encoder's tokenizer alone."""

    def __init__(self, path: str, text_len: int):
        """As `Umt5Encoder`."""
        self.text_len = text_len
        _, folder = folders(path)
        try:
            self.own = _transformers().AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None

    def tokens(self, prompt: str) -> int:
        """How many a prompt has, its end token included; ValueError where that is more than `text_len`."""
        count = len(self.own(clean(prompt)).input_ids)
        if count > self.text_len:
            raise ValueError(
                f"the prompt {shorten(prompt, 60)!r} has {count} tokens, more than the {self.text_len} that "
                "this model reads; shorten it."
            )
        return count


class Umt5Encoder:
    """A text encoder from a local folder. UMT5-XXL takes 11 GB in bfloat16."""

    def __init__(self, path: str, text_len: int, device: torch.device | str = "cpu"):
        """Load it, in bfloat16 on a GPU as Wan does, and in float32 elsewhere.

        Args:
            path: a folder with `text_encoder` and `tokenizer` in it, as pipelines have, or with both as one;
                or one of Wan's release.
            text_len: tokens that the model reads.

        Raises:
            ValueError: there is no encoder at `path`, it cannot be loaded, or transformers is missing.
        """
        self.tokenizer = Tokenizer(path, text_len)
        self.text_len, self.device = text_len, torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        encoder, _ = folders(path)
        try:
            if Path(encoder).is_file():
                model = _released(encoder).to(dtype)
            else:
                model = _transformers().UMT5EncoderModel.from_pretrained(encoder, dtype=dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        self._model = model.to(self.device).requires_grad_(False).eval()
        self._recent: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def text_dim(self) -> int:
        return self._model.config.d_model

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings [tokens, text_dim] on the encoder's device; ValueError for a prompt that is too long."""
        with self._lock:
            missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._recent]
            found = {prompt: self._recent[prompt] for prompt in prompts if prompt in self._recent}
            if missing:
                longest = max(map(self.tokenizer.tokens, missing))
                # Padding changes no token's embedding: it is masked, and positions are relative.
                batch = self.tokenizer.own(
                    [clean(prompt) for prompt in missing],
                    padding="max_length",
                    max_length=longest,
                    return_tensors="pt",
                ).to(self.device)
                hidden = self._model(batch.input_ids, batch.attention_mask).last_hidden_state
                lengths = batch.attention_mask.sum(1).tolist()
                for prompt, row, length in zip(missing, hidden, lengths, strict=True):
                    found[prompt] = row[:length].clone()
            for prompt in prompts:
                self._recent[prompt] = found[prompt]
                self._recent.move_to_end(prompt)
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return [found[prompt] for prompt in prompts]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_len, text_dim] in float32; ValueError for a prompt that is too long."""
        return torch.stack([pad(each.float(), self.text_len) for each in self.embed(prompts)])


def clean(prompt: str) -> str:
    """A prompt as Wan's pipelines read it: mended Unicode, no HTML entities, single spaces."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def folders(path: str) -> tuple[str, str]:
    """Where the encoder (a folder, or the release's file) and the tokenizer lie; ValueError where they do
    not."""
    place = Path(path)
    released = sorted(place.glob(RELEASED))
    tokenizers = [place / "tokenizer", *sorted((place / "google").glob("*"))]
    encoder = released[0] if released else place / "text_encoder"
    encoder = encoder if encoder.exists() else place
    tokenizer = next(filter(Path.is_dir, tokenizers), encoder)
    needed = tokenizer / "tokenizer_config.json", *([] if released else [encoder / "config.json"])
    for file in reversed(needed):
        if not file.is_file():
            raise ValueError(f"there is no UMT5 encoder with its tokenizer at {path}: {file} is missing.")
    return str(encoder), str(tokenizer)


@cache
def digest(path: str) -> str:
    """SHA-256 of the encoder's and the tokenizer's files: two with the same one embed prompts alike."""
    kinds, parts = (".json", ".safetensors", ".bin", ".model"), []
    for place in map(Path, dict.fromkeys(folders(path))):
        files = [file for file in place.iterdir() if file.suffix in kinds] if place.is_dir() else [place]
        parts.append(files_digest(sorted(files)))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


_OUTSIDE = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_IN_BLOCK = {
    "norm1": "0.layer_norm",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
} | {f"attn.{part}": f"0.SelfAttention.{part}" for part in "qkvo"}


def _released(file: str) -> Any:
    """The encoder of Wan's release; its sizes are read off its shapes. ValueError where it is none."""
    transformers, weights = _transformers(), read_pickle(Path(file))
    try:
        renamed = {"encoder.embed_tokens.weight": weights["token_embedding.weight"]}
        for name, tensor in weights.items():
            module = name.removesuffix(".weight")
            if match := re.match(r"blocks\.(\d+)\.(.+)", module):
                module = f"encoder.block.{match[1]}.layer.{_IN_BLOCK[match[2]]}"
            else:
                module = _OUTSIDE[module]
            renamed[f"{module}.weight"] = tensor
        (buckets, heads), inner = (
            weights[f"blocks.0.{name}.weight"].shape for name in ("pos_embedding.embedding", "attn.q")
        )
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{Path(file).name} does not hold the weights of Wan's UMT5") from None
    vocabulary, width = weights["token_embedding.weight"].shape
    config = transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner[0] // heads,
        d_ff=weights["blocks.0.ffn.fc1.weight"].shape[0],
        num_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    model.load_state_dict(renamed, assign=True)
    return model


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(f"the text encoder at {path} cannot be loaded: {first_line(error)}.")


def _transformers() -> Any:
    try:
        import ftfy  # noqa: F401
        import transformers
    except ImportError:
        raise ValueError("text.encoder umt5 needs transformers: pip install 'self-forcing[wan]'.") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
