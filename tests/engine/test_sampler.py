"""From logits to tokens: OpenAI's formulas, and the law of large numbers with fixed seeds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from buddy_kernels import GREEDY, draw
from buddy_kernels.sampling import adjusted, with_logprobs
from buddy_server.engine.messages import SamplingParams
from buddy_server.engine.runner import sampling_of
from buddy_server.engine.sampler import Sampler

NUM_DRAWS = 5_000
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, -3.0])


class Drawing(Sampler):
    """One request's sampling as the reference of the step does it."""

    def sample(self, logits: Tensor) -> int:
        sampling = sampling_of(self.params)
        uniform = next(iter(self.uniforms(1)), 0.0)
        token = draw(adjusted(logits, sampling, self.counts, None), sampling, uniform)
        self.accept(token)
        return token


def make_sampler(seed: int | None = 0, **params: Any) -> Drawing:
    return Drawing(SamplingParams(max_tokens=NUM_DRAWS, seed=seed, **params))


def frequencies(logits: Tensor = LOGITS, **params: Any) -> Tensor:
    """How often each token is drawn from the same logits."""
    sampler = make_sampler(**params)
    draws = torch.tensor([sampler.sample(logits) for _ in range(NUM_DRAWS)])
    return torch.bincount(draws, minlength=len(logits)) / NUM_DRAWS


def assert_drawn_like(seen: Tensor, expected: Tensor) -> None:
    """Within four standard deviations of every probability; what cannot be drawn is not."""
    deviation = (expected * (1 - expected) / NUM_DRAWS).sqrt()
    assert ((seen - expected).abs() <= 4 * deviation).all(), (seen, expected)
    assert (seen[expected == 0] == 0).all()


def kept(tokens: list[int], temperature: float = 1.0) -> Tensor:
    """The distribution over `tokens` alone."""
    probs = torch.zeros_like(LOGITS)
    probs[tokens] = (LOGITS / temperature).softmax(-1)[tokens]
    return probs / probs.sum()


def test_temperature_0_takes_the_likeliest_and_the_lower_of_two() -> None:
    sampler = make_sampler(temperature=0)
    assert sampling_of(sampler.params) is GREEDY
    assert sampler.sample(LOGITS) == 1
    assert sampler.sample(torch.tensor([1.0, 3.0, 3.0])) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    seen = frequencies(temperature=temperature)
    assert_drawn_like(seen, (LOGITS / temperature).softmax(-1))


@pytest.mark.parametrize(("top_k", "tokens"), [(1, [1]), (3, [1, 4, 2]), (6, [0, 1, 2, 3, 4, 5]), (100, [*range(6)])])
def test_top_k_keeps_the_k_likeliest(top_k: int, tokens: list[int]) -> None:
    assert_drawn_like(frequencies(top_k=top_k), kept(tokens))


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    # Sorted: 0.46, 0.28, 0.17, 0.06, 0.02, 0.003.
    assert_drawn_like(frequencies(top_p=0.7), kept([1, 4]))
    assert_drawn_like(frequencies(top_p=0.8), kept([1, 4, 2]))
    assert_drawn_like(frequencies(top_p=0.5, temperature=0.5), kept([1], 0.5))


def test_min_p_keeps_what_is_likely_beside_the_likeliest() -> None:
    probs = LOGITS.softmax(-1)
    assert_drawn_like(frequencies(min_p=0.3), kept((probs >= 0.3 * probs.max()).nonzero().flatten().tolist()))
    assert_drawn_like(frequencies(min_p=1.0), kept([1]))


@pytest.mark.parametrize("params", [{"top_p": 0.0}, {"top_p": 1e-12}, {"min_p": 1.0}, {"top_k": 1}])
def test_the_likeliest_token_always_stays(params: dict[str, Any]) -> None:
    sampler = make_sampler(**params)
    assert {sampler.sample(LOGITS) for _ in range(100)} == {1}


def test_a_tie_at_the_cut_keeps_the_lower_index() -> None:
    flat = torch.zeros(5)
    sampler = make_sampler(top_k=2)
    assert {sampler.sample(flat) for _ in range(200)} == {0, 1}
    sampler = make_sampler(top_p=0.5)
    assert {sampler.sample(flat) for _ in range(200)} == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 5e-324])
def test_temperature_near_0_is_greedy_rather_than_nan(temperature: float) -> None:
    sampler = make_sampler(temperature=temperature)
    assert {sampler.sample(LOGITS) for _ in range(50)} == {1}


