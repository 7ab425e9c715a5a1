import json
import os
import subprocess
import sys

import pytest

from buddy_kernels.gpu.blocks import CARDS

SCRIPT = """
import json, sys
from dataclasses import asdict
from buddy_kernels.gpu.offline import DTYPES, MODELS, all_compiled, compiled
if sys.argv[1] == "all":
    reports = all_compiled()
else:
    reports = [report for num_rows in (1, 64) for report in compiled(MODELS[0], DTYPES[0], num_rows, (9, 0))]
print(json.dumps([asdict(report) for report in reports]))
"""
PRODUCT = {"bfloat16": "HMMA.16816.F32.BF16", "float16": "HMMA.16816.F32", "float32": "HMMA.1688.F32.TF32"}


def reports(which):
    """In a process of its own: here Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    made = subprocess.run([sys.executable, "-c", SCRIPT, which], env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(made.stdout)


def check(kernels):
    assert not [kernel for kernel in kernels if kernel["stack_bytes"]]
    assert not [
        kernel for kernel in kernels if kernel["shared_bytes"] > CARDS[tuple(kernel["capability"])].shared_bytes
    ]
    # One instruction for every batch size is what keeps a row's bits.
    assert not [kernel for kernel in kernels if {*kernel["products"]} - {PRODUCT[kernel["dtype"]]}]
    products = ("_row_linear_kernel", "_row_qkv_kernel", "_row_swiglu_kernel")
    assert all(kernel["products"] for kernel in kernels if kernel["kernel"] in products)


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_a_card_without_spilling():
    check(reports("some"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_spills_on_any_card_with_any_model():
    check(reports("all"))
