"""Which ingresses have been gone for so long that they will not come back."""

import time
from collections.abc import Callable, Collection, Container

GONE_S = 2.0
"""An ingress that is missing for less may have been busy, or its first call is on its way."""


class Absences:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._missing_s: dict[str, float] = {}

    def look(self, names: Collection[str], present: Container[str]) -> set[str]:
        """Those of `names` that have not been `present` at any look in the last GONE_S."""
        now_s = self._clock()
        self._missing_s = {name: self._missing_s.get(name, now_s) for name in names if name not in present}
        return {name for name, since_s in self._missing_s.items() if now_s - since_s >= GONE_S}
