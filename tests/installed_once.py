"""What tests need that cannot be in their own environment: installed once, for all runs."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "buddy-serve"


def install_once(folder: Path, wanted: Path, *commands: Sequence[str | Path]) -> None:
    """Run `commands` unless `folder` has what this version of the list `wanted` names."""
    folder.mkdir(parents=True, exist_ok=True)
    installed = folder / "installed"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed.exists() and installed.read_bytes() == wanted.read_bytes():
            return
        installed.unlink(missing_ok=True)
        for command in commands:
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stdout + ran.stderr
        shutil.copy(wanted, installed)
