"""Training's paths: a conversation among others in a row is routed as it is alone, and as the server would."""

import torch

from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.train.routed_paths import cost_per_conversation, routed_paths

NUM_LAYERS, KV_DIM, ROUTE_BLOCK = 8, 6, 4
ACTIONS = ActionSpace.skip_or_run(NUM_LAYERS)


def router() -> LearnedRouter:
    torch.manual_seed(0)
    return LearnedRouter(DecisionModule(2 * KV_DIM, NUM_LAYERS - 2), torch.zeros(NUM_LAYERS - 2), 0.0, "test")


def test_a_row_of_conversations_is_routed_as_each_alone() -> None:
    v = torch.randn(1, 30, 2, KV_DIM // 2)
    lengths, prompts = (11, 7, 12), (6, 5, 3)
    begins, in_answer = torch.zeros(1, 30, dtype=torch.bool), torch.zeros(1, 30, dtype=torch.bool)
    spans = []
    start = 0
    for length, num_prompt in zip(lengths, prompts, strict=True):
        begins[0, start] = True
        in_answer[0, start + num_prompt : start + length] = True
        spans.append(slice(start, start + length))
        start += length
    num_run = torch.tensor([[3] * 11 + [5] * 7 + [7] * 12])
    together = routed_paths(router(), ACTIONS, begins, in_answer, MILLI_LAYERS * num_run, ROUTE_BLOCK)(v)
    assert together.sum((-1, -2)).round().tolist() == num_run.tolist()
    for span in spans:
        alone = routed_paths(
            router(), ACTIONS, begins[:, span], in_answer[:, span], MILLI_LAYERS * num_run[:, span], ROUTE_BLOCK
        )(v[:, span])
        assert torch.equal(together[:, span].round(), alone.round())


def test_a_conversation_has_one_budget_of_the_allowed_ones() -> None:
    begins = torch.rand(4, 50) < 0.2
    budgets = cost_per_conversation(begins, ACTIONS, 0.4, 5, seed=1)
    assert set(budgets.flatten().tolist()) == {3000, 4000, 5000}
    assert ((budgets[:, 1:] == budgets[:, :-1]) | begins[:, 1:]).all()
    assert torch.equal(budgets, cost_per_conversation(begins, ACTIONS, 0.4, 5, seed=1))
