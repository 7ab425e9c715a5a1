"""The memory use of a process and its children, from /proc."""

from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")


def resident_mib(pid: int) -> float:
    """MiB over the process tree of `pid`: proportional set size, which divides shared pages among the processes.

    Raises ProcessLookupError if the process has ended, or if there is no /proc.
    """
    sizes = [_pss_kib(member) for member in process_tree(pid)]
    if not any(sizes):
        raise ProcessLookupError(f"process {pid} has no memory to read in {PROC}")
    return sum(sizes) / 1024


def process_tree(pid: int) -> list[int]:
    """`pid` and all its running descendants, without zombies."""
    children: dict[int, list[int]] = defaultdict(list)
    alive = set()
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            # The name before the last parenthesis may contain anything.
            state, parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        member = int(stat.parent.name)
        children[int(parent)].append(member)
        if state != "Z":
            alive.add(member)
    tree = [pid]
    for member in tree:
        tree += children[member]
    return [member for member in tree if member in alive]


def _pss_kib(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
