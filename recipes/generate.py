"""Ask a model: talk to it, ask one thing, or every record of a file, through the model's own chat template.

    python recipes/generate.py --model runs/tickets/outputs/merged --chat
    python recipes/generate.py --model runs/tickets/outputs/merged --prompt "What is the capital of France?"
    python recipes/generate.py --model DIR --prompts heldout.jsonl --output answers.jsonl

Features: conversations, questions and files of them; adapters; five formats of models; drawn tokens; calls of tools.

The model is any folder that the other recipes write: Hugging Face, with an adapter beside it or not, CompressedTensors,
TorchAO, GGUF, whose weights become those of a decoder, and ExecuTorch, which runs in its own runtime on the CPU. In a
conversation the answer appears as it is written; Ctrl-C cuts it off,
/new begins another conversation, Ctrl-D ends it.

A record of the file is {"messages": [...]} or {"prompt": "..."}, with {"tools": [...]} where the model may call some.
Where the messages end with an answer, it is left out of the question. Each line of the output is the record with the
model's text under `answer`. While a file is asked, the answers of each batch are added to OUTPUT.partial; at the end
OUTPUT gets all of them at once, in the order of the questions. One device: a GPU if there is one.

Of the model's generation_config.json its stop tokens and its repetition_penalty count, as in transformers. Whether
tokens are drawn, and from which, is said here alone: without --temperature the likeliest is taken every time.
"""

import argparse
import contextlib
import json
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kubetune_trainer import generate, load_model, load_tokenizer
from kubetune_trainer.chat import ChatTemplate, Message, TemplateError
from kubetune_trainer.data.formats import Fields, RecordError
from kubetune_trainer.data.half_characters import half_character
from kubetune_trainer.data.read import read_records
from kubetune_trainer.data.tool_calls import takes_text, with_text
from kubetune_trainer.errors import DataError, TrainerError
from kubetune_trainer.export.executorch import ExecuTorchModel, continue_prompt
from kubetune_trainer.generation import Stop, read_repetition_penalty
from kubetune_trainer.model import Decoder
from kubetune_trainer.model.weights import PROGRAM_FILE
from kubetune_trainer.parallel import compute_dtype
from kubetune_trainer.tokenizer import Tokenizer
from kubetune_trainer.vocabulary import grown, growth_by_adapter

Record = dict[str, Any]
Model = Decoder | ExecuTorchModel

PART_OF_A_CHARACTER = "\ufffd"
"""What a tokenizer makes of each byte of a character, or of all of them, while others are still to come."""


