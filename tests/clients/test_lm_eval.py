"""EleutherAI's harness, unmodified, gives what it would give for the same model in transformers."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from buddy_routing.embedded import MODEL_ID, embedded_model
from clients.environments import client_variables
from end_to_end.tenant_site import Served
from lm_eval.make_tasks import main as make_tasks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOLERANCE = 1e-3
NUM_DOCUMENTS = 20
NUM_CHOICES = 4


class Reference:
    """The embedded model in transformers."""

    def __init__(self) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(embedded_model())
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)

    def log_likelihood(self, context: str, continuation: str) -> float:
        num_context = len(self.tokenizer(context, add_special_tokens=False).input_ids)
        tokens = self.tokenizer(context + continuation, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            logprobs = self._model(tokens).logits[0, :-1].log_softmax(-1)
        return float(logprobs.gather(-1, tokens[0, 1:, None])[num_context - 1 :].sum())

    def answer(self, prompt: str, max_tokens: int) -> str:
        """Greedy, up to the end of the line."""
        tokens = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            answered = self._model.generate(**tokens, max_new_tokens=max_tokens, do_sample=False)
        text = self.tokenizer.decode(answered[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        return text.partition("\n")[0]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_tasks(folder)
    return folder


def evaluate(client_python: Path, tasks: Path, task: str, model: str, **model_args: object) -> Iterator[dict[str, Any]]:
    """The samples of `task` as the command logs them."""
    arguments = {"model": MODEL_ID, "header": {"Authorization": "Bearer sk-full"}, "max_length": 1024} | model_args
    command = [
        client_python.with_name("lm-eval"), "run", "--include_path", tasks, "--tasks", task, "--apply_chat_template",
        "--limit", str(NUM_DOCUMENTS), "--log_samples", "--output_path", tasks / model,
        "--model", model, "--model_args", *(f"{name}={value}" for name, value in arguments.items()),
    ]  # fmt: skip
    # Its copies of the tasks go where the tasks do.
    variables = client_variables(HF_HOME=str(tasks / "huggingface"))
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (samples,) = (tasks / model).rglob(f"samples_{task}_*.jsonl")
    lines = samples.read_text().splitlines()
    assert len(lines) == NUM_DOCUMENTS
    return map(json.loads, lines)


def test_log_likelihoods_of_local_completions_agree(
    site: Served, client_python: Path, tasks: Path, reference: Reference
) -> None:
    samples = evaluate(
        client_python, tasks, "buddy_choice", "local-completions",
        base_url=f"{site.url}/v1/completions", tokenizer=embedded_model(),
    )  # fmt: skip
    for sample in samples:
        scores = [float(response[0][0]) for response in sample["resps"]]
        asked = [(request["arg_0"], request["arg_1"]) for request in sample["arguments"].values()]
        expected = [reference.log_likelihood(*request) for request in asked]
        assert len(scores) == NUM_CHOICES
        assert scores == pytest.approx(expected, rel=0, abs=TOLERANCE)


def test_answers_of_local_completions_agree(
    site: Served, client_python: Path, tasks: Path, reference: Reference
) -> None:
    samples = evaluate(
        client_python, tasks, "buddy_answer", "local-completions",
        base_url=f"{site.url}/v1/completions", tokenizer=embedded_model(),
    )  # fmt: skip
    for sample in samples:
        request = sample["arguments"]["gen_args_0"]
        assert sample["resps"] == [[reference.answer(request["arg_0"], request["arg_1"]["max_gen_toks"])]]


def test_answers_of_local_chat_completions_agree(
    site: Served, client_python: Path, tasks: Path, reference: Reference
) -> None:
    samples = evaluate(
        client_python, tasks, "buddy_answer", "local-chat-completions", base_url=f"{site.url}/v1/chat/completions"
    )
    for sample in samples:
        request = sample["arguments"]["gen_args_0"]
        messages = json.loads(request["arg_0"][0])
        prompt = reference.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert sample["resps"] == [[reference.answer(prompt, request["arg_1"]["max_gen_toks"])]]
