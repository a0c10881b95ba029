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
from model.text import pad

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
            path: a folder with `text_encoder` and `tokenizer` in it, as pipelines have, or with both as one.
            text_len: tokens that the model reads.

        Raises:
            ValueError: there is no encoder at `path`, it cannot be loaded, or transformers is missing.
        """
        self.tokenizer = Tokenizer(path, text_len)
        self.text_len, self.device = text_len, torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            model = _transformers().UMT5EncoderModel.from_pretrained(folders(path)[0], dtype=dtype)
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
    """Where the encoder and the tokenizer lie; ValueError where they do not."""
    place = Path(path)
    encoder = place / "text_encoder" if (place / "text_encoder").is_dir() else place
    tokenizer = place / "tokenizer" if (place / "tokenizer").is_dir() else encoder
    for folder, file in ((encoder, "config.json"), (tokenizer, "tokenizer_config.json")):
        if not (folder / file).is_file():
            raise ValueError(
                f"there is no UMT5 encoder with its tokenizer at {path}: {folder / file} is missing."
            )
    return str(encoder), str(tokenizer)


@cache
def digest(path: str) -> str:
    """SHA-256 of the encoder's and the tokenizer's files: two with the same one embed prompts alike."""
    kinds = (".json", ".safetensors", ".bin", ".model")
    parts = [
        files_digest(sorted(file for file in Path(folder).iterdir() if file.suffix in kinds))
        for folder in dict.fromkeys(folders(path))
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _unreadable(path: str, error: Exception) -> ValueError:
    first = str(error).strip().splitlines()[0].rstrip(".")
    return ValueError(f"the text encoder at {path} cannot be loaded: {first}.")


def _transformers() -> Any:
    try:
        import ftfy  # noqa: F401
        import transformers
    except ImportError:
        raise ValueError("text.encoder umt5 needs transformers: pip install 'self-forcing[wan]'.") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
