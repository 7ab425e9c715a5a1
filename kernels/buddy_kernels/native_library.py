"""Compiles native/ for this machine's CPU on first use and keeps the result.

Not torch's extension builder: the source needs none of torch's headers, so a compiler alone builds it in ten seconds,
and a build that was killed leaves no lock that later ones would wait for.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from buddy_kernels import native_interface as interface

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-pthread", "-fPIC", "-shared", "-Wno-psabi", "-Wno-ignored-attributes")


class NativeBuildError(RuntimeError):
    """The library cannot be built or loaded here; the message says why."""


def load_native_library() -> ctypes.CDLL:
    """Raises NativeBuildError, also when there is no compiler or the processor is none we write for; the first time by
    trying, then from memory."""
    loaded = _load_once()
    if isinstance(loaded, NativeBuildError):
        raise loaded
    return loaded


@cache
def _load_once() -> ctypes.CDLL | NativeBuildError:
    try:
        return load_library()
    except (NativeBuildError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return error if isinstance(error, NativeBuildError) else NativeBuildError(f"the native step: {error}")


def load_library() -> ctypes.CDLL:
    """Build if need be, and load. Raises NativeBuildError; OSError, RuntimeError and TimeoutExpired of the folders and
    the compiler."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]
    if not compiler[0]:
        raise NativeBuildError("there is no C++ compiler (g++)")
    features = _processor_features()
    if "avx2" not in features:
        raise NativeBuildError("the processor has no AVX2")
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    made_of = repr((sources, FLAGS, compiler, sorted(features)))
    path = cache_directory() / f"routed_step-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        log.info("compiling the native step, once; it takes about ten seconds", extra={"path": str(path)})
        _build(compiler, path)
    library = ctypes.CDLL(str(path))
    library.buddy_decoder.restype = ctypes.c_void_p
    library.buddy_step.restype = library.buddy_arithmetic.restype = ctypes.c_char_p
    library.buddy_use.restype = library.buddy_product.restype = ctypes.c_bool
    check_layout(library)
    return library


def check_layout(library: ctypes.CDLL) -> None:
    """Raises NativeBuildError unless both sides lay out the structs that cross between them alike: a field that is
    missing on one side would otherwise be read as another."""
    count = ctypes.c_int64()
    library.buddy_layout.restype = ctypes.POINTER(ctypes.c_int64)
    theirs = library.buddy_layout(ctypes.byref(count))[: count.value]
    if theirs != interface.layout():
        raise NativeBuildError(f"the native step lays out its structs as {theirs}, not as {interface.layout()}")


def _processor_features() -> set[str]:
    """Linux's names of them; empty elsewhere."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def cache_directory() -> Path:
    """Where builds are kept: buddy-serve in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "buddy-serve"


def _build(compiler: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a place of its own and moved when it is whole: another process may be doing the same.
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        command = [*compiler, *FLAGS, str(SOURCES / "routed_step.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603 (ours)
        if done.returncode:
            raise NativeBuildError(f"{compiler[0]} failed: {done.stderr.strip()[-500:]}")
        made.replace(path)
