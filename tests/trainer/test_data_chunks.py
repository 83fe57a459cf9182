"""What becomes of a record: its tokens, which of them are trained, and which records count as copies."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kubetune_trainer.config import Dataset
from kubetune_trainer.data.chunks import Chunk, ChunkEncoder, EncodedChunk
from kubetune_trainer.data.encode import TokenizedSource, epoch_of, hold_out
from kubetune_trainer.errors import DataError
from kubetune_trainer.names import IGNORE_LABEL
from kubetune_trainer.tokenizer import Tokenizer, load_tokenizer
from tests.trainer.tiny_model import write_tokenizer

END = "<|im_end|>"


def sentencepiece(beginning: str) -> tokenizers.Tokenizer:
    """Letters, ▁ for a space, and one before the text: by a normalizer, as Llama 2 has it, or by a pre-tokenizer."""
    vocab = {token: number for number, token in enumerate(["<unk>", END, *"▁what is it?A:yesno\n"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([END])
    if beginning == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """Bytes, one merge of a space and a letter, and one of two line breaks."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġy", "ĊĊ"]
    vocab = {token: number for number, token in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "y"), ("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def saved(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return load_tokenizer(folder)


@pytest.fixture
def chatml(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path))


def encoded(
    records: Iterable[dict[str, Any]], format_: Any, tokenizer: Tokenizer, *, rows: Any = "Samples", **dataset: Any
) -> EncodedChunk:
    block = Dataset(sources=[{"name": "a", "uri": {"location": "file:///a.jsonl"}}], **dataset)
    placed = [(f"a.jsonl line {number}", record) for number, record in enumerate(records, start=1)]
    chunk = Chunk(source="a", records=placed, format=format_, columns={})
    return ChunkEncoder(block, tokenizer, rows).encode(chunk)


def tokens_of(chunk: EncodedChunk, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """All tokens, and those that are trained."""
    trained = chunk.labels[chunk.labels != IGNORE_LABEL]
    return tuple([tokenizer.backend.id_to_token(each) for each in ids.tolist()] for ids in (chunk.tokens, trained))


@pytest.mark.parametrize("beginning", ["normalizer", "pre-tokenizer"])
@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [("what is it? A:", " yes", "▁yes"), ("what is it? A: ", "yes", "yes"), ("what is it?\n", "no", "no")],
)
def test_a_completion_gets_no_space_that_its_text_does_not_have(
    beginning: str, prompt: str, completion: str, trained: str, tmp_path: Path
) -> None:
    tokenizer = saved(sentencepiece(beginning), tmp_path)
    whole = tokenizer.backend.encode(prompt + completion, add_special_tokens=False).tokens
    sample = encoded([{"prompt": prompt, "completion": completion}], "PromptCompletion", tokenizer)
    assert tokens_of(sample, tokenizer) == ([*whole, END], [*trained, END])


def test_answers_of_a_pair_get_no_space_that_their_text_does_not_have(tmp_path: Path) -> None:
    tokenizer = saved(sentencepiece("normalizer"), tmp_path)
    record = {"prompt": "it? A:", "chosen": " yes", "rejected": " no"}
    pair = encoded([record], "Preference", tokenizer, rows="Pairs", packing="None")
    assert tokens_of(pair, tokenizer) == ([*"▁it?▁A:▁yes", END, *"▁it?▁A:▁no", END], [*"▁yes", END, *"▁no", END])


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens", "trained"),
    [
        ("A:", " yes", [*"A:", "Ġy", *"es"], ["Ġy", *"es"]),
        ("A:\n", "yes", [*"A:Ċyes"], [*"yes"]),
        ("A: ", "no ", [*"A:ĠnoĠ"], [*"noĠ"]),
        ("A: ", "yes", [*"A:", "Ġy", *"es"], ["Ġy", *"es"]),
        ("A:\n", "\n\nno", [*"A:", "ĊĊ", *"Ċno"], ["ĊĊ", *"Ċno"]),
        ("", " yes", ["Ġy", *"es"], [*"es"]),
        ("A:", "", [*"A:"], []),
        (f"A:{END}", "", [*"A:", END], []),
    ],
    ids=["clean", "line break", "space", "merged space", "merged line breaks", "no prompt", "nothing", "prompt ends"],
)
def test_a_token_of_prompt_and_completion_is_trained(
    prompt: str, completion: str, tokens: list[str], trained: list[str], tmp_path: Path
) -> None:
    tokenizer = saved(byte_level(), tmp_path)
    sample = encoded([{"prompt": prompt, "completion": completion}], "PromptCompletion", tokenizer)
    assert tokens_of(sample, tokenizer) == ([*tokens, END], [*trained, END])


def test_prompt_and_completion_that_do_not_merge_are_as_if_encoded_apart(tmp_path: Path) -> None:
    tokenizer = saved(byte_level(), tmp_path)
    prompt, completion = "Grüße 😀 you\n", "yes 😀\n\nyou"
    sample = encoded([{"prompt": prompt, "completion": completion}], "PromptCompletion", tokenizer)
    apart = [tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eos_id]]
    assert sample.tokens.tolist() == [*apart[0], *apart[1]]
    assert sample.labels[sample.labels != IGNORE_LABEL].tolist() == apart[1]


