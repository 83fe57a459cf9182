"""Tokenizers that were SentencePiece's: llama.cpp makes the same tokens of a text, and answers with the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kubetune_trainer import generate, load_model, load_tokenizer
from kubetune_trainer.errors import DataError
from kubetune_trainer.export.gguf import save_gguf
from kubetune_trainer.export.gguf_tokenizer import tokenizer_limits
from tests.trainer.test_export_gguf import DIFFICULT, SHAPE, llama
from tests.trainer.tiny import make_folder

SPECIAL = ["<unk>", "<s>", "</s>"]
PHI3 = ["<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_RUNS = [sign * number for sign in ("\n", "▁") for number in (2, 3, 4)] + ["<table>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
LINES = [
    "the cat and the other cats are there, then they gather", "a thin thing thinks within the thick theatre",
    "banana bandana ananas, abab ababa baba", "def f(x):\n    return f(x - 1) + f(x - 2)", "naïve café, 3.14 and 1234",
    "日本語の日本", "she sells sea shells on the sea shore; the shells she sells are sea shells",
] * 5  # fmt: skip
TEXTS = [
    *LINES[:7], *(text for text in DIFFICULT if "<|" not in text), "banana  ananas abababa",
    "thethethe", "ba ▁na", "aaaaaaa bbbb", "<0x41> and <0xZZ>",
]  # fmt: skip


def write_tokenizer(folder: Path, *, prepends: bool = True) -> int:
    """As transformers converts one of SentencePiece: pieces by score, and every pair that makes a piece."""
    made, signs = learned_pieces()
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *BYTES, *made, *signs])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges_of(made, vocab), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    steps = [normalizers.Prepend("▁")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return len(vocab)


def write_phi3(folder: Path) -> int:
    """Llama 2's with special tokens that take the spaces behind them away; `</s>` is no special one there."""
    num_pieces = write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, rstrip=token != "<|endoftext|>") for token in PHI3]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    changed(folder, lambda written: written["added_tokens"][2].update(special=False, rstrip=True))
    return num_pieces + len(PHI3)


def write_gemma(folder: Path) -> int:
    """No space before a text, runs of spaces and lines among added tokens, and the tab itself in place of its byte."""
    made, signs = learned_pieces()
    bytes_ = ["\t" if piece == "<0x09>" else piece for piece in BYTES]
    pieces = [*GEMMA, *GEMMA_RUNS, *bytes_, *made, *signs, *({"\n"} - set(signs))]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = merges_of([*GEMMA_RUNS, *made], vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in GEMMA])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in GEMMA_RUNS])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return len(vocab)


