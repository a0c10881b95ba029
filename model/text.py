"""Prompts → embeddings. The embedded default reads bytes; a large pretrained encoder implements the same
interface.

An encoder maps prompts to `[B, text_len, text_dim]`, zero where there is no text, so the empty prompt (what
classifier-free guidance calls unconditional) is all zeros.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

WORD_REACH = 5
"""Bytes that one layer of the encoder looks at; two layers span the longest digit and direction words."""


class TextEncoder(Protocol):
    """What pipelines need of a text encoder."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_len, text_dim] in float32; ValueError for a prompt longer than `text_len`."""
        ...


class ByteEncoder(nn.Module):
    """A small convolutional encoder of UTF-8 bytes, trained with the teacher and then frozen."""

    def __init__(self, text_len: int, text_dim: int):
        super().__init__()
        self.text_len = text_len
        self.token = nn.Embedding(256, text_dim)
        self.position = nn.Parameter(torch.randn(text_len, text_dim) * 0.1)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(text_dim, text_dim, WORD_REACH, padding=WORD_REACH // 2) for _ in range(2)
        )
        self.norm = nn.LayerNorm(text_dim)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Byte values [B, text_len] and where there is text [B, text_len, 1]."""
        encoded = [prompt.encode() for prompt in prompts]
        for prompt, data in zip(prompts, encoded, strict=True):
            if len(data) > self.text_len:
                raise ValueError(
                    f"the prompt {prompt!r} has {len(data)} bytes, more than the {self.text_len} that this "
                    "model reads; shorten it."
                )
        tokens = torch.tensor([list(data) + [0] * (self.text_len - len(data)) for data in encoded])
        lengths = torch.tensor([len(data) for data in encoded])[:, None]
        present = (torch.arange(self.text_len) < lengths)[..., None]
        device = self.position.device
        return tokens.to(device), present.to(device)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        x = (self.token(tokens) + self.position) * present
        for convolution in self.convolutions:
            x = (x + nn.functional.gelu(convolution(x.transpose(1, 2)).transpose(1, 2))) * present
        return self.norm(x) * present

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self(*self.tokenize(prompts)).float()
