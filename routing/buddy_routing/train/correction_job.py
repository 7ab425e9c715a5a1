"""`buddy train correction`, for the router of any checkpoint, from a file of conversations."""

import itertools
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from buddy_routing.adapter import ADAPTER_DIR, merge_adapter
from buddy_routing.artifact import load_router, save_router
from buddy_routing.checkpoint import load_model
from buddy_routing.embedded import model_directory
from buddy_routing.train.correction_plan import CorrectionPlan
from buddy_routing.train.correction_training import train_correction
from buddy_routing.train.router_job import endless, name_of, out_of_memory_explained, read_examples


def make_correction(
    model: str | None,
    router: Path,
    data: Path,
    out: Path,
    plan: CorrectionPlan,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Correct `router` and save the result in `out`, together with the paths measured, for resuming. The predictor of
    `router`, which knows only its own paths, does not come along.

    Raises DataError, CheckpointError, ArtifactError and others (all of them ValueErrors), TrainingError.
    """
    if out.resolve() == router.resolve():
        raise ValueError(f"--out {out} is the router to correct: choose another place")
    directory = model_directory(model)
    examples = read_examples(data, directory, plan.num_tokens)
    loaded = load_model(directory, dtype, device)
    start, config = load_router(router, loaded.fingerprint, device)
    adapter = router / ADAPTER_DIR
    if adapter.exists():
        merge_adapter(loaded.model, adapter)
    out.mkdir(parents=True, exist_ok=True)
    # One pass: measuring an example again would teach little.
    stream = itertools.islice(endless(examples, plan.seed), len(examples))
    with out_of_memory_explained(plan):
        corrected = train_correction(
            loaded.model,
            start,
            config.route_block,
            stream,
            plan,
            out / "correction_training.safetensors",
            data_name=name_of(data),
        )
    if adapter.exists():
        shutil.copytree(adapter, out / ADAPTER_DIR, dirs_exist_ok=True)
    rank = corrected.decision.down.out_features
    save_router(out, corrected, replace(config, rank=rank, prior_weight=corrected.prior_weight))
    tqdm.write(f"the corrected router is in {out}", file=sys.stderr)
