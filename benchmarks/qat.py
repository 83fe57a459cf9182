"""What quantization-aware training saves: a small model, trained on with rounded weights and without, both quantized.

    python benchmarks/qat.py                   # all weights, and LoRA
    python benchmarks/qat.py --tuning LoRA

A model of bytes is trained on pages of Python's reference. Then it is trained on for some steps, from the same weights,
with the same rows and learning rates: once plainly, once with recipe QAT's layers. Both are written as quantized
outputs, loaded from these files, and measured on pages that neither has seen. Some minutes of one core.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from harness import reference_pages
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.export.torchao import save_torchao
from kubetune_trainer.lora import apply_lora, is_adapter, lora_scale, lora_state_dict, merge_adapters
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import load_model
from kubetune_trainer.quantize.qat import prepare_qat

HELD_OUT: Final = ("debugger", "import")
"""No other page repeats a line of these."""
SHAPE: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "float32",
}  # fmt: skip
ROWS, TOKENS, GROUP_SIZE = 8, 128, 128
FIRST_STEPS, MORE_STEPS = 600, 200
RANK = 16
RATES: Final = {"Full": 1e-3, "LoRA": 2e-3}
"""The highest learning rate with which each tuning goes on."""
SAVE: Final = {"Int4WeightOnly": save_compressed_tensors, "Int8DynamicActivationInt4Weight": save_torchao}


def main() -> None:
    """Print a row for each tuning and scheme."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tuning", choices=RATES, help="only this one")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pages = reference_pages().items()
    seen, unseen = (read([page for name, page in pages if (name in HELD_OUT) == held]) for held in (False, True))
    begun = Decoder(ModelConfig.from_hf(SHAPE))
    for weight in begun.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.05)
    train(begun, seen, steps=FIRST_STEPS, rate=2e-3, seed=1)
    for tuning in [options.tuning] if options.tuning else RATES:
        plain = trained_on(begun, seen, tuning=tuning)
        print(f"{tuning}: loss of the model: {loss_of(plain, unseen):.4f}", flush=True)
        for scheme in SAVE:
            rounded = trained_on(begun, seen, tuning=tuning, scheme=scheme)
            for name, model in (("after training", plain), ("QAT", rounded)):
                with tempfile.TemporaryDirectory() as scratch:
                    loss = loss_of(quantized(model, Path(scratch), scheme=scheme), unseen)
                print(f"{tuning}: {scheme}, {name}: {loss:.4f}", flush=True)


def trained_on(begun: Decoder, data: Tensor, *, tuning: str, scheme: Any = None) -> Decoder:
    """Return a copy that is trained on, with rounded weights where a scheme says how."""
    model = copy.deepcopy(begun)
    if tuning == "LoRA":
        apply_lora(model, rank=RANK, alpha=2 * RANK)
    if scheme is not None:
        prepare_qat(model, scheme=scheme, group_size=GROUP_SIZE)
    train(model, data, steps=MORE_STEPS, rate=RATES[tuning], seed=2)
    return model


def read(pages: list[str]) -> Tensor:
    """Return the bytes of some pages, one after the other."""
    return torch.tensor(list("".join(pages).encode()))


def train(model: Decoder, data: Tensor, *, steps: int, rate: float, seed: int) -> None:
    """Train all weights that are not frozen with AdamW; which rows are seen follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        begins = torch.randint(0, len(data) - TOKENS - 1, (ROWS,), generator=generator).tolist()
        rows = torch.stack([data[begin : begin + TOKENS + 1] for begin in begins])
        loss = model(rows[:, :-1], labels_BT=rows[:, 1:]) / rows[:, 1:].numel()
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_of(model: Decoder, data: Tensor) -> float:
    """Return the mean loss over data."""
    rows = data[: (len(data) - 1) // TOKENS * TOKENS].view(-1, TOKENS)
    labels = data[1 : rows.numel() + 1].view(-1, TOKENS)
    model.eval()
    total = sum(
        model(part, labels_BT=wanted).item() for part, wanted in zip(rows.split(32), labels.split(32), strict=True)
    )
    return total / labels.numel()


def quantized(model: Decoder, folder: Path, *, scheme: str) -> Decoder:
    """Write a model with its adapters merged, quantize it, and load what was written."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(SHAPE))
    adapters = lora_state_dict(model)
    scale = lora_scale(model) if adapters else 1.0
    weights = {
        name: merge_adapters(name, weight.detach().clone(), adapters, scale=scale)
        for name, weight in model.named_parameters()
        if not is_adapter(name)
    }
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    SAVE[scheme](folder / "model", folder / "quantized", scheme=scheme, group_size=GROUP_SIZE)
    return load_model(folder / "quantized", dtype=torch.float32)


if __name__ == "__main__":
    main()
