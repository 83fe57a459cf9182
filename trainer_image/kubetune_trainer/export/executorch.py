"""Write a model as an ExecuTorch program (.pte) for phones and other devices, and run such a program.

The program is the decoder with a cache of fixed length inside, lowered to XNNPACK. It is called as ExecuTorch's own
runner for language models calls programs: `forward(tokens (1, T), start (1,))` puts T tokens behind the first `start`
ones into the cache and returns the logits (1, V) behind the last of them. What a runner must know are constant methods:
get_max_seq_len, get_vocab_size, get_bos_id, get_eos_ids and others.

A program takes the same steps whatever it is given, so that in a mixture of experts every token passes all of them, and
those that its router did not choose count nothing.

Nothing here asks for a device; programs are made and, by this module, run on CPU.

Shapes: T tokens, S max_sequence_length, R rotated part of a head, V vocab_size, D hidden_size, N tokens, E experts,
C chosen experts.
"""

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.export.huggingface import copy_companions
from kubetune_trainer.generation import Stop, choose_tokens, goes_on, seeded, tokens_seen
from kubetune_trainer.loss import soft_capped
from kubetune_trainer.model.config import read_config
from kubetune_trainer.model.decoder import Block, Decoder
from kubetune_trainer.model.feed_forward import MixtureOfExperts
from kubetune_trainer.model.rope import rotary_tables
from kubetune_trainer.model.weights import PROGRAM_FILE, load_model
from kubetune_trainer.tokenizer import load_tokenizer

QUANTIZED: Final = "Int8DynamicActivationInt4Weight"


