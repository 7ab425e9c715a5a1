"""What happens where the native step cannot be built."""

from pathlib import Path

import pytest

from buddy_kernels import native_library
from buddy_kernels.native_library import NativeBuildError, load_native_library


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def load() -> object:
    """Past what this process has loaded already."""
    return load_native_library.__wrapped__()


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(NativeBuildError, match=r"no C\+\+ compiler"):
        load()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "routed_step.cpp").write_text("this is not C++")
    monkeypatch.setattr(native_library, "SOURCES", tmp_path / "sources")
    with pytest.raises(NativeBuildError, match="failed: "):
        load()
    assert not list((tmp_path / "buddy-serve").iterdir())


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(NativeBuildError, match="cannot be built"):
        load()
