"""The one table of tolerances: how far two right ways to the same numbers may lie apart, and how far a wrong one lies.

Two right ways differ by rounding alone: processors and libraries sum in other orders. A number kept in a format is off
by up to its `ROUNDING`. A sum of `width` products gathers errors of random sign in its fp32 accumulator, which grow as
sqrt(width) (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"). `depth` layers on top of
one another add up theirs, and each passes on what it was given larger than it was: the random models of these tests
have weights ten times the usual size, so that their softmaxes are steep. That is depth times depth. `SAFETY` is for the
largest of a hundred thousand such errors, 4.5 times their spread.

The unit is what is wanted there plus the root mean square of all of it: a number near zero is what large ones leave.

A comparison by this table comes with a look at what it would notice: a wrong mask, a lost token, a skipped layer lies
at least `FAR` tolerances away.
"""

from math import sqrt

import torch
from torch import Tensor

ROUNDING = {
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    # Half a step over the spread of a group of weights, the largest of which is 127 steps and 2.5 times the spread.
    "int8": 2.5 / 127 / 2,
}
SAFETY = 4.5
FAR = 20
FAR_OF_ROUNDED = 4


def tolerance(kind: str, width: int, depth: int = 1) -> float:
    """Of `distance`, where numbers are kept as `kind` and the longest sum has `width` products."""
    return SAFETY * depth**2 * (ROUNDING[kind] + ROUNDING["float32"] * sqrt(width))


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference in the unit above; infinity where there is no number."""
    if not want.numel():
        return 0.0
    got, want = got.double(), want.double()
    differences = (got - want).abs() / (want.abs() + want.square().mean().sqrt())
    return float(differences.max().nan_to_num(torch.inf))


def assert_close(got: Tensor, want: Tensor, width: int, depth: int = 1) -> None:
    """`got` is `want` up to rounding, in the same shape and dtype."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    allowed = tolerance(kind_of(want), width, depth)
    assert distance(got, want) <= allowed


def assert_far(wrong: Tensor, want: Tensor, width: int, depth: int = 1) -> None:
    """A comparison with `want` would notice `wrong`."""
    allowed = tolerance(kind_of(want), width, depth)
    assert distance(wrong, want) >= FAR * allowed


def assert_near(rounded: Tensor, exact: Tensor, wrong: Tensor, kind: str, depth: int) -> None:
    """Weights rounded to `kind` move what `depth` layers make of them a little; `wrong` lies several times as far away.

    Each weight's error has a sign of its own, so that those of layers grow as sqrt(depth); int8 rounds inputs as well.
    """
    allowed = SAFETY * sqrt(depth) * ROUNDING[kind] * (sqrt(2) if kind == "int8" else 1)
    assert (rounded - exact).norm() / exact.norm() <= allowed
    assert (wrong - exact).norm() / exact.norm() >= FAR_OF_ROUNDED * allowed


def kind_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
