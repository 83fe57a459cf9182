"""Generation continues each prompt by itself, stops where it should, and draws as it is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from kubetune_trainer import generate, load_model
from kubetune_trainer.errors import ExitCode
from kubetune_trainer.model import Decoder
from tests.cluster.paths import ROOT
from tests.trainer.smollm2 import smollm2_folder
from tests.trainer.tiny import make_folder, random_tokens

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


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
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


def test_an_empty_prompt_is_refused(models: tuple[Decoder, LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(models[0], [[5], []], max_new_tokens=1, stop_ids=[])


def ask(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "recipes" / "generate.py", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_recipe_answers_a_file_of_messages_in_its_order(tmp_path: Path) -> None:
    questions = ["Name the capital of France. Answer with one word only, please, and nothing else.", "Say hello."]
    records = [{"id": i, "messages": [{"role": "user", "content": text}]} for i, text in enumerate(questions)]
    records[0]["messages"].append({"role": "assistant", "content": "Paris"})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "answers.jsonl"
    done = ask(
        *("--model", smollm2_folder(), "--prompts", tmp_path / "questions.jsonl"),
        *("--output", output, "--max-new-tokens", "8", "--batch-size", "1"),
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: answer[key] for key in ("id", "messages")} for answer in answers] == records
    assert "Paris" in answers[0]["answer"]
    assert "hello" in answers[1]["answer"].lower()


@pytest.mark.parametrize(
    ("record", "message"),
    [('{"text": "a"}', "line 1 must have messages or a prompt, got the keys text"), ("{", "line 1")],
)
def test_the_recipe_names_a_record_that_asks_nothing(tmp_path: Path, record: str, message: str) -> None:
    (tmp_path / "questions.jsonl").write_text(record + "\n")
    done = ask("--model", smollm2_folder(), "--prompts", tmp_path / "questions.jsonl")
    assert done.returncode == ExitCode.DATA
    assert message in done.stderr
    assert "Traceback" not in done.stderr
