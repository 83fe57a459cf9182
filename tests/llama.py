"""llama.cpp, as tests and benchmarks open a GGUF file with it."""

from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
from llama_cpp import llama_cpp as bindings


def open_llama(file: Path, **settings: Any) -> llama_cpp.Llama:
    """Load a file, with its weights in memory as they are in the file.

    On a CPU with AMX llama.cpp would arrange Q8_0 anew for it, and then ends with a segmentation fault at the first
    token (llama-cpp-python 0.3.36); `Llama` has no argument against that.
    """
    parameters = bindings.llama_model_default_params()
    parameters.use_extra_bufts = False
    with mock.patch.object(bindings, "llama_model_default_params", return_value=parameters):
        return llama_cpp.Llama(str(file), verbose=False, logits_all=True, **settings)
