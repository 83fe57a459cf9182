"""The families of models: for each, one function that turns its `config.json` into the fields of `ModelConfig`.

A function begins with what transformers takes for keys that the file leaves out, lets `_llama` read what all families
share, and replaces what is different. To add a family, write such a function, enter it in `FAMILIES` under the file's
`model_type`, and give tests/trainer/test_families.py a config to hold it against transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from kubetune_trainer.errors import DataError
from kubetune_trainer.model.config import CONFIG_FILE, Activation, Experts, ModelConfig
from kubetune_trainer.model.rope import Rope
from kubetune_trainer.model.values import Config, flag, mapping, positive_number, whole_number

SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"
ACTIVATIONS: Final[Mapping[str, Activation]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "attention_dropout": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "lm_head_bias": (False, None),
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
}
"""What keys must be in every family, if they are there."""
ELSEWHERE: Final[Mapping[str, tuple[Any, ...]]] = {
    "alibi": (False, None),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (1, None),
    "final_logit_softcapping": (None,),
    "kv_lora_rank": (None,),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_attn": (False, None),
    "qk_layernorm": (False, None),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (1, None),
    "rotary_pct": (1, None),
    "sliding_window": (None,),
    "use_parallel_residual": (False, None),
    "use_qk_norm": (False, None),
}
"""The same of keys by which other families compute something else; those that a family reads itself are its `reads`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of `FAMILIES`."""

    architecture: str
    """transformers' class for language models of this family."""
    read: Callable[[Config], ModelConfig]
    """Turns the file into fields."""
    reads: frozenset[str] = frozenset()
    """Keys of `ELSEWHERE` that it looks at."""


