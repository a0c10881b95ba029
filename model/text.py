"""Prompts → embeddings. The embedded default reads bytes; a pretrained encoder has the same interface.

An encoder maps prompts to `[B, text_len, text_dim]`, zero where there is no text. To the byte encoder the
empty prompt (what classifier-free guidance calls unconditional) is all zeros.
"""

from collections.abc import Sequence
from textwrap import shorten
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORD_BYTES = 16
"""Bytes that one token holds; a longer word takes several."""


def split_words(prompt: str) -> list[bytes]:
    """One item a token: the UTF-8 bytes of each word, at most WORD_BYTES at a time."""
    return [
        data[first : first + WORD_BYTES]
        for data in (word.encode() for word in prompt.split())
        for first in range(0, len(data), WORD_BYTES)
    ]


def pad(embedding: Tensor, text_len: int) -> Tensor:
    """An embedding [tokens, text_dim] with zeros up to `text_len` tokens, as Wan's transformer reads it."""
    return F.pad(embedding, (0, 0, 0, text_len - len(embedding)))


class TextEncoder(Protocol):
    """What pipelines need of a text encoder."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_len, text_dim] in float32; ValueError for a prompt longer than that."""
        ...


class ByteEncoder(nn.Module):
    """A small encoder without a vocabulary, one token a word, trained with the teacher and then frozen.

    A word is the sum of its UTF-8 bytes, each multiplied by its place in the word: words that share letters
    or even all of them start out nearly orthogonal, as the embeddings of a vocabulary do (Plate, Holographic
    Reduced Representations, 1995).
    """

    def __init__(self, text_len: int, text_dim: int):
        super().__init__()
        self.text_len = text_len
        self.byte = nn.Embedding(256, text_dim)
        self.place = nn.Parameter(torch.randn(WORD_BYTES, text_dim))
        self.position = nn.Parameter(torch.randn(text_len, text_dim) * 0.1)
        self.norm = nn.LayerNorm(text_dim)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Bytes of words [B, text_len, WORD_BYTES], 0 where there are none; ValueError for too many words."""
        tokens = torch.zeros(len(prompts), self.text_len, WORD_BYTES, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = split_words(prompt)
            if len(words) > self.text_len:
                raise ValueError(
                    f"the prompt {shorten(prompt, 60)!r} has {len(words)} words, more than the "
                    f"{self.text_len} that this model reads; shorten it."
                )
            for column, word in enumerate(words):
                tokens[row, column, : len(word)] = torch.tensor(list(word))
        return tokens.to(self.position.device)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens > 0)[..., None]
        words = (self.byte(tokens) * self.place * there).sum(2)
        return self.norm(words + self.position) * there[:, :, 0]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self(self.tokenize(prompts)).float()
