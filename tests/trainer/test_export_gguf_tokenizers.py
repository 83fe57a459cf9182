"""Tokenizers as the families have them: llama.cpp makes the same tokens of a text, and what it does not is told.

Their own files are not at hand. Each is made here in the form that its family's `tokenizer.json` has, its merges from
the text below.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kubetune_trainer import load_tokenizer
from kubetune_trainer.config import OutputBase
from kubetune_trainer.errors import DataError
from kubetune_trainer.export.convert import check_outputs
from kubetune_trainer.export.gguf import save_gguf
from kubetune_trainer.export.gguf_tokenizer import (
    GPT4O_SPLIT,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
    tokenizer_limits,
)
from tests.trainer.test_export_gguf import DIFFICULT, SHAPE, llama
from tests.trainer.tiny import make_folder

CODE = 'def f(x):\n    if x > 10:\n\t\treturn "a\\tb"  # ok\n\n\n    return x**2 != 3.14e-10\r\n'
CORPUS = [
    CODE, "The quick brown Fox can't, won't and SHOULDN'T've jumped; they'll see.", "HelloWorld camelCase HTTPServer",
    "1 12 123 1234 12345 1,234,567.89 2026-01-31", "   three leading,  two between and four trailing    ",
    "naïve café, Ünal's façade", "日本語のテキスト、漢字とかな。 中文没有空格", "Привет, мир! как дела",
    "שלום עולם مرحبا بالعالم",
    "🙂 🎉🎉 👍🏽 👩‍👩‍👧 🇩🇪", "a\u00a0b\u2003c \u200b zero", "tabs\t\tand\n\n\n\nnew lines \n \n",
    "x = {'a': [1, 2]}; // /* */ <b>&amp;</b>",
    "https://example.org/path?q=1#top", "½ ² Ⅷ ٣ ", "I'M HERE, IT'S 5'S", "()[]{}...!!??--__==>><<",
]  # fmt: skip
NOT_NFC = ["e\u0301", "cafe\u0301 au lait", "\u1112\u1161\u11ab"]
BEYOND_ASCII = ["ÉCOLE", "हिन्दी में लिखा", "cafe\u0301s"]
CHAT = "<|im_start|>user\nhi  <|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A family's way to split, and its tokens."""

    split: str
    ignore_merges: bool = False
    removed: bool = False
    is_nfc: bool = False
    bos: str | None = None
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    others: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


FORMS = {
    "qwen2": Form(split=QWEN2_SPLIT, is_nfc=True, others=("<tool_call>", "</tool_call>"), limits=("NFC",)),
    "llama-bpe": Form(split=LLAMA3_SPLIT, ignore_merges=True, bos="<|begin_of_text|>"),
    "dbrx": Form(split=LLAMA3_SPLIT, removed=True),
    "tekken": Form(split=TEKKEN_SPLIT, ignore_merges=True, bos="<s>", limits=("tekken",)),
    "gpt-4o": Form(split=GPT4O_SPLIT, removed=True, limits=("gpt-4o",)),
}


def write_byte_level(folder: Path, form: Form) -> int:
    tokenizer = Tokenizer(models.BPE())
    how = {"behavior": "removed", "invert": True} if form.removed else {"behavior": "isolated"}
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(form.split), **how), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *BEYOND_ASCII] * 3, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocab = trained["vocab"] | {"helloworldly": len(trained["vocab"])}  # no merges lead there
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, ignore_merges=form.ignore_merges)
    if form.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    special = (form.bos, *form.special) if form.bos else form.special
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in form.others])
    if form.bos:
        begin = tokenizer.token_to_id(form.bos)
        frame = processors.TemplateProcessing(single=f"{form.bos} $A", special_tokens=[(form.bos, begin)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"eos_token": form.special[0], "bos_token": form.bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return tokenizer.get_vocab_size()


def write_model(folder: Path, write: Callable[[Path], int]) -> Path:
    folder.mkdir()
    make_folder(folder, **(SHAPE | {"vocab_size": write(folder) + 3, "num_hidden_layers": 1, "dtype": torch.float16}))
    return folder


def assert_alike(source: Path, target: Path, texts: list[str]) -> None:
    """The same tokens of every text, with and without what begins a text, and the text again from the tokens."""
    tokenizer = load_tokenizer(source)
    with llama(target) as loaded:
        for text in texts:
            ids = tokenizer.encode(text)
            assert loaded.tokenize(text.encode(), add_bos=False, special=True) == ids, text
            framed = tokenizer.encode(text, add_special_tokens=True)
            assert loaded.tokenize(text.encode(), add_bos=True, special=True) == framed, text


@pytest.mark.parametrize("rule", FORMS)
def test_byte_level_tokenizers_of_the_families_split_text_alike(tmp_path: Path, rule: str) -> None:
    form = FORMS[rule]
    source = write_model(tmp_path / "source", lambda folder: write_byte_level(folder, form))
    save_gguf(source, tmp_path / "target")
    tokenizer = load_tokenizer(source)
    assert (len(tokenizer.encode("helloworldly")) == 1) == form.ignore_merges
    texts = [*CORPUS, *DIFFICULT, "\n".join(CORPUS), CHAT, "helloworldly", "<tool_call>{}</tool_call>"]
    beyond = [*(NOT_NFC if form.is_nfc else ()), *(BEYOND_ASCII if rule in {"tekken", "gpt-4o"} else ())]
    assert_alike(source, tmp_path / "target", [text for text in texts if text not in beyond and text != "e\u0301"])
    with llama(tmp_path / "target") as loaded:
        assert loaded.metadata["tokenizer.ggml.pre"] == rule
        for text in beyond:
            found = loaded.tokenize(text.encode(), add_bos=False, special=True)
            assert found != tokenizer.encode(text), f"{text} is split alike, and need not be told of"
            assert tokenizer.decode(found) == text
    limits = tokenizer_limits(source, vocab_size=tokenizer.vocab_size)
    assert len(limits) == len(form.limits)
    assert all(words in limit for words, limit in zip(form.limits, limits, strict=True))


def changed(folder: Path, change: Callable[[Any], object]) -> None:
    written = json.loads((folder / "tokenizer.json").read_text())
    change(written)
    (folder / "tokenizer.json").write_text(json.dumps(written))


def test_what_a_file_carries_in_part_is_told_before_anything_is_written(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", lambda folder: write_byte_level(folder, FORMS["qwen2"]))
    changed(source, lambda written: written["added_tokens"][1].update(rstrip=True, lstrip=True))
    output = OutputBase(name="edge", type="GGUF", gguf={"type": "F16"})
    told = (
        "llama.cpp does not bring text into NFC: text that is in another form becomes other tokens there",
        "llama.cpp keeps spaces beside special tokens, which <|im_start|> take away",
    )
    limits = check_outputs([output], source, title="FineTuneJob a/b")
    assert limits == [f"FineTuneJob a/b: output edge: {limit}" for limit in told]
    save_gguf(source, tmp_path / "target")
    with llama(tmp_path / "target") as loaded:
        found = loaded.tokenize(CHAT.encode(), add_bos=False, special=True)
        assert found != load_tokenizer(source).encode(CHAT)


def add_tokens(folder: Path, tokens: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))


def name_special(folder: Path, **names: str) -> None:
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, **names}))


