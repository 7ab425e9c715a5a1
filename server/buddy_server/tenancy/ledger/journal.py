"""The ledger's rows that the store does not have yet, in a file that outlives the process.

Every server process has a file of its own, locked while it lives. When it is killed, the next server takes over what
the file holds. Nothing is forced to the disk: the file survives the process, not a loss of power.
"""

import errno
import fcntl
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import DecodeError, msgpack

from buddy_server.tenancy.ledger.entry import LedgerEntry

log = logging.getLogger(__name__)

SLOT_BYTES = 1024
"""Room for one row: two names of at most 64 characters and a model's name take less than half."""
_HEADER = struct.Struct("<II")
_FREE = bytes(_HEADER.size)
_SUFFIX, _UNREADABLE = ".journal", ".unreadable"

_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(LedgerEntry).decode


class Journal:
    """Rows by their id, each in a slot that is written with one system call, so that a killed process leaves the old
    row or the new one. Raises OSError if the directory cannot be written."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        new, self._path = directory / f".{name}.new", directory / f"{name}{_SUFFIX}"
        self._file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # Locked before it gets the name under which others would find it.
        fcntl.flock(self._file, fcntl.LOCK_EX)
        new.rename(self._path)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._num_slots = 0

    def write(self, entry: LedgerEntry) -> None:
        """Keep `entry`, in place of an earlier one with the same id."""
        payload = _encode(entry)
        assert len(payload) + _HEADER.size <= SLOT_BYTES, f"a row of {len(payload)} bytes"
        is_new = entry.id not in self._slots
        slot = self._slots[entry.id] if not is_new else self._free.pop() if self._free else self._num_slots
        try:
            self._write_at(slot, _HEADER.pack(len(payload), zlib.crc32(payload)) + payload)
        except OSError:
            if is_new and slot < self._num_slots:
                self._free.append(slot)
            raise
        self._slots[entry.id] = slot
        self._num_slots = max(self._num_slots, slot + 1)

    def erase(self, entry_id: str) -> None:
        """Forget a row that the store has."""
        slot = self._slots.pop(entry_id)
        self._write_at(slot, _FREE)
        self._free.append(slot)

    def close(self) -> None:
        """Let go of the file, which is kept if it still holds rows."""
        if not self._slots:
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def _write_at(self, slot: int, content: bytes) -> None:
        if os.pwrite(self._file, content, slot * SLOT_BYTES) < len(content):
            raise OSError(errno.ENOSPC, "the journal could not be written whole")


@contextmanager
def abandoned(directory: Path) -> Iterator[list[LedgerEntry]]:
    """The rows in the files of processes that are gone. The files are deleted unless the block raises; one with a row
    that cannot be read gets another name and is kept."""
    with _locked(directory) as files:
        slots = {path: list(_slots(file)) for path, file in files.items()}
        yield [entry for entries in slots.values() for entry in entries if entry is not None]
        for path, entries in slots.items():
            if None in entries:
                log.error("journal has rows that cannot be read", extra={"file": path, "rows": entries.count(None)})
                path.rename(path.with_suffix(_UNREADABLE))
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path) -> Iterator[dict[Path, int]]:
    """Open files that no living process holds; while the block runs, no other server takes them."""
    files: dict[Path, int] = {}
    try:
        for path in sorted(directory.glob(f"*{_SUFFIX}")):
            # Another server may have deleted it, or holds it.
            with suppress(FileNotFoundError, BlockingIOError):
                try:
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except PermissionError:
                    log.error("journal of another user", extra={"file": path})
                    continue
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(file)
                    raise
                files[path] = file
        yield files
    finally:
        for file in files.values():
            os.close(file)


def _slots(file: int) -> Iterator[LedgerEntry | None]:
    """The rows of a file, None for one that cannot be read."""
    for offset in range(0, os.fstat(file).st_size, SLOT_BYTES):
        slot = os.pread(file, SLOT_BYTES, offset)
        if len(slot) <= _HEADER.size:
            continue
        length, checksum = _HEADER.unpack_from(slot)
        payload = slot[_HEADER.size : _HEADER.size + length]
        if length == 0:
            continue
        try:
            yield _decode(payload) if zlib.crc32(payload) == checksum else None
        except DecodeError:
            yield None
