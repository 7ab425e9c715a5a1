"""Chat messages to prompt tokens."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from buddy_server.chat_template import read_chat_template
from buddy_server.errors import ConfigError, InvalidRequest
from buddy_server.tokenizer import ChatTokenizer, PromptTooLong
from buddy_server.tools.syntax import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PLAIN, Syntax
from fakes import families
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


def test_special_tokens_around_a_prompt_are_left_out_on_request_and_decoded_on_request() -> None:
    published = families.llama3_with_beginning()
    begin = published.bos_token_id
    tokenizer = ChatTokenizer(published)
    tokens = tokenizer.encode_prompt("the cat")
    assert tokens == (begin, *tokenizer.encode_prompt("the cat", add_special_tokens=False))
    assert tokenizer.decode(tokens) == "the cat"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<|begin_of_text|>the cat"
    assert tokenizer.names([begin, 10**6]) == ["<|begin_of_text|>", None]


CALL: dict[str, Any] = {
    "id": "call_0123456789",
    "type": "function",
    "function": {"name": "fly", "arguments": '{"to": "you"}'},
}


def with_template(template: str) -> ChatTokenizer:
    published = FAMILIES["llama3"]()
    published.chat_template = template
    return ChatTokenizer(published)


def test_calls_are_text_for_a_template_that_knows_none() -> None:
    tokenizer = with_template("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokens = tokenizer.render([{"role": "assistant", "content": "so", "tool_calls": [CALL, CALL]}])
    line = '{"name": "fly", "arguments": {"to": "you"}}'
    assert tokenizer.decode(tokens) == f"[so\n{line}\n{line}]"


def test_a_result_has_the_name_of_its_call() -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.tool_calls | length }}{{ m.name }}|{% endfor %}")
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "so", "tool_call_id": CALL["id"]},
        {"role": "tool", "content": "so", "tool_call_id": CALL["id"], "name": "mine"},
        {"role": "tool", "content": "so", "tool_call_id": "other"},
    ]
    assert tokenizer.decode(tokenizer.render(messages)) == "1|0fly|0mine|0|"


def test_ids_are_short_where_the_template_wants_them_so() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{% if c.id|length != 9 %}{{ raise_exception('length 9!') }}"
        "{% endif %}{{ c.id }} {% endfor %}{{ m.tool_call_id }}{% endfor %}"
    )
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "abcDEF123"}]},
        {"role": "tool", "content": "so", "tool_call_id": CALL["id"]},
    ]
    tokenizer = with_template(template)
    first, second, result = tokenizer.decode(tokenizer.render(messages)).split()
    assert (len(first), second, result) == (9, "abcDEF123", first)


def test_some_models_have_a_template_of_their_own_for_tools() -> None:
    published = FAMILIES["llama3"]()
    published.chat_template = {"default": "plain", "tool_use": "{{ tools | length }} tools <tool_call>"}
    tokenizer = ChatTokenizer(published)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(tokenizer.render(messages)) == "plain"
    assert tokenizer.decode(tokenizer.render(messages, tools=[{"type": "function"}])) == "1 tools <tool_call>"
    assert tokenizer.tool_format.syntax is HERMES


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (str(FAMILIES["qwen3"]().chat_template), HERMES),
        (str(FAMILIES["llama3"]().chat_template), LLAMA3),
        (str(FAMILIES["mistral"]().chat_template), MISTRAL),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]{}", MISTRAL_ARGS),
        ("{{ tools }}<tool_call><function=f>", PLAIN),
        ("{{ tools }}", PLAIN),
        ("<tool_call>", PLAIN),
        # Llama's template sets the variable, but only sometimes.
        ('{% if custom is defined %}{% set tools = custom %}{% endif %}{{ tools }}"parameters": <|eot_id|>', LLAMA3),
    ],
)
def test_the_format_of_calls_is_found_from_the_template(template: str, syntax: Syntax) -> None:
    assert with_template(template).tool_format.syntax is syntax


def test_a_template_in_a_file_takes_the_place_of_the_models_own(tokenizer_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m.content }} bird{% endfor %}")
    tokenizer = ChatTokenizer.from_directory(tokenizer_directory, read_chat_template(path))
    assert tokenizer.decode(tokenizer.render([{"role": "user", "content": "hi"}])) == "hi bird"


def test_a_file_that_is_no_template_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    with pytest.raises(ConfigError, match=r"chat\.jinja: No such file"):
        read_chat_template(path)
    path.write_text("hi\n{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"chat\.jinja:2: Unexpected end of template"):
        read_chat_template(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat\.jinja: it is not UTF-8"):
        read_chat_template(path)


def test_a_template_with_a_mistake_is_a_request_error() -> None:
    tokenizer = with_template("{% for m in messages %}")
    with pytest.raises(InvalidRequest, match="Unexpected end of template"):
        tokenizer.render([{"role": "user", "content": "hi"}])