def main() -> None:
    """Finds the model with the tokens and the chat template that an adapter brings, and asks it."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="kubetune-generate-") as place:
        if arguments.adapter is not None:
            growth = growth_by_adapter(arguments.model, arguments.adapter)
            arguments.model = grown(arguments.model, growth, below=Path(place))
        ask(arguments)


def ask(arguments: argparse.Namespace) -> None:
    """Reads the questions, asks them in batches and writes the answers in the questions' order."""
    tokenizer = load_tokenizer(arguments.model)
    if arguments.repetition_penalty is None:
        arguments.repetition_penalty = read_repetition_penalty(arguments.model)
    if arguments.chat:
        chat(arguments, tokenizer)
        return
    records = list(read_questions(arguments))
    asker = Asker(tokenizer, system=arguments.system)
    prompts = [asker.encode(record, place) for place, record in records]
    model = load(arguments)
    check_lengths([place for place, _ in records], prompts, longest=longest_text(model), arguments=arguments)

    lines: dict[int, str] = {}
    # Prompts of like length share a batch: the shorter ones are filled up, and filling costs as much as text.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with keep_as_they_come(arguments.output) as keep:
        for start in range(0, len(order), arguments.batch_size):
            batch = order[start : start + arguments.batch_size]
            generated = complete(model, [prompts[index] for index in batch], tokenizer, arguments)
            for index, ids in zip(batch, generated, strict=True):
                text = tokenizer.decode(ids)
                is_file = arguments.prompts is not None
                told = records[index][1] | {"answer": text}
                # Dates and the like, which parquet has and JSON has not, become text.
                lines[index] = json.dumps(told, ensure_ascii=False, default=str) if is_file else text
            keep([lines[index] for index in batch])
            print(f"{len(lines)} of {len(prompts)} answered", file=sys.stderr, flush=True)
    write([lines[index] for index in range(len(lines))], arguments.output)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = number(int, "a whole number of at least 1", lambda value: value >= 1)
    temperature = number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
    penalty = number(float, "a number above 0", lambda value: 0 < value < math.inf)
    part = number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
    seed = number(int, "a whole number that 64 bits hold", lambda value: -(2**63) <= value < 2**63)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a model")
    parser.add_argument("--adapter", type=Path, help="a PEFT folder that is merged into it")
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    questions.add_argument("--prompt", help="one message to the model")
    questions.add_argument("--prompts", type=Path, help="a json, jsonl, csv or parquet file of messages or prompts")
    parser.add_argument("--output", type=Path, help="where the answers to --prompts go; default: standard output")
    parser.add_argument("--system", help="what conversations begin with that have no system message of their own")
    parser.add_argument("--max-new-tokens", type=count, default=256, help="an answer is cut off after so many tokens")
    parser.add_argument("--batch-size", type=count, default=16, help="prompts answered at once")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 takes the likeliest token every time")
    parser.add_argument("--top-k", type=count, help="draw from so many likeliest tokens only")
    parser.add_argument("--top-p", type=part, help="draw from the likeliest tokens of this probability only")
    parser.add_argument("--seed", type=seed, help="makes drawing repeatable")
    parser.add_argument(
        "--repetition-penalty", type=penalty, help="above 1 repeats less; default: what generation_config.json says"
    )
    arguments = parser.parse_args()
    if arguments.output is not None and arguments.prompts is None:
        parser.error("argument --output: must come with --prompts")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        parser.error(f"argument --output: must be in a folder that is there, got {arguments.output}")
    if arguments.output is not None and arguments.output.is_dir():
        parser.error(f"argument --output: must be a file, got the folder {arguments.output}")
    for option in ("top_k", "top_p", "seed"):
        if getattr(arguments, option) is not None and arguments.temperature == 0.0:
            print(f"--{option.replace('_', '-')} changes nothing without --temperature", file=sys.stderr)
    return arguments


def number(kind: type[int] | type[float], rule: str, keeps: Callable[[float], bool]) -> Callable[[str], float]:
    """What reads an option's number and refuses one that breaks its rule."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if keeps(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")

    return read


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
    if isinstance(model, ExecuTorchModel):
        return model.max_length
    stretched = (rope.factor for rope in model.config.ropes if rope is not None and rope.kind == "dynamic")
    return int(model.config.max_positions * max(stretched, default=1.0))


def check_lengths(
    places: Sequence[str], prompts: Sequence[list[int]], *, longest: int, arguments: argparse.Namespace
) -> None:
    """Refuses a question that leaves no room for its answer, before any is asked."""
    for place, prompt in zip(places, prompts, strict=True):
        if len(prompt) + arguments.max_new_tokens > longest:
            raise DataError(
                f"{place}: the prompt and --max-new-tokens must be at most the {longest} tokens that the model sees, "
                f"got {len(prompt)} and {arguments.max_new_tokens}"
            )


def drawing(arguments: argparse.Namespace) -> dict[str, Any]:
    """How long answers may be and how their tokens are chosen."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return {name: getattr(arguments, name) for name in names}


