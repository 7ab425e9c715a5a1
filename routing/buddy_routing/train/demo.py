"""`buddy train demo`: makes the embedded chat model and its router from the texts, end to end.

Stages, each resumed, or skipped if its result exists: tokenizer, tokens, pretrain, tune (base and router together),
export, router and predictor (alone, on the exported base).

Needs only torch, transformers, tokenizers, safetensors and numpy, so it runs on a GPU machine without the web stack:
`python -m buddy_routing.train.demo --data DIR --work DIR --out DIR`.
"""

import random
import shutil
from argparse import ArgumentParser
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig

from buddy_routing.artifact import load_router, save_predictor, save_router
from buddy_routing.checkpoint import load_model, save_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.features import causal_features
from buddy_routing.first_layer import FirstLayer
from buddy_routing.model_spec import ModelSpec
from buddy_routing.prior import measure_prior
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import LearnedRouter
from buddy_routing.train.corpus import PRETRAIN, TUNE, Corpus, Mixture, PackedTokens, pack
from buddy_routing.train.demo_plan import DemoPlan, add_arguments, plan_from
from buddy_routing.train.predictor_plan import PredictorPlan
from buddy_routing.train.predictor_training import train_predictor
from buddy_routing.train.pretrain import FitPlan, fit, initialise
from buddy_routing.train.router_plan import RouterPlan
from buddy_routing.train.router_training import config_of, new_decision_module, train_router
from buddy_routing.train.tokenizer import TrainingTokenizer, train_tokenizer
from buddy_routing.train.training_state import run_name

VOCAB_SIZE = 3072
MAX_CONTEXT = 1024
PRETRAIN_CONTEXT = 256
ROUTER_RANK = 32
CALIBRATION_ROWS = 16


