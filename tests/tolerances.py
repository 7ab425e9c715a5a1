"""The one table of tolerances: how far two ways to the same numbers may lie apart, by dtype.

Use as `torch.testing.assert_close(got, want, **TOLERANCE[got.dtype])`.
"""

import torch

TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
