"""`buddy serve --router DIR` with small FFNs for the embedded model, through the official client."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from buddy_process import serving
from buddy_routing.embedded import MODEL_ID, embedded_duo

NUM_LAYERS = 16
QUESTION = [{"role": "user", "content": "Tell me a short story about a dog named Max."}]
BUDGETS = (0.3, 0.5, 0.625, 0.777, 1.0)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        serving("--router", str(embedded_duo())) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client


def ask(client: openai.OpenAI, budget: float, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL_ID, "messages": QUESTION, "max_completion_tokens": 40, "temperature": 0}
    extra = {"budget": budget, "buddy": {"trace": True}}
    return client.chat.completions.create(**(fields | options), extra_body=extra)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_is_kept_to_the_milli_layer_and_mostly_used(client: openai.OpenAI, budget: float) -> None:
    answer = ask(client, budget)
    buddy, usage = answer.model_extra["buddy"], answer.usage
    assert buddy["budget_granted"] == budget
    assert 0 <= budget * NUM_LAYERS - buddy["layers_per_token"] < 1
    num_tokens = usage.prompt_tokens + usage.completion_tokens - 1 - usage.prompt_tokens_details.cached_tokens
    assert buddy["layer_tokens"] <= num_tokens * budget + 5e-4
    if budget == 1.0:
        assert buddy["paths"] == [list(range(NUM_LAYERS))] * usage.completion_tokens
    else:
        assert max(map(len, buddy["paths"])) > budget * NUM_LAYERS, "no small FFN, which costs less than a layer"


def test_a_seed_repeats_the_text_alone_and_among_fifteen_at_other_budgets(client: openai.OpenAI) -> None:
    def seeded(budget: float) -> str:
        return ask(client, budget, temperature=1.0, seed=7).choices[0].message.content

    alone = {budget: seeded(budget) for budget in (0.5, 0.75, 1.0)}
    with ThreadPoolExecutor(16) as pool:
        others = [
            pool.submit(ask, client, budget, temperature=1.0, seed=100 + index)
            for index, budget in enumerate([0.5, 0.75, 1.0] * 4 + [0.9])
        ]
        among = {budget: pool.submit(seeded, budget) for budget in alone}
        assert {budget: text.result() for budget, text in among.items()} == alone
        for other in others:
            other.result()


def test_a_budget_below_the_two_layers_that_always_run_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"budget 0\.1 .*a number from 0\.125 \(2 of 16 layers\) to 1"):
        ask(client, 0.1)
