"""Generation continues each prompt by itself, stops where it should, and draws as it is told."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kubetune_trainer import generate, load_model
from kubetune_trainer.errors import DataError
from kubetune_trainer.generation import choose_tokens, read_repetition_penalty, seeded, tokens_seen
from kubetune_trainer.model import Decoder
from tests.trainer.families import make_folder as make_family_folder
from tests.trainer.tiny import VOCAB_SIZE, make_folder, random_tokens

PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 6)]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Decoder, LlamaForCausalLM]:
    reference = make_folder(tmp_path)
    return load_model(tmp_path, dtype=torch.float32), reference


def test_greedy_tokens_of_a_mixed_batch_equal_those_of_transformers(models: tuple[Decoder, LlamaForCausalLM]) -> None:
    model, reference = models
    answers = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        whole = reference.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert answer == whole[0, len(prompt) :].tolist()


def test_a_stop_token_ends_its_own_answer_only(models: tuple[Decoder, LlamaForCausalLM]) -> None:
    model, _ = models
    free = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[])
    stop = free[1][4]
    stopped = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[stop])
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert len(stopped[1]) <= 4


def test_drawing_repeats_under_a_seed_and_differs_between_seeds(models: tuple[Decoder, LlamaForCausalLM]) -> None:
    model, _ = models
    drawn = [generate(model, PROMPTS, max_new_tokens=20, stop_ids=[], temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "narrow",
    [
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 1e-300},
        {"temperature": 1e-4},
        {"temperature": 1e-38},
        {"temperature": 1e-320},
    ],
)
def test_drawing_from_the_likeliest_token_alone_is_greedy(
    models: tuple[Decoder, LlamaForCausalLM], narrow: dict[str, float]
) -> None:
    model, _ = models
    greedy = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[])
    drawn = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[], **({"temperature": 1.0, "seed": 3} | narrow))
    assert drawn == greedy


def test_top_k_and_top_p_keep_the_likeliest_tokens(models: tuple[Decoder, LlamaForCausalLM]) -> None:
    model, _ = models
    with torch.no_grad():
        probabilities = model(torch.tensor([PROMPTS[0]]))[0, -1].softmax(dim=-1)
    likeliest = probabilities.argsort(descending=True).tolist()
    nucleus = int((probabilities.sort(descending=True).values.cumsum(0) < 0.6).sum()) + 1
    for narrow, wanted in (({"top_k": 3}, 3), ({"top_p": 0.6}, nucleus)):
        drawn = generate(model, [PROMPTS[0]] * 400, max_new_tokens=1, stop_ids=[], temperature=1.0, seed=0, **narrow)
        assert {answer[0] for answer in drawn} == set(likeliest[:wanted])


@pytest.fixture(params=["longrope", "dynamic"])
def stretched(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Decoder, Any]:
    """A model whose angles depend on how long the text is, from 100 tokens on."""
    config: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config |= {"vocab_size": VOCAB_SIZE, "intermediate_size": 30, "num_hidden_layers": 3, "tie_word_embeddings": False}
    rope: dict[str, Any] = {"rope_type": request.param, "rope_theta": 10000.0}
    if request.param == "dynamic":
        config |= {"rope_parameters": rope | {"factor": 2.0}, "max_position_embeddings": 100}
        reference = make_family_folder(tmp_path, "llama", config)
    else:
        rope |= {"short_factor": [1.0 + 0.1 * pair for pair in range(4)]}
        rope |= {"long_factor": [1.5 + 2.0 * pair for pair in range(4)]}
        config |= {"rope_parameters": rope, "max_position_embeddings": 256, "original_max_position_embeddings": 100}
        reference = make_family_folder(tmp_path, "phi3", config | {"pad_token_id": 0})
    return load_model(tmp_path, dtype=torch.float32), reference


def greedy_of_transformers(reference: Any, prompt: list[int], **options: Any) -> list[int]:
    rotary = copy.deepcopy(reference.model.rotary_emb)  # which remembers the longest text it saw
    tokens = torch.tensor([prompt])
    reference.generation_config.eos_token_id = None
    whole = reference.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **options)
    reference.model.rotary_emb = rotary
    return whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param((110, 130, 125, 121), id="all beyond the original context"),
        pytest.param((90, 90, 95, 40, 99, 100, 101), id="some grow out of it"),
        pytest.param((60, 70, 75, 72), id="all within"),
    ],
)
def test_prompts_with_a_common_beginning_are_answered_as_each_alone_whatever_their_lengths_do_to_angles(
    stretched: tuple[Decoder, Any], lengths: tuple[int, ...]
) -> None:
    model, reference = stretched
    beginning = random_tokens(1, 38, seed=50)[0].tolist()
    prompts = [
        beginning + random_tokens(1, length - 38, seed=number)[0].tolist() for number, length in enumerate(lengths)
    ]
    answers = generate(model, prompts, max_new_tokens=20, stop_ids=[])
    assert answers == [generate(model, [prompt], max_new_tokens=20, stop_ids=[])[0] for prompt in prompts]
    assert answers == [greedy_of_transformers(reference, prompt, max_new_tokens=20) for prompt in prompts]


def test_an_answer_that_ended_stays_so_when_others_are_computed_anew(stretched: tuple[Decoder, Any]) -> None:
    model, _ = stretched
    prompts = [random_tokens(1, 95, seed=number)[0].tolist() for number in range(3)]
    free = generate(model, prompts, max_new_tokens=20, stop_ids=[])
    told: list[int] = []

    def stop(answer: list[int]) -> bool:
        told.append(len(answer))
        return answer == free[1][:6]  # the last token of it is the first one beyond the original context

    assert generate(model, prompts, max_new_tokens=20, stop_ids=[], stop=stop) == [free[0], free[1][:6], free[2]]
    assert sorted(told) == sorted([*range(1, 21), *range(1, 7), *range(1, 21)])


def test_a_repetition_penalty_is_that_of_transformers_for_each_row_of_a_batch(
    models: tuple[Decoder, LlamaForCausalLM],
) -> None:
    model, reference = models
    assert not any(0 in prompt for prompt in PROMPTS), "what fills rows up must not count as seen"
    plain = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[])
    answers = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[], repetition_penalty=1.3)
    assert all(answer != other for answer, other in zip(answers, plain, strict=True))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == greedy_of_transformers(reference, prompt, max_new_tokens=20, repetition_penalty=1.3)


def test_a_repetition_penalty_counts_a_beginning_that_is_computed_once(
    models: tuple[Decoder, LlamaForCausalLM],
) -> None:
    model, _ = models
    beginning = random_tokens(1, 30, seed=9)[0].tolist()
    prompts = [[*beginning, *prompt] for prompt in PROMPTS * 2]
    options = {"max_new_tokens": 10, "stop_ids": [], "repetition_penalty": 1.3}
    assert generate(model, prompts, **options) == [generate(model, [prompt], **options)[0] for prompt in prompts]


def test_a_repetition_penalty_comes_before_all_else_and_counts_a_token_once() -> None:
    logits_BV, texts = torch.tensor([[2.0, -1.0, 1.7, 0.0]]), [[0, 0, 1]]
    seen_BV = tokens_seen(texts, vocab_size=4, device="cpu")
    drawing: dict[str, Any] = {"top_p": None, "generator": seeded(0, device="cpu"), "seen_BV": seen_BV}
    for penalty, temperature, likeliest in ((1.0, 0.0, 0), (1.1, 0.0, 0), (1.3, 0.0, 2), (1.3, 1.0, 2), (0.5, 0.0, 0)):
        chosen = choose_tokens(logits_BV, temperature=temperature, top_k=1, repetition_penalty=penalty, **drawing)
        assert chosen.tolist() == [likeliest]


@pytest.mark.parametrize(
    ("told", "penalty"), [({}, 1.0), ({"repetition_penalty": 1.1}, 1.1), ({"repetition_penalty": None}, 1.0)]
)
def test_a_model_folder_says_its_repetition_penalty(tmp_path: Path, told: dict[str, Any], penalty: float) -> None:
    assert read_repetition_penalty(tmp_path) == 1.0
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert read_repetition_penalty(tmp_path) == penalty


def test_a_repetition_penalty_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 0}')
    with pytest.raises(DataError, match=r"repetition_penalty must be a number above 0, got 0"):
        read_repetition_penalty(tmp_path)


def test_an_empty_prompt_is_refused(models: tuple[Decoder, LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(models[0], [[5], []], max_new_tokens=1, stop_ids=[])