def test_all_of_a_prompt_is_trained_where_everything_is(tmp_path: Path) -> None:
    tokenizer = saved(byte_level(), tmp_path)
    sample = encoded([{"prompt": "A:", "completion": " no"}], "PromptCompletion", tokenizer, train_on="All")
    assert tokens_of(sample, tokenizer)[1] == [*":Ġno", END]


BEGINNING = "the same long beginning "


@pytest.mark.parametrize(
    ("format_", "rows", "record"),
    [
        ("Text", "Samples", lambda tail: {"text": 9 * BEGINNING + tail}),
        ("PromptCompletion", "Samples", lambda tail: {"prompt": "Say:", "completion": 9 * BEGINNING + tail}),
        ("Preference", "Pairs",
         lambda tail: {"prompt": "Say:", "chosen": 9 * BEGINNING + tail, "rejected": 9 * BEGINNING.upper() + tail}),
        ("Preference", "Answers",
         lambda tail: {"prompt": "Say:", "chosen": 9 * BEGINNING + tail, "rejected": 9 * BEGINNING.upper() + tail}),
        ("UnpairedPreference", "Answers",
         lambda tail: {"prompt": "Say:", "completion": 9 * BEGINNING + tail, "label": True}),
    ],
)  # fmt: skip
def test_samples_that_are_equal_once_they_are_cut_are_held_out_together(
    format_: Any, rows: Any, record: Any, chatml: Tokenizer
) -> None:
    records = [record(str(number)) for number in range(8)]
    packing = {} if rows == "Samples" else {"packing": "None"}
    chunk = encoded(records, format_, chatml, rows=rows, max_sequence_length=64, overlong="Truncate", **packing)
    assert chunk.counts.truncated_samples == len(records)
    assert len(np.unique(chunk.digests)) == 1


def test_a_cut_sample_is_never_on_both_sides(chatml: Tokenizer) -> None:
    records = [{"text": f"{number % 20} {9 * BEGINNING}{number}"} for number in range(60)]
    chunk = encoded(records, "Text", chatml, max_sequence_length=32, overlong="Truncate")
    rows = [tuple(row) for row in np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1])]
    source = TokenizedSource(name="a", weight=1, first=0, digests=chunk.digests)
    held = hold_out([source], fraction=0.2)
    kept, trained = ({rows[n] for n in source.samples(held=held, are_held=side)} for side in (True, False))
    assert (len(kept), len(trained)) == (4, 16)
    assert not kept & trained


def test_parts_of_a_split_sample_stay_together(chatml: Tokenizer) -> None:
    records = [{"text": f"{number} {9 * BEGINNING}"} for number in range(3)]
    chunk = encoded(records, "Text", chatml, max_sequence_length=64, overlong="Split")
    assert [len(set(part.tolist())) for part in np.split(chunk.digests, 3)] == [1, 1, 1]
    assert len(np.unique(chunk.digests)) == 3


TOJSON = (
    "{% for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>{% endfor %}"
)
AS_TEXT = TOJSON.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}")
AS_THEY_ARE = TOJSON.replace("{{ call.function.arguments | tojson }}", "{{ call.function.arguments }}")


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("template", [TOJSON, AS_TEXT, AS_THEY_ARE], ids=["tojson", "joined", "as they are"])
@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'], ids=["object", "JSON"])
def test_arguments_are_written_as_json_once(template: str, arguments: Any, chatml: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Rain?"}, call(arguments)]
    sample = encoded([{"messages": messages}], "Messages", chatml, chat_template=template, train_on="All")
    written = chatml.decode(sample.tokens.tolist(), skip_special_tokens=False)
    assert written == f'Rain?{END}weather({{"city": "Köln"}}){END}'


@pytest.mark.parametrize(
    ("format_", "record", "field"),
    [
        ("Text", {"text": "cut \ud83d off"}, "text"),
        ("PromptCompletion", {"prompt": "a", "completion": "\ude00"}, "completion"),
        ("Messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}]},
         r"messages\[1\]\.content"),
        ("ShareGPT", {"id": 1, "conversations": [{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "a"}]},
         r"conversations\[0\]\.value"),
        ("Messages", {"messages": [{"role": "user", "content": "a 😀"}, call(r'{"\ud83d\ude00": "\ud83d"}')]},
         r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"),
    ],
    ids=["text", "second half", "messages", "ShareGPT", "arguments"],
)  # fmt: skip
def test_half_of_a_character_is_named_with_its_line_and_field(
    format_: Any, record: dict[str, Any], field: str, chatml: Tokenizer
) -> None:
    with pytest.raises(DataError, match=rf"^dataset source a: a\.jsonl line 1: {field} has half of a character"):
        encoded([record], format_, chatml, chat_template=TOJSON)


@pytest.mark.parametrize(("weight", "samples"), [(0.1, 1), (0.5, 2), (1.0, 3), (1.1, 3), (2.5, 8)])
def test_a_small_source_of_a_small_weight_is_not_rounded_away(weight: float, samples: int) -> None:
    source = TokenizedSource(name="few", weight=weight, first=5, digests=np.arange(3, dtype=np.uint64))
    epoch = epoch_of([source], held=np.empty(0, dtype=np.uint64), seed=0)
    assert len(epoch) == samples
    assert set(epoch) <= {5, 6, 7}
