"""PyTorch's pickles of tensors, read without executing what is in them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read_pickle(path: Path) -> Mapping[Any, Any]:
    """What a file holds by name, mapped into memory where it can be.

    ValueError where that is more than tensors, or the file is damaged, FileNotFoundError where there is none.
    """
    for mmap in (True, False):  # files of old releases of PyTorch cannot be mapped
        try:
            body = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except pickle.UnpicklingError as error:
            if "Weights only load failed" not in str(error):
                raise ValueError(f"{path} is damaged: {first_line(error)}.") from None
            raise ValueError(
                f"{path} holds more than tensors, which would have to be executed to be read; save its "
                "tensors alone, as safetensors best."
            ) from None
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            if not mmap or "mmap" not in str(error):
                raise ValueError(f"{path} is damaged, or no PyTorch file: {first_line(error)}.") from None
    if not isinstance(body, Mapping):
        raise ValueError(f"{path} holds a {type(body).__name__} and no tensors by name.")
    return body


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
