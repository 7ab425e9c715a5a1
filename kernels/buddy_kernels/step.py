"""The contract of a decoder step: what it is given and what comes of it, whatever runs it.

`RoutedStep` (routed_step.py) runs it on a CPU, `buddy_routing.gpu_stepper.GpuStepper` on a GPU,
`buddy_routing.stepper.TorchStepper` in plain torch.
"""

# N rows, A rows ahead, S segments, W wanted rows, L layers, V vocabulary, F width of one token's V

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from buddy_kernels.sampling import GREEDY, SampledToken, Sampling

SKIP, RUN, SMALL = 0, 1, 2
"""What a layer may do for a token: nothing, all, or all with its small FFN in place of the big one. A path names one
action for each layer."""


class PathAction(IntEnum):
    """What a segment does about its path."""

    KEEP = 0
    """Run the lane's last path again."""
    CHOOSE = 1
    """Ask the router."""
    CONTINUE = 2
    """Go on with a route block whose path is chosen and whose features are counted."""


class Constraint(Protocol):
    """Which tokens a row may make, one after the other."""

    def allowed(self) -> bytearray:
        """A bit for each token of the vocabulary, the lowest bit of the first byte first. No bit at all ends the row,
        which may not begin with that. Every call returns the same memory, written anew after a token."""
        ...

    def accept(self, token: int) -> None:
        """The row has made `token`. Neither method raises."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row whose next token is asked for.

    The token is drawn as `sampling` says, by `uniforms` from [0, 1), one for each token, which greedy sampling does not
    need. `counts` says how often the answer has each token already, for the penalties. `constraint` is told every token
    that is drawn. With `given` that token is scored and none is drawn.

    `num_likeliest` asks for the log probability of the token, and for so many of the likeliest tokens beside it.

    Where a call takes several steps, the row takes part until it has made `max_tokens` or one of its `end_tokens`, or
    its constraint allows no more. `tokens_left` is what it may make in this call and those that follow before it is
    read; None: `max_tokens`.
    """

    row: int
    sampling: Sampling = GREEDY
    uniforms: Sequence[float] = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    constraint: Constraint | None = None
    given: int | None = None
    num_likeliest: int | None = None
    max_tokens: int = 1
    tokens_left: int | None = None
    end_tokens: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step's work in plain numbers: the smallest steps take less time than a few tensors take to make.

    `tokens` [N + A]: the rows', then those that segments look ahead to. `positions` [N]; `lengths`, `aheads`, `lanes`,
    `max_costs` (milli-layers that a token may cost) and `path_actions` [S]; a block table for each segment; the rows
    that are `wanted` [W], in order. A route block that is cut short looks ahead to the rest of itself, since its path
    follows from its last token. Segments `aligned` [S] with an earlier one of the same cost share a path, the best by
    the sum of their scores; a segment's own index leaves it alone.

    Where every row is a segment and wanted, one call may be several steps: rows go on by their next tokens until none
    is left or `most_s` seconds are over. One step always runs.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    lengths: Sequence[int]
    tables: Sequence[Sequence[int]]
    lanes: Sequence[int]
    max_costs: Sequence[int]
    path_actions: Sequence[int]
    wanted: Sequence[Wanted]
    aheads: Sequence[int]
    aligned: Sequence[int]
    most_s: float = 0.0

    @property
    def most_steps(self) -> int:
        return max((wanted.max_tokens for wanted in self.wanted), default=1)


@dataclass(frozen=True, slots=True)
class RoutedOutput:
    """What one step or several did.

    `tokens` [W]: what each wanted row made, one token a step. `paths` [steps, S, L] int8 are the actions that were run;
    a segment that took no part in a step skips every layer there. `sums` [S, F] fp64 of the first layer's V over each
    segment's sequence, after the last step, with the tokens it looked ahead to. `logits` [W, V] fp32 of the last step,
    of the rows that took part, valid until the next call; GpuStepper leaves those of decodes on its device. `router_s`:
    seconds that choosing took.
    """

    tokens: Sequence[Sequence[SampledToken]]
    paths: Tensor
    sums: Tensor
    logits: Tensor
    router_s: float


def check_rows(rows: StepRows) -> None:
    """Raises ValueError for rows or segments of which some lack what others have."""
    num_segments = len(rows.lanes)
    for name in ("lengths", "tables", "max_costs", "path_actions", "aheads", "aligned"):
        count = len(getattr(rows, name))
        if count != num_segments:
            raise ValueError(f"{name} are {count}, allowed is one for each of {num_segments} lanes")
    if len(rows.positions) > len(rows.tokens):
        raise ValueError(f"tokens are {len(rows.tokens)}, allowed is one for each of {len(rows.positions)} positions")
    for wanted in rows.wanted:
        if wanted.sampling.temperature and wanted.given is None and len(wanted.uniforms) < wanted.max_tokens:
            raise ValueError(
                f"uniforms of row {wanted.row} are {len(wanted.uniforms)}, allowed is one for each of "
                f"{wanted.max_tokens} tokens"
            )
