"""Loads config files, applies ``--config.key=value`` overrides, and ties a work directory to its config.

A config file is Python that defines ``get_config(arg="")`` and returns an ``ml_collections.ConfigDict``; it is run, so
only run your own. Every mistake a user can make here is one ``UserError`` line.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import pathlib
import runpy
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmprm_jax.records import UserError

_PREFIX = "config."
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_MAX_LISTED = 12
# What a run may be resumed with another value of: when and where work is done, never its result.
SCHEDULING = ("mesh", "evaluate.verify_workers") + tuple(
    f"annotate.{key}"
    for key in ("slots", "in_flight", "cache_tokens", "verify_workers", "checkpoint_seconds", "servers", "concurrency",
                "lockstep", "skip_failed")
)  # fmt: skip


def split_args(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into (what absl should parse, the ``--config.key=value`` overrides)."""
    rest = [a for a in argv if not a.startswith("--" + _PREFIX)]
    return rest, [a for a in argv if a.startswith("--" + _PREFIX)]


def load(path_with_arg: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the locked config of ``FILE[:ARG]`` with the overrides applied; the last one of a key wins.

    Args:
      path_with_arg: a config file, then optionally a colon and the argument of its ``get_config``.
      overrides: ``--config.key.sub=value`` strings. A value must have the type of the file's value. A file's ``None``
        takes any Python literal, else the text itself. ``None`` is accepted only where the file says ``None`` (or an
        ``ml_collections.config_dict.placeholder``).

    Raises UserError.
    """
    config = _read(path_with_arg)
    texts = dict(_split(override) for override in overrides)
    for key, text in texts.items():
        _override(config, key, text)
    return config.lock()


def to_text(config: ConfigDict) -> str:
    """The config as JSON with sorted keys; equal configs give equal text. Tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def guard_workdir(
    workdir: epath.PathLike, config: ConfigDict, ignore: Sequence[str] = SCHEDULING, primary: bool = True
) -> epath.Path:
    """Creates the work directory and ties it to the config, which is kept in its ``config.json``.

    Args:
      workdir: a local or ``gs://`` directory.
      config: the run's config.
      ignore: dotted keys, or groups of them, that may change between runs in one directory.
      primary: whether this process writes; the others only compare, if there is something to compare with.

    Returns the directory. Raises UserError if it cannot be written, or belongs to another config.
    """
    workdir = epath.Path(workdir)
    path, temporary = workdir / "config.json", workdir / "config.json.tmp"
    try:
        if primary:
            workdir.mkdir(parents=True, exist_ok=True)
            # Written even if config.json exists: a resumed run must find out now that it cannot write.
            temporary.write_text(to_text(config))
            if not path.exists():
                temporary.replace(path)
                return workdir
            temporary.unlink()
        elif not path.exists():
            return workdir
        stored = path.read_bytes().decode(errors="replace")
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{workdir}: not a directory; choose another --workdir") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{workdir}: cannot be written ({reason}); choose a --workdir that can") from None
    _compare(path, stored, to_text(config), ignore)
    return workdir


