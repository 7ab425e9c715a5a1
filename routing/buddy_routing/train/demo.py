"""`buddy train demo`: makes the embedded chat model and its router from the texts, end to end.

Stages, each resumed or skipped when its result is there: tokenizer, tokens, pretrain, tune, export, router.
Runs with torch, transformers, tokenizers, safetensors and numpy alone, so on a GPU machine without the web stack:
`python -m buddy_routing.train.demo --data DIR --work DIR --out DIR`.
"""

import random
import shutil
from argparse import ArgumentParser
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaConfig

from buddy_routing.artifact import save_router
from buddy_routing.checkpoint import load_model, save_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.model_spec import ModelSpec
from buddy_routing.train.corpus import PRETRAIN, TUNE, Corpus, Mixture, PackedTokens, pack
from buddy_routing.train.demo_plan import DemoPlan, add_arguments, plan_from
from buddy_routing.train.pretrain import FitPlan, fit, initialise
from buddy_routing.train.router_training import RouterPlan, train_router
from buddy_routing.train.tokenizer import TrainingTokenizer, train_tokenizer

VOCAB_SIZE = 3072
MAX_CONTEXT = 1024
PRETRAIN_CONTEXT = 256


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
    """The token file of a stage, drawn once. A longer pretraining needs a longer file, whose beginning is the same."""
    path = plan.work / f"{stage}-{num_tokens}.npz"
    if not path.exists():
        pack(corpus, mixture, tokenizer, num_tokens, plan.seed).save(path)
    return PackedTokens.load(path)


def make_base(plan: DemoPlan, device: torch.device) -> RoutedDecoder:
    """Tokenizer, pretraining and chat tuning: the base model in fp32."""
    corpus = Corpus(plan.data, "train")
    tokenizer = make_tokenizer(plan, corpus)
    model = RoutedDecoder(ModelSpec.from_config(demo_config()))
    initialise(model, plan.seed)
    compile_layers = device.type == "cuda" or shutil.which("g++") is not None
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
    tune = FitPlan(
        num_steps=plan.tune_tokens // plan.batch_tokens,
        batch_size=plan.batch_tokens // MAX_CONTEXT,
        num_tokens=MAX_CONTEXT,
        learning_rate=plan.learning_rate,
        final_lr_scale=0.0,
        warmup_steps=20,
        depth_drop=plan.depth_drop,
    )
    data = packed_tokens(plan, corpus, tokenizer, "tune", TUNE, plan.tune_tokens)
    # Named by where it branched off: tuning after more pretraining is another run.
    checkpoint = plan.work / f"tune-{pretrain.num_steps}-{tune.num_steps}.safetensors"
    fit(model, data, tune, checkpoint, device, plan.seed + 1, compile_layers)
    return model


def export_base(plan: DemoPlan, model: RoutedDecoder) -> Path:
    """Publish the base model in Hugging Face's format, in bf16."""
    directory = plan.out / "model"
    save_model(model, demo_config(), directory, torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(plan.work / "tokenizer" / name, directory / name)
    return directory


def make_router(plan: DemoPlan, directory: Path, device: torch.device) -> None:
    """Train the Decision Module on the published model, whose rounding is the one it will be served with."""
    loaded = load_model(directory, torch.float32, device)
    corpus = Corpus(plan.data, "train")
    tokenizer = TrainingTokenizer(directory)
    router_plan = RouterPlan(num_steps=plan.router_steps, seed=plan.seed)
    checkpoint = plan.work / f"router-{loaded.fingerprint}.safetensors"
    router, config = train_router(loaded, corpus.router_mix(plan.seed), tokenizer, router_plan, checkpoint)
    save_router(plan.out / "router", router, config)


def make_demo(plan: DemoPlan) -> None:
    """Everything, in order."""
    plan.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    directory = export_base(plan, make_base(plan, device))
    make_router(plan, directory, device)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    make_demo(plan_from(parser.parse_args()))
