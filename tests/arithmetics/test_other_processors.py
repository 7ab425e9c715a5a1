"""The numeric tests once more, in the arithmetic of other processors: one machine finds what another would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from buddy_kernels import native_library

TESTS = Path(__file__).parents[1]
NUMERIC = (
    *("kernels", "routing/test_decoder.py", "routing/test_stepper.py", "routing/test_exits.py"),
    *("routing/test_features.py", "routing/test_adapter.py", "routing/test_prompt_sets.py", "engine/test_exits.py"),
    *("engine/test_parity.py", "engine/test_prefix_cache.py", "engine/test_stories260k.py"),
    *("routing/test_duo.py", "engine/test_duo.py"),
)
# In Triton's interpreter, and so in numpy's arithmetic.
LEFT_OUT = TESTS / "kernels" / "gpu"


def of_torch(vectors: str, onednn: str, mkl: str) -> dict[str, str]:
    """Its own loops and the two libraries that it multiplies with."""
    return {"ATEN_CPU_CAPABILITY": vectors, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_CBWR": mkl}


# What fixes the native step to one of its arithmetics is a line here, too.
ARITHMETICS = {
    # Name: (what the processor must have, in Linux's words, and the environment)
    "torch with AVX2": ("avx2", of_torch("avx2", "AVX2", "AVX2")),
    "torch with AVX-512": ("avx512f", of_torch("avx512", "AVX512_CORE", "AVX512")),
    "torch with AVX-512 and bfloat16": ("avx512_bf16", of_torch("avx512", "AVX512_CORE_BF16", "AVX512")),
    # Passive, or on a busy machine each would spin while it waits for the other.
    "torch on two threads": ("sse4_1", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}),
    "native step with AVX2": ("avx2", {"BUDDY_TEST_FLAGS": "-march=x86-64-v3"}),
}
FEATURES = native_library._processor_features()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name, (needed, _) in ARITHMETICS.items() if needed in FEATURES])
def test_numbers_hold_in_the_arithmetic_of_other_processors(name: str) -> None:
    _, environment = ARITHMETICS[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [*command, f"--ignore={LEFT_OUT}", *(str(TESTS / tests) for tests in NUMERIC)],
        env={**os.environ, **environment},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
