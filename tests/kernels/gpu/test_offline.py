import json
import os
import subprocess
import sys

import pytest

from buddy_kernels.gpu.blocks import CARDS
from buddy_kernels.gpu.offline import FEW_BYTES

SCRIPT = """
import json, sys
from dataclasses import asdict
from buddy_kernels.gpu.offline import CAPABILITIES, DTYPES, MODELS, compiled
model = next(model for model in MODELS if model.name == sys.argv[1])
asked = [(DTYPES[0], num_rows, (9, 0)) for num_rows in (1, 64)]
if sys.argv[2] == "every card":
    asked += [(DTYPES[0], 64, card) for card in CAPABILITIES if card != (9, 0)]
    asked += [(dtype, 64, (8, 0)) for dtype in DTYPES[1:]]
print(json.dumps([asdict(report) for case in asked for report in compiled(model, *case)]))
"""
PRODUCT = {"bfloat16": "HMMA.16816.F32.BF16", "float16": "HMMA.16816.F32", "float32": "HMMA.1688.F32.TF32"}


def reports(*which):
    """In a process of its own: here Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    made = subprocess.run([sys.executable, "-c", SCRIPT, *which], env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(made.stdout)


def check(kernels):
    assert not [kernel for kernel in kernels if kernel["stack_bytes"] > FEW_BYTES]
    assert not [
        kernel for kernel in kernels if kernel["shared_bytes"] > CARDS[tuple(kernel["capability"])].shared_bytes
    ]
    # One instruction for every batch size is what keeps a row's bits.
    assert not [kernel for kernel in kernels if {*kernel["products"]} - {PRODUCT[kernel["dtype"]]}]
    products = ("_row_linear_kernel", "_row_qkv_kernel", "_row_swiglu_kernel")
    assert all(kernel["products"] for kernel in kernels if kernel["kernel"] in products)


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_a_card_without_spilling():
    check(reports("Llama-3-8B", "one card"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_spills_on_any_card_with_a_model_that_fits_no_block():
    """`python -m buddy_kernels.gpu.offline` compiles all models, which takes long."""
    check(reports("odd", "every card"))
