"""Quantizes a model of more than a gigabyte and prints how much memory that took; run in a process of its own.

python tests/trainer/quantize_memory.py FOLDER SCHEME
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import torch

from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.export.shards import Planned, ShardWriter
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.weights import build_model

SHARD_BYTES = 300_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 9, "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "vocab_size": 1000, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_model(folder: Path) -> tuple[int, int]:
    """A random model; returns the bytes of its weights and the elements of the largest."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {name: tuple(p.shape) for name, p in build_model(ModelConfig.from_hf(CONFIG)).named_parameters()}
    planned = [Planned(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    drawn = torch.randn(largest, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    with ShardWriter(folder, planned, max_shard_bytes=SHARD_BYTES) as writer:
        for name, shape in shapes.items():
            writer.write(name, drawn[: torch.Size(shape).numel()].reshape(shape))
    return sum(tensor.nbytes for tensor in planned), largest


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Watch(threading.Thread):
    """Samples the memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.001)


def main() -> None:
    folder, scheme = Path(sys.argv[1]), sys.argv[2]
    if not folder.exists():
        sizes = write_model(folder)
        (folder / "sizes").write_text(json.dumps(sizes))
        return
    before, watch = anonymous_bytes(), Watch()
    watch.start()
    save_compressed_tensors(folder, folder.with_name("out"), scheme=scheme, group_size=32)
    watch.over.set()
    watch.join()
    total, largest = json.loads((folder / "sizes").read_text())
    print(json.dumps({"took": watch.peak - before, "total": total, "largest": largest}))


if __name__ == "__main__":
    main()
