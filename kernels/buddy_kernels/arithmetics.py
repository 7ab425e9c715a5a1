"""Which arithmetic the native step's products take: the ways that native/arithmetic.h knows, checked, then timed.

Processors differ: where one has fast products of bf16 pairs, another multiplies widened weights faster. An engine takes
one for prefill and decode together, so that a row's bits do not depend on where it is computed.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from buddy_kernels.native_library import NativeBuildError
from buddy_kernels.packed_product import known_arithmetics, packed_product, packed_product_reference
from buddy_kernels.packing import pack

log = logging.getLogger(__name__)

AUTO = "auto"
ALLOWED_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}
"""Of a product's norm, by the kind of weights: what rounding the inputs costs, several times over."""
MOST_ROUNDS, TIMING_S = 10, 0.15
"""Timing ends after so many rounds, or after so many seconds for each name."""
GAIN = 0.9
"""A later name is chosen only if it takes less than this part of the time: a choice by noise would change the last bits
of a text from one start to the next."""


@cache
def arithmetics(kind: str) -> tuple[str, ...]:
    """Names of those that compute products with weights of a kind right on this processor; the first is the default.

    Raises NativeBuildError.
    """
    known = known_arithmetics(kind)
    sound = tuple(name for name in known if is_right(name, kind))
    for name in known:
        if name not in sound:
            log.warning("an arithmetic computes wrong here and is not used", extra={"arithmetic": name, "dtype": kind})
    if not sound:
        raise NativeBuildError(f"no arithmetic computes products of {kind} right here")
    return sound


def is_right(arithmetic: str, kind: str) -> bool:
    """Whether products of odd sizes are those of plain torch, and each row's the same alone as among others."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 200, generator=generator) for rows in (11 * 16 - 3, 41))
    matrix = pack(weight, torch.randn(len(weight), generator=generator), kind)
    want, got = packed_product_reference(x, matrix), packed_product(x, matrix, arithmetic)
    parts = [packed_product(part, matrix, arithmetic) for part in x.split([1, 2, 5, 33])]
    # Not "more than": what is no number is wrong.
    return bool((got - want).norm() <= ALLOWED_ERROR[kind] * want.norm()) and torch.equal(torch.cat(parts), got)


def fastest(names: Sequence[str], works: Sequence[Callable[[str], object]]) -> str:
    """The name with the least product of the works' times on this thread: each work counts the same, whatever it takes.
    A later name has to gain something over an earlier one. All take turns, and of each the best counts."""
    best = {name: [math.inf] * len(works) for name in names}
    started = time.perf_counter()
    for rounds in range(MOST_ROUNDS + 1):
        if rounds > 1 and time.perf_counter() - started > TIMING_S * len(names):
            break
        for name in names:
            for index, work in enumerate(works):
                # The thread's own time: whatever else runs, every start is to choose the same.
                begun = time.thread_time()
                work(name)
                # The first round warms up.
                if rounds:
                    best[name][index] = min(best[name][index], time.thread_time() - begun)
    costs = {name: math.prod(times) for name, times in best.items()}
    chosen = names[0]
    for name in names[1:]:
        if costs[name] < costs[chosen] * GAIN ** len(works):
            chosen = name
    return chosen
