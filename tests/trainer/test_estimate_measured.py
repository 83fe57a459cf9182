"""The estimate beside the memory that real training steps take on a CPU; benchmarks/estimate.py has more rows."""

from typing import Any

import pytest
import torch

from kubetune_trainer.parallel import compute_dtype
from tests.cluster.paths import ROOT


@pytest.mark.parametrize(
    "row",
    [1, 3, 12, 13, 14, 15, 16, 18, 21],
    ids=[
        "all weights, recomputing",
        "adapters in bf16",
        "8 bits and steps in backward",
        "recomputing some",
        "adapters, recomputing some",
        "adapters with dropout",
        "DoRA",
        "inputs rounded in training",
        "preferences",
    ],
)
def test_the_estimate_is_within_a_tenth_of_what_real_steps_need(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import estimate  # noqa: PLC0415 (only importable beside the tables)

    model, settings = estimate.ROWS[row]
    if settings.get("precision") == "BF16Mixed" and compute_dtype("cpu") != torch.bfloat16:
        pytest.skip("needs a CPU with bf16 arithmetic: others compute in fp32")
    found: dict[str, Any] = estimate.measure(estimate.SHAPES[model], settings)
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.1), found["message"]
