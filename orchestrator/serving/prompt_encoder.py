"""UMT5 as a deployment of its own, which the engines of an application share.

It has no replica until an engine asks, so that a model with an encoder of its own pays nothing for it.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from model.text import pad
from model.umt5 import Umt5Encoder
from orchestrator.serving.config import EncoderConfig

UNREACHABLE = (RayError, RayServeException)
"""A deployment is being restarted, or could not do as it was asked."""
LOADING_S, WAIT_S = 1800.0, 30.0
"""Seconds that a model's first prompt may take, for which the encoder is loaded, and any other."""
FOR_EVER_S = 1e9


@serve.deployment
class PromptEncoder:
    """One replica. It holds the encoders of two models at most: the one served and the one before it."""

    def __init__(self) -> None:
        self._encoder = lru_cache(2)(
            lambda path, text_len: Umt5Encoder(path, text_len, "cuda" if torch.cuda.is_available() else "cpu")
        )
        self._thread = ThreadPoolExecutor(1)

    async def embed(self, path: str, text_len: int, prompts: list[str]) -> list[Tensor] | str:
        """Embeddings [tokens, text_dim] in the encoder's type; in words, why there are none."""
        # Not on the event loop, on which Serve asks for the replica's health.
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._embed, path, text_len, prompts
        )

    def _embed(self, path: str, text_len: int, prompts: list[str]) -> list[Tensor] | str:
        try:
            return [each.cpu() for each in self._encoder(path, text_len).embed(prompts)]
        except ValueError as error:
            return str(error)


def prompt_encoder(config: EncoderConfig) -> serve.Application:
    """The deployment, to be bound to what asks it."""
    return PromptEncoder.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=0,
            initial_replicas=0,
            max_replicas=config.replicas,
            downscale_to_zero_delay_s=FOR_EVER_S,
        ),
    ).bind()


@dataclass
class SharedEncoder:
    """A `TextEncoder` that asks the deployment. To be called off the event loop that handles run on."""

    handle: DeploymentHandle
    path: str
    text_len: int
    wait_s: float = LOADING_S

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_len, text_dim] in float32.

        ValueError for a prompt that is too long, ConnectionError where the deployment does not answer.
        """
        try:
            found: list[Tensor] | str = self.handle.embed.remote(
                self.path, self.text_len, list(prompts)
            ).result(timeout_s=self.wait_s)
        except (*UNREACHABLE, TimeoutError) as error:
            raise ConnectionError(f"the text encoder does not answer ({type(error).__name__})") from error
        if isinstance(found, str):
            raise ValueError(found)
        self.wait_s = WAIT_S
        return torch.stack([pad(each.float(), self.text_len) for each in found])
