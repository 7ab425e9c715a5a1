"""What the product promises, against `buddy serve` with the embedded model: the official client, and `buddy chat`."""

import math
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from buddy_process import BUDDY, NEEDS_RAY, serving
from buddy_routing.embedded import MODEL_ID

NUM_LAYERS = 16
QUESTION = [{"role": "user", "content": "Tell me a short story about a dog named Max."}]


REPLICAS = pytest.param(
    ("--replicas", "2"), id="replicas", marks=[NEEDS_RAY, pytest.mark.slow, pytest.mark.timeout(600)]
)


@pytest.fixture(scope="module", params=[pytest.param((), id="process"), REPLICAS])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """Of one process, and of two replicas of the engine on Ray Serve."""
    with (
        serving(*request.param) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client


def ask(client: openai.OpenAI, /, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL_ID, "messages": QUESTION, "max_completion_tokens": 40, "temperature": 0}
    return client.chat.completions.create(**(fields | options), extra_body=extra or {})


def stream(client: openai.OpenAI, extra: dict[str, Any], **options: Any) -> tuple[str, Any]:
    """The text of a streamed answer, and its last chunk."""
    options = {"stream": True, "stream_options": {"include_usage": True}} | options
    chunks = list(ask(client, extra, **options))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1]


@pytest.mark.parametrize("budget", [1.0, 0.875, 0.75, 0.6, 0.5, 0.125])
def test_every_token_runs_exactly_the_layers_its_budget_buys(client: openai.OpenAI, budget: float) -> None:
    answer = ask(client, {"budget": budget, "buddy": {"trace": True}})
    expected = math.floor(budget * NUM_LAYERS)
    buddy = answer.model_extra["buddy"]
    assert buddy["layers"] == NUM_LAYERS
    assert buddy["layers_per_token"] == expected
    assert buddy["budget_requested"] == budget
    assert buddy["decided_by"] == "request"
    assert len(buddy["paths"]) == answer.usage.completion_tokens
    for path in buddy["paths"]:
        assert len(path) == expected
        assert path == sorted(set(path))
        assert path[0] == 0
        assert path[-1] == NUM_LAYERS - 1
    assert len({tuple(path) for path in buddy["paths"]}) == buddy["distinct_paths"]
    # The last token is generated and not run.
    num_tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    assert buddy["layer_tokens"] == pytest.approx(num_tokens * expected / NUM_LAYERS, abs=5e-4)


@pytest.mark.parametrize(("extra", "requested"), [({}, None), ({"budget": "auto"}, "auto")])
def test_without_a_number_the_predictor_decides(
    client: openai.OpenAI, extra: dict[str, Any], requested: str | None
) -> None:
    buddy = ask(client, extra).model_extra["buddy"]
    assert (buddy["budget_requested"], buddy["decided_by"]) == (requested, "predictor")
    assert 2 / NUM_LAYERS < buddy["budget_granted"] <= 1
    assert buddy["layers_per_token"] == buddy["budget_granted"] * NUM_LAYERS


@pytest.mark.parametrize("budget", [1.0, 0.75, 0.5])
def test_streaming_says_the_same_as_not_streaming(client: openai.OpenAI, budget: float) -> None:
    whole = ask(client, {"budget": budget})
    text, last = stream(client, {"budget": budget})
    assert text == whole.choices[0].message.content
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.model_extra["buddy"]["layers_per_token"] == math.floor(budget * NUM_LAYERS)


@pytest.mark.parametrize("budget", [0, 1.5, "x", 0.12, -1])
def test_a_budget_out_of_range_is_refused_and_the_range_named(client: openai.OpenAI, budget: object) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, {"budget": budget})
    assert caught.value.code == "invalid_budget"
    assert caught.value.param == "budget"
    assert "0.125" in caught.value.message
    assert str(budget) in caught.value.message


def test_a_seed_repeats_the_text_alone_and_among_fifteen_others(client: openai.OpenAI) -> None:
    def seeded() -> str:
        return ask(client, {"budget": 0.5}, temperature=1.0, seed=7).choices[0].message.content

    alone = seeded()
    assert seeded() == alone
    budgets = [1.0, 0.75, 0.5, 0.25] * 4
    with ThreadPoolExecutor(16) as pool:
        others = [
            pool.submit(ask, client, {"budget": b}, temperature=1.0, seed=100 + i) for i, b in enumerate(budgets[1:])
        ]
        among = pool.submit(seeded)
        assert among.result() == alone
        assert all(other.result().choices[0].finish_reason for other in others)


