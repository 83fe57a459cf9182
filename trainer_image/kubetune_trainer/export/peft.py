"""Write adapters as a peft folder: adapter_config.json and adapter_model.safetensors.

Adapters with trained tokens have the tokenizer beside them that knows these tokens.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from kubetune_trainer.lora import A_SUFFIX, ALL_LINEAR, MAGNITUDE_SUFFIX
from kubetune_trainer.tokenizer import TOKENIZER_FILES
from kubetune_trainer.trained_tokens import IDS_SUFFIX

if TYPE_CHECKING:
    from kubetune_trainer.config import Lora

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
BASE_FORM = "base_form"
"""In the weights file's metadata: what the base's weights are to be made before adapters are merged into them."""
NF4 = "NF4"
TRAINED_IDS = "trainable_token_indices"


def save_peft(
    adapters: Mapping[str, Tensor],
    *,
    target_dir: Path,
    lora: "Lora",
    base_model: str,
    revision: str | None = None,
    packed: bool = False,
    model_dir: Path | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` and vLLM load.

    Args:
        adapters: What `lora_state_dict` gathered.
        target_dir: Made if it is not there.
        lora: The settings that the adapters were made with.
        base_model: Where the base model is: a Hub repository or a path; peft looks there unless it is given the base.
        revision: The base's commit, where it is a repository of the Hub.
        packed: Record, for whoever merges them, that they belong to the base in NF4; peft does not look at it.
        model_dir: Where the tokenizer comes from that adapters with trained tokens have beside them.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    weights_file = target_dir / ADAPTER_WEIGHTS_FILE
    save_file(
        {PREFIX + name: tensor.contiguous() for name, tensor in adapters.items() if not name.endswith(IDS_SUFFIX)},
        weights_file,
        metadata={"format": "pt", **({BASE_FORM: NF4} if packed else {})},
    )
    weights_file.chmod(0o644)  # safetensors lets the owner alone read it
    config = _adapter_config(adapters, lora=lora, base_model=base_model, revision=revision)
    (target_dir / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    if TRAINED_IDS in config and model_dir is not None:
        for file in (model_dir / name for name in TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, target_dir / file.name)


def _adapter_config(
    adapters: Mapping[str, Tensor], *, lora: "Lora", base_model: str, revision: str | None
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _target_modules(adapters, lora=lora),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": lora.rank_stabilized,
        "use_dora": any(name.endswith(MAGNITUDE_SUFFIX) for name in adapters),
        **_trained_ids(adapters),
    }


def _trained_ids(adapters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Say whose rows are trained: one list for the embedding alone, or one for each table by its name."""
    gathered = ((name.removesuffix(IDS_SUFFIX), ids) for name, ids in adapters.items() if name.endswith(IDS_SUFFIX))
    named = {table.rpartition(".")[2]: ids.tolist() for table, ids in gathered}
    if not named:
        return {}
    return {TRAINED_IDS: named if len(named) > 1 else next(iter(named.values()))}


def _target_modules(adapters: Mapping[str, Tensor], *, lora: "Lora") -> list[str]:
    """Say for peft which layers are meant: its names match as ours do, but its all-linear asks for the base model."""
    if ALL_LINEAR not in lora.target_modules:
        return list(lora.target_modules)
    layers = {name.removesuffix(A_SUFFIX) for name in adapters if name.endswith(A_SUFFIX)}
    return sorted({layer.rpartition(".")[2] for layer in layers})