def save_executorch(
    source: Path, target: Path, *, max_sequence_length: int = 512, scheme: str | None = None, group_size: int = 32
) -> None:
    """Write a Hugging Face folder as a program beside its configuration and tokenizer.

    The whole model is in memory while it is lowered, in fp32. With the scheme, the output head gets 8-bit weights and
    the embedding stays fp32.

    Args:
        source: Folder of a model in Hugging Face format.
        target: Made if it is not there.
        max_sequence_length: Tokens that the cache holds, prompt and answer together.
        scheme: None, or Int8DynamicActivationInt4Weight: 4-bit weights in groups, activations to 8 bits on the way.
        group_size: Weights that share a scale.

    Raises:
        ConfigError: The model is made for shorter texts, or its rows cannot be cut into groups.
    """
    check_executorch(source, max_sequence_length=max_sequence_length, scheme=scheme, group_size=group_size)
    tokenizer = load_tokenizer(source)
    module = _CachedDecoder(load_model(source, dtype=torch.float32), max_length=max_sequence_length)
    module.eval().requires_grad_(requires_grad=False)
    if scheme is not None:
        _quantize(module, group_size=group_size)
    facts = {
        "get_max_seq_len": max_sequence_length,
        "get_max_context_len": max_sequence_length,
        "get_vocab_size": module.head.out_features,
        "get_bos_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "get_eos_ids": list(tokenizer.stop_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    program = _lower(module, facts=facts, is_quantized=scheme is not None)
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f"{PROGRAM_FILE}.partial"
    try:
        with partial.open("wb") as stream:
            program.write_to_file(stream)
        partial.replace(target / PROGRAM_FILE)
    finally:
        partial.unlink(missing_ok=True)
    copy_companions(source, target)


def check_executorch(
    source: Path, *, max_sequence_length: int = 512, scheme: str | None = None, group_size: int = 32
) -> None:
    """Refuse what `save_executorch` cannot write, by the model's small files alone.

    Raises:
        ConfigError: The model is made for shorter texts, or its rows cannot be cut into groups.
    """
    config = read_config(source)
    # A program has one table of angles: it ends where a text's length would begin to decide about them.
    stretches = config.rope.kind in {"dynamic", "longrope"}
    longest = config.rope.original_max_positions if stretches else config.max_positions
    if max_sequence_length > longest:
        raise ConfigError(
            f"execu_torch.max_sequence_length must be at most the model's {longest}, got {max_sequence_length}"
        )
    if scheme not in {None, QUANTIZED}:
        raise ConfigError(f"scheme must be {QUANTIZED} or none for an ExecuTorch program, got {scheme}")
    widths = {config.hidden_size, config.num_heads * config.head_dim}
    if config.experts is None or not all(config.experts.layers):
        widths.add(config.intermediate_size)
    if config.experts is not None:
        widths.add(config.experts.intermediate_size)
    if scheme is not None and any(width % group_size for width in widths):
        told = ", ".join(map(str, sorted(widths)))
        raise ConfigError(f"group_size must divide the widths of the model's layers ({told}), got {group_size}")


class ExecuTorchModel:
    """A program in memory, with its cache.

    Args:
        path: A folder that `save_executorch` wrote.

    Raises:
        DataError: There is no program, or it cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path) / PROGRAM_FILE
        if not file.is_file():
            raise DataError(f"Model folder {path}: {PROGRAM_FILE} is missing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runtime calls its own interface experimental
            from executorch.runtime import Runtime  # noqa: PLC0415 (loads native libraries that announce themselves)

            try:
                self._program = Runtime.get().load_program(file)
                self._forward = self._program.load_method("forward")
            except RuntimeError as error:
                raise DataError(f"Model folder {path}: {PROGRAM_FILE} cannot be loaded: {error}") from error
        self.max_length: int = self.fact("get_max_seq_len")
        """Tokens that the cache holds."""
        self.vocab_size: int = self.fact("get_vocab_size")
        """Width of the logits."""

    def fact(self, name: str) -> Any:
        """Return what one of the constant methods says."""
        found = self._program.load_method(name).execute([])
        return found[0] if len(found) == 1 else list(found)

    def step(self, tokens: list[int], *, start: int) -> Tensor:
        """Put tokens behind the first `start` ones; return the logits (V,) behind the last of them."""
        if start + len(tokens) > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, got {start + len(tokens)}")
        logits_1V = self._forward.execute([torch.tensor([tokens]), torch.tensor([start])])[0]
        return logits_1V[0].clone()  # the next call writes over it

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits (B, T, V), computed token by token as in an answer."""
        rows = [
            [self.step([token], start=place) for place, token in enumerate(tokens)] for tokens in tokens_BT.tolist()
        ]
        return torch.stack([torch.stack(row) for row in rows])


@torch.inference_mode()
def continue_prompt(
    program: ExecuTorchModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    stop: Stop | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> list[int]:
    """Return what a program adds to a prompt; the arguments are those of `generate`.

    An answer also ends where the program's cache is full.
    """
    generator = seeded(seed, device="cpu")
    answer: list[int] = []
    fed, start = list(prompt), 0
    seen_1V = tokens_seen([prompt], vocab_size=program.vocab_size, device="cpu")
    for _ in range(min(max_new_tokens, program.max_length - len(prompt))):
        logits_1V = program.step(fed, start=start)[None].float()
        chosen_1 = choose_tokens(
            logits_1V,
            seen_BV=seen_1V,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            generator=generator,
        )
        start += len(fed)
        fed = chosen_1.tolist()
        seen_1V[0, fed] = True
        if not goes_on(answer, fed[0], stop_ids, stop):
            break
    return answer


class _CachedDecoder(nn.Module):
    """A decoder whose cache is part of it: one buffer each for a layer's keys and values.

    ExecuTorch's runners begin with zeroed buffers. What an earlier text left there is never seen, because a query sees
    only slots up to its own, which are written anew before.
    """

    def __init__(self, model: Decoder, *, max_length: int) -> None:
        super().__init__()
        config = model.config
        self.trunk = model.model
        for block in self.trunk.layers:
            _pass_all_experts(block)
        # A layer of its own even where it shares its weight with the embedding: it is quantized, the embedding is not.
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        weight = model.model.embed_tokens.weight if config.tied_embeddings else model.lm_head.weight
        self.head.weight = nn.Parameter(weight.detach().clone())
        self.config = config
        slots_S = torch.arange(max_length)
        self.register_buffer("slots_S", slots_S, persistent=False)
        self.ropes = list(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        for number, rope in enumerate(self.ropes):
            cos, sin = rotary_tables(rope, slots_S[None], head_dim=config.head_dim, dtype=torch.float32)
            self.register_buffer(f"cos_{number}_SR", cos[0, 0], persistent=False)
            self.register_buffer(f"sin_{number}_SR", sin[0, 0], persistent=False)
        for layer in range(config.num_layers):
            for kind in ("keys", "values"):
                empty = torch.zeros(1, config.num_kv_heads, max_length, config.head_dim)
                self.register_buffer(f"{kind}_{layer}", empty, persistent=False)

    def forward(self, tokens_1T: Tensor, start_1: Tensor) -> Tensor:
        """Return the logits (1, V) behind the last token."""
        slots_T = start_1 + torch.arange(tokens_1T.shape[1])
        x_1TD = self.trunk.embed_tokens(tokens_1T)
        tables = {
            rope: tuple(self.get_buffer(f"{kind}_{number}_SR")[slots_T][None, None] for kind in ("cos", "sin"))
            for number, rope in enumerate(self.ropes)
        }
        masks = {window: self._mask(slots_T, window) for window in dict.fromkeys(self.config.windows)}
        cache = _Cache(self, slots_T)
        for layer, block in enumerate(self.trunk.layers):
            cos, sin = tables.get(self.config.ropes[layer], (None, None))
            x_1TD = block(x_1TD, cos, sin, masks[self.config.windows[layer]], cache)
        return soft_capped(self.head(self.trunk.norm(x_1TD[:, -1])), self.config.logit_softcap)

    def _mask(self, slots_T: Tensor, window: int | None) -> Tensor:
        """Return which slots each token sees, (1, 1, T, S)."""
        mask = self.slots_S[None] <= slots_T[:, None]
        if window is not None and window < len(self.slots_S):
            mask = mask & (slots_T[:, None] - self.slots_S[None] < window)
        return mask[None, None]


class _Cache:
    """What the attention of a decoder asks of a cache, on the buffers of a module."""

    def __init__(self, module: nn.Module, slots_T: Tensor) -> None:
        self._module, self._slots_T = module, slots_T

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of that layer's, slots without any included."""
        keys, values = self._module.get_buffer(f"keys_{layer}"), self._module.get_buffer(f"values_{layer}")
        keys.index_copy_(2, self._slots_T, key)
        values.index_copy_(2, self._slots_T, value)
        return keys, values


class _AllExperts(nn.Module):
    """A mixture of experts without a choice: what the router does not choose is computed, and multiplied with 0."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.gate, self.experts = mixture.gate, mixture.experts

    def forward(self, x_1TD: Tensor) -> Tensor:
        """Map each token by itself."""
        x_ND = x_1TD.flatten(0, 1)
        weights_NC, chosen_NC = self.gate(x_ND)
        numbers_E = torch.arange(len(self.experts))
        weights_NE = ((chosen_NC[..., None] == numbers_E) * weights_NC[..., None]).sum(dim=1)
        out_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            out_ND = out_ND + expert(x_ND) * weights_NE[:, number, None]
        return out_ND.view_as(x_1TD)


def _pass_all_experts(block: Block) -> None:
    feed_forward = getattr(block, block.feed_forward_name)
    if isinstance(feed_forward, MixtureOfExperts):
        setattr(block, block.feed_forward_name, _AllExperts(feed_forward))


def _quantize(module: _CachedDecoder, *, group_size: int) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_  # noqa: PLC0415 (only here)
    from torchao.quantization.granularity import PerAxis, PerGroup  # noqa: PLC0415 (as above)

    layers = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(group_size))
    head = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(module, layers, lambda layer, name: isinstance(layer, nn.Linear) and name != "head")
    quantize_(module, head, lambda layer, name: isinstance(layer, nn.Linear) and name == "head")


def _lower(module: _CachedDecoder, *, facts: dict[str, Any], is_quantized: bool) -> Any:
    """Return the program, with everything that XNNPACK computes given over to it."""
    num_tokens = torch.export.Dim("T", min=1, max=facts["get_max_seq_len"] - 1)
    example = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with warnings.catch_warnings():
        # Executorch and what it imports warn of their own future, and that the cache's first values are not stored.
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # noqa: PLC0415 (imports take seconds)
            XnnpackDynamicallyQuantizedPartitioner,
            XnnpackPartitioner,
        )
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower  # noqa: PLC0415 (as above)

        exported = torch.export.export(module, example, dynamic_shapes=({1: num_tokens}, None))
        # Dynamic quantization must be matched before its parts are taken for operations of their own.
        partitioners = [XnnpackDynamicallyQuantizedPartitioner()] if is_quantized else []
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[*partitioners, XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=facts,
        )
        return edge.to_executorch()
