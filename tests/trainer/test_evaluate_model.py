"""What lm_eval sees of a model equals what transformers finds of each request alone."""

import copy
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import save_file
from torch.nn import functional

from kubetune_trainer import load_model
from kubetune_trainer.distributed import StopSignal, World
from kubetune_trainer.evaluate.answers import Answers
from kubetune_trainer.evaluate.model import EvalModel
from kubetune_trainer.evaluate.work import Crew
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.weights import build_model
from kubetune_trainer.storage import open_store
from kubetune_trainer.tokenizer import load_tokenizer
from tests.trainer.families import make_folder as make_family_folder
from tests.trainer.tiny_model import build_tokenizer, model_config, write_model, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

Load = Callable[..., EvalModel]
"""Takes a folder, and the batch size if that matters."""

ORIGINAL_CONTEXT = 100
NUM_TOKENS = 260  # bytes and four special ones
TINY: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": NUM_TOKENS,
    "intermediate_size": 30, "num_hidden_layers": 3, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def load(world: World, tmp_path: Path) -> Iterator[Load]:
    """Load a model's folder as lm_eval sees it, on one rank."""
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(leave=lambda: sys.exit(1))

    def load_folder(folder: Path, *, batch_size: int = 8) -> EvalModel:
        model = load_model(folder, dtype=torch.float32)
        answers = Answers(open_store(f"file://{tmp_path}/answers-{batch_size}"), fingerprint="test")
        tokenizer = load_tokenizer(folder)
        crew = Crew(model, tokenizer, batch_size=batch_size, answers=answers, world=world, stop=stop)
        return EvalModel(crew, [], max_length=model.config.max_positions, name="tiny", seed=0)

    yield load_folder
    signal.signal(signal.SIGTERM, before)


def scored(context: str, continuation: str) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


def whole(text: str) -> Instance:
    return Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)


def continued(context: str, **settings: Any) -> Instance:
    return Instance(request_type="generate_until", doc={}, arguments=(context, settings), idx=0)


def stretched_model(folder: Path, kind: str) -> Any:
    """Write a model whose angles depend on how long the text is; return that of transformers."""
    write_tokenizer(folder, bos_token="<s>")
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "dynamic":
        rope |= {"factor": 2.0}
        return make_family_folder(
            folder, "llama", TINY | {"rope_parameters": rope, "max_position_embeddings": ORIGINAL_CONTEXT}
        )
    rope |= {"short_factor": [1.0 + 0.1 * pair for pair in range(4)]}
    rope |= {"long_factor": [1.5 + 2.0 * pair for pair in range(4)]}
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": ORIGINAL_CONTEXT}
    return make_family_folder(folder, "phi3", TINY | {"rope_parameters": rope, **lengths})


@torch.no_grad()
def by_transformers(reference: Any, context: list[int], continuation: list[int]) -> float:
    """The log probability of a continuation, of this text alone."""
    rotary = copy.deepcopy(reference.model.rotary_emb)  # which remembers the longest text it saw
    logits = reference(torch.tensor([[*context, *continuation][:-1]])).logits[0, -len(continuation) :]
    reference.model.rotary_emb = rotary
    return float(functional.log_softmax(logits, dim=-1).gather(1, torch.tensor(continuation)[:, None]).sum())


