"""Templates render as transformers renders them; what carries loss is the assistant's words with their end of turn."""

import dataclasses
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
THINKS_LAST = (  # as Qwen3 does: thoughts, if only empty ones, in the answers since the last question alone
    "{% set asked = namespace(last=0) %}{% for message in messages if message.role == 'user' %}"
    "{% set asked.last = messages.index(message) %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > asked.last and (loop.last or message.thoughts) %}"
    "<think>{{ message.thoughts }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGINS_TO_THINK = THINKS_LAST.replace(  # as Qwen3.5 does: an answer to come begins with the first word of its thoughts
    "assistant\n{% endif %}", "assistant\n<think>{% endif %}"
)
EOS_LAST = CHATML.replace("assistant\n{% endif %}", "assistant\n{% else %}<|endoftext|>{% endif %}")  # as Phi-3 does
OTHER_END_LAST = CHATML.replace(  # as gpt-oss does: the end of an answer is another one where more follows
    "<|im_end|>", "{% if loop.last and not add_generation_prompt %}<|im_end|>{% else %}<s>{% endif %}"
)
MARKED_EOS_APART = MARKED + (  # as Phi-3's template does, made ready for training
    "{% if messages[-1].role == 'assistant' %}{% generation %}<|endoftext|>{% endgeneration %}{% endif %}"
)
MARKED_TWICE = MARKED.replace("{{ message.content }}<|im_end|>{% end", "{{ message.content }}{% end", 1).replace(
    "{% endgeneration %}", "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
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


def trained_text(
    messages: Any, source: str, tokenizer: Tokenizer, train_on: Any = "Assistant", *, num_given: int = 0
) -> str:
    ids, trained = encode_messages(
        messages,
        tokenizer=tokenizer,
        template=template(source, tokenizer),
        train_on=train_on,
        num_given=num_given,
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


@pytest.mark.parametrize(
    ("source", "first", "last"),
    [
        (THINKS_LAST, " Grüße 😀 <|im_end|>", "<think></think>Ciao<|im_end|>"),
        (BEGINS_TO_THINK, " Grüße 😀 <|im_end|>", "</think>Ciao<|im_end|>"),
        (EOS_LAST, " Grüße 😀 <|im_end|>", "Ciao<|im_end|>\n<|endoftext|>"),
        (OTHER_END_LAST, " Grüße 😀 ", "Ciao<|im_end|>"),
        (MARKED_EOS_APART, " Grüße 😀 <|im_end|>", "Ciao<|im_end|><|endoftext|>"),
        (MARKED_TWICE, " Grüße 😀 <|im_end|>", "Ciao<|im_end|>"),
    ],
    ids=["thinks last", "begins to think", "eos last", "other end last", "marked, eos apart", "marked twice"],
)
def test_an_answer_is_trained_as_it_stands_in_the_whole(
    source: str, first: str, last: str, tokenizer: Tokenizer
) -> None:
    tokenizer = dataclasses.replace(tokenizer, stop_ids=(tokenizer.eos_id, tokenizer.pad_id))
    assert trained_text(HELLO, source, tokenizer) == first + last
    assert trained_text(HELLO, source, tokenizer, "LastAssistant") == last
    assert trained_text(HELLO, source, tokenizer, num_given=3) == last
    assert trained_text(HELLO[:4], source, tokenizer) == first


FIRST = [
    {"role": "assistant", "content": " Salut"}, {"role": "user", "content": "Hallo"},
    {"role": "assistant", "content": "Ciao"},
]  # fmt: skip
"""A conversation that the assistant begins."""
READS_THE_FIRST = "{% if messages[0].role == 'system' %}<s>{% endif %}" + CHATML  # as Qwen2.5 and Llama 3.1 do
DEFAULT_SYSTEM = (  # as SmolLM2 does
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nHelp.<|im_end|>\n{% endif %}{% endfor %}"
) + CHATML


@pytest.mark.parametrize("source", [CHATML, READS_THE_FIRST, DEFAULT_SYSTEM, THINKS_LAST, EOS_LAST, MARKED])
def test_an_answer_that_nothing_stands_before_is_found(source: str, tokenizer: Tokenizer) -> None:
    tokenizer = dataclasses.replace(tokenizer, stop_ids=(tokenizer.eos_id, tokenizer.pad_id))
    last = {THINKS_LAST: "<think></think>Ciao<|im_end|>", EOS_LAST: "Ciao<|im_end|>\n<|endoftext|>"}
    expected = last.get(source, "Ciao<|im_end|>")
    assert trained_text(FIRST, source, tokenizer) == f" Salut<|im_end|>{expected}"
    assert trained_text(FIRST, source, tokenizer, num_given=1) == expected
    assert trained_text(FIRST[:2], source, tokenizer) == " Salut<|im_end|>"


def test_a_call_that_nothing_stands_before_is_found_behind_the_header_or_refused(tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    found = trained_text([call, HELLO[1]], THINKS_LAST, tokenizer)
    assert found.startswith("<call>{")
    assert found.endswith("</call><|im_end|>")
    with pytest.raises(TemplateError, match=r"messages\[0\]: the chat template does not show"):
        trained_text([call, HELLO[1]], DEFAULT_SYSTEM, tokenizer)


def test_a_header_is_not_trained_where_an_answer_to_come_begins_with_more(tokenizer: Tokenizer) -> None:
    asks_for_thoughts = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # as QwQ does
    assert trained_text(HELLO, asks_for_thoughts, tokenizer) == " Grüße 😀 <|im_end|>Ciao<|im_end|>"


def test_calls_and_answers_are_found_where_thoughts_before_them_are_left_out_later(tokenizer: Tokenizer) -> None:
    def call(**arguments: Any) -> dict[str, Any]:
        function = {"name": "look_up", "arguments": arguments}
        return {"role": "assistant", "content": "", "thoughts": "hm", "tool_calls": [{"function": function}]}

    messages: list[dict[str, Any]] = [
        HELLO[1], call(), {"role": "tool", "content": "1"}, call(n=1), {"role": "tool", "content": "2"}, HELLO[2],
        *HELLO[3:],
    ]  # fmt: skip
    expected = [
        '<call>{"name": "look_up", "arguments": {}}</call>', '<call>{"name": "look_up", "arguments": {"n": 1}}</call>',
        " Grüße 😀 ", "<think></think>Ciao",
    ]  # fmt: skip
    assert trained_text(messages, THINKS_LAST, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in expected)


def test_answers_are_found_among_messages_that_are_all_alike(tokenizer: Tokenizer) -> None:
    messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user", "assistant", "assistant")]
    assert trained_text(messages, THINKS_LAST, tokenizer) == "Hi<|im_end|>Hi<|im_end|><think></think>Hi<|im_end|>"


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


def test_answers_are_found_where_the_beginning_tells_how_long_the_conversation_is(tokenizer: Tokenizer) -> None:
    source = "{{ messages | length }} messages:\n" + CHATML
    assert trained_text(HELLO, source, tokenizer) == " Grüße 😀 <|im_end|>Ciao<|im_end|>"


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages | reverse %}{{ message.content }} {% endfor %}",
        "{{ messages | length }} messages, the last is {{ messages[-1].content }}",
        CHATML + "{{ messages | map(attribute='content') | join }}",
    ],
    ids=["backwards", "left out", "repeated"],
)
def test_a_template_that_hides_where_answers_are_is_refused(source: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(TemplateError, match=r"messages\[\d\]: the chat template does not show where this message ends"):
        trained_text(HELLO, source, tokenizer)
    assert trained_text(HELLO, source, tokenizer, "All")


def test_a_template_that_is_not_jinja_names_the_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="the chat template is not jinja: line 2: "):
        template("a\n{% for %}", tokenizer)
