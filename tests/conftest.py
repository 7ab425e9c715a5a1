import os

# Tensors here are tiny: threads would only wait for one another. Before torch is imported, for child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Kernels run on CPU tensors (kernels/gpu). Before Triton is imported, which transformers does and torch does not.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """test_other_processors.py has the native step compiled for other processors."""
    from buddy_kernels import native_library

    native_library.FLAGS += tuple(os.environ.get("BUDDY_TEST_FLAGS", "").split())