def chat(arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """A conversation: reads a line, writes the answer as it comes, and remembers both."""
    if tokenizer.chat_template is None:
        raise DataError(f"Model folder {arguments.model} has no chat template; ask it with --prompt")
    model = load(arguments)
    asker, messages = Asker(tokenizer, system=arguments.system), list[Record]()
    while (line := read_line()) is not None:
        if line == "/new":
            messages = []
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            prompt = asker.encode({"messages": asked}, "the conversation")
            if len(prompt) + arguments.max_new_tokens > longest_text(model):
                print(f"the model sees {longest_text(model)} tokens; /new begins anew", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": answer(model, prompt, tokenizer, arguments)}]


def read_line() -> str | None:
    """What the person says, None at the end; the prompt is for a terminal only."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip().encode("utf-8", "replace").decode()
    except (EOFError, KeyboardInterrupt):
        return None


def answer(model: Model, prompt: list[int], tokenizer: Tokenizer, arguments: argparse.Namespace) -> str:
    """Writes an answer to the terminal token by token and returns it; Ctrl-C keeps what is there."""
    told, ids = "", []

    def show(tokens: list[int]) -> bool:
        nonlocal told, ids
        ids = tokens
        text = tokenizer.decode(tokens).rstrip(PART_OF_A_CHARACTER)
        if text.startswith(told):
            print(text[len(told) :], end="", flush=True)
            told = text
        return False

    with contextlib.suppress(KeyboardInterrupt):
        complete(model, [prompt], tokenizer, arguments, stop=show)
    text = tokenizer.decode(ids)
    # A tokenizer may write what it wrote before in another way once more has come.
    print(text[len(told) :] if text.startswith(told) else f"\n{text}")
    return text


def read_questions(arguments: argparse.Namespace) -> Iterator[tuple[str, Record]]:
    """Yields each record with the place that messages call it by."""
    if arguments.prompts is None:
        asked = iter([("--prompt", {"prompt": arguments.prompt})])
    elif not arguments.prompts.is_file():
        raise DataError(f"--prompts must name a file, got {arguments.prompts}")
    else:
        asked = read_records(arguments.prompts, name=str(arguments.prompts))
    for place, record in asked:
        if (field := half_character(record)) is not None:
            raise DataError(f"{place}: {field} has half of a character, which no text can hold")
        yield place, dict(record)


class Asker:
    """Turns questions into tokens, by the model's chat template where it has one."""

    def __init__(self, tokenizer: Tokenizer, *, system: str | None) -> None:
        self._tokenizer, self._system = tokenizer, system
        source = tokenizer.chat_template
        self._template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
        self._calls_as_text = self._template is not None and takes_text(self._template)

    def encode(self, record: Record, place: str) -> list[int]:
        """The token ids of a question, up to where the answer begins."""
        messages, tools = question(record, place)
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        if self._template is None:
            if len(messages) > 1 or tools or not isinstance(messages[0]["content"], str):
                raise DataError(f"{place} must be one text without --system and tools: the model has no chat template")
            ids = self._tokenizer.encode(messages[0]["content"], add_special_tokens=True)
        else:
            given = [with_text(message) for message in messages] if self._calls_as_text else messages
            try:
                ids = self._tokenizer.encode(self._template.render(given, tools=tools, add_generation_prompt=True))
            except TemplateError as error:
                raise DataError(f"{place}: the model's chat template fails: {error}") from error
        if not ids:
            raise DataError(f"{place} must have a token that the answer can follow, got none")
        return ids


def question(record: Record, place: str) -> tuple[Sequence[Message], Sequence[Any] | None]:
    """The messages that are put to the model, and the tools that it may call."""
    fields = Fields(record, {})
    try:
        tools = fields.tools()
        if isinstance(record.get("prompt"), str):
            return [{"role": "user", "content": record["prompt"]}], tools
        if not record.get("messages"):
            raise DataError(f"{place} must have messages or a prompt, got the keys {', '.join(record) or 'none'}")
        messages = fields.messages("messages")
    except RecordError as error:
        raise DataError(f"{place}: {error}") from error
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise DataError(f"{place}: messages must ask something, got an answer alone")
    return asked, tools


@contextlib.contextmanager
def keep_as_they_come(output: Path | None) -> Iterator[Callable[[Sequence[str]], None]]:
    """Gives what adds lines to OUTPUT.partial; where asking is cut off, they stay there."""
    if output is None:
        yield lambda _: None
        return
    file, num_kept = output.with_name(f"{output.name}.partial"), 0
    with file.open("w", encoding="utf-8") as stream:

        def keep(lines: Sequence[str]) -> None:
            nonlocal num_kept
            stream.writelines(f"{line}\n" for line in lines)
            stream.flush()
            num_kept += len(lines)

        try:
            yield keep
        except BaseException:
            print(f"{num_kept} answers are in {file}", file=sys.stderr)
            raise


def write(lines: Sequence[str], output: Path | None) -> None:
    """Writes all answers, to a file at once or not at all."""
    text = "".join(f"{line}\n" for line in lines)
    if output is None:
        sys.stdout.write(text)
        return
    ordered = output.with_name(f"{output.name}.ordered")
    ordered.write_text(text, encoding="utf-8")
    ordered.replace(output)
    output.with_name(f"{output.name}.partial").unlink()


if __name__ == "__main__":
    try:
        main()
    except TrainerError as error:
        print(f"{error}\n{error.hint}".rstrip(), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
