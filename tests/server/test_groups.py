"""Tokens that come at the same time are one chunk, and the answer is the same as one by one."""

import json
from typing import Any

import pytest

from fakes.site import Site

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
PLAIN: dict[str, Any] = {"prompt": "hi"}
REQUESTS = (
    CHAT,
    CHAT | {"n": 3},
    CHAT | {"logprobs": True, "top_logprobs": 2},
    PLAIN,
    PLAIN | {"n": 2, "logprobs": 2},
    PLAIN | {"echo": True},
    PLAIN | {"echo": True, "logprobs": 1},
    PLAIN | {"prompt": ["hi", "you are"], "logprobs": 0},
)


def post(site: Site, group_size: int, **fields: Any) -> str:
    site.engine.group_size = group_size
    path = "chat/completions" if "messages" in fields else "completions"
    return site.http.post(f"/v1/{path}", json={"model": site.engine.info.model_id, **fields}).text


def chunks_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the chunks say of each choice."""
    said: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        of_choice = said.setdefault(choice["index"], {"text": "", "logprobs": {}, "finish_reason": None})
        of_choice["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for name, entries in (choice["logprobs"] or {}).items():
            of_choice["logprobs"][name] = of_choice["logprobs"].get(name, []) + (entries or [])
        of_choice["finish_reason"] = choice["finish_reason"] or of_choice["finish_reason"]
    return said


@pytest.mark.parametrize("fields", REQUESTS)
@pytest.mark.parametrize("group_size", [3, 100])
def test_answer_is_the_same(site: Site, fields: dict[str, Any], group_size: int) -> None:
    single, grouped = (json.loads(post(site, size, **fields)) for size in (1, group_size))
    for name in ("choices", "usage", "buddy"):
        assert grouped[name] == single[name]


@pytest.mark.parametrize("fields", REQUESTS)
@pytest.mark.parametrize("group_size", [3, 100])
def test_stream_says_the_same_in_fewer_chunks(site: Site, fields: dict[str, Any], group_size: int) -> None:
    single, grouped = (chunks_of(post(site, size, stream=True, **fields)) for size in (1, group_size))
    assert joined(grouped) == joined(single)
    assert len(grouped) < len(single)
    if fields is CHAT and group_size == 100:
        assert [chunk["choices"][0]["delta"] for chunk in grouped] == [
            {"role": "assistant", "content": ""},
            {"content": "Hello there, wörld 🐦!"},
            {},
        ]


def test_counters_count_every_token_of_a_group(site: Site) -> None:
    post(site, 4, stream=True, **CHAT)
    assert site.sample("buddy_completion_tokens_total") == 6
    assert site.sample("buddy_time_to_first_token_seconds_count") == 1
    assert site.sample("buddy_inter_token_latency_seconds_count") == 5
    assert site.sample("buddy_layers_per_token_count") == 6


def test_tokens_before_a_failure_arrive(site: Site) -> None:
    site.engine.fail_at = 2
    text = post(site, 100, stream=True, **CHAT)
    assert joined(chunks_of(text)[:-1])[0]["text"] == "Hello there"
    assert "error" in chunks_of(text)[-1]
