"""The per-prompt baseline: groups get rankings of their own, and the classifier tells them apart."""

import random
from pathlib import Path

import torch

from buddy_routing.checkpoint import load_model
from buddy_routing.router import NEVER
from buddy_routing.selection import select_path
from buddy_routing.train.answer_loss import answer_loss, fixed_paths, prompt_features
from buddy_routing.train.example import Example, packed_in_order
from buddy_routing.train.prompt_sets import train_prompt_sets
from tiny_models import SHAPE, save_random_model
from tolerances import assert_close, assert_far

NUM_LAYERS = SHAPE["num_hidden_layers"]


def test_prompts_choose_among_rankings_that_the_server_can_run(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    model = load_model(tmp_path, torch.float32, torch.device("cpu")).model
    rng = random.Random(0)
    examples = [
        Example(tuple(rng.randrange(low, low + 20) for _ in range(12)), 6) for low in (1, 70) for _ in range(20)
    ]
    batches = list(packed_in_order(examples, 2, 48))
    router = train_prompt_sets(model, batches, seed=0)
    features = torch.cat([prompt_features(model, batch) for batch in batches])
    paths = select_path(router.scores(features), torch.tensor(4000), model.spec.actions)
    assert paths.sum(1).tolist() == [4] * len(examples)
    assert paths[:, [0, -1]].all()
    assert len(set(map(tuple, paths.tolist()))) > 1
    assert router.reroute_every == NEVER


def test_answers_of_packed_examples_cost_what_they_cost_alone(tmp_path: Path) -> None:
    save_random_model("mistral-window", tmp_path)
    model = load_model(tmp_path, torch.float32, torch.device("cpu")).model
    rng = random.Random(1)
    examples = [Example(tuple(rng.randrange(1, 90) for _ in range(n)), n // 2) for n in (9, 30, 12, 25, 8)]
    paths = torch.tensor([[1, *[rng.randrange(2) for _ in range(NUM_LAYERS - 2)], 1] for _ in examples])
    (together,) = packed_in_order(examples, 3, 40)
    nats = answer_loss(model, together, fixed_paths(together, paths)).nats
    for index, example in enumerate(examples):
        (alone,) = packed_in_order([example], 1, len(example.ids))
        expected = answer_loss(model, alone, fixed_paths(alone, paths[index : index + 1])).nats
        assert_close(nats[index : index + 1], expected, SHAPE["intermediate_size"], NUM_LAYERS)
        paths[index, 1] = 1 - paths[index, 1]
        other = answer_loss(model, alone, fixed_paths(alone, paths[index : index + 1])).nats
        assert_far(other, expected, SHAPE["intermediate_size"], NUM_LAYERS)
