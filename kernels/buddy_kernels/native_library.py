"""Compiles routed_step.cpp for this machine's CPU on first use and keeps the result.

Not torch's extension builder: the source needs none of torch's headers, so a compiler alone builds it in ten seconds,
and a build that was killed leaves no lock that later ones would wait for.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "routed_step.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-pthread", "-fPIC", "-shared", "-Wno-psabi", "-Wno-ignored-attributes")


class NativeBuildError(RuntimeError):
    """The library cannot be built or loaded here; the message says why."""


@cache
def load_native_library() -> ctypes.CDLL:
    """Raises NativeBuildError, also when there is no compiler or the processor is none we write for."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeBuildError("there is no C++ compiler (g++)")
    cpu = Path("/proc/cpuinfo")
    features = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "")
    if "avx2" not in features:
        raise NativeBuildError("the processor has no AVX2")
    name = hashlib.sha256(repr((SOURCE.read_text(), FLAGS, compiler, sorted(features.split()))).encode()).hexdigest()[
        :16
    ]
    path = cache_directory() / f"routed_step-{name}.so"
    if not path.exists():
        _build(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(f"{path} cannot be loaded: {error}") from error


def cache_directory() -> Path:
    """Where builds are kept: buddy-serve in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "buddy-serve"


def _build(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a place of its own and moved when it is whole: another process may be doing the same.
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            done = subprocess.run(  # noqa: S603 (a compiler on our own source)
                command, capture_output=True, text=True, timeout=300, check=False
            )
            if done.returncode:
                raise NativeBuildError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{path} cannot be built: {error}") from error
