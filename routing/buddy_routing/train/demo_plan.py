"""The plan of `buddy train demo`: sizes and directories. Imports no torch, so that a command line can be built from
it."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from buddy_routing.train.plan_fields import add_plan, check_positive, read_plan

TINY_STORIES = "tinystories/tinystories_sample_2MiB.txt"
KIDS_STORIES = "kids_stories/kids_stories_en_ccby.txt"
BOOKS = "books/easy_fiction.tar.xz"
INSTRUCTIONS = "instruct/rasbt_instruction-data.json"
WORD_PROBLEMS = "gsm8k/train.jsonl"
WIKITEXT = "wikitext2/wiki.test.raw"
TEXTS = (TINY_STORIES, KIDS_STORIES, BOOKS, INSTRUCTIONS, WORD_PROBLEMS, WIKITEXT)


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """`data` contains the texts (with DATA.md), `work` holds resumable state, `out` receives model/ and router/.

    Token counts are training tokens seen, repeats included. `depth_drop` applies to pretraining, `routed_share` to
    tuning (pretrain.FitPlan). With `start`, an earlier `out`, its model and router are tuned further and nothing is
    pretrained; the result is a mean of the weights before, of `kept_share`, and after (Wortsman et al. 2022, arXiv
    2109.01903). With 0 `router_steps` the router is the one that was tuned with the model.
    """

    data: Path = Path("data")
    work: Path = Path("build/demo")
    out: Path = Path("build/demo/embedded")
    start: str = ""
    kept_share: float = 0.0
    pretrain_tokens: int = 12_000_000
    tune_tokens: int = 2_500_000
    router_steps: int = 300
    predictor_batches: int = 150
    batch_tokens: int = 6144
    learning_rate: float = 3e-3
    depth_drop: float = 0.4
    routed_share: float = 0.5
    seed: int = 0


def add_arguments(parser: ArgumentParser) -> None:
    meanings = {
        "start": "an earlier --out to tune further, in place of pretraining",
        "kept_share": "the share of --start's weights in the result",
    }
    add_plan(parser, DemoPlan, meanings, {})


def plan_from(parsed: Namespace) -> DemoPlan:
    """Raises ValueError naming a missing directory or a number out of range."""
    plan = read_plan(DemoPlan, parsed)
    missing = [name for name in TEXTS if not (plan.data / name).exists()]
    if missing:
        raise ValueError(f"--data {plan.data} does not hold the texts; missing: {', '.join(missing)}")
    if plan.start:
        missing = [name for name in ("model", "router") if not (Path(plan.start) / name).exists()]
        if missing:
            raise ValueError(f"--start {plan.start} is no earlier --out; missing: {', '.join(missing)}")
        if Path(plan.start).resolve() == plan.out.resolve():
            raise ValueError(f"--out {plan.out} is --start, which it would overwrite")
    elif plan.kept_share:
        raise ValueError(f"--kept-share is {plan.kept_share}, and there is no --start of which to keep it")
    check_positive(plan, "pretrain_tokens", "tune_tokens", "predictor_batches", "batch_tokens", "learning_rate")
    if plan.router_steps < 0:
        raise ValueError(f"--router-steps is {plan.router_steps}, allowed is 0 or more")
    for name in ("depth_drop", "routed_share", "kept_share"):
        if not 0 <= getattr(plan, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(plan, name)}, allowed is 0 to 1")
    return plan
