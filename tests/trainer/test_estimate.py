"""The estimate's parts follow from the model's shape and the run, and activations are those that torch really keeps."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kubetune_trainer.config import FineTuneConfig, load_config
from kubetune_trainer.estimate import RUNTIME_BYTES, activation_bytes, count_parameters, estimate_memory, host_bytes
from kubetune_trainer.model.attention import HAS_BF16_TILES
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.weights import build_model
from tests.cluster.paths import ROOT
from tests.trainer.tiny_model import model_config

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
PARAMETERS = 8_030_261_248  # as its model card says
KEPT = (2 * 128256 + 65) * 4096  # embedding, output head and norms are not packed
SHAPE = ModelConfig.from_hf(LLAMA_8B)
GIB = 2**30


def config(tmp_path: Path, *overrides: str) -> FineTuneConfig:
    path = tmp_path / "run.yaml"
    values = {
        "model": {"uri": {"location": "s3://models/llama"}},
        "dataset": {"sources": [{"name": "data", "uri": {"location": "s3://data/train.jsonl"}}]},
        "training": {"max_steps": 1, "activation_checkpointing": "Full"},
    }
    path.write_text(yaml.safe_dump(values))
    return load_config(path, overrides=overrides)


def parts(message: str) -> dict[str, float]:
    """The named parts in bytes."""
    found = re.findall(r"([a-z ]+) ([\d.]+) (GiB|MiB)(?:, |$)", message)
    return {name.strip(): float(size) * (GIB if unit == "GiB" else 2**20) for name, size, unit in found}


def test_parameters_are_counted_as_the_model_card_has_them() -> None:
    assert count_parameters(SHAPE) == PARAMETERS


@pytest.mark.parametrize(
    ("overrides", "weights", "gradients", "optimizer"),
    [
        (["tuning=Full"], 4 * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS),
        (["tuning=Full", "training.precision=BF16"], 2 * PARAMETERS, 2 * PARAMETERS, 4 * PARAMETERS),
        (["tuning=Full", "run.num_nodes=2", "run.processes_per_node=4"], PARAMETERS / 2, PARAMETERS / 2, PARAMETERS),
        (["tuning=QLoRA"], 2 * KEPT + 0.515625 * (PARAMETERS - KEPT) + 4 * 41_943_040, 4 * 41_943_040, 8 * 41_943_040),
        ([], 2 * PARAMETERS + 4 * 41_943_040, 4 * 41_943_040, 8 * 41_943_040),  # as peft counts rank 16 on all layers
    ],
)
def test_weights_gradients_and_optimizer_are_spread_over_ranks(
    overrides: list[str], weights: float, gradients: float, optimizer: float, tmp_path: Path
) -> None:
    found = parts(estimate_memory(config(tmp_path, *overrides), SHAPE).message)
    expected = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.02)


def test_trained_tokens_need_a_copy_of_the_output_head_and_its_gradient_at_the_loss(tmp_path: Path) -> None:
    plain = parts(estimate_memory(config(tmp_path), SHAPE).message)
    trained = parts(estimate_memory(config(tmp_path, "lora.train_tokens=[a, b]"), SHAPE).message)
    assert trained["gathered"] - plain["gathered"] == pytest.approx(2 * 2 * 128256 * 4096, rel=0.06)
    assert trained["weights"] == plain["weights"], "a few rows are nothing beside it"
    assert trained["logits"] > plain.get("logits", 0) == 0, "the peak is at the loss now"


BLOCKS = PARAMETERS - KEPT
GROUPS = ["tuning=Full", "run.num_nodes=2", "run.processes_per_node=4"]


@pytest.mark.parametrize(
    ("overrides", "held"),
    [
        ([*GROUPS, "training.parallelism.replicate=2"], PARAMETERS / 4),
        ([*GROUPS, "training.parallelism.tensor=2"], BLOCKS / 8 + KEPT / 4),
        ([*GROUPS, "training.parallelism.replicate=2", "training.parallelism.tensor=4"], BLOCKS / 4 + KEPT),
    ],
)
def test_copies_share_nothing_and_tensor_groups_share_what_lies_in_blocks(
    overrides: list[str], held: float, tmp_path: Path
) -> None:
    found = parts(estimate_memory(config(tmp_path, *overrides), SHAPE).message)
    expected = {"weights": 4 * held, "gradients": 4 * held, "optimizer": 8 * held}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.02)


def test_split_layers_need_less_activations(tmp_path: Path) -> None:
    plain, split = (
        parts(estimate_memory(config(tmp_path, "run.num_nodes=2", "training.activation_checkpointing=None",
                                     f"training.parallelism.tensor={size}"), SHAPE).message)
        for size in (1, 2)
    )  # fmt: skip
    assert split["activations"] == pytest.approx(0.57 * plain["activations"], rel=0.05), "norms are whole"


def test_offloaded_activations_are_those_of_two_blocks_and_the_rest_is_in_the_hosts_memory(tmp_path: Path) -> None:
    recompute = "training.activation_checkpointing=None"
    # A compiler decides what is kept, too: neither leaves anything to be made again.
    plain = estimate_memory(config(tmp_path, recompute, "training.compile=Blocks"), SHAPE)
    there = estimate_memory(config(tmp_path, recompute, "training.activation_offload=true"), SHAPE)
    before, after = parts(plain.message)["activations"], parts(there.message.partition(";")[0])["activations"]
    assert before - after == pytest.approx(before * (1 - 2 / SHAPE.num_layers), rel=0.02)
    assert there.message.endswith(" GiB in the host's memory")
    assert host(there.message) == pytest.approx(before, rel=0.03)


@pytest.mark.parametrize("tuning", ["Full", "LoRA"])
def test_offloaded_weights_leave_what_is_gathered(tuning: str, tmp_path: Path) -> None:
    plain, away = (
        estimate_memory(config(tmp_path, f"tuning={tuning}", "run.num_nodes=2", *more), SHAPE).message
        for more in ((), ("training.cpu_offload=true",))
    )
    before, after = parts(plain), parts(away.partition(";")[0])
    state = {"weights", "gradients", "optimizer"}
    assert not state & set(after)
    assert host(away) == pytest.approx(sum(before[name] for name in state), rel=0.02)


def host(message: str) -> float:
    """What it says of the host's memory, in bytes."""
    [size] = re.findall(r"; ([\d.]+) GiB in the host's memory", message)
    return float(size) * GIB


