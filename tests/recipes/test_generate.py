"""The recipe that asks a model: a conversation, one message, or a file of them."""

import importlib.util
import json
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tokenizers
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from tokenizers import decoders, models

from kubetune_trainer import load_model
from kubetune_trainer.errors import DataError, ExitCode
from kubetune_trainer.export.executorch import save_executorch
from kubetune_trainer.export.gguf import save_gguf
from kubetune_trainer.tokenizer import load_tokenizer
from tests.cluster.paths import ROOT
from tests.recipes.tiny import write_tokenizer
from tests.trainer.smollm2 import smollm2_folder
from tests.trainer.tiny import make_folder

RECIPE = ROOT / "recipes" / "generate.py"


@pytest.fixture
def recipe() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("generate", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a model that reads bytes."""
    make_folder(tmp_path / "model", vocab_size=320, max_position_embeddings=128)
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def parse(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """Reads a command line."""

    def read(*arguments: str | Path) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        return recipe.parse_arguments()

    return read


def ask(*arguments: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, RECIPE, *arguments]
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
    told = tmp_path / "source" / "generation_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"repetition_penalty": 1.5}))
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


def byte_fallback() -> tokenizers.Tokenizer:
    """A tokenizer that writes what it has no word for as one token a byte, as Llama 2's does."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581Hello",
        "\u2581how",
        "\u2581are",
    ]
    vocab = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("Hello\u00e9 how are", None, id="2 bytes"),
        pytest.param("Hello\u6f22 how are", None, id="3 bytes"),
        pytest.param("Hello\U0001f600 how\U0001f600", None, id="4 bytes"),
        pytest.param(b"Hello\xf0\x9f how", "Hello\ufffd\ufffd how", id="a part of a character, then words"),
        pytest.param(b"Hello\xf0\x9f", "Hello\ufffd\ufffd", id="cut off inside a character"),
    ],
)
def test_a_conversation_shows_all_of_an_answer_whatever_bytes_its_characters_have(
    recipe: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | bytes,
    shown: str | None,
) -> None:
    backend = byte_fallback()
    raw = text.encode() if isinstance(text, str) else text
    ids: list[int] = []
    while raw:
        word = next((word for word in ("Hello", " how", " are") if raw.startswith(word.encode())), None)
        name = f"\u2581{word.strip()}" if word else f"<0x{raw[0]:02X}>"
        ids.append(backend.token_to_id(name))
        raw = raw[len(word) if word else 1 :]

    def complete(*_: Any, stop: Callable[[list[int]], bool]) -> list[list[int]]:
        for number in range(1, len(ids) + 1):
            assert not stop(ids[:number])
        return [ids]

    class Bytes:
        def decode(self, tokens: list[int]) -> str:
            return backend.decode(tokens)

    monkeypatch.setattr(recipe, "complete", complete)
    wanted = shown or text
    assert recipe.answer(None, [1], Bytes(), None) == wanted
    assert capsys.readouterr().out == f"{wanted}\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--top-p", "0"), "argument --top-p: must be a number above 0 and at most 1, got 0"),
        (("--top-p", "1.5"), "argument --top-p: must be a number above 0 and at most 1, got 1.5"),
        (("--top-k", "0"), "argument --top-k: must be a whole number of at least 1, got 0"),
        (("--top-k", "2.5"), "argument --top-k: must be a whole number of at least 1, got 2.5"),
        (("--temperature", "-1"), "argument --temperature: must be a number of at least 0, got -1"),
        (("--temperature", "nan"), "argument --temperature: must be a number of at least 0, got nan"),
        (("--batch-size", "0"), "argument --batch-size: must be a whole number of at least 1, got 0"),
        (("--max-new-tokens", "0"), "argument --max-new-tokens: must be a whole number of at least 1, got 0"),
        (("--repetition-penalty", "0"), "argument --repetition-penalty: must be a number above 0, got 0"),
        (("--output", "answers.jsonl"), "argument --output: must come with --prompts"),
        (("--seed", str(2**63)), f"argument --seed: must be a whole number that 64 bits hold, got {2**63}"),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name_rule_and_value(
    parse: Callable[..., Namespace], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--model", "m", "--prompt", "hello", *options)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {complaint}\n")


