"""Causal self-attention: which tokens see which, the cache of keys and values, and the layer itself.

It asks for the device in two places, both marked; this tree's tests run it on CPU only, never on CUDA. Training on CUDA
attends by blocks instead of by a mask, where `parallelize` is told to: see `block_attention`.

Shapes: B batch, T tokens, D hidden_size, N heads, K key and value heads, H head_dim, R its rotated part, S cached
tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

from kubetune_trainer.loss import soft_capped
from kubetune_trainer.model.block_attention import attend_by_blocks, block_mask
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoding import Fused
from kubetune_trainer.model.linear import Linear
from kubetune_trainer.model.norm import RMSNorm
from kubetune_trainer.model.rope import Rope, rotary_tables, rotate
from kubetune_trainer.names import PADDING_DOCUMENT

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask = Union[Tensor, "BlockMask"]
"""Which keys each query sees: (B, 1, T, S), true or 0 where one is seen, false or -inf elsewhere, or by blocks."""

# On CUDA cuDNN would be first, and plan anew for each length: for each token of an answer, about half a second.
torch.backends.cuda.enable_cudnn_sdp(enabled=False)

HAS_BF16_TILES: Final = bool(torch.cpu.get_capabilities().get("amx_bf16"))
"""Whether this machine's CPU multiplies bf16 by tiles (AMX). Without, the bf16 backward of torch's attention takes 3 to
4 times as long as the fp32 one; with it long rows take the same, and forward a third (torch 2.14)."""

SHORT_ROW: Final = 256
"""Up to so many tokens the backward pass of torch's attention is faster in fp32 even with tiles, by a tenth at 256 and
by 4 times at 64 (torch 2.14), and closer to the exact gradients."""


class KVCache:
    """Keys and values of the tokens seen so far, with room for `max_length` of them."""

    def __init__(
        self, config: ModelConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.documents_BS = torch.full((batch_size, max_length), PADDING_DOCUMENT, dtype=torch.int32, device=device)
        self.positions_BS = torch.zeros((batch_size, max_length), dtype=torch.int32, device=device)
        self.length = 0

    def append(self, layer: int, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of that layer's, new ones included."""
        num_new = key_BKTH.shape[2]
        keys_BKSH, values_BKSH = self.keys[layer], self.values[layer]
        keys_BKSH.narrow(2, self.length, num_new).copy_(key_BKTH)
        values_BKSH.narrow(2, self.length, num_new).copy_(value_BKTH)
        return keys_BKSH.narrow(2, 0, self.length + num_new), values_BKSH.narrow(2, 0, self.length + num_new)

    def begin_with(self, other: "KVCache") -> None:
        """Take over the one row of another cache as the beginning of every row."""
        self.length = other.length
        self.keys[:, :, :, : self.length] = other.keys[:, :, :, : self.length]
        self.values[:, :, :, : self.length] = other.values[:, :, :, : self.length]
        self.documents_BS[:, : self.length] = other.documents_BS[:, : self.length]
        self.positions_BS[:, : self.length] = other.positions_BS[:, : self.length]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.documents_BS, self.positions_BS = self.documents_BS[index], self.positions_BS[index]


