"""The training step of each project, for the tables lora, full and mfu: the same model, rows, optimizer and clipping.

Settings: model (folder), rows, length, share (of a row's tokens that are trained, at its end), tuning (LoRA or Full),
rank, targets (names of linear layers), dropout (of adapters), precision, steps, clipped (unless false), compiled (by
`torch.compile`: each block of ours and of torchtune, as its recipes do; the whole of transformers' model, as its
Trainer does, and of litgpt's). No activation checkpointing; rows are full, so nothing is padded.

Precisions are ours. FP32: all in fp32. BF16Mixed: frozen weights in bf16, trained ones in fp32, computed in bf16, which
PEFT's users get of autocast. BF16: all in bf16, which is what torchtune and litgpt have.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, Measures, Settings, Side, now, peak_bytes, resident_bytes, stored_dtype

LEARNING_RATE = 1e-4
Step = Callable[[], float]


def token_rows(settings: Settings) -> tuple[Any, Any]:
    """Returns tokens and labels (not shifted), made of the example tickets."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{settings['model']}/tokenizer.json")
    lines = (ROOT / "examples" / "data" / "tickets-train.jsonl").read_text().splitlines()
    text = "\n".join(message["content"] for line in lines for message in json.loads(line)["messages"])
    wanted = settings["rows"] * settings["length"]
    tokens = torch.tensor(tokenizer.encode(text).ids[:wanted]).view(settings["rows"], settings["length"])
    labels = tokens.clone()
    labels[:, : round((1 - settings["share"]) * settings["length"])] = -100
    return tokens, labels


def measure(step: Step, settings: Settings, *, baseline: int) -> Measures:
    """Takes one step to warm up, then some that count."""
    loss = step()
    times = []
    for _ in range(settings["steps"]):
        began = now()
        step()
        times.append(now() - began)
    tokens = settings["rows"] * settings["length"]
    return {"tokensPerSecond": tokens / min(times), "peakBytes": peak_bytes() - baseline, "loss": loss}


def optimized(parameters: Any, loss_of: Callable[[], Any], settings: Settings) -> Step:
    """Returns a step as every side takes it."""
    import torch

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        if settings.get("clipped", True):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ours(settings: Settings) -> Measures:
    """Our decoder, adapters and loss."""
    import torch

    from kubetune_trainer.compiled import compile_blocks
    from kubetune_trainer.lora import apply_lora, init_lora
    from kubetune_trainer.model.config import read_config
    from kubetune_trainer.model.weights import build_model, load_weights
    from kubetune_trainer.parallel import set_dtypes

    tokens, labels = token_rows(settings)
    baseline = resident_bytes()
    model = build_model(read_config(Path(settings["model"])))
    if settings["tuning"] == "LoRA":
        dropout = settings.get("dropout", 0.0)
        rank = settings["rank"]
        apply_lora(model, rank=rank, alpha=2 * rank, dropout=dropout, target_modules=settings["targets"])
    set_dtypes(model, precision=settings["precision"])
    model.to_empty(device="cpu")
    load_weights(model, settings["model"])
    init_lora(model, seed=0)
    if settings.get("compiled"):
        compile_blocks(model)
    shifted = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
    trained = int((shifted != -100).sum())
    step = optimized(model.parameters(), lambda: model(tokens, labels_BT=shifted) / trained, settings)
    return measure(step, settings, baseline=baseline)