def test_sixteen_streams_of_mixed_budgets_finish(client: openai.OpenAI) -> None:
    budgets = [1.0, 0.75, 0.5, 0.3] * 4
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda budget: stream(client, {"budget": budget}), budgets))
    for budget, (text, last) in zip(budgets, answers, strict=True):
        assert text
        assert last.model_extra["buddy"]["layers_per_token"] == math.floor(budget * NUM_LAYERS)


def test_a_request_longer_than_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=[{"role": "user", "content": "word " * 2000}])
    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_seen_before_is_cached_and_says_the_same(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be kind to everyone you meet. " * 40}, *QUESTION]
    first, again, shallow = (ask(client, {"budget": budget}, messages=messages) for budget in (1.0, 1.0, 0.5))
    text, last = stream(client, {"budget": 1.0}, messages=messages)
    assert text == again.choices[0].message.content == first.choices[0].message.content
    usages = [answer.usage for answer in (first, again, shallow, last)]
    num_cached = (usages[0].prompt_tokens - 1) // 128 * 128
    assert num_cached > 0
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, num_cached, 0, num_cached]
    layer_tokens = [answer.model_extra["buddy"]["layer_tokens"] for answer in (first, again)]
    assert layer_tokens[0] - layer_tokens[1] == num_cached
    plain = client.completions.create(model=MODEL_ID, prompt="Once upon a time. " * 40, temperature=0)
    assert plain.usage.prompt_tokens_details.cached_tokens == 0
    plain = client.completions.create(model=MODEL_ID, prompt="Once upon a time. " * 40, temperature=0)
    assert plain.usage.prompt_tokens_details.cached_tokens >= 128
    counted = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    assert 'buddy_prefix_cache_hits_total{tenant="default",tier="default"}' in counted


def test_choices_are_charged_for_the_full_blocks_of_their_prompt_once(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Answer as a pirate would. " * 40}, *QUESTION]
    answer = ask(client, {"budget": 1.0}, messages=messages, n=4, temperature=1, max_completion_tokens=8)
    num_prompt = answer.usage.prompt_tokens
    num_shared = (num_prompt - 1) // 128 * 128
    assert num_shared > 0
    num_run = num_prompt + 3 * (num_prompt - num_shared) + answer.usage.completion_tokens - 4
    assert answer.model_extra["buddy"]["layer_tokens"] == num_run


def test_responses_say_what_chat_says(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be kind."}, *QUESTION]
    chat = ask(client, {"budget": 0.75}, messages=messages)
    fields: dict[str, Any] = {
        "model": MODEL_ID, "instructions": "Be kind.", "input": QUESTION, "max_output_tokens": 40, "temperature": 0,
        "extra_body": {"budget": 0.75},
    }  # fmt: skip
    whole = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:
        last = list(stream)[-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.output_text == chat.choices[0].message.content
        assert response.status == "incomplete"
        assert response.model_extra["buddy"]["layers_per_token"] == 12
        usage = (response.usage.input_tokens, response.usage.output_tokens)
        assert usage == (chat.usage.prompt_tokens, chat.usage.completion_tokens)


def test_offsets_of_an_echoed_prompt_count_characters(client: openai.OpenAI) -> None:
    prompt = "A café, 🐦🐦 and a bird"
    answer = client.completions.create(
        model=MODEL_ID, prompt=prompt, echo=True, logprobs=2, max_tokens=8, temperature=0
    )
    text, told = answer.choices[0].text, answer.choices[0].logprobs
    assert text.startswith(prompt)
    assert told is not None
    assert told.tokens is not None
    assert told.text_offset is not None
    pairs = list(zip(told.tokens, told.text_offset, strict=True))
    in_text = [(token, start) for token, start in pairs if not token.startswith(("bytes:", "<|end|>"))]
    assert all(text[start : start + len(token)] == token for token, start in in_text)
    # The bytes of the first bird begin where it does.
    birds = [token for token, start in pairs if start == text.index("🐦") and token.startswith("bytes:")]
    spelled = b"".join(bytes.fromhex(token[6:].replace("\\x", "")) for token in birds)
    assert spelled.decode() == "🐦"


def test_a_conversation_of_several_turns_is_answered(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "What is 2 + 3?"},
    ]
    answer = ask(client, messages=messages)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content


def test_chat_shows_the_answer_and_its_layers(client: openai.OpenAI) -> None:
    def chat(budget: str) -> "subprocess.CompletedProcess[str]":
        url = str(client.base_url).removesuffix("/v1/")
        command = [BUDDY, "chat", "--url", url, "--budget", budget, "Hello!"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    ended = chat("0.5")
    assert ended.stdout.strip()
    assert "8 of 16 layers per token" in ended.stderr
    refused = chat("7")
    assert refused.returncode == 1
    assert "buddy chat: " in refused.stderr
    assert "7" in refused.stderr
