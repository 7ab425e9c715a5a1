"""/tokenize and /detokenize: what a prompt is made of."""

import hashlib
from typing import Any

import pytest

from buddy_server.config import ServerConfig
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tokenizer import ChatTokenizer
from fakes import families
from fakes.engine import INFO
from fakes.site import Serve, Site

CHAT = [{"role": "user", "content": "hi"}]


def tokenize(site: Site, **fields: object) -> dict[str, Any]:
    response = site.http.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_text_becomes_its_tokens_and_comes_back(site: Site) -> None:
    body = tokenize(site, model=INFO.model_id, prompt="you are hi <|end|>", return_token_strs=True)
    assert body["token_strs"] == ["you", "are", "hi", "<|end|>"]
    assert (body["count"], body["max_model_len"]) == (4, INFO.kv_capacity_tokens)
    response = site.http.post("/detokenize", json={"tokens": body["tokens"]})
    assert response.json() == {"prompt": "you are hi <|end|>"}


def test_messages_become_the_tokens_that_a_completion_runs(site: Site) -> None:
    body = tokenize(site, messages=CHAT)
    site.chat(messages=CHAT)
    assert tuple(body["tokens"]) == site.engine.requests[0].prompt_tokens
    assert body["token_strs"] is None
    shorter = tokenize(site, messages=CHAT, add_generation_prompt=False)
    assert shorter["tokens"] == body["tokens"][:-1]


def test_prompt_beyond_the_context_is_counted_all_the_same(site: Site) -> None:
    assert tokenize(site, prompt="hi " * 10_000)["count"] == 10_000
    response = site.http.post("/tokenize", json={"prompt": "hi " * 600_000})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_text_without_tokens_has_none(site: Site) -> None:
    assert tokenize(site, prompt="")["tokens"] == []
    assert site.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "hi", "messages": CHAT}, 400, "prompt"),
        ("/tokenize", {"prompt": ["hi"]}, 400, "prompt"),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": CHAT, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"prompt": "hi", "model": "gpt-5"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, INFO.vocab_size]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1.0]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "gpt-5"}, 404, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    site: Site, path: str, fields: dict[str, object], status: int, param: str
) -> None:
    response = site.http.post(path, json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_both_need_a_key_where_completions_do(serve: Serve) -> None:
    key = "sk-tokens"
    tenant = Tenant("acme", Tier("free"), (hashlib.sha256(key.encode()).digest(),))
    site = serve(config=ServerConfig(tenants=(tenant,)))
    for path, body in (("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [1]})):
        assert site.http.post(path, json=body).status_code == 401
        assert site.http.post(path, json=body, headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_special_tokens_are_those_of_a_completion_unless_left_out(serve: Serve) -> None:
    site = serve(of_family=ChatTokenizer(families.llama3_with_beginning()))
    tokens = tokenize(site, prompt="the cat")["tokens"]
    assert tokenize(site, prompt="the cat", add_special_tokens=False)["tokens"] == tokens[1:]
    asked = {"model": INFO.model_id, "prompt": "the cat"}
    assert site.http.post("/v1/completions", json=asked | {"add_special_tokens": True}).status_code == 200
    assert list(site.engine.requests[0].prompt_tokens) == tokens
    refused = site.http.post("/v1/completions", json=asked | {"add_special_tokens": False}).json()["error"]
    assert (refused["param"], refused["code"]) == ("add_special_tokens", "unsupported_parameter")


def test_tools_are_counted_as_a_completion_has_them(serve: Serve) -> None:
    # The usual tokenizer's template tells nothing of tools.
    site = serve(of_family=ChatTokenizer(families.qwen3()))
    tools = [{"type": "function", "function": {"name": "fly"}}]
    body = tokenize(site, messages=CHAT, tools=tools)
    site.chat(messages=CHAT, tools=tools)
    assert tuple(body["tokens"]) == site.engine.requests[0].prompt_tokens
    assert body["count"] > tokenize(site, messages=CHAT)["count"]
