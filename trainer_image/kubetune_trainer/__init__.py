"""Building blocks for fine-tuning language models with plain PyTorch.

`load_model`, `load_tokenizer` and `generate` are enough to use a model; the recipes show how the rest goes together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kubetune_trainer.generation import generate
    from kubetune_trainer.model import load_model
    from kubetune_trainer.tokenizer import load_tokenizer

__all__ = ["generate", "load_model", "load_tokenizer"]

_MODULES = {"generate": "generation", "load_model": "model", "load_tokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
