"""Templates render as transformers renders them; what carries loss is the assistant's words with their end of turn."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kubetune_trainer.chat import ChatTemplate, TemplateError, encode_messages
from kubetune_trainer.errors import DataError
from kubetune_trainer.tokenizer import Tokenizer, load_tokenizer
from tests.trainer.tiny_model import CHATML, build_tokenizer, write_tokenizer

HELLO = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": " Grüße 😀 "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token }}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LOOPS_AND_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for message in messages %}{% if message.role == 'system' %}"
    "{% continue %}{% endif %}\n    {%- set text = message.content | trim %}\n{{ message.role }}: {{ text }}\n"
    "{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path, bos_token="<s>"))


def template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(source, tokenizer.special_tokens)


def trained_text(messages: Any, source: str, tokenizer: Tokenizer, train_on: Any = "Assistant") -> str:
    ids, trained = encode_messages(
        messages, tokenizer=tokenizer, template=template(source, tokenizer), train_on=train_on
    )
    assert len(ids) == len(trained)
    return tokenizer.decode([i for i, k in zip(ids, trained, strict=True) if k], skip_special_tokens=False)


@pytest.mark.parametrize("source", [CHATML, MARKED, MARKED_WITHOUT_END])
def test_every_answer_is_trained_with_its_end_of_turn_and_nothing_else(source: str, tokenizer: Tokenizer) -> None:
    assert trained_text(HELLO, source, tokenizer) == " Grüße 😀 <|im_end|>Ciao<|im_end|>"


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_the_last_answer_alone_is_trained_with_last_assistant(source: str, tokenizer: Tokenizer) -> None:
    assert trained_text(HELLO, source, tokenizer, "LastAssistant") == "Ciao<|im_end|>"


def test_everything_is_trained_with_all(tokenizer: Tokenizer) -> None:
    assert trained_text(HELLO, CHATML, tokenizer, "All") == template(CHATML, tokenizer).render(HELLO)


def test_a_template_that_writes_the_beginning_of_text_gets_no_second_one(tokenizer: Tokenizer) -> None:
    ids, _ = encode_messages(HELLO[1:3], tokenizer=tokenizer, template=template(LLAMA_2, tokenizer), train_on="All")
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1


def test_without_a_header_the_answer_begins_where_the_prompt_ends(tokenizer: Tokenizer) -> None:
    assert trained_text(HELLO[1:], LLAMA_2, tokenizer) == "  Grüße 😀 <|im_end|> Ciao<|im_end|>"


def test_an_answer_without_an_end_is_given_one_to_learn(tokenizer: Tokenizer) -> None:
    source = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert trained_text(messages, source, tokenizer) == "assistant: Ho\n<|im_end|>"


def test_a_conversation_without_an_answer_has_nothing_to_train(tokenizer: Tokenizer) -> None:
    assert trained_text(HELLO[:2], CHATML, tokenizer) == ""


@pytest.mark.parametrize("source", [CHATML, MARKED, LLAMA_2, LOOPS_AND_TOOLS])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_template_renders_as_transformers_renders_it(source: str, tools: Any, tokenizer: Tokenizer) -> None:
    reference = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), bos_token="<s>", eos_token="<|im_end|>", chat_template=source
    )
    for prompt in (False, True):
        if prompt and source == MARKED:
            continue  # it has no header to add
        expected = reference.apply_chat_template(HELLO, tools=tools, tokenize=False, add_generation_prompt=prompt)
        rendered = template(source, tokenizer).render(HELLO, tools=tools, add_generation_prompt=prompt)
        assert rendered == expected


def test_tokens_and_mask_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    reference = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), bos_token="<s>", eos_token="<|im_end|>", chat_template=MARKED
    )
    expected = reference.apply_chat_template(HELLO, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, trained = encode_messages(
        HELLO, tokenizer=tokenizer, template=template(MARKED, tokenizer), train_on="Assistant"
    )
    assert ids == expected["input_ids"]
    assert [int(flag) for flag in trained] == expected["assistant_masks"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users may speak') }}", "the chat template fails: only users may speak"),
        ("{{ messages[9].content.x }}", "the chat template fails: "),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "the chat template fails: "),
        ("{% set _ = messages.append(1) %}", "the chat template fails: "),
    ],
)
def test_a_template_that_fails_says_why(source: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(TemplateError, match=message):
        template(source, tokenizer).render(HELLO)


def test_a_template_that_rewrites_the_past_is_refused(tokenizer: Tokenizer) -> None:
    source = "{{ messages | length }} messages: {% for message in messages %}{{ message.content }} {% endfor %}"
    with pytest.raises(TemplateError, match=r"messages\[2\]: the chat template does not write the conversation"):
        trained_text(HELLO, source, tokenizer)


def test_a_template_that_is_not_jinja_names_the_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="the chat template is not jinja: line 2: "):
        template("a\n{% for %}", tokenizer)
