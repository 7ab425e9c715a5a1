"""Users' text that stays recognizable after it has passed through a chat template."""

from collections.abc import Iterable, Iterator
from typing import Any

from buddy_server.stand_ins import StandIns


class UserText(str):
    """A text with its characters replaced by stand-ins, which compares and searches like the plain text.

    A template prints the stand-ins, whatever it joins the text with. But its tests of the text ("does it contain
    </think>?") and the positions of its cuts use `plain`, which has the same length. Operations not named here work on
    the stand-ins, so a template that relies on them does not recognize the characters behind them.
    """

    __slots__ = ("plain", "stand_ins")
    plain: str
    stand_ins: StandIns

    def __new__(cls, printed: str, plain: str, stand_ins: StandIns) -> "UserText":
        assert len(printed) == len(plain)
        text = super().__new__(cls, printed)
        text.plain = plain
        text.stand_ins = stand_ins
        return text

    def __str__(self) -> str:
        return self

    def __eq__(self, other: object) -> bool:
        return self.plain == _plain(other)

    def __ne__(self, other: object) -> bool:
        # str has one of its own, which would compare what is printed.
        return not self == other

    def __hash__(self) -> int:
        return hash(self.plain)

    def __contains__(self, part: object) -> bool:
        return _plain(part) in self.plain

    def __getitem__(self, key: Any) -> "UserText":
        return self._with(super().__getitem__(key), self.plain[key])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: str) -> "UserText":
        return self._with(super().__add__(other), self.plain + _plain(other))

    def __radd__(self, other: str) -> "UserText":
        return self._with(other + printed(self), other + self.plain)

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return self.plain.startswith(_plain(prefix), *bounds)

    def endswith(self, suffix: Any, *bounds: Any) -> bool:
        return self.plain.endswith(_plain(suffix), *bounds)

    def find(self, part: str, *bounds: Any) -> int:
        return self.plain.find(_plain(part), *bounds)

    def rfind(self, part: str, *bounds: Any) -> int:
        return self.plain.rfind(_plain(part), *bounds)

    def index(self, part: str, *bounds: Any) -> int:
        return self.plain.index(_plain(part), *bounds)

    def rindex(self, part: str, *bounds: Any) -> int:
        return self.plain.rindex(_plain(part), *bounds)

    def count(self, part: str, *bounds: Any) -> int:
        return self.plain.count(_plain(part), *bounds)

    def strip(self, chars: str | None = None) -> "UserText":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "UserText":
        return self[len(self) - len(self.plain.lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> "UserText":
        return self[: len(self.plain.rstrip(_plain(chars)))]

    def removeprefix(self, prefix: str) -> "UserText":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "UserText":
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return list(self._cut(self.plain.split(_plain(sep), maxsplit), sep))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return list(self._cut(self.plain.rsplit(_plain(sep), maxsplit), sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return list(self._cut(self.plain.splitlines(keepends), None))

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, _ = self.plain.partition(_plain(sep))
        return self[: len(before)], self[len(before) : len(before) + len(found)], self[len(before) + len(found) :]

    def replace(self, old: str, new: str, count: Any = -1) -> "UserText":
        if not old:
            return self._with(super().replace(old, new, count), self.plain.replace("", _plain(new), count))
        parts = self.split(old, count)
        return self._with(printed(new).join(map(printed, parts)), _plain(new).join(map(_plain, parts)))

    def lower(self) -> "UserText":
        return self._relettered(self.plain.lower())

    def upper(self) -> "UserText":
        return self._relettered(self.plain.upper())

    def casefold(self) -> "UserText":
        return self._relettered(self.plain.casefold())

    def swapcase(self) -> "UserText":
        return self._relettered(self.plain.swapcase())

    def capitalize(self) -> "UserText":
        return self._relettered(self.plain.capitalize())

    def title(self) -> "UserText":
        return self._relettered(self.plain.title())

    def _relettered(self, plain: str) -> "UserText":
        """A text with new letters. All of it counts as written by users, even what a template joined to it before."""
        return self._with(self.stand_ins.hide(plain), plain)

    def _with(self, printed: str, plain: str) -> "UserText":
        return UserText(printed, plain, self.stand_ins)

    def _cut(self, parts: list[str], sep: str | None) -> Iterator["UserText"]:
        """Parts of this text that match `parts` of the plain text, separated by `sep` (None: white space)."""
        end = 0
        for part in parts:
            start = end if sep is not None else self.plain.index(part, end)
            yield self[start : start + len(part)]
            end = start + len(part) + len(sep or "")


def joined(parts: Iterable[str]) -> str:
    """The concatenation of `parts`: a UserText if one of them is."""
    parts = list(parts)
    marked = next((part for part in parts if isinstance(part, UserText)), None)
    text = "".join(map(printed, parts))
    return text if marked is None else UserText(text, "".join(map(_plain, parts)), marked.stand_ins)


def printed(text: str) -> str:
    """The characters of `text`, including stand-ins, as a plain str."""
    return str.__str__(text)


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, UserText) else value