def test_logit_of_minus_infinity_is_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[1] = -torch.inf
    assert frequencies(logits)[1] == 0
    alone = torch.full((6,), -torch.inf)
    alone[4] = 0.0
    assert frequencies(alone)[4] == 1


def test_penalties_follow_the_formula_of_openai() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c over the generated tokens."""
    sampler = make_sampler(temperature=0, presence_penalty=0.4, frequency_penalty=0.3)
    logits = torch.tensor([2.0, 1.5, 0.0])
    expected, counts = [], torch.zeros(3)
    for _ in range(12):
        token = int((logits - 0.3 * counts - 0.4 * (counts > 0)).argmax())
        expected.append(token)
        counts[token] += 1
    assert [sampler.sample(logits) for _ in range(12)] == expected
    assert len(set(expected)) == 3
    assert logits.tolist() == [2.0, 1.5, 0.0], "the model's logits are not the sampler's to change"


def test_presence_penalty_counts_once_and_frequency_penalty_every_time() -> None:
    logits = torch.tensor([1.0, 0.0])
    presence = make_sampler(temperature=0, presence_penalty=0.9)
    frequency = make_sampler(temperature=0, frequency_penalty=0.6)
    assert [presence.sample(logits) for _ in range(4)] == [0, 0, 0, 0]
    assert [frequency.sample(logits) for _ in range(4)] == [0, 0, 1, 0]


def test_negative_penalty_invites_repetition() -> None:
    sampler = make_sampler(temperature=0, frequency_penalty=-1.0)
    assert sampler.sample(torch.tensor([1.0, 0.0])) == 0
    assert sampler.sample(torch.tensor([0.0, 0.5])) == 0


def test_logit_bias_adds_to_the_logits() -> None:
    bias = {3: 2.5, 1: -1.0}
    biased = LOGITS.clone()
    biased[3] += 2.5
    biased[1] -= 1.0
    assert_drawn_like(frequencies(logit_bias=bias), biased.softmax(-1))
    assert make_sampler(temperature=0, logit_bias={5: 100.0}).sample(LOGITS) == 5
    assert make_sampler(temperature=0, logit_bias={1: -100.0}).sample(LOGITS) == 4


def test_seed_repeats_the_draws_and_another_seed_does_not() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = make_sampler(seed=seed)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64])
def test_any_integer_is_a_seed(seed: int) -> None:
    first, second = make_sampler(seed=seed), make_sampler(seed=seed)
    assert [first.sample(LOGITS) for _ in range(20)] == [second.sample(LOGITS) for _ in range(20)]


def test_a_seed_and_its_negative_are_two_seeds() -> None:
    first, second = make_sampler(seed=1), make_sampler(seed=-1)
    assert [first.sample(LOGITS) for _ in range(50)] != [second.sample(LOGITS) for _ in range(50)]


def test_a_token_draws_one_number_whatever_the_parameters_leave() -> None:
    """So that a seeded text does not jump when a step leaves one token instead of many."""
    certain = torch.tensor([50.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    first, second = make_sampler(), make_sampler()
    first.sample(certain)
    second.sample(LOGITS)
    assert [first.sample(LOGITS) for _ in range(20)] == [second.sample(LOGITS) for _ in range(20)]


def test_log_probabilities_are_the_models_own() -> None:
    logprobs = LOGITS.double().log_softmax(-1)
    scored = with_logprobs(LOGITS, 5, 3)
    assert scored.logprob == pytest.approx(float(logprobs[5]))
    assert [token for token, _ in scored.likeliest] == [1, 4, 2]
    assert [value for _, value in scored.likeliest] == pytest.approx(logprobs[[1, 4, 2]].tolist())
    assert with_logprobs(LOGITS, 0, 0).likeliest == ()


def test_only_allowed_tokens_are_drawn() -> None:
    masked = adjusted(LOGITS, GREEDY, {}, bytearray([0b101001]))
    assert (masked > -torch.inf).tolist() == [True, False, False, True, False, True]


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # Of 0.4, 0.3, 0.2, 0.1 the best two are 4/7 and 3/7: a top_p of 0.5 keeps the first alone, 0.6 keeps both.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()

    def drawn(top_p: float) -> set[int]:
        params = SamplingParams(max_tokens=1, top_k=2, top_p=top_p, seed=0)
        sampler = Drawing(params)
        return {sampler.sample(logits) for _ in range(200)}

    assert drawn(0.5) == {0}
    assert drawn(0.6) == {0, 1}
