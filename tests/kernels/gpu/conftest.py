"""These tests run the kernels on the GPU where there is one, else in Triton's interpreter, on CPU tensors, which
TRITON_INTERPRET=1 asks for everywhere."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = False
if HAS_TRITON:
    from triton import knobs

    INTERPRETED = knobs.runtime.interpret


class WithoutTriton(pytest.Module):
    def collect(self):
        pytest.skip("Triton is not installed: pip install 'buddy-serve[gpu]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return None if HAS_TRITON else WithoutTriton.from_parent(parent, path=module_path)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda:0")


@pytest.fixture(autouse=INTERPRETED)
def quick_interpreter(monkeypatch):
    from quick_interpreter import patch_language_once

    patch_language_once(monkeypatch)


@pytest.fixture(autouse=INTERPRETED)
def arithmetic_of_a_card(monkeypatch):
    """Triton 3.7's interpreter cuts numbers off to bf16 where a card rounds, and multiplies their bits as integers; and
    its products are numpy's, whose sums follow the number of columns."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data, from_type, to_type, rounding):
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            bits = data.view(np.uint32)
            nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)
        if (from_type, to_type) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, from_type, to_type, rounding)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (self.cast_impl(x, tl.float32).data.astype(np.float64) for x in (a, b))
        return interpreter.TensorHandle((a @ b + d.data).astype(np.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