def transformers(settings: Settings) -> Measures:
    """transformers, with PEFT for adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tokens, labels = token_rows(settings)
    baseline = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=stored_dtype(settings))
    model.config.use_cache = False
    if settings["tuning"] == "LoRA":
        rank = settings["rank"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=settings["targets"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if settings.get("compiled"):
        model = torch.compile(model)

    def loss_of() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings["precision"] == "BF16Mixed"):
            loss: torch.Tensor = model(input_ids=tokens, labels=labels).loss
        return loss

    return measure(optimized(model.parameters(), loss_of, settings), settings, baseline=baseline)


def torchtune(settings: Settings) -> Measures:
    """Torchtune 0.6.1, with its chunked loss."""
    import torch
    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3_2._component_builders import llama3_2, lora_llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import compile_loss, compile_model

    tokens, labels = token_rows(settings)
    baseline = resident_bytes()
    config = json.loads(Path(settings["model"], "config.json").read_text())
    shape = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": settings["length"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": config["rope_theta"],
        "scale_factor": 1,
    }
    torch.set_default_dtype(stored_dtype(settings))
    if settings["tuning"] == "LoRA":
        names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
        model = lora_llama3_2(
            [name for ours, name in names.items() if ours in settings["targets"]],
            apply_lora_to_mlp="up_proj" in settings["targets"],
            lora_rank=settings["rank"],
            lora_alpha=2 * settings["rank"],
            lora_dropout=settings.get("dropout", 0.0),
            **shape,
        )
        set_trainable_params(model, get_adapter_params(model))
    else:
        model = llama3_2(**shape)
    torch.set_default_dtype(torch.float32)
    weights = load_file(f"{settings['model']}/model.safetensors")
    heads = {"num_heads": shape["num_heads"], "num_kv_heads": shape["num_kv_heads"]}
    model.load_state_dict(hf_to_tune(weights, dim=shape["embed_dim"], **heads), strict=False)
    del weights
    loss_of = CEWithChunkedOutputLoss()
    if settings.get("compiled"):
        compile_model(model)
        loss_of = compile_loss(loss_of)
    model.set_num_output_chunks(loss_of.num_output_chunks)
    shifted = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
    step = optimized(model.parameters(), lambda: loss_of(model(tokens), shifted), settings)
    return measure(step, settings, baseline=baseline)


def litgpt(settings: Settings) -> Measures:
    """litgpt, with its chunked head and loss."""
    import torch
    from litgpt import GPT as PlainGPT  # noqa: N811
    from litgpt import Config as PlainConfig
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    tokens, labels = token_rows(settings)
    baseline = resident_bytes()
    shape = shape_of_litgpt(settings)
    adapters = settings["tuning"] == "LoRA"
    torch.set_default_dtype(stored_dtype(settings))
    if adapters:
        names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "projection", "up_proj": "mlp"}
        lora = {f"lora_{name}": ours in settings["targets"] for ours, name in names.items()}
        rank = {"lora_r": settings["rank"], "lora_alpha": 2 * settings["rank"]}
        config = Config(**shape, **rank, lora_dropout=settings.get("dropout", 0.0), **lora)
        model = GPT(config)
    else:
        config = PlainConfig(**shape)
        model = PlainGPT(config)
    torch.set_default_dtype(torch.float32)
    weights = load_file(f"{settings['model']}/model.safetensors")
    converted: dict[str, Any] = {}
    copy_weights_hf_llama(config, {}, converted, weights)
    model.load_state_dict(converted, strict=False)
    del weights, converted
    if adapters:
        mark_only_lora_as_trainable(model)
    model.max_seq_length = settings["length"]
    if settings.get("compiled"):
        model = torch.compile(model)

    def loss_of() -> torch.Tensor:
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:])

    return measure(optimized(model.parameters(), loss_of, settings), settings, baseline=baseline)


def shape_of_litgpt(settings: Settings) -> dict[str, Any]:
    """Returns litgpt's words for a Llama's config."""
    config = json.loads(Path(settings["model"], "config.json").read_text())
    return {
        "name": "benchmark",
        "block_size": settings["length"],
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "n_query_groups": config["num_key_value_heads"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": config["intermediate_size"],
        "rope_base": config["rope_theta"],
        "norm_eps": config["rms_norm_eps"],
    }


SIDES = {
    "ours": Side(run=ours),
    "transformers": Side(run=transformers),
    "torchtune": Side(run=torchtune, environment="torchtune"),
    "litgpt": Side(run=litgpt, environment="litgpt"),
}
