"""`buddy serve --router DIR` with exits for the embedded model, through the official client."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from buddy_process import serving
from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.artifact import save_predictor
from buddy_routing.embedded import MODEL_ID, embedded_exits, embedded_model
from buddy_routing.model_spec import ModelSpec
from buddy_routing.predictor import BudgetPredictor

NUM_LAYERS = 16
EXITS = (7, 9, 11, 13)
RUN = {0.5: 8, 0.6: 8, 0.625: 10, 0.75: 12, 0.9: 14, 1.0: 16}
"""Layers that a token runs at each budget."""
QUESTION = [{"role": "user", "content": "Tell me a short story about a dog named Max."}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of exits with a Budget Predictor that always chooses 10 layers."""
    exits = shutil.copytree(embedded_exits(), tmp_path_factory.mktemp("exits") / "exits")
    kv_dim = ModelSpec.from_pretrained(embedded_model()).kv_dim
    depths = [MILLI_LAYERS * num_run for num_run in sorted(set(RUN.values()))]
    predictor = BudgetPredictor(2 * kv_dim, depths)
    torch.nn.init.zeros_(predictor.estimator.up.weight)
    predictor.estimator.up.bias.data = torch.tensor([float(depth == 10_000) for depth in depths])
    save_predictor(exits, predictor)
    with (
        serving("--router", str(exits)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client


def ask(client: openai.OpenAI, budget: Any = None, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL_ID, "messages": QUESTION, "max_completion_tokens": 40, "temperature": 0}
    extra = {"buddy": {"trace": True}} if budget is None else {"budget": budget, "buddy": {"trace": True}}
    return client.chat.completions.create(**(fields | options), extra_body=extra)


def check_cost(answer: Any, num_run: int) -> None:
    buddy, usage = answer.model_extra["buddy"], answer.usage
    assert (buddy["layers"], buddy["layers_per_token"], buddy["distinct_paths"]) == (NUM_LAYERS, num_run, 1)
    # The last token is generated and not run.
    num_tokens = usage.prompt_tokens + usage.completion_tokens - 1 - usage.prompt_tokens_details.cached_tokens
    assert buddy["layer_tokens"] == pytest.approx(num_tokens * num_run / NUM_LAYERS, abs=5e-4)
    number = NUM_LAYERS + EXITS.index(num_run - 1) if num_run < NUM_LAYERS else NUM_LAYERS - 1
    assert buddy["paths"] == [[*range(num_run - 1), number]] * usage.completion_tokens


@pytest.mark.parametrize("budget", RUN)
def test_every_token_runs_the_deepest_exit_that_its_budget_buys(client: openai.OpenAI, budget: float) -> None:
    answer = ask(client, budget)
    check_cost(answer, RUN[budget])
    assert answer.model_extra["buddy"]["budget_granted"] == budget


def test_auto_is_the_exit_that_the_predictor_chooses(client: openai.OpenAI) -> None:
    for answer in (ask(client), ask(client, "auto")):
        check_cost(answer, 10)
        buddy = answer.model_extra["buddy"]
        assert (buddy["decided_by"], buddy["budget_granted"]) == ("predictor", 0.625)


def test_a_budget_below_the_first_exit_is_refused_and_the_range_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"budget 0\.4 .*a number from 0\.5 \(8 of 16 layers\) to 1"):
        ask(client, 0.4)


def test_a_seed_repeats_the_text_alone_and_among_fifteen_at_other_exits(client: openai.OpenAI) -> None:
    def seeded(budget: float) -> str:
        return ask(client, budget, temperature=1.0, seed=7).choices[0].message.content

    alone = {budget: seeded(budget) for budget in (0.5, 0.75, 1.0)}
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(16) as pool:
        others = [
            pool.submit(ask, client, budget, temperature=1.0, seed=100 + index)
            for index, budget in enumerate([0.5, 0.75, 1.0] * 4 + [0.9])
        ]
        among = {budget: pool.submit(seeded, budget) for budget in alone}
        assert {budget: text.result() for budget, text in among.items()} == alone
        for other, num_run in zip(others, [8, 12, 16] * 4 + [14], strict=True):
            check_cost(other.result(), num_run)


def test_metrics_count_the_layers_of_the_model(client: openai.OpenAI) -> None:
    url = str(client.base_url).removesuffix("/v1/")
    before, after = 0.0, 0.0
    name = "buddy_layers_executed_total"

    def executed() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    before = executed()
    answer = ask(client, 0.5, messages=[{"role": "user", "content": "What is 2 + 3?"}], max_completion_tokens=1)
    after = executed()
    assert after - before == answer.usage.prompt_tokens * 8
