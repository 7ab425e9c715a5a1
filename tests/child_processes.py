"""Processes of processes, by /proc."""

from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie, which one without a parent that waits may stay."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """The running children of all threads of a process."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [child for text in lists for child in map(int, text.split()) if is_running(child)]


def has_loaded(pid: int, library: str) -> bool:
    """Whether a file whose name contains `library` is mapped into the process."""
    return any(library in line.rpartition("/")[2] for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


def descendants_of(pid: int) -> list[int]:
    """The running children of a process, their children, and so on."""
    children = children_of(pid)
    return children + [below for child in children for below in descendants_of(child)]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def engines_of(pid: int) -> list[int]:
    """The running engines' processes below a server's."""
    return [below for below in descendants_of(pid) if "buddy_server.engine.worker" in command_of(below)]