def test_output_in_a_folder_that_is_not_there_is_refused_before_anything_is_asked(
    parse: Callable[..., Namespace], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "none" / "answers.jsonl"
    with pytest.raises(SystemExit):
        parse("--model", "m", "--prompts", "p.jsonl", "--output", output)
    assert f"argument --output: must be in a folder that is there, got {output}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--model", "m", "--prompts", "p.jsonl", "--output", tmp_path)
    assert f"argument --output: must be a file, got the folder {tmp_path}" in capsys.readouterr().err


def test_half_of_a_character_is_refused_before_anything_is_asked(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "red cat"}\n{"prompt": "red", "note": "\\ud83d"}\n')
    done = ask("--model", tiny, "--prompts", tmp_path / "p.jsonl")
    assert done.returncode == ExitCode.DATA
    assert "p.jsonl line 2: note has half of a character, which no text can hold" in done.stderr


def test_dates_of_parquet_stand_in_the_answers_as_text(tiny: Path, tmp_path: Path) -> None:
    rows = {"prompt": ["red cat"], "at": [datetime(2026, 1, 2, tzinfo=UTC)]}
    parquet.write_table(pa.table(rows), tmp_path / "p.parquet")
    done = ask("--model", tiny, "--prompts", tmp_path / "p.parquet", "--max-new-tokens", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["at"].startswith("2026-01-02")


def test_an_option_of_drawing_says_that_it_changes_nothing_where_none_is_drawn(
    parse: Callable[..., Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    parse("--model", "m", "--prompt", "hello", "--top-p", "0.9", "--temperature", "0.7")
    assert capsys.readouterr().err == ""
    parse("--model", "m", "--prompt", "hello", "--top-p", "0.9")
    assert capsys.readouterr().err == "--top-p changes nothing without --temperature\n"


USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
}


@pytest.mark.parametrize(
    ("record", "system", "written"),
    [
        ({"prompt": "hi"}, None, "<user>hi"),
        ({"prompt": "hi"}, "Be brief.", "<system>Be brief.<user>hi"),
        ({"messages": [USER]}, "Be brief.", "<system>Be brief.<user>hi"),
        ({"messages": [{"role": "system", "content": "Mine."}, USER]}, "Be brief.", "<system>Mine.<user>hi"),
        ({"messages": [USER], "tools": [TOOL]}, None, "weather<user>hi"),
        ({"messages": [USER], "tools": json.dumps([TOOL])}, None, "weather<user>hi"),
        ({"prompt": "hi", "tools": [TOOL]}, None, "weather<user>hi"),
        (
            {"messages": [USER, CALL, {"role": "tool", "content": "dry"}]},
            None,
            '<user>hi<assistant>{"city": "Rome"}<tool>dry',
        ),
    ],
)
def test_system_and_tools_reach_the_chat_template(
    recipe: Any, record: dict[str, Any], system: str | None, written: str
) -> None:
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.arguments }}{% endfor %}{% endfor %}"
    )
    tokenizer = Namespace(chat_template=template, special_tokens={}, encode=lambda text, **_: text)
    assert recipe.Asker(tokenizer, system=system).encode(record, "p.jsonl line 1") == written


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": ["hi"]}, "p.jsonl line 3: messages[0] must have role and content, got 'hi'"),
        ({"messages": [{"role": "user"}]}, "p.jsonl line 3: messages[0].content is missing"),
        ({"messages": "hi"}, "p.jsonl line 3: messages must be a list of messages, got 'hi'"),
        ({"messages": [USER], "tools": {}}, "p.jsonl line 3: tools must be a list of tools, got {}"),
        ({"messages": [USER], "tools": "["}, "p.jsonl line 3: tools is not JSON"),
        ({"messages": [USER | {"role": "assistant"}]}, "p.jsonl line 3: messages must ask something, got an answer"),
        ({"messages": []}, "p.jsonl line 3 must have messages or a prompt, got the keys messages"),
    ],
)
def test_a_record_that_is_no_question_is_refused_by_its_place(
    recipe: Any, record: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError) as refused:
        recipe.question(record, "p.jsonl line 3")
    assert str(refused.value).startswith(complaint)