def read_family(config: Config) -> ModelConfig:
    """Read a parsed `config.json`; what counts or measures weights must be in it, whatever transformers would take.

    Raises:
        DataError: A key is missing, has an impossible value, or asks for something that is not supported.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise DataError(
            f"{CONFIG_FILE}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}",
            hint="Of a model that also sees pictures, a folder with its language model alone can be used."
            if "text_config" in config
            else "",
        )
    architectures = config.get("architectures") or []
    if architectures not in ([], [family.architecture]):
        raise DataError(
            f"{CONFIG_FILE}: architectures must be ['{family.architecture}'] with model_type '{model_type}', "
            f"got {architectures!r}"
        )
    _only(config, {key: values for key, values in ELSEWHERE.items() if key not in family.reads})
    return family.read(config)


def _llama(config: Config, *, theta: float = 10000.0, act: str = "silu", partial_rope: bool = False) -> ModelConfig:
    """Llama 2 and 3, SmolLM2, TinyLlama and their kin; what all other families are told apart from."""
    _only(config, UNSUPPORTED | {"hidden_act": (act,)})
    num_heads = whole_number(config, "num_attention_heads")
    hidden_size = whole_number(config, "hidden_size")
    num_layers = whole_number(config, "num_hidden_layers")
    num_kv_heads = whole_number(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise DataError(
            f"{CONFIG_FILE}: num_attention_heads must be a multiple of num_key_value_heads, "
            f"got {num_heads} and {num_kv_heads}"
        )
    max_positions = whole_number(config, "max_position_embeddings", default=2048)
    head_dim = _head_dim(config, hidden_size=hidden_size, num_heads=num_heads)
    rope = Rope.from_hf(
        config, max_positions=max_positions, head_dim=head_dim, theta=theta, may_be_partial=partial_rope
    )
    attention_bias = flag(config, "attention_bias")
    return ModelConfig(
        family=config["model_type"],
        vocab_size=whole_number(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole_number(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=positive_number({"rms_norm_eps": 1e-6} | config, "rms_norm_eps"),
        tied_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
        ropes=(rope,) * num_layers,
        windows=(None,) * num_layers,
        activation=ACTIVATIONS[act],
    )


def _mistral(config: Config) -> ModelConfig:
    """Mistral and Mistral Nemo: all layers or none have a sliding window."""
    config = {"sliding_window": 4096, "max_position_embeddings": 131_072} | config
    return replace(_without_biases(config), windows=_one_window(config))


def _mixtral(config: Config) -> ModelConfig:
    config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131_072} | config
    _only(config, {"router_jitter_noise": (0, None)})
    plain = _without_biases(config, theta=1_000_000.0)
    experts = Experts(
        num_experts=whole_number(config, "num_local_experts"),
        num_chosen=_chosen(config, "num_local_experts"),
        intermediate_size=plain.intermediate_size,
        normalized=True,
        names="Mixtral",
        layers=(True,) * plain.num_layers,
    )
    return replace(plain, windows=_one_window(config), experts=experts)


def _qwen2(config: Config) -> ModelConfig:
    """Qwen2 and 2.5: biases that the file does not tell of."""
    config = {"max_position_embeddings": 32768} | config
    return replace(_llama(config), qkv_bias=True, output_bias=False, mlp_bias=False, windows=_upper_windows(config))


def _qwen3(config: Config) -> ModelConfig:
    config = {"max_position_embeddings": 32768, "head_dim": 128} | config
    return replace(_llama(config), mlp_bias=False, query_key_norm="Head", windows=_upper_windows(config))


def _qwen3_moe(config: Config) -> ModelConfig:
    """Qwen3 with experts in every layer, or in every n-th; one window for all layers."""
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    config = {"max_position_embeddings": 32768, "sliding_window": 4096} | config
    plain = _llama(config)
    step, dense = whole_number(config, "decoder_sparse_step", default=1), config.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise DataError(f"{CONFIG_FILE}: mlp_only_layers must be a list of layers, got {dense!r}")
    experts = Experts(
        num_experts=whole_number(config, count),
        num_chosen=_chosen(config, count),
        intermediate_size=whole_number(config, "moe_intermediate_size"),
        normalized=flag(config, "norm_topk_prob"),
        names="Qwen",
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(plain.num_layers)),
    )
    windows = _one_window(config) if flag(config, "use_sliding_window") else plain.windows
    return replace(plain, mlp_bias=False, query_key_norm="Head", windows=windows, experts=experts)


def _gemma(config: Config) -> ModelConfig:
    act = "gelu_pytorch_tanh"
    config = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": act} | config
    if config["hidden_act"] == "gelu":  # the first files say so; the models are trained with the approximation
        config["hidden_act"] = act
    plain = _llama(config, act=act)
    return replace(plain, mlp_bias=False, norm_style="Gemma", embedding_scale=plain.hidden_size**0.5)


def _gemma2(config: Config) -> ModelConfig:
    """Gemma 2: every other layer has a sliding window, and products and logits have soft bounds."""
    config = {
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
    } | config
    _only(config, {"hidden_activation": ("gelu_pytorch_tanh",)})
    plain = _gemma(config | {"hidden_act": config["hidden_activation"]})
    return replace(
        plain,
        norm_places="Around",
        attention_scale=positive_number(config, "query_pre_attn_scalar") ** -0.5,
        attention_softcap=_bound(config, "attn_logit_softcapping"),
        logit_softcap=_bound(config, "final_logit_softcapping"),
        windows=_windows(config, default=[SLIDING if (i + 1) % 2 else FULL for i in range(plain.num_layers)]),
    )


def _gemma3(config: Config) -> ModelConfig:
    """Gemma 3's language models: layers with a sliding window have a rotary position embedding of their own.

    transformers reads a soft bound of attention for them and does not apply it: one that is there is refused.
    """
    _only(config, {"attn_logit_softcapping": (None,)})
    pattern = whole_number(config, "sliding_window_pattern", default=6)
    num_layers = whole_number(config, "num_hidden_layers")
    config = {
        "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": [SLIDING if (i + 1) % pattern else FULL for i in range(num_layers)],
    } | {key: value for key, value in config.items() if key != "layer_types" or value is not None}
    by_kind = mapping(config, "rope_parameters")
    for key, value in by_kind.items():
        if key not in (FULL, SLIDING):  # transformers does not look at it
            raise DataError(f"{CONFIG_FILE}: rope_parameters must be of {FULL} and {SLIDING}, got {key} {value!r}")
    flat = {key: value for key, value in config.items() if key != "rope_parameters"}
    plain = _gemma2({key: value for key, value in flat.items() if key not in {"rope_scaling", "rope_theta"}})
    sizes = {"max_positions": plain.max_positions, "head_dim": plain.head_dim}
    far_given = {**mapping(by_kind, FULL, within="rope_parameters."), **mapping(config, "rope_scaling")}
    far = Rope.from_hf(flat | {"rope_scaling": far_given}, theta=1_000_000.0, **sizes)
    near_given = mapping(by_kind, SLIDING, within="rope_parameters.")
    near_theta = positive_number(config, "rope_local_base_freq", default=10_000.0)
    near = Rope.from_hf({"rope_scaling": near_given}, theta=near_theta, **sizes)
    ropes = tuple(far if window is None else near for window in plain.windows)
    return replace(plain, query_key_norm="Head", ropes=ropes)


def _phi3(config: Config) -> ModelConfig:
    """Phi-3, 3.5, 4 and 4-mini: fused projections, and maybe only a part of each head that is turned."""
    config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096} | config
    for key in ("rope_scaling", "rope_parameters"):
        given = mapping(config, key)
        kind = given.get("rope_type", given.get("type"))
        if kind in ("su", "yarn"):  # names that the first files have for it
            config[key] = {**given, "rope_type": "longrope"}
        elif kind not in (None, "default", "longrope"):
            raise DataError(f"{CONFIG_FILE}: rope_type must be default or longrope for phi3, got {kind!r}")
    return replace(_without_biases(config, partial_rope=True), fused_projections=True, windows=_one_window(config))


def _smollm3(config: Config) -> ModelConfig:
    """SmolLM3: every fourth layer, or as the file says, does not look at positions."""
    config = {"max_position_embeddings": 32768, "tie_word_embeddings": True} | config
    plain = _llama(config, theta=2_000_000.0)
    every = whole_number(config, "no_rope_layer_interval", default=4)
    turned = config.get("no_rope_layers")
    if turned is None or turned == []:
        turned = [int((i + 1) % every != 0) for i in range(plain.num_layers)]
    is_list = isinstance(turned, list) and len(turned) >= plain.num_layers
    if not is_list or not all(each in (0, 1) for each in turned):
        raise DataError(
            f"{CONFIG_FILE}: no_rope_layers must be a 0 or 1 for each of {plain.num_layers} layers, got {turned!r}"
        )
    turned = turned[: plain.num_layers]
    windowed = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    default = [SLIDING if windowed and not each else FULL for each in turned]
    return replace(
        plain,
        ropes=tuple(rope if each else None for rope, each in zip(plain.ropes, turned, strict=True)),
        windows=_windows(config, default=default),
    )


def _olmo2(config: Config) -> ModelConfig:
    """OLMo 2: norms behind attention and feed-forward block, and over all queries and all keys as a whole."""
    plain = _llama({"rms_norm_eps": 1e-5} | config)
    return replace(plain, mlp_bias=False, norm_style="OLMo", norm_places="After", query_key_norm="Whole")


_WINDOWED: Final = frozenset({"sliding_window"})
_CAPPED: Final = _WINDOWED | {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(architecture="LlamaForCausalLM", read=_llama),
    "mistral": Family(architecture="MistralForCausalLM", read=_mistral, reads=_WINDOWED),
    "mixtral": Family(architecture="MixtralForCausalLM", read=_mixtral, reads=_WINDOWED | {"num_local_experts"}),
    "qwen2": Family(architecture="Qwen2ForCausalLM", read=_qwen2, reads=_WINDOWED),
    "qwen3": Family(architecture="Qwen3ForCausalLM", read=_qwen3, reads=_WINDOWED),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM", read=_qwen3_moe, reads=_WINDOWED | {"num_experts", "num_local_experts"}
    ),
    "gemma": Family(architecture="GemmaForCausalLM", read=_gemma),
    "gemma2": Family(architecture="Gemma2ForCausalLM", read=_gemma2, reads=_CAPPED),
    "gemma3_text": Family(architecture="Gemma3ForCausalLM", read=_gemma3, reads=_CAPPED),
    "phi3": Family(architecture="Phi3ForCausalLM", read=_phi3, reads=_WINDOWED),
    "smollm3": Family(architecture="SmolLM3ForCausalLM", read=_smollm3, reads=_WINDOWED | {"no_rope_layers"}),
    "olmo2": Family(architecture="Olmo2ForCausalLM", read=_olmo2),
}
"""By `model_type`."""


def _without_biases(config: Config, *, theta: float = 10000.0, partial_rope: bool = False) -> ModelConfig:
    _only(config, {"attention_bias": (False, None), "mlp_bias": (False, None)})
    return _llama(config, theta=theta, partial_rope=partial_rope)


def _one_window(config: Config) -> tuple[int | None, ...]:
    """The same window for all layers."""
    num_layers = whole_number(config, "num_hidden_layers")
    kind = FULL if config.get("sliding_window") is None else SLIDING
    _only(config, {"layer_types": (None, [kind] * num_layers)})
    return _windows(config, default=[kind] * num_layers)


def _upper_windows(config: Config) -> tuple[int | None, ...]:
    """Qwen's rule: the layers from max_window_layers on have a window, if they are to have one at all."""
    config = {"sliding_window": 4096, "max_window_layers": 28} | config
    num_layers = first = whole_number(config, "num_hidden_layers")
    if not flag(config, "use_sliding_window"):
        del config["sliding_window"]
    if config.get("sliding_window") is not None:
        first = whole_number(config, "max_window_layers", least=0)
    return _windows(config, default=[SLIDING if i >= first else FULL for i in range(num_layers)])