def merges_of(made: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    pairs = [(piece[:place], piece[place:]) for piece in made for place in range(1, len(piece))]
    return [pair for pair in pairs if all(part in vocab for part in pair)]


def learned_pieces() -> tuple[list[str], list[str]]:
    """Pieces that are made of others, in their order, and signs."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=240, show_progress=False))
    learned = sorted(trained.get_vocab(), key=lambda piece: trained.get_vocab()[piece])
    return [piece for piece in learned if len(piece) > 1], [piece for piece in learned if len(piece) == 1]


def write_model(folder: Path, *, write: Callable[[Path], int] = write_tokenizer) -> Path:
    folder.mkdir()
    num_pieces = write(folder)
    make_folder(folder, **(SHAPE | {"vocab_size": num_pieces + 5, "dtype": torch.float16}))
    return folder


CHATS = {
    "llama": ["</s> the cat", "the<s>cat</s>sea", "<unk>"],
    "no prefix": ["</s> the cat", "the<s>cat</s>sea", "<unk>"],
    "phi3": [
        "<|user|>\nhi there<|end|>\n<|assistant|>\n", "<|user|>  the<|endoftext|> cat </s>  cat", "<s> a <unk> b",
        "<|end|> \t\r\n\v\f x",
    ],
    "gemma": [
        "<start_of_turn>user\nhi  there<end_of_turn>\n<start_of_turn>model\n", "a<table> b", "<bos> the  cat",
        *("x" + "\n" * number + "y" for number in range(1, 10)),
        *("x" + " " * number + "the" for number in range(1, 10)),
        "\t", "\t\tcat\t the", "<0x09>", " \n  \n\n the",
    ],
}  # fmt: skip
WRITE: dict[str, Callable[[Path], int]] = {
    "llama": write_tokenizer,
    "no prefix": lambda folder: write_tokenizer(folder, prepends=False),
    "phi3": write_phi3,
    "gemma": write_gemma,
}


@pytest.mark.parametrize("form", WRITE)
@pytest.mark.parametrize("name", ["mine", "My-Phi-3-bot"])
def test_llama_cpp_makes_the_same_tokens_of_a_text(tmp_path: Path, form: str, name: str) -> None:
    source = write_model(tmp_path / "source", write=WRITE[form])
    save_gguf(source, tmp_path / "target", name=name)
    tokenizer = load_tokenizer(source)
    assert len(tokenizer.encode("banana ananas")) < 8, "pieces are longer than signs"
    with llama(tmp_path / "target") as loaded:
        for text in [*TEXTS, *CHATS[form]]:
            assert loaded.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text), text
            framed = tokenizer.encode(text, add_special_tokens=True)
            assert loaded.tokenize(text.encode(), add_bos=True, special=True) == framed, text
            plain = loaded.tokenize(text.encode(), add_bos=False, special=False)
            written_out = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)
            if not any(token in text for token in (*SPECIAL, *PHI3, *GEMMA)):
                assert loaded.detokenize(plain).decode().lstrip(" ") == written_out.lstrip(" "), text


def test_of_spaces_behind_phi3s_tokens_llama_cpp_knows_those_of_ascii(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", write=write_phi3)
    assert tokenizer_limits(source, vocab_size=load_tokenizer(source).vocab_size) == [
        "llama.cpp takes ASCII's spaces away behind Phi-3's special tokens, not those of all Unicode"
    ]
    save_gguf(source, tmp_path / "target")
    with llama(tmp_path / "target") as loaded:
        text = "<|end|>\u00a0cat"
        found = loaded.tokenize(text.encode(), add_bos=False, special=True)
        assert found != load_tokenizer(source).encode(text)


def test_gemma_3s_token_of_images_has_no_row_in_models_of_text_and_is_left_out(tmp_path: Path) -> None:
    def write(folder: Path) -> int:
        num_pieces = write_gemma(folder)
        image = AddedToken("<image_soft_token>", normalized=False, special=True)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens([image])
        tokenizer.save(str(folder / "tokenizer.json"))
        assert tokenizer.token_to_id(image.content) == num_pieces
        return num_pieces - 5  # what `write_model` adds

    source = write_model(tmp_path / "source", write=write)
    num_rows = load_tokenizer(source).vocab_size - 1
    assert tokenizer_limits(source, vocab_size=num_rows) == [
        f"llama.cpp takes tokens past the model's {num_rows} rows for ordinary text: <image_soft_token> ({num_rows})"
    ]
    save_gguf(source, tmp_path / "target")
    with llama(tmp_path / "target") as loaded:
        assert loaded.n_vocab() == num_rows
        for text in [*LINES, *CHATS["gemma"]]:
            ids = loaded.tokenize(text.encode(), add_bos=False, special=True)
            assert ids == load_tokenizer(source).encode(text), text


def test_llama_cpp_answers_with_the_same_tokens(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    save_gguf(source, tmp_path / "target")
    tokenizer, model = load_tokenizer(source), load_model(source, dtype=torch.float32)
    prompt = tokenizer.encode("she sells", add_special_tokens=True)
    wanted = generate(model, [prompt], max_new_tokens=16, stop_ids=tokenizer.stop_ids)[0]
    with llama(tmp_path / "target") as loaded:
        drawn = loaded.generate(prompt, temp=0.0, repeat_penalty=1.0)
        assert [next(drawn) for _ in wanted] == wanted
        assert loaded.token_bos() == 1
        assert loaded.token_eos() == 2


def changed(folder: Path, change: Any) -> None:
    written = json.loads((folder / "tokenizer.json").read_text())
    change(written)
    (folder / "tokenizer.json").write_text(json.dumps(written))


def without_a_merge(written: Any) -> Any:
    """Take away one of the pairs that make a piece, and return it."""
    merges = written["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    return merges.pop(next(place for place, piece in enumerate(made) if made.count(piece) > 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_merge, "model.merges must have every pair that makes a piece"),
        (lambda written: written["model"]["merges"].append(without_a_merge(written)), "must be ordered by"),
        (
            lambda written: written.update(
                normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
            ),
            "normalizer must be that of Llama 2 or Gemma and pre_tokenizer must be null or .*got None and .*Metaspace",
        ),
        (
            lambda written: written["added_tokens"][1].update(normalized=True),
            "added token '<s>' must not be normalized",
        ),
    ],
    ids=[
        "merges that are not all",
        "merges in another order",
        "another normalizer",
        "added tokens that are normalized",
    ],
)
def test_a_file_of_which_llama_cpp_would_make_other_tokens_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    source = write_model(tmp_path / "source")
    changed(source, change)
    with pytest.raises(DataError, match=f"GGUF cannot carry tokenizer.json: .*{words}"):
        save_gguf(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
