"""The model: a causal decoder with Hugging Face's parameter names, so that no weight is ever converted.

It asks for the device in two places, both marked; this tree's tests run it on CPU only, never on CUDA.

Shapes: B batch, T tokens, D hidden_size, N heads, K key and value heads, H head_dim, V vocab_size, S cached tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kubetune_trainer.loss import sum_cross_entropy
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.rope import rotary_tables, rotate
from kubetune_trainer.names import PADDING_DOCUMENT


class KVCache:
    """Keys and values of the tokens seen so far, with room for `max_length` of them."""

    def __init__(
        self, config: ModelConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.documents_BS = torch.full((batch_size, max_length), PADDING_DOCUMENT, dtype=torch.int32, device=device)
        self.length = 0

    def append(self, layer: int, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of that layer's, new ones included."""
        end = self.length + key_BKTH.shape[2]
        self.keys[layer, :, :, self.length : end] = key_BKTH
        self.values[layer, :, :, self.length : end] = value_BKTH
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def begin_with(self, other: "KVCache") -> None:
        """Take over the one row of another cache as the beginning of every row."""
        self.length = other.length
        self.keys[:, :, :, : self.length] = other.keys[:, :, :, : self.length]
        self.values[:, :, :, : self.length] = other.values[:, :, :, : self.length]
        self.documents_BS[:, : self.length] = other.documents_BS[:, : self.length]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.documents_BS = self.documents_BS[index]


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32 as Llama does."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise the last dimension."""
        x32 = x_BTD.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x_BTD.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.head_dim = config.head_dim
        self.layer = layer

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Attend; `mask` is None for plain causal attention, otherwise (B, 1, T, S), true where a query sees a key."""
        query = rotate(self._heads(self.q_proj(x_BTD)), cos, sin)
        key = rotate(self._heads(self.k_proj(x_BTD)), cos, sin)
        value = self._heads(self.v_proj(x_BTD))
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        out_BNTH = attend(query, key, value, mask)
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """Gated feed-forward block (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token by itself."""
        return self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer=layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.recompute = False
        """Whether backward computes the activations again instead of keeping them; set by `parallelize`."""

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Map the residual stream."""
        if self.recompute and torch.is_grad_enabled():
            # Inside the block, so that FSDP's hooks stay outside and do not run again.
            return checkpoint(self._forward, x_BTD, cos, sin, mask, cache, use_reentrant=False)
        return self._forward(x_BTD, cos, sin, mask, cache)

    def _forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face's names put under `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer=layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)


class Decoder(nn.Module):
    """A causal language model, written for one device; `parallelize` spreads it from outside.

    Args:
        config: Its shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Run the model.

        Args:
            tokens_BT: Token ids.
            positions_BT: Position of each token in its document; unset counts from 0, or on from the cache.
            documents_BT: Document of each token, -1 for padding; attention stays inside a document. Unset: one per row.
            labels_BT: Target of each position, already shifted, -100 where none is trained.
            cache: Where keys and values are kept for the next call; it grows by T.
            last_only: Return the logits of the last position alone, (B, 1, V).

        Returns:
            The logits (B, T, V) without labels; with labels the SUM of cross entropy over the trained positions, an
            fp32 scalar. The loss is computed in here so that FSDP has the output head's weights at hand.
        """
        mask = attention_mask(tokens_BT, documents_BT, cache)
        x_BTD = self.hidden(tokens_BT, mask=mask, positions_BT=positions_BT, cache=cache)
        if labels_BT is None:
            return functional.linear(x_BTD[:, -1:] if last_only else x_BTD, self.head)
        return sum_cross_entropy(x_BTD, self.head, labels_BT)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        mask: Tensor | None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run the model up to its output head, for callers that need few of the logits; arguments as in `forward`.

        Args:
            tokens_BT: Token ids.
            mask: Which keys each query sees, (B, 1, T, S); None is plain causal attention.
            positions_BT: Position of each token; unset counts from 0, or on from the cache.
            cache: Where keys and values are kept for the next call; it grows by T.

        Returns:
            The normalised residual stream, (B, T, D); `functional.linear` with `head` makes logits of it.
        """
        start = cache.length if cache is not None else 0
        if positions_BT is None:
            positions_BT = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x_BTD = self.model.embed_tokens(tokens_BT)
        cos, sin = rotary_tables(self.config.rope, positions_BT, head_dim=self.config.head_dim, dtype=x_BTD.dtype)
        for block in self.model.layers:
            x_BTD = block(x_BTD, cos, sin, mask, cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.model.norm(x_BTD)

    @property
    def head(self) -> Tensor:
        """The output head's weight, which may be the embedding's."""
        return self.model.embed_tokens.weight if self.config.tied_embeddings else self.lm_head.weight


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


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with heads (B, N, T, H) over keys and values (B, K, S, H)."""
    # On CPU the bf16 backward of torch's attention takes 3 to 4 times as long as the fp32 one (torch 2.14).
    dtype = torch.float32 if query.device.type == "cpu" and query.requires_grad else query.dtype
    out = functional.scaled_dot_product_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.to(query.dtype)
