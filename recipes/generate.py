"""Ask a model: talk to it, ask one thing, or every record of a file, through the model's own chat template.

    python recipes/generate.py --model runs/tickets/outputs/merged --chat
    python recipes/generate.py --model runs/tickets/outputs/merged --prompt "What is the capital of France?"
    python recipes/generate.py --model DIR --prompts heldout.jsonl --output answers.jsonl

The model is any folder that the other recipes write: Hugging Face, with an adapter beside it or not, CompressedTensors,
TorchAO, GGUF, whose weights become those of a decoder, and ExecuTorch, which runs in its own runtime on the CPU. In a
conversation the answer appears as it is written; Ctrl-C cuts it off,
/new begins another conversation, Ctrl-D ends it.

A record of the file is {"messages": [...]} or {"prompt": "..."}. Where the messages end with an answer, it is left out
of the question. Each line of the output is the record with the model's text under `answer`. One device: a GPU if there
is one.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from kubetune_trainer import generate, load_model, load_tokenizer
from kubetune_trainer.chat import ChatTemplate, TemplateError
from kubetune_trainer.data.read import read_records
from kubetune_trainer.errors import DataError, TrainerError
from kubetune_trainer.export.executorch import ExecuTorchModel, continue_prompt
from kubetune_trainer.generation import Stop
from kubetune_trainer.model import Decoder
from kubetune_trainer.model.weights import PROGRAM_FILE
from kubetune_trainer.parallel import compute_dtype
from kubetune_trainer.tokenizer import Tokenizer
from kubetune_trainer.vocabulary import grown, growth_by_adapter

Record = dict[str, Any]
Model = Decoder | ExecuTorchModel

HALF_A_CHARACTER = "\ufffd"
"""What a tokenizer makes of a character whose other bytes are still to come."""


def main() -> None:
    """Finds the model with all tokens that an adapter brings, and asks it."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="kubetune-generate-") as place:
        if arguments.adapter is not None:
            growth = growth_by_adapter(arguments.model, arguments.adapter)
            arguments.model = grown(arguments.model, growth, below=Path(place))
        ask(arguments)


def ask(arguments: argparse.Namespace) -> None:
    """Reads the questions, asks them in batches and writes the answers in the questions' order."""
    tokenizer = load_tokenizer(arguments.model)
    if arguments.chat:
        chat(arguments, tokenizer)
        return
    records = list(read_questions(arguments))
    prompts = [encode(record, place, tokenizer=tokenizer) for place, record in records]
    model = load(arguments)

    answers: dict[int, str] = {}
    # Prompts of like length share a batch: the shorter ones are filled up, and filling costs as much as text.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), arguments.batch_size):
        batch = order[start : start + arguments.batch_size]
        generated = complete(model, [prompts[index] for index in batch], tokenizer, arguments)
        answers |= {index: tokenizer.decode(ids) for index, ids in zip(batch, generated, strict=True)}
        print(f"{len(answers)} of {len(prompts)} answered", file=sys.stderr, flush=True)

    if arguments.prompts is None:
        print(answers[0])
    elif arguments.output is None:
        write(sys.stdout, [record for _, record in records], answers)
    else:
        with arguments.output.open("w", encoding="utf-8") as stream:
            write(stream, [record for _, record in records], answers)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a model")
    parser.add_argument("--adapter", type=Path, help="a PEFT folder that is merged into it")
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    questions.add_argument("--prompt", help="one message to the model")
    questions.add_argument("--prompts", type=Path, help="a json, jsonl or parquet file of messages or prompts")
    parser.add_argument("--output", type=Path, help="where the answers to --prompts go; default: standard output")
    parser.add_argument("--system", help="what a conversation begins with, unseen")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="an answer is cut off after so many tokens")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts answered at once")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token every time")
    parser.add_argument("--top-k", type=int, help="draw from so many likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this probability only")
    parser.add_argument("--seed", type=int, help="makes drawing repeatable")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> Model:
    """The model in memory, in whichever form its folder has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (arguments.model / PROGRAM_FILE).is_file():
        if arguments.adapter is not None:
            raise DataError(f"Model folder {arguments.model} is a program: no adapter can be merged into it")
        return ExecuTorchModel(arguments.model)
    return load_model(arguments.model, dtype=compute_dtype(device), device=device, adapter=arguments.adapter)


def complete(
    model: Model,
    prompts: Sequence[list[int]],
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
    *,
    stop: Stop | None = None,
) -> list[list[int]]:
    """What the model adds to each prompt: to all at once, or to one after the other where it is a program."""
    chosen = {"stop_ids": tokenizer.stop_ids, "stop": stop, **drawing(arguments)}
    if isinstance(model, ExecuTorchModel):
        return [continue_prompt(model, prompt, **chosen) for prompt in prompts]
    return generate(model, prompts, **chosen)


def longest_text(model: Model) -> int:
    """How many tokens the model sees at once."""
    return model.max_length if isinstance(model, ExecuTorchModel) else model.config.max_positions


def drawing(arguments: argparse.Namespace) -> dict[str, Any]:
    """How long answers may be and how their tokens are chosen."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(arguments, name) for name in names}


