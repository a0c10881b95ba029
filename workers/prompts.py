"""Prompts as embeddings: read from a data set, or given."""

from safetensors.torch import load_file
from torch import Tensor

from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory


class PromptWorker:
    """An actor that reads prompts and hands out their embeddings, one reference a sample."""

    def __init__(self, path: str, seed: int, model: str):
        """`model` names the directory whose encoder embeds prompts, unless the data set holds an `embedding` column."""
        source = ModelDirectory(model)
        self._embedded = source.card.text.encoder == "embedded"
        self._data = ParquetDataset(path, ["embedding"] if self._embedded else ["prompt"])
        self._encoder = None if self._embedded else source.text_encoder()
        self._seed = seed

    def batch(self, position: int, size: int) -> list[Tensor] | Tensor:
        """Embeddings [text_len, text_dim] of samples `position …`, in the seeded order."""
        rows = self._data.batch(position, size, self._seed)
        if self._embedded:
            return unwrapped([row["embedding"] for row in rows])
        return unwrapped(self._encode([row["prompt"] for row in rows]))

    def unconditional(self, prompt: str, file: str | None) -> Tensor:
        """Embedding of the negative prompt: of its text, or from `file` where prompts come embedded."""
        return self._encode([prompt])[0] if file is None else load_file(file)["embedding"]

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        if self._encoder is None:
            raise ValueError(
                "prompts come embedded, so distill.roles.teacher.negative_embedding must name the negative one's file."
            )
        return [embedding.clone() for embedding in self._encoder.encode(prompts)]


def unwrapped(embeddings: list[Tensor]) -> list[Tensor] | Tensor:
    """Ray splits a list over several references, but hands a list of one over as it is."""
    return embeddings if len(embeddings) > 1 else embeddings[0]