@pytest.mark.parametrize(
    ("overrides", "others", "expected"),
    [
        (["tuning=Full"], {}, 2 * PARAMETERS),
        (["run.num_nodes=2"], {"dpo.reference": SHAPE}, PARAMETERS),
        ([], {}, None),
    ],
)
def test_a_reference_is_counted_where_it_is_a_model_of_its_own(
    overrides: list[str], others: dict[str, Any], expected: float | None, tmp_path: Path
) -> None:
    found = parts(estimate_memory(config(tmp_path, "recipe=DPO", *overrides), SHAPE, others=others).message)
    assert found.get("reference") == (None if expected is None else pytest.approx(expected, rel=0.02))


@pytest.mark.parametrize("recipe", ["DPO", "KTO", "SFT"])
def test_a_copy_of_the_first_adapters_is_counted_where_they_are_the_reference(recipe: str, tmp_path: Path) -> None:
    begun = (f"recipe={recipe}", "run.num_nodes=2", "lora={rank: 64, adapter: {uri: {location: 's3://runs/adapter'}}}")
    found = parts(estimate_memory(config(tmp_path, *begun), SHAPE).message)
    adapters = found["optimizer"] / 2
    assert found.get("reference") == (None if recipe == "SFT" else pytest.approx(adapters, rel=0.01))
    away = config(tmp_path, *begun, "training.cpu_offload=true")
    plain = config(tmp_path, *begun[:2], "lora={rank: 64}", "training.cpu_offload=true")
    assert "reference" not in parts(estimate_memory(away, SHAPE).message.partition(";")[0])
    more = host_bytes(away, SHAPE) - host_bytes(plain, SHAPE)
    assert more == (0 if recipe == "SFT" else pytest.approx(adapters, rel=0.01))


def test_the_tables_of_the_page_about_memory_are_what_the_estimate_says(tmp_path: Path) -> None:
    lines = (ROOT / "docs" / "memory.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| Llama-")]
    shapes = {}
    for name, hidden, inner, layers, heads, kv, head, vocab, tied, parameters in (
        row for row in rows if len(row) == 10
    ):
        shapes[name] = ModelConfig.from_hf(LLAMA_8B | {
            "hidden_size": int(hidden), "intermediate_size": int(inner), "num_hidden_layers": int(layers),
            "num_attention_heads": int(heads), "num_key_value_heads": int(kv), "head_dim": int(head),
            "vocab_size": int(vocab), "tie_word_embeddings": tied == "yes",
        })  # fmt: skip
        assert count_parameters(shapes[name]) == int(parameters.replace(",", ""))
    told = [row for row in rows if len(row) == 9]
    assert len(told) > 15
    switches = {
        "": (),
        "AdamW8bit": ("training.optimizer=AdamW8bit",),
        "optimizerInBackward": ("training.optimizer_in_backward=true", "training.global_batch_size=1"),
        "activationOffload": ("training.activation_offload=true",),
        "cpuOffload": ("training.cpu_offload=true",),
    }
    used = set()
    for name, tuning, precision, recompute, rows_at_once, more, gibibytes, in_host, fits in told:
        used |= set(more.split(", "))
        run = config(
            tmp_path, f"tuning={tuning}", f"training.precision={precision}",
            f"training.activation_checkpointing={recompute}", f"training.micro_batch_size={rows_at_once}",
            *(override for switch in more.split(", ") for override in switches[switch]),
        )  # fmt: skip
        needed = estimate_memory(run, shapes[name]).memory_per_device_bytes / GIB
        host = host_bytes(run, shapes[name]) / GIB
        computed = (f"{needed:.1f}", f"{host:.1f}" if host else "", "yes" if needed < 24 else "no")
        assert computed == (gibibytes, in_host, fits), (name, tuning, precision, recompute, more, computed)
    assert used == set(switches)