def _compare(path: epath.Path, stored: str, current: str, ignore: Sequence[str]) -> None:
    """Raises UserError listing the keys in which two config texts differ."""
    try:
        before, now = (dict(_leaves(json.loads(text))) for text in (stored, current))
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not a config; delete it, or choose another --workdir") from None
    differences = []
    for key in sorted(before.keys() | now.keys()):
        ignored = any(key == i or key.startswith(i + ".") for i in ignore)
        # Compared as text, because nan != nan and 1 == True.
        was, is_ = (json.dumps(side[key]) if key in side else "absent" for side in (before, now))
        if was != is_ and not ignored:
            differences.append(f"{key} was {was}, is {is_}")
    if differences:
        more = len(differences) - _MAX_LISTED
        listed = "; ".join(differences[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(
            f"{path.parent}: was made with another config ({listed}); choose another --workdir, or delete this one"
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of nested dicts. An empty group is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path_with_arg: str) -> ConfigDict:
    """Runs the config file and returns what its get_config returns. Raises UserError."""
    name, *arguments = path_with_arg.split(":", 1)
    path = pathlib.Path(name)
    if not path.is_file():
        raise UserError(f"{name}: no such config file; {_available(path)}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except SyntaxError as error:
        raise UserError(f"{name}, line {error.lineno}: {error.msg}") from None
    if not callable(get_config):
        raise UserError(f"{name}: defines no get_config(arg='')")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        raise UserError(f"{path_with_arg}: its get_config takes no argument after a colon") from None
    try:
        config = get_config(*arguments)
    except ValueError as error:
        raise UserError(f"{path_with_arg}: {' '.join(str(error).split())}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{name}: get_config returned {type(config).__name__}, not an ml_collections.ConfigDict")
    return config


def _available(path: pathlib.Path) -> str:
    """Says which config files there are beside a missing one, or else in configs/."""
    for folder in (path.parent, pathlib.Path("configs"), pathlib.Path(__file__).parents[1] / "configs"):
        files = sorted(str(f) for f in folder.glob("*.py") if f.name != "__init__.py")
        if files and (folder.name == "configs" or folder != pathlib.Path(".")):
            return "there are " + ", ".join(files)
    return "there is no configs/ directory here"


def _split(override: str) -> tuple[str, str]:
    """``--config.a.b=text`` to ("a.b", "text"). Raises UserError."""
    flag, equals, text = override.partition("=")
    key = flag.removeprefix("--").removeprefix(_PREFIX)
    if not equals:
        raise UserError(f"{override}: has no value; write --{_PREFIX}{key}=VALUE")
    return key, text


def _override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one key from its text. Raises UserError."""
    *groups, last = key.split(".")
    group: Any = config
    for name in groups:
        group = group[name] if isinstance(group, ConfigDict) and name in group else None
    flag = f"--{_PREFIX}{key}={text}"
    if not isinstance(group, ConfigDict) or last not in group:
        keys = sorted(name for name, _ in _leaves(config.to_dict()))
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0)
        raise UserError(f"{flag}: no such setting" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    default = group[last]
    if isinstance(default, ConfigDict):
        names = ", ".join(f"{key}.{name}" for name in sorted(default))
        raise UserError(f"{flag}: a group of settings, not a setting; it holds {names}")
    try:
        value = _parse(text, default, group.get_type(last))
    except ValueError:
        raise UserError(f"{flag}: expected {_describe(default, group.get_type(last))}, got {text!r}") from None
    group[last] = value


def _parse(text: str, default: Any, kind: type) -> Any:
    """The value that the text stands for, of the type ``kind`` of the default. Raises ValueError."""
    if default is None and text.lower() == "none":
        return None
    if kind is type(None):
        try:
            return _literal(text)
        except ValueError:
            return text
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if kind in (tuple, list):
        return kind(_parse_items(text, default or ()))
    value = _literal(text)
    if not isinstance(value, kind):
        raise ValueError(text)
    return value


def _parse_items(text: str, default: Sequence[Any]) -> Sequence[Any]:
    """``(1, 2)``, ``1,2`` or ``a,b`` to its items, which have the type of the default's if those share one."""
    kind = _item_type(default)
    try:
        items = _literal(text)
    except ValueError:
        items = None
    items = items if isinstance(items, (tuple, list)) else None if items is None else (items,)
    if items is None or (kind is str and not all(isinstance(i, str) for i in items)):
        if kind not in (str, None):
            raise ValueError(text)
        items = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    if kind is float:
        items = [float(i) if type(i) is int else i for i in items]
    if kind and not all(type(i) is kind for i in items):
        raise ValueError(text)
    return items


def _item_type(items: Sequence[Any]) -> type | None:
    kinds = {type(i) for i in items}
    return kinds.pop() if len(kinds) == 1 else None


def _literal(text: str) -> Any:
    """A Python literal. Raises ValueError for anything else."""
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(text) from error


def _describe(default: Any, kind: type) -> str:
    item = _item_type(default) if kind in (tuple, list) and default else None
    return f"{kind.__name__} of {item.__name__}" if item else kind.__name__
