"""What attention by blocks sees is what the mask says, and its outputs are those of the mask; backward needs CUDA."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kubetune_trainer.distributed import join_world, local_part
from kubetune_trainer.model import Decoder, KVCache, build_model
from kubetune_trainer.model import block_attention as module
from kubetune_trainer.model.attention import attention_mask, within
from kubetune_trainer.model.block_attention import block_mask, sees, why_not
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.parallel import build_mesh, parallelize
from tests.trainer.tiny_model import model_config

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral, with windows": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 24,
    },
    "gemma2, with windows and soft bounds": {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 24,
    },
}  # fmt: skip


def packed(rows: int, length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Documents and positions of packed rows: some documents of any length, and then padding."""
    generator = torch.Generator().manual_seed(seed)
    documents_BT = torch.full((rows, length), -1)
    positions_BT = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        place = number = 0
        while place < length - 20:
            size = int(torch.randint(1, 60, (), generator=generator))
            size = min(size, length - 10 - place)
            documents_BT[row, place : place + size] = number
            positions_BT[row, place : place + size] = torch.arange(size)
            place, number = place + size, number + 1
    return documents_BT, positions_BT


@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_a_query_sees_the_keys_that_the_mask_shows_it(window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_mask  # noqa: PLC0415 (slow)

    documents_BT, positions_BT = packed(3, 150)
    ours = create_mask(sees(documents_BT, positions_BT, window=window), 3, 1, 150, 150, device="cpu")
    dense = within(attention_mask(documents_BT, documents_BT, None), window, positions_BT, positions_BT)
    assert torch.equal(ours, dense)
    assert 0 < ours.sum() < ours.numel() / 4


def test_tiles_in_which_nothing_is_seen_are_passed_over() -> None:
    places_BT = torch.arange(512)[None]
    apart = block_mask(places_BT // 256, places_BT % 256, window=None)
    together = block_mask(places_BT * 0, places_BT, window=None)
    assert (apart.sparsity(), together.sparsity()) == (62.5, 37.5), "of 4 x 4 tiles 6, and 10, are computed"


@pytest.fixture
def made() -> Callable[..., Decoder]:
    def make(**shape: Any) -> Decoder:
        model = build_model(ModelConfig.from_hf(model_config(num_hidden_layers=2, **shape))).float()
        return fill(model.to_empty(device="cpu"))

    return make


def fill(model: Decoder) -> Decoder:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_says_the_same_by_blocks_within_1e_5(family: str, made: Callable[..., Decoder]) -> None:
    model = made(**FAMILIES[family])
    documents_BT, positions_BT = packed(2, 140)
    tokens_BT = torch.randint(0, 250, (2, 140))
    told = {"documents_BT": documents_BT, "positions_BT": positions_BT}
    wanted = model(tokens_BT, **told)
    model.attends_by_blocks = True
    torch.testing.assert_close(model(tokens_BT, **told), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(tokens_BT), wanted, atol=1e-2), "documents matter"


@torch.no_grad()
def test_with_a_cache_the_mask_stays(made: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BT = made(), torch.randint(0, 250, (2, 12))
    wanted = model(tokens_BT)
    monkeypatch.setattr(module, "_kernels", lambda _: pytest.fail("no blocks with a cache"))
    model.attends_by_blocks = True
    cache = KVCache(model.config, batch_size=2, max_length=12, dtype=torch.float32, device=CPU)
    documents_BT = torch.zeros_like(tokens_BT)
    parts = [
        model(tokens_BT[:, part], documents_BT=documents_BT[:, part], cache=cache) for part in (slice(9), slice(9, 12))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_block_masks_pass_through_fsdp_and_recomputation(made: Callable[..., Decoder]) -> None:
    documents_BT, positions_BT = packed(2, 140)
    tokens_BT = torch.randint(0, 250, (2, 140))
    told = {"documents_BT": documents_BT, "positions_BT": positions_BT}
    plain = made()
    with join_world():
        model = build_model(plain.config)
        mesh = build_mesh("cpu", num_ranks=1)
        parallelize(model, precision="FP32", activation_checkpointing="Full", attends_by_blocks=True, mesh=mesh)
        model.to_empty(device="cpu").eval()
        for weight, value in zip(model.parameters(), plain.parameters(), strict=True):
            local_part(weight).copy_(value)
        torch.testing.assert_close(model(tokens_BT, **told), plain(tokens_BT, **told), atol=1e-5, rtol=1e-5)


SHAPE = ModelConfig.from_hf(model_config(**FAMILIES["gemma2, with windows and soft bounds"]))


def tried() -> str | None:
    return why_not(SHAPE, dtype=torch.float32, device=CPU, recompute="Selective")


def test_a_trial_that_goes_well_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention  # noqa: PLC0415 (slow)

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    assert tried() is None


def test_a_trial_names_what_is_missing_and_numbers_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention  # noqa: PLC0415 (slow)

    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", set())
    assert str(tried()).startswith("UserWarning: flex_attention called without torch.compile()"), "no kernel"

    def wrong(*args: Any, **settings: Any) -> Tensor:
        return flex_attention.flex_attention(*args, **{**settings, "scale": 1.0})

    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})
    monkeypatch.setattr(module, "_kernels", lambda _: (flex_attention.create_block_mask, wrong))
    assert "its numbers differ by" in str(tried())

    def missing(_: str) -> Any:
        raise RuntimeError("Failed to find C compiler\nPlease specify via CC")

    monkeypatch.setattr(module, "_kernels", missing)
    assert tried() == "RuntimeError: Failed to find C compiler"
