"""What happens where the native step cannot be built."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from buddy_kernels import native_library
from buddy_kernels.native_library import NativeBuildError, load_native_library


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # What this process has loaded is forgotten before, and what these tests did after.
    native_library._load_once.cache_clear()
    yield
    native_library._load_once.cache_clear()


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(NativeBuildError, match=r"no C\+\+ compiler"):
        load_native_library()


def test_a_compiler_that_fails_is_quoted_leaves_nothing_and_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "routed_step.cpp").write_text("this is not C++")
    monkeypatch.setattr(native_library, "SOURCES", tmp_path / "sources")
    with pytest.raises(NativeBuildError, match="failed: "):
        load_native_library()
    assert not list((tmp_path / "buddy-serve").iterdir())
    monkeypatch.setattr("subprocess.run", None)
    with pytest.raises(NativeBuildError, match="failed: "):
        load_native_library()


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(NativeBuildError, match=str(file)):
        load_native_library()


def test_a_processor_without_avx2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_processor_features", set)
    with pytest.raises(NativeBuildError, match="no AVX2"):
        load_native_library()