def _windows(config: Config, *, default: list[str]) -> tuple[int | None, ...]:
    """Read `layer_types`, by default of the family's pattern, and `sliding_window`."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = default
    if not isinstance(kinds, list) or len(kinds) != len(default) or not all(kind in (SLIDING, FULL) for kind in kinds):
        raise DataError(
            f"{CONFIG_FILE}: layer_types must be {SLIDING} or {FULL} for each of {len(default)} layers, got {kinds!r}"
        )
    if SLIDING not in kinds:
        return (None,) * len(kinds)
    window = whole_number(config, "sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _only(config: Config, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that mean something which the decoder does not do."""
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:
            raise DataError(f"{CONFIG_FILE}: {key} must be {values[0]!r}, got {config[key]!r}")


def _head_dim(config: Config, *, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise DataError(
            f"{CONFIG_FILE}: hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
            f"got {hidden_size} and {num_heads}"
        )
    head_dim = whole_number(config, "head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise DataError(f"{CONFIG_FILE}: head_dim must be even, got {head_dim}")
    return head_dim


def _chosen(config: Config, count: str) -> int:
    chosen = whole_number(config, "num_experts_per_tok")
    if chosen > config[count]:
        raise DataError(f"{CONFIG_FILE}: num_experts_per_tok must be at most {count}, got {chosen} and {config[count]}")
    return chosen


def _bound(config: Config, key: str) -> float | None:
    return None if config[key] is None else positive_number(config, key)
