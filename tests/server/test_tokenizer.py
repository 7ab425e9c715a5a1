"""Chat messages to prompt tokens."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from buddy_server.errors import InvalidRequest
from buddy_server.tokenizer import ChatTokenizer


def test_render_equals_the_template_tokenized_by_transformers(
    tokenizer: ChatTokenizer, tokenizer_directory: Path
) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    plain = AutoTokenizer.from_pretrained(tokenizer_directory)
    expected = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.render(messages) == tuple(expected)


def test_arguments_of_tool_calls_reach_the_template_as_an_object(tokenizer: ChatTokenizer) -> None:
    def rendered(arguments: object) -> tuple[int, ...]:
        call = {"id": "c", "type": "function", "function": {"name": "hi", "arguments": arguments}}
        messages: list[dict[str, Any]] = [{"role": "assistant", "tool_calls": [call]}]
        return tokenizer.render(messages)

    # {"a": 1} is two words, "{\"a\": 1}" in quotes would be as well; spaces of the string are not kept.
    assert rendered('{ "a" : 1 }') == rendered('{"a": 1}')
    assert rendered("no json") != rendered("{}")


def test_template_that_raises_is_a_request_error(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="not this word"):
        tokenizer.render([{"role": "user", "content": "forbidden"}])


def test_many_threads_may_render_at_once(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "hi " * 200}]
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: tokenizer.render(messages), range(32)))) == 1
