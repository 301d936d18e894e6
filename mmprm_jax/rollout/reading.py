"""What a policy wrote, as segments; and a run whose rollouts cannot be read, which stops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmprm_jax.data.steps import final_answer, split
from mmprm_jax.records import Request, UserError

_KEPT = 16  # texts that could not be read; two of them are shown
_HEAD, _TAIL = 140, 60  # characters of a text that are shown

Segments = tuple[str, ...]


class Reader:
    """Reads the texts of rollouts, and notes how many of the first ones have no steps or no answer."""

    def __init__(self, steps: str = "tags", max_unread: float = 1.0, unread_after: int = 256, section: str = ""):
        """steps, max_unread, unread_after: as in ``settings.Reading``. section: of the settings, as errors name it."""
        self.steps, self._most, self._after, self._section = steps, max_unread, unread_after, section
        self._count = self._unread = 0
        self._texts: list[tuple[str, str]] = []  # problem id, text

    @classmethod
    def of(cls, settings: Any, section: str) -> Reader:
        """As a section of the settings has it."""
        return cls(settings.steps, settings.max_unread, settings.unread_after, section)

    def read(self, request: Request, text: str) -> tuple[Segments, str | None]:
        """The segments behind the request's prefix, and the final answer of the solution."""
        segments = split(text, self.steps, request.prefix)
        answer = final_answer(request.prefix + segments)
        if self._count < self._after:
            self._count += 1
            if not segments or answer is None:
                self._unread += 1
                self._texts += [(request.problem.id, text)][: _KEPT - len(self._texts)]
        return segments, answer

    def check(self) -> None:
        """Raises UserError when the first rollouts are there, and too many of them could not be read."""
        if self._count == self._after:
            self._raise_above(self._unread, self._count)

    def check_all(self, rollouts: Iterable[tuple[str, Segments, Segments]]) -> None:
        """As ``check``, of the first rollouts in a file, however few: each problem's id, prefix and segments."""
        count = unread = 0
        texts: list[tuple[str, str]] = []
        for (problem, prefix, segments), _ in zip(rollouts, range(self._after), strict=False):
            count += 1
            if not segments or final_answer(prefix + segments) is None:
                unread += 1
                texts += [(problem, "".join(segments))][: _KEPT - len(texts)]
        self._texts = self._texts or texts
        self._raise_above(unread, count)

    def _raise_above(self, unread: int, count: int) -> None:
        """Raises UserError if so many of so many are too many."""
        if unread > self._most * count:
            raise UserError(
                f"{self._section}: {unread} of the first {count} rollouts have no steps or no final answer, such as"
                f" {' and '.join(map(_shown, _different(self._texts)))}. {self._advice()}; or go on all the same with"
                f" --config.{self._section}.max_unread=1. What was made is kept"
            )

    def _advice(self) -> str:
        found = [text for _, text in self._texts if text.strip()]
        readable = sum("<step>" not in text and final_answer(split(text, "structure")) is not None for text in found)
        setting = f"--config.{self._section}.steps"
        if self.steps == "tags" and 2 * readable >= len(found) > 0:
            return f"They can be read without <step> tags: set {setting}=structure, or auto, and another --workdir"
        other = "" if self.steps == "structure" else f"set {setting}=structure if the policy writes no <step> tags, or "
        change = f"{other}raise --config.{self._section}.max_new_tokens if they are cut off, and another --workdir"
        return change[0].upper() + change[1:]


def _different(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Two of them, with different texts if there are any."""
    others = [item for item in texts[1:] if item[1] != texts[0][1]] or texts[1:]
    return texts[:1] + others[:1]


def _shown(item: tuple[str, str]) -> str:
    """A text on one line, shortened."""
    problem, text = item
    head, tail = (
        " ".join("".join(c if c.isprintable() else " " for c in x).split()) for x in (text[:999], text[-999:])
    )
    short = head if len(text) <= 999 and len(head) <= _HEAD + _TAIL else f"{head[:_HEAD]} … {tail[-_TAIL:]}"
    return f'problem {problem}: "{short}"'
