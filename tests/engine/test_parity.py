"""The third level of parity: the whole engine's greedy tokens against transformers' generate(), in every family."""

from pathlib import Path

import pytest
import torch

from tiny_engine import NUM_LAYERS, build_tiny_engine, make_request, run_engine, save_tiny_model
from tiny_models import CONFIGS
from tolerances import assert_close, assert_far


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_generate(name: str, native: bool, tmp_path: Path) -> None:
    theirs = save_tiny_model(name, tmp_path)
    engine = build_tiny_engine(tmp_path, "prior:cosine", native=native).engine
    requests = [
        make_request(f"{seed}", num_prompt=30 + seed, num_run=NUM_LAYERS, seed=seed, temperature=0) for seed in range(3)
    ]
    answers = run_engine(engine, requests).answers
    for request in requests:
        prompt = torch.tensor([request.prompt_tokens])
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert answers[request.request_id].token_ids == expected[0, prompt.shape[1] :].tolist()


def test_logprobs_of_the_prompt_equal_transformers(tmp_path: Path) -> None:
    theirs = save_tiny_model("qwen3", tmp_path)
    engine = build_tiny_engine(tmp_path, "prior:cosine").engine
    request = make_request(num_prompt=50, num_run=NUM_LAYERS, prompt_logprobs=0)
    (event,) = run_engine(engine, [request]).answers["r"].prompts
    prompt = torch.tensor([request.prompt_tokens])
    with torch.inference_mode():
        logprobs = theirs(prompt).logits[0, :-1].float().log_softmax(-1)
    expected = logprobs.gather(1, prompt[0, 1:, None])[:, 0]
    got = torch.tensor([token.logprob for token in event.logprobs])
    assert_close(got, expected, width=50, depth=NUM_LAYERS)
    assert_far(got.roll(1), expected, width=50, depth=NUM_LAYERS)
