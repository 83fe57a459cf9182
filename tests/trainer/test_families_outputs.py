"""Outputs of every family: peft loads the adapters, quantized folders stay near, and mixtures train on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import multiprocessing

from kubetune_trainer.config import Lora
from kubetune_trainer.config.outputs import SCHEMES
from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.export import save_peft
from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.export.torchao import save_torchao
from kubetune_trainer.generation import generate
from kubetune_trainer.lora import lora_state_dict
from kubetune_trainer.model import load_model
from kubetune_trainer.quantize.calibrate import calibrate
from tests.cluster.paths import ROOT
from tests.trainer.conftest import Held
from tests.trainer.families import FAMILIES, MIXTURES, make_folder
from tests.trainer.parallel_ranks import NUM_ROWS, run, train
from tests.trainer.test_export import with_trained_adapters
from tests.trainer.test_families import CHECKS
from tests.trainer.test_families_gguf import CASES, SIZES
from tests.trainer.tiny import random_tokens

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""In mixtures only these are linear layers to peft, since transformers 5 keeps experts in one parameter."""
SHALLOW = {"num_hidden_layers": 2, "layer_types": None, "intermediate_size": 128, "moe_intermediate_size": 64}
SAVERS = {"CompressedTensors": save_compressed_tensors, "TorchAO": save_torchao}
LIMITS = {
    "Int8WeightOnly": 0.1, "Int8DynamicActivation": 0.2, "Float8WeightOnly": 0.25, "Int4WeightOnly": 0.7,
    "Int8DynamicActivationInt4Weight": 0.7, "NF4": 0.7,
}  # fmt: skip
"""How far logits may be from the source's, as a part of their length; one weight in another's place makes 1.

Measured were at most 0.04, 0.11 (with experts, since a token that is rounded may pass others), 0.14, 0.47, 0.47, 0.51.
"""
NEEDS_A_GPU = ("Float8DynamicActivation",)


def write_folder(folder: Path, family: str) -> Any:
    return make_folder(folder, family, SIZES | CASES[family][0] | SHALLOW)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft 0.21 asks transformers 5 by an old name
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_adapters_of_a_family_and_gives_our_logits(tmp_path: Path, family: str, held: Held) -> None:
    base = write_folder(tmp_path / "a", family)
    targets = ATTENTION if family in MIXTURES else ("all-linear",)
    model = with_trained_adapters(tmp_path / "a", targets=targets)
    adapters = lora_state_dict(model)
    save_peft(
        adapters, target_dir=tmp_path / "b", lora=Lora(rank=4, alpha=6, target_modules=targets), base_model="owner/name"
    )
    theirs = PeftModel.from_pretrained(base, tmp_path / "b").eval()
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        wanted = theirs(tokens).logits
        torch.testing.assert_close(model(tokens), wanted, atol=1e-5, rtol=1e-5)
        with theirs.disable_adapter():
            assert (theirs(tokens).logits - wanted).abs().max() > 1e-2, "the adapters change what is computed"
    held(family, "PEFT")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_quantized_folders_of_a_family_stay_near_and_answers_are_transformers(
    tmp_path: Path, family: str, held: Held
) -> None:
    reference = write_folder(tmp_path / "a", family)
    model = load_model(tmp_path / "a", dtype=torch.float32)
    prompt = random_tokens(1, 9)
    theirs = reference.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    assert generate(model, prompt.tolist(), max_new_tokens=12, stop_ids=[])[0] == theirs
    held(family, "generation")
    tokens = random_tokens(2, 20)
    wanted = model(tokens)
    for form, save in SAVERS.items():
        for scheme in (scheme for scheme in SCHEMES[form] if scheme not in NEEDS_A_GPU):
            folder = tmp_path / f"{form}-{scheme}"
            save(tmp_path / "a", folder, scheme=scheme, group_size=16)
            assert 0 < error_of(folder, tokens, wanted) < LIMITS[scheme], f"{form} {scheme}"
            held(family, f"{form} {scheme}")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_of_a_family_are_rounded_by_data(tmp_path: Path, family: str, held: Held) -> None:
    write_folder(tmp_path / "a", family)
    rows = random_tokens(24, 48)
    batches = [as_batch(row[None]) for row in rows]
    rounded = calibrate(tmp_path / "a", batches, bits=4, group_size=16, folder=tmp_path / "rounded")
    wanted = load_model(tmp_path / "a", dtype=torch.float32)(rows)
    options = {"scheme": "Int4WeightOnly", "group_size": 16}
    save_compressed_tensors(tmp_path / "a", tmp_path / "gptq", rounded=rounded, **options)
    save_compressed_tensors(tmp_path / "a", tmp_path / "nearest", **options)
    assert 0 < error_of(tmp_path / "gptq", rows, wanted) < error_of(tmp_path / "nearest", rows, wanted)
    held(family, "GPTQ")


def error_of(folder: Path, tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    found = load_model(folder, dtype=torch.float32)(tokens)
    return ((found - wanted).norm() / wanted.norm()).item()


def as_batch(tokens_BT: torch.Tensor) -> Batch:
    positions = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    return Batch(
        tokens=tokens_BT, labels=tokens_BT.roll(-1, dims=1), documents=torch.zeros_like(tokens_BT), positions=positions,
        num_tokens=tokens_BT.numel(), trained_tokens=tokens_BT.numel(),
    )  # fmt: skip


def test_the_page_of_models_has_every_family_and_check_in_its_table() -> None:
    """Printed by the command on the page, which is to be run again whenever families or checks change."""
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    begin = next(place for place, cells in enumerate(rows) if CHECKS[0] in cells)
    schemes = [f"{form} {scheme}" for form in SAVERS for scheme in SCHEMES[form] if scheme not in NEEDS_A_GPU]
    checks = [*CHECKS, "GGUF", "ExecuTorch", "PEFT", "generation", *schemes, "GPTQ", "2 ranks"]
    assert set(rows[begin][1:]) == set(checks)
    table = {cells[0]: dict(zip(rows[begin][1:], cells[1:], strict=True)) for cells in rows[begin + 2 :]}
    assert table.keys() >= set(FAMILIES)
    for family in FAMILIES:
        assert all(table[family][check] for check in checks if check != "2 ranks" or family in MIXTURES), family


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_train_on_two_ranks_as_on_one(tmp_path: Path, family: str, held: Held) -> None:
    write_folder(tmp_path / "model", family)
    multiprocessing.set_forkserver_preload(["torch._dynamo", "tests.trainer.parallel_ranks"])
    multiprocessing.start_processes(
        run, args=("2 ranks", tmp_path, ("full fp32",)), nprocs=2, start_method="forkserver"
    )
    results = torch.load(tmp_path / "2 ranks.pt")["full fp32"]
    losses, norms = train(load_model(tmp_path / "model", dtype=torch.float32), rows=slice(0, NUM_ROWS))
    assert results["losses"] == pytest.approx(losses, rel=1e-5)
    assert results["norms"] == pytest.approx(norms, rel=1e-5)
    held(family, "2 ranks")
