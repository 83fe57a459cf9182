"""Compiled blocks: torch.compile makes fewer and faster kernels of each decoder layer.

All layers of a kind share one compilation, and every length of row shares it after the second one. It takes from half a
minute on, once per attempt, and needs a compiler in the image, which `check_compiler` asks for before anything else.
Numbers change as rounding does: some 1e-6 of the loss in fp32. This tree's tests run it on CPU only, never on CUDA.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Final

import torch

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.model.block_attention import MAX_COMPILATIONS
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.storage import scratch_dir

COMPILERS: Final = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang"))}
"""The variable that names a compiler for a device, and where it is not set, the programs that are looked for."""


def check_compiler(title: str, *, device_type: str) -> None:
    """Make sure that blocks can be compiled here.

    Args:
        title: The job, for the error.
        device_type: What is compiled for.

    Raises:
        ConfigError: A compiler is missing, or Python's headers are.
    """
    variable, programs = COMPILERS[device_type]
    named = os.environ.get(variable)
    missing = []
    if not any(shutil.which(program) for program in ([named] if named else programs)):
        missing.append(named or " or ".join(programs))
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python.h")
    if missing:
        raise ConfigError(
            f"{title}: training.compile must be None where {' and '.join(missing)} is not installed, got Blocks",
            hint="Build the trainer's image with --build-arg PACKAGES=g++, or leave training.compile at None.",
        )


def keep_kernels() -> None:
    """Let what is compiled lie in scratch: no other folder of a pod is sure to be writable."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch_dir() / "compiled"))


def compile_blocks(model: Decoder) -> None:
    """Have every layer compiled when it is first called; FSDP's hooks stay outside of what is compiled."""
    keep_kernels()
    torch._dynamo.config.recompile_limit = MAX_COMPILATIONS  # noqa: SLF001 (torch documents it under this name)
    for block in model.model.layers:
        block.forward = torch.compile(block.forward)