def chat(arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """A conversation: reads a line, writes the answer as it comes, and remembers both."""
    if tokenizer.chat_template is None:
        raise DataError(f"Model folder {arguments.model} has no chat template; ask it with --prompt")
    model = load(arguments)
    beginning = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(beginning)
    while (line := read_line()) is not None:
        if line == "/new":
            messages = list(beginning)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            prompt = encode({"messages": asked}, "the conversation", tokenizer=tokenizer)
            if len(prompt) + arguments.max_new_tokens > longest_text(model):
                print(f"the model sees {longest_text(model)} tokens; /new begins anew", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": answer(model, prompt, tokenizer, arguments)}]


def read_line() -> str | None:
    """What the person says, None at the end; the prompt is for a terminal only."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def answer(model: Model, prompt: list[int], tokenizer: Tokenizer, arguments: argparse.Namespace) -> str:
    """Writes an answer to the terminal token by token and returns it; Ctrl-C keeps what is there."""
    told = ""

    def show(tokens: list[int]) -> bool:
        nonlocal told
        text = tokenizer.decode(tokens).removesuffix(HALF_A_CHARACTER)
        if text.startswith(told):
            print(text[len(told) :], end="", flush=True)
            told = text
        return False

    with contextlib.suppress(KeyboardInterrupt):
        complete(model, [prompt], tokenizer, arguments, stop=show)
    print()
    return told


def read_questions(arguments: argparse.Namespace) -> Iterator[tuple[str, Record]]:
    """Yields each record with the place that messages call it by."""
    if arguments.prompt is not None:
        yield "--prompt", {"prompt": arguments.prompt}
        return
    if not arguments.prompts.is_file():
        raise DataError(f"--prompts must name a file, got {arguments.prompts}")
    for place, record in read_records(arguments.prompts, name=str(arguments.prompts)):
        yield place, dict(record)


def encode(record: Record, place: str, *, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a question, up to where the answer begins."""
    messages = question(record, place)
    if tokenizer.chat_template is None:
        return tokenizer.encode(messages[-1]["content"], add_special_tokens=True)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    try:
        return tokenizer.encode(template.render(messages, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(f"{place}: the model's chat template fails: {error}") from error


def question(record: Record, place: str) -> Sequence[Record]:
    """The messages that are put to the model."""
    if isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}]
    messages = record.get("messages")
    if isinstance(messages, list) and messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{place} must have messages or a prompt, got the keys {', '.join(record) or 'none'}")
    return messages


def write(stream: TextIO, records: Sequence[Record], answers: dict[int, str]) -> None:
    """Writes each record with its answer, a line each."""
    lines = (
        json.dumps(record | {"answer": answers[index]}, ensure_ascii=False) for index, record in enumerate(records)
    )
    stream.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except TrainerError as error:
        print(f"{error}\n{error.hint}".rstrip(), file=sys.stderr)
        sys.exit(error.exit_code)
