"""Settings as frozen dataclasses: one field says a setting's name, type, default, meaning and what is allowed.

    @dataclasses.dataclass(frozen=True)
    class Sampling(Section):
        temperature: float = setting(1.0, "flattens the distribution; 0: the most likely token", low=0)

``build`` makes a section of nested mappings (what a config file gives), ``problems`` finds the values that are not
allowed, ``from_config`` takes the part of a section that a component needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mmprm_jax.errors import UserError, nearest

MOST = 2**31 - 1  # of a whole number, where nothing else is said: many go into int32 arrays

Found = tuple[str, str]  # a dotted key, and what is wrong with its value


@dataclasses.dataclass(frozen=True)
class Rule:
    """What values of a setting are allowed; of a tuple, each item."""

    meaning: str
    low: float | None = None
    above: float | None = None  # the value itself is not allowed
    high: float | None = None
    choices: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        if isinstance(value, str):
            return not self.choices or value in self.choices
        if isinstance(value, bool):
            return True
        if not math.isfinite(value):
            return False
        high = MOST if self.high is None and isinstance(value, int) else self.high
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (high is None or value <= high)
        )

    def describe(self, kind: Any) -> str:
        """What is allowed, in words; empty where every value of the type is."""
        if self.choices:
            return "one of " + ", ".join(choice or '""' for choice in self.choices)
        high = MOST if self.high is None and kind is int else self.high
        parts = [
            f"at least {self.low:,}" if self.low is not None else "",
            f"above {self.above:,}" if self.above is not None else "",
            f"at most {high:,}" if high is not None else "",
        ]
        return " and ".join(filter(None, parts)) or ("a finite number" if kind is float else "")


def setting(default: Any, meaning: str, **allowed: Any) -> Any:
    """The field of a setting. ``allowed``: low, above, high, choices of its ``Rule``."""
    return dataclasses.field(default=default, metadata={"rule": Rule(meaning, **allowed)})


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of settings. Subclasses are frozen dataclasses whose fields are ``setting`` or other sections."""

    def __getitem__(self, name: str) -> Any:
        """The setting or section of that name."""
        return getattr(self, name)

    def rules(self) -> Iterator[Found]:
        """What is wrong between settings of this section: (key, message). Values may be out of their ranges."""
        return iter(())


S = TypeVar("S", bound=Section)


@functools.cache
def kinds(cls: Any) -> dict[str, Any]:
    """The type of each field: bool, int, float, str, a tuple of them, or another section."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def item_kind(kind: Any) -> Any:
    """The type of a tuple's items; None for another type."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def kind_name(kind: Any) -> str:
    return f"tuple of {item_kind(kind).__name__}" if item_kind(kind) else kind.__name__


def convert(kind: Any, value: Any) -> Any:
    """``value`` as that type: a whole number is a float, too, and a list a tuple. Raises ValueError."""
    item = item_kind(kind)
    if item:
        if not isinstance(value, list | tuple):
            raise ValueError(value)
        return tuple(convert(item, x) for x in value)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(value) from error
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(value)
    return value


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any, Any]]:
    """(dotted key, field, type, value) of every setting of a section and those in it."""
    for field in dataclasses.fields(section):
        kind, value, key = kinds(section.__class__)[field.name], getattr(section, field.name), f"{prefix}{field.name}"
        if is_section(kind):
            yield from leaves(value, f"{key}.")
        else:
            yield key, field, kind, value


def build(cls: type[S], values: Mapping[str, Any]) -> tuple[S, list[Found]]:
    """A section with the defaults of all settings that ``values``, a mapping with mappings in it, does not give.

    Also returns every unknown key and every value of another type; these are left out. Ranges are not checked.
    """
    keys = [key for key, *_ in leaves(cls())]
    wrong: list[Found] = []

    def make(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
        known, given = kinds(cls), {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            if name not in known:
                wrong.append((key, f"no such setting{nearest(key, keys)}"))
            elif not is_section(known[name]):
                try:
                    given[name] = convert(known[name], value)
                except ValueError:
                    wrong.append((key, f"expected {kind_name(known[name])}, got {value!r:.80}"))
            elif isinstance(value, Mapping):
                given[name] = make(known[name], value, f"{key}.")
            else:
                wrong.append((key, f"a group of settings, got {value!r:.80}"))
        return cls(**given)

    return make(cls, values, ""), wrong


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def problems(section: Section, prefix: str = "") -> Iterator[Found]:
    """Every setting whose value is not allowed, and what does not go together."""
    cls: Any = type(section)
    for field in dataclasses.fields(section):
        kind, value, key = kinds(cls)[field.name], getattr(section, field.name), f"{prefix}{field.name}"
        if is_section(kind):
            yield from problems(value, f"{key}.")
            continue
        rule = field.metadata.get("rule")
        bad = [x for x in _values(value) if rule and not rule.allows(x)]
        if rule and bad:
            near = nearest(bad[0], filter(None, rule.choices)) if rule.choices and bad[0] else ""
            allowed = rule.describe(item_kind(kind) or kind)
            yield key, f"{bad[0]!r:.80} is not {'' if rule.choices else 'allowed; it must be '}{allowed}{near}"
    yield from ((f"{prefix}{key}", message) for key, message in section.rules())


def raise_for(found: Iterable[Found]) -> None:
    """Raises UserError with a line for each problem, if there are any."""
    lines = [f"{key}: {message}" for key, message in found]
    if len(lines) > 1:
        raise UserError("\n  ".join([f"{len(lines)} settings are wrong:", *lines]))
    if lines:
        raise UserError(lines[0])


def check(section: Section) -> None:
    """Raises ValueError when a value is not allowed: for components that are made without a config file."""
    found = [f"{key}: {message}" for key, message in problems(section)]
    if found:
        raise ValueError("; ".join(found))


def given(cls: type[S], values: Mapping[str, Any]) -> S:
    """The section with these values and the defaults of all others. Raises UserError: all that is wrong with them."""
    section, wrong = build(cls, values)
    raise_for([*wrong, *problems(section)])
    return section


def from_config(cls: type[S], section: Any, **more: Any) -> S:
    """The ``cls`` whose fields are those of ``section``, but for ``more``. Every field must be in one of them."""
    names = [f.name for f in dataclasses.fields(cls) if f.name not in more]
    return cls(**{name: getattr(section, name) for name in names}, **more)


def describe(section: Section) -> str:
    """A line for every setting: its value, default, meaning and what is allowed."""
    rows = []
    defaults = {key: value for key, _, _, value in leaves(type(section)())}
    for key, field, kind, value in leaves(section):
        rule = field.metadata["rule"]
        allowed = rule.describe(item_kind(kind) or kind)
        meaning = f"{rule.meaning} ({allowed})" if rule.choices else rule.meaning
        rows.append((f"{key} = {value!r}", f"default {defaults[key]!r}", meaning))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{left:<{widths[0]}}  {default:<{widths[1]}}  {meaning}" for left, default, meaning in rows)