def test_the_parts_add_up(tmp_path: Path) -> None:
    estimate = estimate_memory(config(tmp_path), SHAPE)
    found = parts(estimate.message)
    assert list(found) == [
        "weights", "gradients", "optimizer", "gathered", "activations", "kernels", "runtime",
    ]  # fmt: skip
    assert sum(found.values()) == pytest.approx(estimate.memory_per_device_bytes, rel=0.02)
    assert found["runtime"] == RUNTIME_BYTES


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ("training.micro_batch_size=4", pytest.approx(4)),
        ("training.precision=FP32", pytest.approx(1.9, rel=0.07)),
        ("training.activation_checkpointing=None", pytest.approx(7, rel=0.1)),
        ("training.activation_checkpointing=Selective", pytest.approx(7, rel=0.1)),
    ],
)
def test_activations_follow_the_micro_batch(change: str, factor: Any, tmp_path: Path) -> None:
    before = activation_bytes(config(tmp_path), SHAPE)
    assert activation_bytes(config(tmp_path, change), SHAPE) / before == factor


@pytest.mark.parametrize("precision", ["FP32", "BF16"])
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
        {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
        {
            "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
            "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        {
            "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 16, "hidden_size": 64,
            "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
        },
    ],
    ids=["llama", "wide llama", "mixtral", "gemma2"],
)  # fmt: skip
def test_activations_are_what_torch_keeps_for_the_backward_pass(
    precision: str, shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "BF16" and not HAS_BF16_TILES:
        pytest.skip("needs a CPU with AMX: others attend in fp32")
    run = config(
        tmp_path, f"training.precision={precision}", "training.activation_checkpointing=None",
        "training.micro_batch_size=2", "dataset.max_sequence_length=128", "tuning=Full", "lora=null",
    )  # fmt: skip
    shapes = [ModelConfig.from_hf(model_config(**shape, num_hidden_layers=number)) for number in (6, 2)]
    dtype = torch.float32 if precision == "FP32" else torch.bfloat16
    more, less = (kept_by_blocks(each, dtype=dtype, monkeypatch=monkeypatch) for each in shapes)
    counted = activation_bytes(run, shapes[0]) - activation_bytes(run, shapes[1])
    assert counted == pytest.approx(more - less, rel=0.15)


def kept_by_blocks(shape: ModelConfig, *, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the bytes that torch keeps of a model's blocks, less what they make again."""
    model = build_model(shape).to(dtype).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    class Counted(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
            def keep(tensor: torch.Tensor) -> Any:
                packed = pack(tensor)
                if isinstance(packed, torch.Tensor):
                    kept[packed.untyped_storage().data_ptr()] = packed
                return packed

            super().__init__(keep, unpack)

    tokens_BT = torch.randint(0, 250, (2, 128))
    documents_BT = (torch.arange(128) >= 64).long().expand(2, 128)  # two packed samples each
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", Counted)
        model(tokens_BT, documents_BT=documents_BT, labels_BT=tokens_BT)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)


def test_a_teacher_is_counted_and_its_pupil_needs_more(tmp_path: Path) -> None:
    teacher = "distillation.teacher.uri.location=s3://models/teacher"
    made = config(tmp_path, "recipe=Distillation", teacher, "run.num_nodes=2")
    found = parts(estimate_memory(made, SHAPE, others={"distillation.teacher": SHAPE}).message)
    assert found["teacher"] == pytest.approx(PARAMETERS, rel=0.02), "bf16, shared by two ranks"
    alone = estimate_memory(config(tmp_path, "run.num_nodes=2"), SHAPE).memory_per_device_bytes
    assert estimate_memory(made, SHAPE).memory_per_device_bytes >= alone