def demo_config() -> LlamaConfig:
    """16 layers, 192 wide, 6 query heads on 2 key/value heads: 6.9 M parameters."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )


def make_tokenizer(plan: DemoPlan, corpus: Corpus) -> TrainingTokenizer:
    directory = plan.work / "tokenizer"
    if plan.start:
        directory.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(Path(plan.start) / "model", directory)
    if not (directory / "tokenizer_config.json").exists():
        rng = random.Random(plan.seed)
        tasks = islice(corpus.tasks(rng), 15_000)
        texts = [*corpus.tiny_stories, *corpus.kids_stories, *rng.sample(corpus.book_pieces, 2_000)]
        texts += [f"{document.prompt}\n{document.text}" for document in [*corpus.instructions, *tasks]]
        train_tokenizer(texts, VOCAB_SIZE, MAX_CONTEXT, directory)
    return TrainingTokenizer(directory)


def packed_tokens(
    plan: DemoPlan, corpus: Corpus, tokenizer: TrainingTokenizer, stage: str, mixture: Mixture, num_tokens: int
) -> PackedTokens:
    """The token file of a stage, drawn once. A longer pretraining needs a longer file, which begins with the same
    tokens."""
    vocabulary = (plan.work / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    path = plan.work / f"{stage}-{num_tokens}-{run_name(mixture, plan.seed, vocabulary)}.npz"
    if not path.exists():
        pack(corpus, mixture, tokenizer, num_tokens, plan.seed).save(path)
    return PackedTokens.load(path)


def make_base(plan: DemoPlan, device: torch.device) -> tuple[RoutedDecoder, LearnedRouter]:
    """Tokenizer, pretraining and chat tuning: the base model in fp32, and the router tuned with it."""
    corpus = Corpus(plan.data, "train")
    tokenizer = make_tokenizer(plan, corpus)
    compile_layers = device.type == "cuda" or shutil.which("g++") is not None
    if plan.start:
        model, router, name = started(plan, device)
    else:
        model, name = pretrained(plan, corpus, tokenizer, device, compile_layers)
        router = None
    tune = FitPlan(
        num_steps=plan.tune_tokens // plan.batch_tokens,
        batch_size=plan.batch_tokens // MAX_CONTEXT,
        num_tokens=MAX_CONTEXT,
        learning_rate=plan.learning_rate,
        final_lr_scale=0.0,
        warmup_steps=20,
        routed_share=plan.routed_share,
    )
    data = packed_tokens(plan, corpus, tokenizer, "tune", TUNE, plan.tune_tokens)
    # Named after its starting point: tuning from another one is a different run.
    checkpoint = plan.work / f"{name}-{tune.num_steps}-{plan.routed_share:g}.safetensors"
    router = router or router_from_prior(model, data, plan.seed, device)
    run = run_name(name, tune, plan.seed)
    fit(model, data, tune, checkpoint, device, plan.seed + 1, compile_layers, router, run)
    if plan.start and plan.kept_share:
        before, router_before, _ = started(plan, device)
        keep(plan.kept_share, before, model)
        keep(plan.kept_share, router_before, router)
    return model, router


def started(plan: DemoPlan, device: torch.device) -> tuple[RoutedDecoder, LearnedRouter, str]:
    """The model and the router in `plan.start`, to be trained, and what their tuning is named after."""
    loaded = load_model(Path(plan.start) / "model", torch.float32, device)
    router, _ = load_router(Path(plan.start) / "router", loaded.fingerprint, device)
    return loaded.model.requires_grad_(), router.requires_grad_(), f"tune-{loaded.fingerprint}"


@torch.no_grad()
def keep(share: float, before: nn.Module, after: nn.Module) -> None:
    """Make the weights of `after` a mean, `share` of which are those of `before`."""
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        new.lerp_(old, share)


def pretrained(
    plan: DemoPlan, corpus: Corpus, tokenizer: TrainingTokenizer, device: torch.device, compile_layers: bool
) -> tuple[RoutedDecoder, str]:
    """A model pretrained from nothing, and what its tuning is named after."""
    model = RoutedDecoder(ModelSpec.from_config(demo_config()))
    initialise(model, plan.seed)
    pretrain = FitPlan(
        num_steps=plan.pretrain_tokens // plan.batch_tokens,
        batch_size=plan.batch_tokens // PRETRAIN_CONTEXT,
        num_tokens=PRETRAIN_CONTEXT,
        learning_rate=plan.learning_rate,
        final_lr_scale=1.0,
        warmup_steps=50,
        depth_drop=plan.depth_drop,
    )
    data = packed_tokens(plan, corpus, tokenizer, "pretrain", PRETRAIN, plan.pretrain_tokens)
    fit(model, data, pretrain, plan.work / "pretrain.safetensors", device, plan.seed, compile_layers)
    return model, f"tune-{pretrain.num_steps}"


def router_from_prior(model: RoutedDecoder, data: PackedTokens, seed: int, device: torch.device) -> LearnedRouter:
    """An untrained router that ranks layers by the perplexity they save on part of `data`, whatever the input."""
    rows = data.batch(0, CALIBRATION_ROWS, PRETRAIN_CONTEXT)
    tokens, begins, counted = (torch.from_numpy(array).to(device) for array in rows)
    features = causal_features(FirstLayer.of(model).v(tokens), conversation_starts(begins)).flatten(0, 1)
    decision = new_decision_module(model, features, "mean_v+newest_v", ROUTER_RANK, seed)
    with torch.no_grad():
        # A position's own `counted` does not state whether the token after it counts, so it is shifted by one.
        decision.up.bias.copy_(measure_prior(model, tokens, "ppl", counted.roll(-1, 1)))
    return LearnedRouter(decision, torch.zeros(len(model.spec.actions.free)), 0.0, "training")


def export_base(plan: DemoPlan, model: RoutedDecoder) -> Path:
    """Publish the base model in Hugging Face's format, in bf16."""
    directory = plan.out / "model"
    save_model(model, demo_config(), directory, torch.bfloat16)
    copy_tokenizer(plan.work / "tokenizer", directory)
    return directory


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target / name)


def make_router(plan: DemoPlan, directory: Path, tuned: LearnedRouter, device: torch.device) -> None:
    """Train the router that was `tuned` with the model on, and the predictor, on the exported model, which rounds
    exactly as it will when served."""
    loaded = load_model(directory, torch.float32, device)
    corpus, tokenizer = Corpus(plan.data, "train"), TrainingTokenizer(directory)
    router_plan = RouterPlan(seed=plan.seed, rank=ROUTER_RANK)
    router, config = tuned, replace(config_of(loaded, router_plan), prior_weight=tuned.prior_weight)
    if plan.router_steps:
        examples = map(tokenizer.encode_example, corpus.router_mix(plan.seed))
        checkpoint = plan.work / f"router-{loaded.fingerprint}.safetensors"
        router, config = train_router(loaded, examples, router_plan, plan.router_steps, checkpoint, tuned.decision)
    save_router(plan.out / "router", router, config)
    predictor_plan = PredictorPlan(num_batches=plan.predictor_batches, seed=plan.seed)
    # How the model answers what it knows by heart says little about anything new.
    fresh = Corpus(plan.data, "validation")
    examples = map(tokenizer.encode_example, fresh.router_mix(plan.seed + 1))
    checkpoint = plan.work / f"predictor-{loaded.fingerprint}.safetensors"
    predictor = train_predictor(loaded.model, router, config.route_block, examples, predictor_plan, checkpoint)
    save_predictor(plan.out / "router", predictor)


def make_demo(plan: DemoPlan) -> None:
    """Run all stages in order."""
    plan.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, router = make_base(plan, device)
    make_router(plan, export_base(plan, model), router, device)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    make_demo(plan_from(parser.parse_args()))
