"""A scheduler whose steps are made up: blocks and lanes are real, there is no model."""

from array import array

import torch

from buddy_kernels import SampledToken
from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_server.engine.batch import Batch, BatchResult, WorkResult
from buddy_server.engine.block_pool import BlockPool
from buddy_server.engine.messages import GenerationRequest
from buddy_server.engine.prefix_keys import PrefixKeys
from buddy_server.engine.scheduler import Scheduler, StepOutput
from buddy_server.engine.sequence import Sequence
from tiny_engine import new_sequence

ROUTE_BLOCK = 8
SUMS = array("d", [0.5])
ACTIONS = ActionSpace.skip_or_run(4)


def make_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_sequences: int = 4,
    max_step_tokens: int = 32,
    prefix_cache: bool = False,
    multi_step: bool = False,
) -> Scheduler:
    keys = PrefixKeys("router", ROUTE_BLOCK) if prefix_cache else None
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(pool, ACTIONS, max_sequences, max_step_tokens, ROUTE_BLOCK, keys, multi_step)


def add(scheduler: Scheduler, request: GenerationRequest) -> Sequence:
    sequence = new_sequence(request)
    scheduler.add(sequence)
    return sequence


def commit(scheduler: Scheduler, batch: Batch, num_steps: int = 1, seconds: float = 0.01) -> StepOutput:
    """Every work runs all layers that it may and makes the token 7."""
    works = [
        WorkResult(
            [path_of(work.max_cost)] * num_steps,
            [SampledToken(7)] * num_steps if work.makes_token else [],
            [SampledToken(7, -1.0) for _ in work.scored],
            torch.tensor(SUMS.tolist()),
        )
        for work in batch.works
    ]
    return scheduler.commit(batch, BatchResult(works, num_steps, 2 * num_steps, 0.0, seconds))


def path_of(max_cost: int) -> bytes:
    """The first and the last layer, then the others."""
    num_free = max_cost // MILLI_LAYERS - 2
    return bytes([1, num_free > 0, num_free > 1, 1])
