"""A record's format is told by its columns, and what a record must have is named when it lacks it."""

from typing import Any

import pytest

from kubetune_trainer.data.formats import Chat, RecordError, Text, convert, detect
from kubetune_trainer.errors import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}

F = {"name": "f", "arguments": {"x": 1}}


def called(*functions: dict[str, Any]) -> dict[str, Any]:
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    ("columns", "mapping", "expected"),
    [
        (["messages", "id"], {}, "Messages"),
        (["conversations", "id"], {}, "ShareGPT"),
        (["instruction", "input", "output"], {}, "Alpaca"),
        (["prompt", "completion"], {}, "PromptCompletion"),
        (["text"], {}, "Text"),
        (["messages", "text"], {}, "Messages"),
        (["question", "answer"], {"prompt": "question", "completion": "answer"}, "PromptCompletion"),
        (["chat"], {"messages": "chat"}, "Messages"),
    ],
)
def test_a_format_is_told_by_its_columns(columns: list[str], mapping: dict[str, str], expected: str) -> None:
    assert detect(columns, mapping=mapping) == expected


def test_columns_of_no_format_are_named_with_what_each_format_needs() -> None:
    with pytest.raises(DataError) as caught:
        detect(["question", "answer"], mapping={})
    assert str(caught.value) == (
        "the columns question, answer match no format: Messages needs messages; ShareGPT needs conversations; "
        "Alpaca needs instruction and output; PromptCompletion needs prompt and completion; Text needs text"
    )
    assert "dataset.sources[].columns" in caught.value.hint


@pytest.mark.parametrize(
    ("record", "format_", "expected"),
    [
        ({"messages": [USER, ANSWER], "tools": [1]}, "Messages", Chat(messages=[USER, ANSWER], tools=[1])),
        ({"messages": [USER], "tools": '[{"type": "function"}]'}, "Messages",
         Chat(messages=[USER], tools=[{"type": "function"}])),
        ({"messages": [USER], "tools": ""}, "Messages", Chat(messages=[USER])),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]}, "Messages",
         Chat(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [1]}])),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Brief."},
         "ShareGPT", Chat(messages=[{"role": "system", "content": "Brief."}, USER, ANSWER])),
        ({"conversations": [{"from": "tool", "value": "1"}]}, "ShareGPT",
         Chat(messages=[{"role": "tool", "content": "1"}])),
        ({"conversations": [USER, ANSWER]}, "ShareGPT", Chat(messages=[USER, ANSWER])),
        ({"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                            {"from": "observation", "value": "2"}]}, "ShareGPT",
         Chat(messages=[called(F), {"role": "tool", "content": "2"}])),
        ({"conversations": [{"from": "function_call", "value":
                             '[{"name": "f", "arguments": "{\\"x\\": 1}"}, {"name": "g", "arguments": {}}]'}]},
         "ShareGPT", Chat(messages=[called(F, {"name": "g", "arguments": {}})])),
        ({"messages": [called({"name": "f", "arguments": '{"x": 1}'})]}, "Messages", Chat(messages=[called(F)])),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}]}, "Messages",
         Chat(messages=[{"role": "assistant", "tool_calls": [F]}])),
        *[({"messages": [called({"name": "f", "arguments": broken})]}, "Messages",
           Chat(messages=[called({"name": "f", "arguments": broken})])) for broken in ("", "{x", "[1]", None)],
        ({"instruction": "Hi", "output": "Ho"}, "Alpaca", Chat(messages=[USER, ANSWER])),
        (
            {"instruction": "Add", "input": "1+1", "output": "2", "system": "Be brief."},
            "Alpaca",
            Chat(
                messages=[
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Add\n\n1+1"},
                    {"role": "assistant", "content": "2"},
                ]
            ),
        ),
        ({"instruction": "Hi", "input": None, "output": "Ho"}, "Alpaca", Chat(messages=[USER, ANSWER])),
        ({"prompt": "1+1=", "completion": "2"}, "PromptCompletion", Text(prompt="1+1=", completion="2")),
        ({"prompt": [USER], "completion": [ANSWER]}, "PromptCompletion", Chat(messages=[USER, ANSWER])),
        ({"text": "Once"}, "Text", Text(prompt="", completion="Once")),
    ],
)  # fmt: skip
def test_a_record_becomes_a_conversation_or_text(record: Any, format_: Any, expected: object) -> None:
    assert convert(record, format_, mapping={}) == expected


def test_a_mapped_column_is_read_under_the_datas_own_name() -> None:
    assert convert({"body": "Once"}, "Text", mapping={"text": "body"}) == Text(prompt="", completion="Once")


@pytest.mark.parametrize(
    ("record", "format_", "message"),
    [
        ({"text": 3}, "Text", "text must be text, got 3"),
        ({"prompt": "a"}, "PromptCompletion", "completion must be text, got None"),
        ({"messages": []}, "Messages", r"messages must be a list of messages, got \[\]"),
        ({"messages": ["Hi"]}, "Messages", r"messages\[0\] must have role and content, got 'Hi'"),
        ({"messages": [USER, {"role": "assistant"}]}, "Messages", r"messages\[1\]\.content is missing"),
        ({"conversations": [{"from": "human"}]}, "ShareGPT", r"conversations\[0\] must have from and value"),
        ({"conversations": [{"from": "me", "value": "Hi"}]}, "ShareGPT",
         r"conversations\[0\]\.from must be one of human, user, gpt, .*, got 'me'"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "ShareGPT",
         r"conversations\[0\]\.value is not JSON: Expecting value at column 1"),
        *[({"conversations": [{"from": "function_call", "value": value}]}, "ShareGPT",
           r"conversations\[0\]\.value must be JSON of \{name, arguments\} or a list of them, got ")
          for value in ("[]", "1", '{"name": "f"}', '["f"]')],
        ({"messages": [USER], "tools": "{"}, "Messages", "tools is not JSON: Expecting property name"),
        ({"messages": [USER], "tools": '["a'}, "Messages", "tools is not JSON: Unterminated string starting at column"),
        ({"messages": [USER], "tools": "{}"}, "Messages", r"tools must be a list of tools, got \{\}"),
        ({"output": "Ho"}, "Alpaca", "instruction must be text, got None"),
        ({"text": list(range(99))}, "Text", r"got \[0, 1, 2.*\.\.\.$"),
    ],
)  # fmt: skip
def test_a_record_that_is_not_of_its_format_says_what_is_wrong(record: Any, format_: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        convert(record, format_, mapping={})
