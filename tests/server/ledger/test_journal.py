"""The file that outlives the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.ledger.journal import SLOT_BYTES, Journal, abandoned
from fakes.entries import entry

KILLED = """
import sys, os, signal
from pathlib import Path
from buddy_server.tenancy.ledger.journal import Journal
from fakes.entries import entry
journal = Journal(Path(sys.argv[1]))
for index in range(20):
    journal.write(entry(f"r{index}"))
for index in range(0, 20, 2):
    journal.erase(f"r{index}")
journal.write(entry("late", milli_layers=7))
os.kill(os.getpid(), signal.SIGKILL)
"""


def left(directory: Path) -> dict[str, LedgerEntry]:
    with abandoned(directory) as entries:
        return {entry.id: entry for entry in entries}


def test_rows_of_a_killed_process_are_found_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    found = left(tmp_path)
    assert set(found) == {f"r{index}" for index in range(1, 20, 2)} | {"late"}
    assert found["late"].milli_layers == 7
    assert left(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_living_process_are_its_own(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(entry("mine"))
    assert left(tmp_path) == {}
    journal.close()
    assert set(left(tmp_path)) == {"mine"}


def test_file_of_a_process_that_owes_nothing_is_gone_when_it_closes(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(entry("a"))
    journal.erase("a")
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_last_write_of_a_row_counts_and_slots_are_used_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for index in range(100):
        journal.write(entry(f"r{index}"))
        journal.write(entry(f"r{index}", milli_layers=index))
        if index:
            journal.erase(f"r{index}")
    [path] = tmp_path.iterdir()
    assert path.stat().st_size <= 2 * SLOT_BYTES
    journal.close()
    assert {name: row.milli_layers for name, row in left(tmp_path).items()} == {"r0": 0}


def test_rows_stay_when_the_block_that_takes_them_over_fails(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(entry("kept"))
    journal.close()
    with pytest.raises(RuntimeError), abandoned(tmp_path):
        raise RuntimeError
    assert set(left(tmp_path)) == {"kept"}


def test_damaged_slot_costs_only_its_own_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(entry("a"))
    journal.write(entry("b"))
    journal.close()
    [path] = tmp_path.iterdir()
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"damaged!")
    assert set(left(tmp_path)) == {"b"}
    # For someone to look at; nobody takes it over again.
    assert [kept.suffix for kept in tmp_path.iterdir()] == [".unreadable"]
    assert left(tmp_path) == {}


def test_row_that_does_not_fit_on_the_disk_takes_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda *_: 10)
        for index in range(3):
            with pytest.raises(OSError, match="written whole"):
                journal.write(entry(f"r{index}"))
    journal.write(entry("a"))
    journal.erase("a")
    [path] = tmp_path.iterdir()
    assert path.stat().st_size <= SLOT_BYTES
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_longest_row_fits_into_a_slot(tmp_path: Path) -> None:
    row = entry("c" * 64, tenant="t" * 64, key_id="k" * 64, model="m" * 256, milli_layers=10**15)
    longest = msgspec.structs.replace(row, prompt_tokens=10**9, completion_tokens=10**9, cached_tokens=10**9)
    journal = Journal(tmp_path)
    journal.write(longest)
    journal.close()
    assert left(tmp_path) == {row.id: longest}