def test_an_added_token_has_the_number_that_the_library_gives_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", lambda folder: write_byte_level(folder, FORMS["llama-bpe"]))
    changed(source, lambda written: written["added_tokens"][-1].update(id=100_000))
    save_gguf(source, tmp_path / "target")
    assert_alike(source, tmp_path / "target", [*CORPUS, CHAT])


def test_added_tokens_past_the_rows_are_left_out_and_told_of(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", lambda folder: write_byte_level(folder, FORMS["llama-bpe"]))
    num_rows = json.loads((source / "config.json").read_text())["vocab_size"]
    add_tokens(source, ["<a>", "<b>", "<c>", "<image>", "<far>"])
    name_special(source, pad_token="<image>")
    output = OutputBase(name="edge", type="GGUF", gguf={"type": "F16"})
    told = f"tokens past the model's {num_rows} rows for ordinary text: <image> ({num_rows}), <far> ({num_rows + 1})"
    assert check_outputs([output], source, title="FineTuneJob a/b") == [
        f"FineTuneJob a/b: output edge: llama.cpp takes {told}"
    ]
    save_gguf(source, tmp_path / "target")
    assert_alike(source, tmp_path / "target", [*CORPUS, CHAT, "helloworldly", "<a>, <c>"])
    with llama(tmp_path / "target") as loaded:
        assert loaded.n_vocab() == num_rows
        assert "tokenizer.ggml.padding_token_id" not in loaded.metadata
        assert len(loaded.tokenize(b"<image>", add_bos=False, special=True)) > 1


def test_a_piece_past_the_rows_is_refused_whatever_their_number(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", lambda folder: write_byte_level(folder, FORMS["qwen2"]))
    num_rows = json.loads((source / "config.json").read_text())["vocab_size"]
    changed(source, lambda written: written["model"]["vocab"].update(helloworldly=num_rows + 7))
    words = f"has the piece 'helloworldly' as id {num_rows + 7}, and vocab_size in config.json is {num_rows}"
    with pytest.raises(DataError, match=words):
        save_gguf(source, tmp_path / "target")


def test_an_end_of_text_past_the_rows_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", lambda folder: write_byte_level(folder, FORMS["qwen2"]))
    num_rows = json.loads((source / "config.json").read_text())["vocab_size"]
    add_tokens(source, ["<a>", "<b>", "<c>", "<end>"])
    name_special(source, eos_token="<end>")
    with pytest.raises(DataError, match=f"the token that ends a text must have a row, got id {num_rows}"):
        save_gguf(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda written: written.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
            "model must be BPE, got 'Unigram'",
        ),
        (
            lambda written: written["model"].update(ignore_merges=True),
            "model.ignore_merges must be False with this pre_tokenizer",
        ),
        (
            lambda written: written["added_tokens"][0].update(single_word=True),
            r"added token '<\|endoftext\|>' must not be single_word",
        ),
        (
            lambda written: written["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
            "pre_tokenizer must be that of GPT-2, SmolLM, Llama 3, Qwen2, Mistral Nemo, OLMo 2 or Phi-4, .*got Split",
        ),
        (
            lambda written: written["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
            "pre_tokenizer must be that of .*got Split",
        ),
    ],
    ids=["no BPE", "merges that are ignored", "single words", "another behavior", "what is between"],
)
def test_a_tokenizer_that_llama_cpp_has_no_rule_for_is_refused(
    tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    source = write_model(tmp_path / "source", lambda folder: write_byte_level(folder, FORMS["qwen2"]))
    changed(source, change)
    with pytest.raises(DataError, match=f"GGUF cannot carry tokenizer.json: .*{words}"):
        save_gguf(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
