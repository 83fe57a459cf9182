"""On a real model: transformers' logits, its token ids, and its answers token for token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from kubetune_trainer import generate, load_model, load_tokenizer
from kubetune_trainer.chat import ChatTemplate
from kubetune_trainer.model import Decoder
from tests.trainer.smollm2 import smollm2_folder

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "How many legs has a spider? 8 or 12?"},
    ],
    [
        {"role": "user", "content": "Grüße! 你好 🙂  two  spaces\n\ttab"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Say it again, please."},
    ],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Decoder:
    return load_model(folder, dtype=torch.float32)


def test_logits_equal_those_of_transformers(ours: Decoder, theirs: LlamaForCausalLM) -> None:
    tokens = torch.randint(17, 49152, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(tokens).logits
        assert (ours(tokens) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_token_ids_equal_those_of_transformers(folder: Path, their_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    for messages in CHATS:
        wanted = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert tokenizer.encode(template.render(messages, add_generation_prompt=True)) == wanted
    assert tokenizer.decode(wanted) == their_tokenizer.decode(wanted, skip_special_tokens=True)
    assert tokenizer.stop_ids == (their_tokenizer.eos_token_id,) == (2,)


def test_greedy_answers_equal_those_of_transformers(
    ours: Decoder, theirs: LlamaForCausalLM, their_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [
        their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in CHATS
    ]
    answers = generate(ours, prompts, max_new_tokens=12, stop_ids=[2])
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
                0, len(prompt) :
            ].tolist()
        assert answer == [token for token in wanted if token != 2]