@pytest.mark.parametrize(
    ("record", "system"),
    [({"messages": [USER, USER]}, None), ({"prompt": "hi"}, "Be brief."), ({"prompt": "hi", "tools": [TOOL]}, None)],
)
def test_a_model_without_a_chat_template_gets_one_text_alone(
    recipe: Any, record: dict[str, Any], system: str | None
) -> None:
    tokenizer = Namespace(chat_template=None, special_tokens={}, encode=lambda text, **_: [len(text)])
    assert recipe.Asker(tokenizer, system=None).encode({"prompt": "hi"}, "p") == [2]
    with pytest.raises(DataError, match="p must be one text without --system and tools"):
        recipe.Asker(tokenizer, system=system).encode(record, "p")


def test_a_question_that_leaves_no_room_for_its_answer_is_refused_by_its_place(tiny: Path, tmp_path: Path) -> None:
    records = [{"prompt": "short"}, {"prompt": "long " * 30}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = ask("--model", tiny, "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", "9")
    assert done.returncode == ExitCode.DATA
    assert "p.jsonl line 2: the prompt and --max-new-tokens must be at most the 128 tokens" in done.stderr
    assert done.stdout == ""


def test_what_was_answered_before_an_interruption_stays_and_the_output_appears_whole(
    recipe: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": number, "prompt": "cat " * number} for number in (3, 1, 2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    output.write_text("of an earlier run\n")
    options = ["--model", tiny, "--prompts", tmp_path / "p.jsonl", "--output", output, "--batch-size", "1"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, options), "--max-new-tokens", "3"])
    complete, asked = recipe.complete, []

    def interrupted(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return complete(*arguments)

    monkeypatch.setattr(recipe, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    assert output.read_text() == "of an earlier run\n"
    assert [json.loads(line)["id"] for line in partial.read_text().splitlines()] == [1, 2]
    assert f"2 answers are in {partial}" in capsys.readouterr().err

    monkeypatch.setattr(recipe, "complete", complete)
    recipe.main()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [3, 1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.jsonl", "model", "p.jsonl"]


def test_ctrl_c_between_batches_leaves_no_traceback(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "cat"}\n' * 2000)
    command = [sys.executable, RECIPE, "--model", tiny, "--prompts", tmp_path / "p.jsonl", "--batch-size", "1"]
    command += ["--max-new-tokens", "8", "--output", tmp_path / "out.jsonl"]
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears) as process:  # noqa: PLW1509
        assert process.stderr is not None
        lines = iter(process.stderr)
        next(line for line in lines if " of 2000 answered" in line)
        process.send_signal(signal.SIGINT)
        rest = "".join(lines)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in rest
    kept = len((tmp_path / "out.jsonl.partial").read_text().splitlines())
    assert f"{kept} answers are in" in rest


def test_the_penalty_of_the_models_folder_counts_where_the_command_line_says_none(
    recipe: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> str:
        asked = ["--model", str(tiny), "--prompt", "the red cat", "--max-new-tokens", "24", *options]
        monkeypatch.setattr(sys, "argv", ["generate.py", *asked])
        capsys.readouterr()
        recipe.main()
        return capsys.readouterr().out

    plain = said()
    given = said("--repetition-penalty", "1.5")
    assert given not in ("", plain)
    told = json.loads((tiny / "generation_config.json").read_text())
    (tiny / "generation_config.json").write_text(json.dumps(told | {"repetition_penalty": 1.5}))
    assert said() == given
    assert said("--repetition-penalty", "1") == plain


def test_an_adapter_is_asked_through_the_chat_template_that_it_was_trained_with(
    recipe: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, name = tmp_path / "adapter", "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    adapter.mkdir()
    save_file(
        {f"{name}A.weight": torch.zeros(2, 32), f"{name}B.weight": torch.zeros(32, 2)},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}TRAINED {{ m.content }}{% endfor %}")
    prompts: list[list[int]] = []
    complete = recipe.complete

    def watched(model: Any, asked: list[list[int]], *more: Any) -> Any:
        prompts.extend(asked)
        return complete(model, asked, *more)

    monkeypatch.setattr(recipe, "complete", watched)
    options = ["--model", tiny, "--adapter", adapter, "--prompt", "hello", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, options)])
    recipe.main()
    assert [load_tokenizer(tiny).decode(prompt) for prompt in prompts] == ["TRAINED hello"]
