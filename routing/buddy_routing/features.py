"""The router's input from a sequence: the first layer's V states, pooled and newest (design section 2).

The paper pools V over the cached tokens without stating how. We use the running mean, which costs one addition per
token, concatenated with the newest token's own V.
"""

# B sequences, T tokens, N rows, A rows ahead, S segments, F width of one token's V (key/value heads x head dim)

from array import array

import torch
from torch import Tensor

from buddy_kernels import PathAction
from buddy_routing.router_config import FeatureKind
from buddy_routing.segments import SegmentBatch


def feature_dim(kv_dim: int, kind: FeatureKind = "mean_v+newest_v") -> int:
    """Width of the features of a model whose V states are `kv_dim` wide."""
    return kv_dim if kind == "mean_v" else 2 * kv_dim


def causal_features(v: Tensor, starts: Tensor | None = None) -> Tensor:
    """Features of every token of whole sequences: V states [B, T, ...] -> [B, T, 2F] fp32.

    `starts` [B, T] int64 is where each token's sequence starts, if several share a row.
    """
    newest = v.flatten(2).float()  # [B, T, F]
    # fp64 like the server's sums, so that both get the same mean, however the tokens were split into steps.
    sums = newest.double().cumsum(1)
    index = torch.arange(v.shape[1], device=v.device)
    if starts is None:
        mean = sums / (index + 1)[:, None]
    else:
        before = torch.nn.functional.pad(sums, (0, 0, 1, 0)).gather(1, starts[..., None].expand_as(sums))
        mean = (sums - before) / (index - starts + 1)[..., None]
    return torch.cat((mean.float(), newest), -1)


def last_features(v: Tensor) -> Tensor:
    """Features of the last token of one sequence: V states [T, ...] -> [2F] fp32."""
    rows = v.flatten(1)  # [T, F]
    mean = rows.sum(0, dtype=torch.float64) / len(rows)
    return torch.cat((mean.float(), rows[-1].float()))


class RunningFeatures:
    """The same features, kept per lane as a running sum: O(1) per step, without rereading the cache."""

    def __init__(self, num_lanes: int, kv_dim: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_lanes, kv_dim, dtype=torch.float64, device=device)

    def reset(self, lane: int, sums: "array[float] | None" = None) -> None:
        """Assign the lane to a sequence, at its beginning or, given its `sums` [F] so far, at a later position."""
        self.sums[lane] = 0.0 if sums is None else torch.frombuffer(sums, dtype=torch.float64).to(self.sums.device)

    def update(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the V states [N + A, ...] of a step's rows and the rows ahead, unless already added. Returns features [S,
        2F] fp32 and sums [S, F] fp64 at every segment's deciding row."""
        rows = v.flatten(1)  # [N + A, F]
        added = self.sums.new_zeros(len(batch.lanes), rows.shape[1])
        added.index_add_(0, torch.cat((batch.segment_of_row, batch.segment_of_ahead)), rows.double())
        sums = torch.empty_like(added)
        for segment, lane in enumerate(batch.lanes):
            if batch.path_actions[segment] != PathAction.CONTINUE:
                self.sums[lane] += added[segment]
            sums[segment] = self.sums[lane]
        newest = rows[batch.deciding_rows].float()
        return torch.cat(((sums / batch.num_counted[:, None]).float(), newest), -1), sums