def letters(number: int, *, seed: int) -> str:
    drawn = torch.randint(ord("a"), ord("z") + 1, (number,), generator=torch.Generator().manual_seed(seed))
    return "".join(map(chr, drawn.tolist()))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_score_is_that_of_the_text_alone_where_lengths_decide_about_angles(
    load: Load, tmp_path: Path, kind: str, batch_size: int
) -> None:
    reference = stretched_model(tmp_path / "model", kind)
    model = load(tmp_path / "model", batch_size=batch_size)
    model.max_length = 256  # a dynamic model's own is where its angles begin to change
    question = letters(60, seed=0)  # what the texts share a tree by
    texts = [(question + letters(more, seed=more), letters(4, seed=-more)) for more in (5, 20, 36, 37, 38, 70, 90)]
    texts += [(letters(30, seed=100), "no"), (letters(150, seed=101), "yes")]
    found = model.loglikelihood([scored(*text) for text in texts])
    for (context, continuation), (score, _) in zip(texts, found, strict=True):
        tokens = [model.tok_encode(text) for text in (context, continuation)]
        assert score == pytest.approx(by_transformers(reference, *tokens), abs=1e-3), len(context)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_perplexity_is_that_of_the_text_alone_where_lengths_decide_about_angles(
    load: Load, tmp_path: Path, kind: str
) -> None:
    reference = stretched_model(tmp_path / "model", kind)
    model = load(tmp_path / "model")
    model.max_length = 256
    texts = [letters(length, seed=length) for length in (40, 100, 101, 180)]
    found = model.loglikelihood_rolling([whole(text) for text in texts])
    for text, score in zip(texts, found, strict=True):
        wanted = by_transformers(reference, [model.prefix_token_id], model.tok_encode(text))
        assert score == pytest.approx(wanted, rel=1e-5), len(text)


def test_a_context_without_tokens_is_the_token_before_texts_and_changes_no_other_score(
    load: Load, tmp_path: Path
) -> None:
    """lm_eval counts a context's whitespace at its end to the continuation, so that nothing may be left of it."""
    model = load(write_model(tmp_path / "model"))
    (alone,) = model.loglikelihood([scored("abc", " def")])
    assert model.tok_encode("") == []
    again, newline, blank = model.loglikelihood(
        [scored("abc", " def"), scored("\n", "hello"), scored(" ", "hello, world and more")]
    )
    wanted = model.loglikelihood([scored("", "\nhello"), scored("", " hello, world and more")])
    assert again == pytest.approx(alone)
    assert [newline, blank] == [pytest.approx(score) for score in wanted]


def test_a_prompt_without_tokens_is_the_token_before_texts(load: Load, tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", bos_token="<s>"))
    settings = {"until": ["~"], "max_gen_toks": 8}
    assert model.generate_until([continued("", **settings)]) == model.generate_until([continued("<s>", **settings)])


def write_chain(folder: Path, follows: Mapping[str, str]) -> Path:
    """Write a model that goes from each token to the next, and from a token that is not there to the first."""
    write_tokenizer(folder, eos_token="<|endoftext|>")
    config = model_config(hidden_size=NUM_TOKENS, num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=256)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = build_model(ModelConfig.from_hf(config)).named_parameters()
    weights = {name: torch.zeros(weight.shape) for name, weight in shapes}
    weights["model.norm.weight"] += 1
    weights["model.embed_tokens.weight"] = torch.eye(NUM_TOKENS)
    ids = build_tokenizer().token_to_id
    for token, following in follows.items():
        weights["lm_head.weight"][ids(following), ids(token)] = 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "until",
    [
        pytest.param(["Question:", "</s>", "<|im_end|>"], id="a special token"),
        pytest.param(["5"], id="text behind a special token"),
        pytest.param(["45"], id="text around a special token"),
        pytest.param(["4<|im_end|>"], id="text with a special token"),
        pytest.param(["~"], id="what does not come"),
    ],
)
def test_an_answer_ends_where_that_of_lm_evals_own_backend_ends(load: Load, tmp_path: Path, until: list[str]) -> None:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 (slow, and only where it is compared)

    folder = write_chain(tmp_path / "model", {"a": "4", "4": "<|im_end|>", "<|im_end|>": "5", "5": "5"})
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    asked = continued("a", until=until, max_gen_toks=12, do_sample=False)
    wanted = theirs.generate_until([copy.deepcopy(asked)], disable_tqdm=True)
    assert load(folder).generate_until([asked]) == wanted
