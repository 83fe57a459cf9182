"""Sharded training is the same training: weights load into shards, and losses, norms and steps do not change."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from kubetune_trainer.lora import apply_lora, init_lora
from kubetune_trainer.model import Decoder, load_model
from kubetune_trainer.parallel import compute_dtype
from tests.trainer.parallel_ranks import CASES, MESHES, NUM_ROWS, has_plan, run, train
from tests.trainer.tiny import make_folder

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    make_folder(folder / "model", attention_bias=True, shard="20KB")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Callable[[str], Results]:
    """What came out on a mesh; it is trained on when it is first asked for."""

    @functools.cache
    def of(mesh: str) -> Results:
        # What its ranks import is imported once.
        multiprocessing.set_forkserver_preload(["torch._dynamo", "tests.trainer.parallel_ranks"])
        ranks = MESHES[mesh]["num_ranks"]
        multiprocessing.start_processes(run, args=(mesh, folder), nprocs=ranks, start_method="forkserver")
        return torch.load(folder / f"{mesh}.pt")

    return of


def runs(*, in_fp32: bool | None = None) -> list[tuple[str, str]]:
    """Every mesh with every case that it has a plan for; unset means of any precision."""
    cases = [case for case, settings in CASES.items() if in_fp32 in {None, settings["precision"] == "FP32"}]
    return [(mesh, case) for mesh in MESHES for case in cases if has_plan(case, mesh)]


@pytest.fixture
def results(outcomes: Callable[[str], Results], mesh: str) -> Results:
    return outcomes(mesh)


def single(folder: Path, case: str) -> Decoder:
    """The same model on one device, without FSDP, in fp32."""
    model = load_model(folder / "model", dtype=torch.float32)
    if CASES[case]["lora"]:
        settings = {name: CASES[case][name] for name in ("has_magnitude", "trained_ids") if name in CASES[case]}
        apply_lora(model, rank=2, alpha=4, **settings)
        init_lora(model, seed=5)
    return model


@pytest.mark.parametrize(("mesh", "case"), runs())
def test_shards_hold_the_folders_weights_and_the_same_adapters(folder: Path, results: Results, case: str) -> None:
    model = single(folder, case)
    computes_in = torch.float32 if CASES[case]["precision"] == "FP32" else compute_dtype("cpu")
    trained_in = torch.bfloat16 if CASES[case]["precision"] == "BF16" else torch.float32
    loaded = results[case]["loaded"]
    wanted = dict(model.named_parameters())
    assert loaded.keys() == wanted.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == (trained_in if wanted[name].requires_grad else computes_in), name
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


@pytest.mark.parametrize(("mesh", "case"), runs(in_fp32=True))
def test_training_in_fp32_does_not_depend_on_the_number_of_ranks(
    folder: Path, results: Results, mesh: str, case: str
) -> None:
    model = single(folder, case)
    losses, norms = train(model, rows=slice(0, NUM_ROWS))
    assert results[case]["losses"] == pytest.approx(losses, rel=1e-6)
    assert results[case]["norms"] == pytest.approx(norms, rel=1e-6)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert results[case]["trained"].keys() == trained.keys()
    # A step is up to 0.01, and where a gradient is all but 0 Adam makes much of the order in which a group sums it.
    atol = 1e-4 if "tensor" in MESHES[mesh] else 1e-5
    for name, tensor in results[case]["trained"].items():
        torch.testing.assert_close(
            tensor, trained[name].detach(), atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("mesh", "case"), runs(in_fp32=False))
def test_training_in_bf16_stays_close_to_fp32(folder: Path, results: Results, case: str) -> None:
    losses, norms = train(single(folder, case), rows=slice(0, NUM_ROWS))
    assert results[case]["losses"] == pytest.approx(losses, rel=2e-2)
    assert results[case]["norms"] == pytest.approx(norms, rel=1e-1)


@pytest.mark.parametrize(("mesh", "case"), runs())
def test_trained_weights_are_gathered_whole(results: Results, case: str) -> None:
    result = results[case]
    kept = torch.bfloat16 if CASES[case]["precision"] == "BF16" else torch.float32
    assert {tensor.dtype for tensor in result["trained"].values()} == {kept}
    assert (result["adapters"].keys() == result["trained"].keys()) == CASES[case]["lora"]
    changed = {name for name, tensor in result["trained"].items() if not torch.equal(tensor, result["loaded"][name])}
    assert changed == result["trained"].keys()


@pytest.mark.parametrize(("mesh", "case"), runs())
def test_adapters_of_a_small_model_are_gathered_at_once_and_whole_models_by_block(
    folder: Path, results: Results, mesh: str, case: str
) -> None:
    if mesh == "1 rank":
        assert results[case]["num_groups"] == 0, "nobody to share with"
        return
    num_layers = single(folder, case).config.num_layers
    assert results[case]["num_groups"] == (1 if CASES[case]["lora"] else 1 + num_layers)


def test_a_cpu_without_bf16_arithmetic_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        assert compute_dtype("cpu") == wanted
    assert compute_dtype("cuda") == torch.bfloat16
