"""Chat messages to prompt tokens."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from buddy_server.errors import InvalidRequest
from buddy_server.tokenizer import ChatTokenizer, PromptTooLong
from fakes.families import FAMILIES


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


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_character_tell_their_bytes(family: str) -> None:
    tokenizer = ChatTokenizer(FAMILIES[family]())
    parts = [tokenizer.token_bytes(token) for token in tokenizer.encode_text("🐦")[-4:]]
    assert b"".join(part or b"" for part in parts) == "🐦".encode()


@pytest.mark.parametrize("family", ["llama3", "qwen3", "phi"])
def test_tokens_of_a_text_begin_at_their_characters(family: str) -> None:
    tokenizer = ChatTokenizer(FAMILIES[family]())
    offsets = tokenizer.offsets(100)
    text = "the cat 🐦🐦 sat é"
    begun = [offsets.next(token) for token in tokenizer.encode_text(text)]
    assert begun == sorted(begun)
    assert begun[0] == 100
    # A bird is four tokens and one character.
    assert [begun.count(100 + text.index("🐦") + bird) for bird in (0, 1)] in ([4, 4], [5, 4])
    assert begun[-1] == 100 + len(text) - 1


def test_only_a_text_that_is_surely_too_long_is_refused_early(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PromptTooLong) as caught:
        tokenizer.encode_prompt("hi " * 10**6, limit=1000)
    assert 1000 < caught.value.num_tokens < 10**6
    assert len(tokenizer.encode_prompt("hi " * 900, limit=1000)) == 900
    assert len(tokenizer.encode_prompt("h" * 10**6, limit=1000)) == 1


def test_arguments_with_half_a_character_stay_a_text() -> None:
    tokenizer = ChatTokenizer(FAMILIES["qwen3"]())
    function = {"name": "f", "arguments": '{"a": "\\ud800"}'}
    call = {"id": "c", "type": "function", "function": function}
    assert tokenizer.render([{"role": "assistant", "tool_calls": [call]}])
