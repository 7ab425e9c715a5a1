"""A real trained model from file to English."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.checkpoint import load_model
from buddy_server.engine.build import build_engine
from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.engine.settings import EngineSettings
from stories260k import convert
from tiny_engine import Answer, run_engine
from tolerances import assert_close, assert_far

NUM_LAYERS = 5
WIDTH = 172
BEGINNING = "Once upon a time"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("stories260k"))


def prompt_tokens(directory: Path) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(directory)(BEGINNING)["input_ids"])


def tell(directory: Path, dtype: str = "float32", num_run: int = NUM_LAYERS, max_tokens: int = 120) -> Answer:
    settings = EngineSettings(block_size=16, max_sequences=4, max_step_tokens=256)
    engine = build_engine(str(directory), "prior:cosine", settings, "cpu", dtype).engine
    sampling = SamplingParams(max_tokens, temperature=0)
    request = GenerationRequest("r", "default", prompt_tokens(directory), MILLI_LAYERS * num_run, sampling)
    return run_engine(engine, [request]).answers["r"]


@pytest.mark.parametrize("text", ["Once upon a time, there was a little girl.", "A 🐦 sang: “déjà vu”\n\nThe end."])
def test_tokenizer_gives_back_what_it_was_given(directory: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    token_ids = tokenizer(text)["input_ids"]
    assert token_ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_logits_equal_those_of_transformers(directory: Path) -> None:
    ours = load_model(directory, torch.float32, torch.device("cpu")).model
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(directory)("Lily went to the park. " * 8)["input_ids"]])
    with torch.inference_mode():
        got, expected = ours.lm_head(ours.dense(tokens)), theirs(tokens).logits
        without_a_token = ours.lm_head(ours.dense(tokens[:, 1:]))
    assert_close(got, expected, WIDTH, NUM_LAYERS)
    assert_far(without_a_token, expected[:, 1:], WIDTH, NUM_LAYERS)


def test_greedy_story_is_that_of_transformers(directory: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = torch.tensor([prompt_tokens(directory)])
    generated = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=120, do_sample=False, pad_token_id=0
    )
    assert tell(directory).token_ids == generated[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_story_is_sensible_english(directory: Path, dtype: str) -> None:
    story = tell(directory, dtype).text
    assert story.startswith(", there was a little girl named Lily. She loved to")
    assert story.count(".") >= 4
    assert {"the", "to", "She", "and"} <= set(story.split())


def test_every_budget_tells_something_with_exactly_its_layers(directory: Path) -> None:
    for num_run in (2, 3, 4):
        answer = tell(directory, num_run=num_run, max_tokens=20)
        assert {len(path) for path in answer.paths} == {num_run}
        assert answer.text
