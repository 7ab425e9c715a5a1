import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from dataclasses import asdict
from buddy_kernels.gpu.offline import BATCH_SIZES, CAPABILITIES, MODELS, compiled
models = MODELS if sys.argv[1] == "all" else MODELS[-1:]
capabilities = CAPABILITIES if sys.argv[1] == "all" else [(9, 0)]
batch_sizes = BATCH_SIZES if sys.argv[1] == "all" else BATCH_SIZES[:1]
reports = [r for m in models for c in capabilities for n in batch_sizes for r in compiled(m, n, c)]
print(json.dumps([asdict(report) for report in reports]))
"""


def reports(which):
    """In a process of its own: here Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    made = subprocess.run([sys.executable, "-c", SCRIPT, which], env=environment, check=True, capture_output=True)
    return json.loads(made.stdout)


def check(kernels):
    assert not [kernel for kernel in kernels if kernel["stack_bytes"]]
    # One instruction for every batch size is what keeps a row's bits.
    assert {product for kernel in kernels for product in kernel["products"]} == {"HMMA.16816.F32.BF16"}
    assert all(
        kernel["products"] for kernel in kernels if kernel["kernel"] in ("_row_linear_kernel", "_row_swiglu_kernel")
    )


def test_every_kernel_compiles_for_a_card_without_spilling():
    check(reports("some"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_spills_on_any_card_with_any_model():
    check(reports("all"))
