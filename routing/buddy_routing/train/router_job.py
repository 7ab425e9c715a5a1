"""`buddy train router` and `buddy train predictor`, for any checkpoint, from a file of conversations."""

import hashlib
import itertools
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from buddy_routing.adapter import ADAPTER_DIR, merge_adapter, save_adapter
from buddy_routing.artifact import save_predictor, save_router
from buddy_routing.checkpoint import load_model
from buddy_routing.embedded import model_directory
from buddy_routing.path_source import decoder_for, load_path_source
from buddy_routing.train.chat_data import ChatEncoder, DataError, read_conversations
from buddy_routing.train.correction_plan import CorrectionPlan
from buddy_routing.train.duo_plan import DuoPlan
from buddy_routing.train.example import Example
from buddy_routing.train.exits_plan import ExitsPlan
from buddy_routing.train.predictor_plan import PredictorPlan
from buddy_routing.train.predictor_training import train_predictor
from buddy_routing.train.router_plan import RouterPlan
from buddy_routing.train.router_training import train_router


class TrainingError(RuntimeError):
    """Training that could not continue; the message states what to change."""


def make_router(
    model: str | None, data: Path, out: Path, plan: RouterPlan, device: torch.device, dtype: torch.dtype
) -> None:
    """Train and save an artifact in `out`, together with `training.safetensors` for resuming and TensorBoard's log.

    Raises DataError, CheckpointError, UnsupportedModelError (all of them ValueErrors), TrainingError.
    """
    # Before the model is loaded, because it assigns each process its GPU.
    process = PartialState(cpu=device.type == "cpu")
    directory = model_directory(model)
    examples = read_examples(data, directory, plan.num_tokens)
    loaded = load_model(directory, dtype, device)
    steps = num_steps(examples, plan)
    out.mkdir(parents=True, exist_ok=True)
    stream = endless(examples, plan.seed)
    with out_of_memory_explained(plan):
        router, config = train_router(
            loaded,
            stream,
            plan,
            steps,
            out / "training.safetensors",
            log_directory=out,
            data_name=name_of(data),
        )
    if process.is_main_process:
        save_router(out, router, config)
        if plan.lora_rank:
            save_adapter(out / ADAPTER_DIR, loaded.model, plan.lora_rank, str(directory))
        tqdm.write(f"{steps} steps; the router is in {out}", file=sys.stderr)
    process.destroy_process_group()


def make_predictor(
    model: str | None, router: Path, data: Path, plan: PredictorPlan, device: torch.device, dtype: torch.dtype
) -> None:
    """Train a predictor for `router`, an artifact of any kind, and save it there.

    Raises ArtifactError, and everything that make_router raises.
    """
    directory = model_directory(model)
    examples = read_examples(data, directory, plan.num_tokens)
    loaded = load_model(directory, dtype, device)
    source, route_block = load_path_source(router, loaded.model, loaded.fingerprint)
    if (router / ADAPTER_DIR).exists():
        merge_adapter(loaded.model, router / ADAPTER_DIR)
    # One pass: measuring an example again would teach nothing new.
    stream = itertools.islice(endless(examples, plan.seed), len(examples))
    with out_of_memory_explained(plan):
        predictor = train_predictor(
            decoder_for(loaded.model, source),
            source,
            route_block,
            stream,
            plan,
            router / "predictor_training.safetensors",
            data_name=name_of(data),
        )
    save_predictor(router, predictor)
    tqdm.write(f"the predictor is in {router}", file=sys.stderr)


def name_of(data: Path) -> str:
    """A digest of a file's content."""
    return hashlib.sha256(data.read_bytes()).hexdigest()


@contextmanager
def out_of_memory_explained(plan: RouterPlan | CorrectionPlan | PredictorPlan | ExitsPlan | DuoPlan) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory with --num-rows {plan.num_rows} and --num-tokens {plan.num_tokens}: "
            f"lower one of them and start again, what was trained so far is kept ({error})"
        ) from error


def read_examples(data: Path, directory: Path, num_tokens: int) -> list[Example]:
    """The examples in a file, in the tokens of the model in `directory`. Examples whose prompt fills `num_tokens` are
    left out and reported. Raises DataError."""
    conversations = read_conversations(data)
    encoder = ChatEncoder.from_directory(directory)
    bar = tqdm(conversations, desc="tokens", unit="conversation", mininterval=2)
    encoded = list(itertools.chain.from_iterable(encoder.examples(conversation) for conversation in bar))
    fitting = [example for example in encoded if example.num_prompt < num_tokens]
    if not fitting:
        raise DataError(f"{data}: all {len(encoded)} prompts are longer than {num_tokens} tokens")
    if len(fitting) < len(encoded):
        left_out = len(encoded) - len(fitting)
        tqdm.write(f"{left_out} of {len(encoded)} examples left out: their prompts are longer than {num_tokens} tokens")
    return fitting


def num_steps(examples: Sequence[Example], plan: RouterPlan | ExitsPlan | DuoPlan) -> int:
    """Number of batches that contain the examples `plan.epochs` times, divided among the processes."""
    total = sum(min(len(example.ids), plan.num_tokens) for example in examples)
    return math.ceil(plan.epochs * total / (plan.num_rows * plan.num_tokens * PartialState().num_processes))


def endless(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    """Repeats the examples forever, each time in a different order."""
    rng = random.Random(seed)
    order = list(examples)
    while True:
        rng.shuffle(order)
        yield from order
