"""How fast a quantized model writes, beside the same model in fp32 and bf16: one answer at a time, on this machine.

    python benchmarks/quantize_decode.py MODEL_FOLDER [--tokens 64] [--threads 1]

Quantizes the folder into a temporary one, loads each form as `load_model` does everywhere, lets it write the same
number of tokens behind the same prompt three times and prints the median. Ratios are to fp32.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kubetune_trainer import generate, load_model
from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.quantize.linear import IntegerLinear

REPEATS = 3
PROMPT = list(range(100, 132))


def tokens_per_second(model: Decoder, *, tokens: int) -> float:
    """The median of some answers; reading the prompt is part of each."""
    rates = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        [answer] = generate(model, [PROMPT], max_new_tokens=tokens, stop_ids=set(), temperature=0.0)
        rates.append(len(answer) / (time.perf_counter() - began))
    return statistics.median(rates)


def weight_bytes(model: Decoder) -> int:
    """Bytes of all weights in memory, those included that are there once more for few tokens."""
    packed = [layer.packed for layer in model.modules() if isinstance(layer, IntegerLinear) and layer.packed]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *itertools.chain(*packed)))


def main() -> None:
    """Measures every form and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.tokens} tokens behind {len(PROMPT)}\n")
    print("| weights | computes in | weights in memory | tokens/s | to fp32 |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        small = {scheme: Path(folder) / scheme for scheme in ("Int8WeightOnly", "Int4WeightOnly")}
        for scheme, path in small.items():
            save_compressed_tensors(options.model, path, scheme=scheme, group_size=32)
        base = None
        for name, path, dtype in (
            ("fp32", options.model, torch.float32),
            ("bf16", options.model, torch.bfloat16),
            *((scheme, path, dtype) for scheme, path in small.items() for dtype in (torch.float32, torch.bfloat16)),
        ):
            model = load_model(path, dtype=dtype)
            rate = tokens_per_second(model, tokens=options.tokens)
            base = base or rate
            size = weight_bytes(model) / 1e6
            print(f"| {name} | {str(dtype)[6:]} | {size:.0f} MB | {rate:.1f} | {rate / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
