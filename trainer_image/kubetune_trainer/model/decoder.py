"""The model: a causal decoder with Hugging Face's parameter names, so that no weight is ever converted.

Shapes: B batch, T tokens, D hidden_size, R rotated part of a head, V vocab_size, S cached tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kubetune_trainer.loss import soft_capped, sum_cross_entropy
from kubetune_trainer.model.attention import Attention, KVCache, LayerInputs, Mask, attention_mask
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoding import linear
from kubetune_trainer.model.feed_forward import build_feed_forward
from kubetune_trainer.model.linear import Linear
from kubetune_trainer.model.norm import Embedding, RMSNorm
from kubetune_trainer.model.recompute import ActivationCheckpointing, recomputed

if TYPE_CHECKING:
    from kubetune_trainer.model.offload import ActivationOffload

NORMS = {
    "Before": ("input_layernorm", "post_attention_layernorm"),
    "Around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "After": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""A block's norms by `NormPlaces`. The second name means before the feed-forward block in the first only."""


Score = Callable[[Tensor, Tensor, float | None], Any]
"""What `Decoder.forward` can be asked for beside logits and cross entropy."""


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer=layer)
        experts = config.experts if config.experts is not None and config.experts.layers[layer] else None
        self.feed_forward_name = "block_sparse_moe" if experts is not None and experts.names == "Mixtral" else "mlp"
        setattr(self, self.feed_forward_name, build_feed_forward(config, experts))
        self.norm_places = config.norm_places
        for name in NORMS[config.norm_places]:
            setattr(self, name, RMSNorm(config.hidden_size, eps=config.norm_eps, style=config.norm_style))
        self.recompute: ActivationCheckpointing = "None"
        """Which activations backward computes again instead of keeping them; set by `parallelize`."""
        self.offload: ActivationOffload | None = None
        """Where kept activations wait for backward; None is where they are. Set by `parallelize`."""

    def forward(
        self, x_BTD: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Mask | None, cache: KVCache | None
    ) -> Tensor:
        """Map the residual stream."""
        # Inside the block, so that FSDP's hooks stay outside and do not run again.
        if self.offload is None or not torch.is_grad_enabled():
            return recomputed(self._forward, x_BTD, cos, sin, mask, cache, mode=self.recompute)
        with self.offload.block(but=(*self.parameters(), *self.buffers(), cos, sin, mask)):
            return recomputed(self._forward, x_BTD, cos, sin, mask, cache, mode=self.recompute)

    def _forward(
        self, x_BTD: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Mask | None, cache: KVCache | None
    ) -> Tensor:
        feed_forward = getattr(self, self.feed_forward_name)
        if self.norm_places == "Before":
            x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, cache)
            return x_BTD + feed_forward(self.post_attention_layernorm(x_BTD))
        is_before = self.norm_places == "Around"
        seen_BTD = self.input_layernorm(x_BTD) if is_before else x_BTD
        x_BTD = x_BTD + self.post_attention_layernorm(self.self_attn(seen_BTD, cos, sin, mask, cache))
        seen_BTD = self.pre_feedforward_layernorm(x_BTD) if is_before else x_BTD
        return x_BTD + self.post_feedforward_layernorm(feed_forward(seen_BTD))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face's names put under `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, scale=config.embedding_scale)
        self.layers = nn.ModuleList(Block(config, layer=layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, style=config.norm_style)


class Decoder(nn.Module):
    """A causal language model, written for one device; `parallelize` spreads it from outside.

    Args:
        config: Its shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attends_by_blocks = False
        """Whether documents are kept apart by `block_attention` and not by a mask; set by `parallelize`."""
        self.model = Trunk(config)
        if not config.tied_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        score: Score | None = None,
    ) -> Any:
        """Run the model.

        Args:
            tokens_BT: Token ids.
            positions_BT: Position of each token in its document; unset counts from 0, or on from the cache.
            documents_BT: Document of each token, -1 for padding; attention stays inside a document. Unset: one per row.
            labels_BT: Target of each position, already shifted, -100 where none is trained.
            cache: Where keys and values are kept for the next call; it grows by T.
            last_only: Return the logits of the last position alone, (B, 1, V).
            score: What to return instead, made of the residual stream (B, T, D), the output head (V, D) and its bound.

        Returns:
            The logits (B, T, V) without labels; with labels the SUM of cross entropy over the trained positions, an
            fp32 scalar. The loss is computed in here so that FSDP has the output head's weights at hand.
        """
        blocks_of_BT = documents_BT if self.attends_by_blocks and cache is None else None
        mask = attention_mask(tokens_BT, documents_BT, cache) if blocks_of_BT is None else None
        x_BTD = self.hidden(tokens_BT, mask=mask, blocks_of_BT=blocks_of_BT, positions_BT=positions_BT, cache=cache)
        if score is not None:
            return score(x_BTD, self.head, self.config.logit_softcap)
        if labels_BT is None:
            return self.logits(x_BTD[:, -1:] if last_only else x_BTD)
        return sum_cross_entropy(x_BTD, self.head, labels_BT, softcap=self.config.logit_softcap)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        mask: Tensor | None,
        blocks_of_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run the model up to its output head, for callers that need few of the logits; arguments as in `forward`.

        Args:
            tokens_BT: Token ids.
            mask: Which keys each query sees, (B, 1, T, S); None is plain causal attention.
            blocks_of_BT: Document of each token, for attention by blocks in place of a mask; unset: none.
            positions_BT: Position of each token; unset counts from 0, or on from the cache.
            cache: Where keys and values are kept for the next call; it grows by T.

        Returns:
            The normalised residual stream, (B, T, D); `logits` makes logits of it.
        """
        start = cache.length if cache is not None else 0
        if positions_BT is None:
            positions_BT = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x_BTD = self.model.embed_tokens(tokens_BT)
        inputs = LayerInputs(
            self.config, positions_BT, mask=mask, blocks_of_BT=blocks_of_BT, cache=cache, dtype=x_BTD.dtype
        )
        for layer, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, *inputs.of(layer), cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.model.norm(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Map the normalised residual stream to logits (…, V)."""
        return soft_capped(linear(x_BTD, self.head), self.config.logit_softcap)

    @property
    def head(self) -> Tensor:
        """The output head's weight, which may be the embedding's, with the rows that are trained beside it."""
        layer = self.model.embed_tokens if self.config.tied_embeddings else self.lm_head
        weight = self.model.embed_tokens.converted(layer.weight)
        adapter = getattr(layer, "token_adapter", None)
        return weight if adapter is None else adapter.replaced(weight)
