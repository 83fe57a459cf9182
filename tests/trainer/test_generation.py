"""Generation continues each prompt by itself, stops where it should, and draws as it is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from kubetune_trainer import generate, load_model
from kubetune_trainer.errors import DataError, ExitCode
from kubetune_trainer.export.executorch import save_executorch
from kubetune_trainer.export.gguf import save_gguf
from kubetune_trainer.model import Decoder
from tests.cluster.paths import ROOT
from tests.recipes.tiny import write_tokenizer
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


def ask(*arguments: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "recipes" / "generate.py", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, input=typed)


def test_a_conversation_remembers_what_was_said_until_it_begins_anew() -> None:
    lines = ["My name is Rosa. Please say hello.", "What is my name? Just the name.", "", "/new", "What is 2+2?"]
    typed = "".join(f"{line}\n" for line in lines)
    done = ask("--model", smollm2_folder(), "--chat", "--max-new-tokens", "16", typed=typed)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) >= 3
    assert "Rosa" in done.stdout
    again = ask("--model", smollm2_folder(), "--prompt", lines[-1], "--max-new-tokens", "16")
    assert done.stdout.endswith(again.stdout), "after /new it is asked as if for the first time"


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    make_folder(tmp_path, vocab_size=320)
    write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"chat_template": None}))
    done = ask("--model", tmp_path, "--chat", typed="hello\n")
    assert done.returncode == ExitCode.DATA
    assert "has no chat template; ask it with --prompt" in done.stderr


def test_a_gguf_folder_is_talked_to_like_any_other(tmp_path: Path) -> None:
    # F16 holds bf16's numbers, so that both have the same weights whatever the CPU computes in.
    make_folder(tmp_path / "source", dtype=torch.bfloat16, vocab_size=320, hidden_size=64, intermediate_size=96)
    write_tokenizer(tmp_path / "source")
    save_gguf(tmp_path / "source", tmp_path / "gguf")
    asked = ("--prompt", "the red cat", "--max-new-tokens", "5")
    answers = [ask("--model", tmp_path / form, *asked) for form in ("source", "gguf")]
    assert answers[0].stdout == answers[1].stdout, answers[1].stderr


def test_an_executorch_program_is_talked_to_like_any_other(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    write_tokenizer(tmp_path / "source")
    save_executorch(tmp_path / "source", tmp_path / "program", max_sequence_length=48)
    asked = ("--chat", "--max-new-tokens", "12")
    answers = [ask("--model", tmp_path / form, *asked, typed="red cat\n" * 4) for form in ("source", "program")]
    assert answers[1].returncode == 0, answers[1].stderr
    first = answers[0].stdout.splitlines()[0]
    assert answers[1].stdout.splitlines()[0] == first
    assert "the model sees 48 tokens; /new begins anew" in answers[1].stderr
    with pytest.raises(DataError, match=r"model.pte is an ExecuTorch program"):
        load_model(tmp_path / "program")


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
