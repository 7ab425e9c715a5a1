"""Makes Triton's interpreter twice as fast."""

from types import SimpleNamespace

import pytest
import triton.language as tl
from triton.runtime import interpreter


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It patches the language at every call of a function in a kernel; all of it once for each kernel is enough."""
    patch, whole = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda _: patch(whole))
    monkeypatch.setattr(
        interpreter.InterpretedFunction, "__call__", lambda self, *given, **named: self.rewrite()(*given, **named)
    )