class QueryKeyRMSNorm(RMSNorm):
    """Norm of queries or keys; where ranks have some of the heads each, they sum the gradient of its weight."""

    def _scaled(self, normed: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, DTensor):  # `tensor_parallel` makes it one
            weight = weight.to_local(grad_placements=[Partial()])
        return super()._scaled(normed, weight, dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values."""

    fused: Fused | None = None
    """The three projections as one, while the model writes."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.sizes = (query_size, kv_size, kv_size)
        if config.fused_projections:
            self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), bias=config.qkv_bias)
        else:
            self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
            self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
            self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.query_key_norm = config.query_key_norm
        if config.query_key_norm != "None":
            widths = (config.head_dim,) * 2 if config.query_key_norm == "Head" else (query_size, kv_size)
            self.q_norm, self.k_norm = (
                QueryKeyRMSNorm(width, eps=config.norm_eps, style=config.norm_style) for width in widths
            )
        self.head_dim = config.head_dim
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.layer = layer

    def forward(
        self, x_BTD: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Mask | None, cache: KVCache | None
    ) -> Tensor:
        """Attend; `mask` is None for plain causal attention."""
        if self.fused is not None and self.query_key_norm == "None" and cos is not None and sin is not None:
            both, value = self.fused(x_BTD).split((self.sizes[0] + self.sizes[1], self.sizes[2]), dim=-1)
            turned, value = rotate(self._heads(both), cos, sin), self._heads(value)
            query, key = turned.split([size // self.head_dim for size in self.sizes[:2]], dim=1)
        else:
            query, key, value = self._project(x_BTD)
            if cos is not None and sin is not None:
                query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        out_BNTH = attend(query, key, value, mask, scale=self.scale, softcap=self.softcap)
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2))

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values by head."""
        if self.fused is not None:
            query, key, value = self.fused(x_BTD).split(self.sizes, dim=-1)
        elif hasattr(self, "qkv_proj"):
            query, key, value = self.qkv_proj(x_BTD).split(self.sizes, dim=-1)
        else:
            query, key, value = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.query_key_norm == "Whole":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.query_key_norm == "Head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class LayerInputs:
    """What the layers are told beside the residual stream, made once for all layers of a kind.

    Args:
        config: The model's shape.
        positions_BT: Position of each token in its document.
        mask: What `attention_mask` returns, or any other choice among the tokens before: (B, 1, T, S).
        blocks_of_BT: Document of each token, for masks by blocks in place of `mask`; unset: none.
        cache: Holds the tokens before these, if there are any.
        dtype: The residual stream's.
    """

    def __init__(
        self,
        config: ModelConfig,
        positions_BT: Tensor,
        *,
        mask: Tensor | None,
        blocks_of_BT: Tensor | None = None,
        cache: KVCache | None = None,
        dtype: torch.dtype,
    ) -> None:
        self._blocks_of_BT = blocks_of_BT
        self._config, self._positions_BT, self._dtype = config, positions_BT, dtype
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._key_positions_BS = positions_BT
        if cache is not None:
            end = cache.length + positions_BT.shape[1]
            cache.positions_BS[:, cache.length : end] = positions_BT
            self._key_positions_BS = cache.positions_BS[:, :end]
        if mask is None and config.attention_softcap is not None and blocks_of_BT is None:
            mask = _causal(positions_BT)
        self._mask, self._masks = mask, dict[int | None, Mask | None]()

    def of(self, layer: int) -> tuple[Tensor | None, Tensor | None, Mask | None]:
        """Return cosine and sine (B, 1, T, R), None where positions do not matter, and the mask for `attend`."""
        rope, window = self._config.ropes[layer], self._config.windows[layer]
        if window not in self._masks:
            self._masks[window] = self._within(window)
        if rope is None:
            return None, None, self._masks[window]
        if rope not in self._tables:
            self._tables[rope] = rotary_tables(
                rope, self._positions_BT, head_dim=self._config.head_dim, dtype=self._dtype
            )
        return *self._tables[rope], self._masks[window]

    def _within(self, window: int | None) -> Mask | None:
        if self._blocks_of_BT is not None:
            return block_mask(self._blocks_of_BT, self._positions_BT, window=window)
        mask = within(self._mask, window, self._positions_BT, self._key_positions_BS)
        if mask is None or self._config.attention_softcap is not None:
            return mask
        # As torch's attention would make it, but once for all layers.
        return torch.zeros_like(mask, dtype=self._dtype).masked_fill_(~mask, -torch.inf)


def within(mask: Tensor | None, window: int | None, positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor | None:
    """Narrow a mask to what lies less than `window` positions back."""
    if window is None or key_positions_BS.shape[1] <= window:
        return mask
    if mask is None:
        mask = _causal(positions_BT)
    return mask & (positions_BT[:, None, :, None] - key_positions_BS[:, None, None, :] < window)


def _causal(positions_BT: Tensor) -> Tensor:
    num_tokens = positions_BT.shape[1]
    return torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=positions_BT.device).tril()


def attention_mask(tokens_BT: Tensor, documents_BT: Tensor | None, cache: KVCache | None) -> Tensor | None:
    """Say which keys each query sees: (B, 1, T, S), or None where plain causal attention says the same."""
    num_new = tokens_BT.shape[1]
    if cache is None:
        if documents_BT is None or _one_document_per_row(documents_BT):
            return None
        causal_TT = torch.ones(num_new, num_new, dtype=torch.bool, device=tokens_BT.device).tril()
        return (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]) & causal_TT
    end = cache.length + num_new
    if documents_BT is None:
        documents_BT = torch.zeros_like(tokens_BT)
    cache.documents_BS[:, cache.length : end] = documents_BT
    slots_S = torch.arange(end, device=tokens_BT.device)
    causal_TS = slots_S[cache.length :, None] >= slots_S
    return (documents_BT[:, None, :, None] == cache.documents_BS[:, None, None, :end]) & causal_TS


def _one_document_per_row(documents_BT: Tensor) -> bool:
    """Whether a row is one document and then padding; asked on CPU only, since a GPU would have to be waited for."""
    if documents_BT.device.type != "cpu":
        return False
    return bool(((documents_BT == documents_BT[:, :1]) | (documents_BT == PADDING_DOCUMENT)).all())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with heads (B, N, T, H) over keys and values (B, K, S, H); a soft bound needs a mask."""
    if mask is not None and not isinstance(mask, Tensor):
        return attend_by_blocks(query, key, value, mask, scale=scale, softcap=softcap)
    if softcap is not None:
        return _attend_soft_capped(query, key, value, mask, scale=scale, softcap=softcap)
    is_trained_on_cpu = query.device.type == "cpu" and query.requires_grad and query.dtype == torch.bfloat16
    if is_trained_on_cpu and HAS_BF16_TILES and _is_short(query) and not torch.compiler.is_compiling():
        return _ShortAttention.apply(query, key, value, mask, scale)  # type: ignore[no-any-return]
    dtype = torch.float32 if is_trained_on_cpu and not HAS_BF16_TILES else query.dtype
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    out = functional.scaled_dot_product_attention(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out.to(query.dtype)


def _is_short(query: Tensor) -> bool:
    return 0 < query.shape[2] <= SHORT_ROW and type(query) is Tensor


class _ShortAttention(torch.autograd.Function):
    """Torch's attention on a CPU: forward in bf16, backward in fp32."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Attend; `mask` holds 0 and -inf, None is plain causal attention."""
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, log_sums, mask)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first three."""
        query, key, value, out, log_sums, mask = ctx.saved_tensors
        given = [tensor.float() for tensor in (grad, query, key, value, out)]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # noqa: SLF001
            *given, log_sums, 0.0, mask is None, attn_mask=None if mask is None else mask.float(), scale=ctx.scale
        )
        return *(grad.to(query.dtype) for grad in grads), None, None


def _attend_soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None, softcap: float
) -> Tensor:
    """The same with all products in memory: torch's own attention has no soft bound that trains on every device."""
    assert mask is not None, "soft-capped attention needs a mask"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = soft_capped(scores, softcap).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(dim=-1).to(query.dtype) @ value
