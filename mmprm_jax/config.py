"""Loads config files, applies ``--config.key=value`` overrides, and ties a work directory to its config.

A config file is Python that defines ``get_config(arg="")`` and returns an ``ml_collections.ConfigDict`` with what
differs from the defaults of ``settings.Config``; it is run, so only run your own. Every mistake a user can make here is
reported in one line.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pathlib
import runpy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmprm_jax.errors import UsageError, UserError, nearest
from mmprm_jax.schema import (
    Found,
    Section,
    build,
    convert,
    item_kind,
    kind_name,
    leaves,
    problems,
    raise_for,
)
from mmprm_jax.settings import HUB_ID, Config

_PREFIX = "config."
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_MAX_LISTED = 12
_NO_RESULTS = ("config.json", "config.json.tmp", "compilation_cache", "logs")  # what a run leaves before its results
# What a run may be resumed with another value of: when and where work is done, never its result.
# ``max_unread`` and ``unread_after`` say when to stop.
SCHEDULING = ("mesh", *(f"evaluate.{key}" for key in ("verify_workers", "max_unread", "unread_after"))) + tuple(
    f"annotate.{key}"
    for key in ("slots", "in_flight", "cache_tokens", "verify_workers", "checkpoint_seconds", "servers", "concurrency",
                "lockstep", "skip_failed", "max_unread", "unread_after")
)  # fmt: skip


def load(path_with_arg: str, overrides: Sequence[str] = (), schema: type[Section] = Config) -> Any:
    """Returns the ``schema`` as ``FILE[:ARG]`` and the overrides have it, checked; the last one of a key wins.

    Args:
      path_with_arg: a config file, then optionally a colon and the argument of its ``get_config``.
      overrides: ``--config.key.sub=value`` strings.
      schema: the settings that there are, with their defaults.

    Raises UserError, or UsageError if one of the overrides is wrong; it lists everything that is wrong, a line each.
    """
    given = _read(path_with_arg)
    texts = dict(_split(override) for override in overrides)
    wrong = _override(schema, given, texts)
    config, misplaced = build(schema, given)
    found = [*problems(config), *missing_files(config)]
    in_overrides = bool(wrong) or any(key in texts for key, _ in found)
    wrong += [(f"{path_with_arg}: {key}", message) for key, message in misplaced]
    try:
        raise_for([*wrong, *found])
    except UserError as error:
        raise (UsageError if in_overrides else UserError)(str(error)) from None
    return config


def examples() -> list[pathlib.Path]:
    """The config files that come with the package: ``configs/`` of a clone, which a wheel has inside of the package."""
    package = pathlib.Path(__file__).parent
    inside = package / "configs"
    return sorted((inside if inside.is_dir() else package.parent / "configs").glob("*.py"))


def missing_files(config: Section) -> Iterator[Found]:
    """The settings that name a file or folder which is not there."""
    values = {key: value for key, *_, value in leaves(config)}
    folder, policy = values.get("data.folder"), values.get("policy")
    if folder and not _is_folder(folder):
        yield "data.folder", f"{folder}: no such folder"
    if policy:
        yield from _no_model("policy", policy)
    if values.get("annotate.policy") and not values["annotate.servers"]:
        yield from _no_model("annotate.policy", values["annotate.policy"])


def _is_folder(path: str) -> bool:
    """Raises UserError for a bucket that cannot be read."""
    try:
        return epath.Path(path).is_dir()
    except ImportError as error:
        raise UserError(f"{path}: reading it needs pip install 'mmprm_jax[gcs]' ({error})") from None


def _no_model(key: str, name: str) -> Iterator[Found]:
    """What is wrong with the name of a model; whether the hub has it is not asked."""
    if _is_folder(name):
        if not any((epath.Path(name) / file).exists() for file in ("config.json", "hf")):
            yield key, f"{name}: no model is in this folder (no config.json)"
    elif not HUB_ID.fullmatch(name):
        yield key, f"{name}: neither a folder nor a hub id (org/name or org/name@revision)"


def to_text(config: Section) -> str:
    """The config as JSON with sorted keys; equal configs give equal text. Tuples become lists."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"


def guard_workdir(
    workdir: epath.PathLike, config: Section, ignore: Sequence[str] = SCHEDULING, primary: bool = True
) -> epath.Path:
    """Creates the work directory and ties it to the config, which is kept in its ``config.json``.

    A directory in which nothing was made yet is tied to the new config, whatever it was made for.

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
            if not path.exists() or not _holds_results(workdir):
                temporary.replace(path)
                return workdir
            temporary.unlink()
        elif not path.exists() or not _holds_results(workdir):
            return workdir
        stored = path.read_bytes()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{workdir}: not a directory; choose another --workdir") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{workdir}: cannot be written ({reason}); choose a --workdir that can") from None
    _compare(path, stored, config, ignore)
    return workdir


def _holds_results(workdir: epath.Path) -> bool:
    """Whether anything was made in it: a file that is neither a config, nor a compiled program, nor a log."""

    def holds_file(folder: epath.Path) -> bool:
        return any(holds_file(path) if path.is_dir() else True for path in folder.iterdir())

    for path in workdir.iterdir():
        if path.name not in _NO_RESULTS and (not path.is_dir() or holds_file(path)):
            return True
    return False


def _compare(path: epath.Path, stored: bytes, config: Section, ignore: Sequence[str]) -> None:
    """Raises UserError listing the keys in which a stored config text and a config differ."""
    try:
        before = dict(_leaves(json.loads(stored.decode())))
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a config; delete it, or choose another --workdir") from None
    defaults = dict(_leaves(json.loads(to_text(type(config)()))))
    before = defaults | before  # an older version did not have every setting
    now = dict(_leaves(json.loads(to_text(config))))
    differences = []
    for key in sorted(before):
        ignored = any(key == i or key.startswith(i + ".") for i in ignore)
        # Compared as text, because nan != nan and 1 == True.
        was, is_ = (json.dumps(side[key]) if key in side else "no setting of this version" for side in (before, now))
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


def _read(path_with_arg: str) -> dict[str, Any]:
    """Runs the config file and returns what its get_config returns, as nested dicts. Raises UserError."""
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
    return config.to_dict()


def _available(path: pathlib.Path) -> str:
    """Says which config files there are beside a missing one, or else in configs/."""
    for folder in (path.parent, pathlib.Path("configs")):
        files = sorted(str(f) for f in folder.glob("*.py") if f.name != "__init__.py")
        if files and (folder.name == "configs" or folder != pathlib.Path(".")):
            return "there are " + ", ".join(files)
    return "`mmprm list configs --copy` copies the examples to configs/"


def _split(override: str) -> tuple[str, str]:
    """``--config.a.b=text`` to ("a.b", "text"). Raises UserError."""
    flag, equals, text = override.partition("=")
    key = flag.removeprefix("--").removeprefix(_PREFIX)
    if not equals:
        raise UsageError(f"{override}: has no value; write --{_PREFIX}{key}=VALUE")
    return key, text


def _override(schema: type[Section], given: dict[str, Any], texts: Mapping[str, str]) -> list[Found]:
    """Sets the keys in ``given`` from their texts. Returns those that cannot be, and why."""
    known = {key: kind for key, _, kind, _ in leaves(schema())}
    wrong = []
    for key, text in texts.items():
        flag, names = f"--{_PREFIX}{key}={text}", [name for name in known if name.startswith(f"{key}.")]
        if names:
            wrong.append((flag, f"a group of settings, not a setting; it holds {', '.join(names)}"))
        elif key not in known:
            wrong.append((flag, f"no such setting{nearest(key, known)}"))
        else:
            try:
                _set(given, key.split("."), _parse(text, known[key]))
            except ValueError:
                wrong.append((flag, f"expected {kind_name(known[key])}, got {text!r}"))
    return wrong


def _set(given: dict[str, Any], names: Sequence[str], value: Any) -> None:
    *groups, last = names
    for name in groups:
        given = given.setdefault(name, {})
        if not isinstance(given, dict):  # a mistake of the file, which is reported later
            return
    given[last] = value


def _parse(text: str, kind: Any) -> Any:
    """The value of that type which the text stands for. Raises ValueError."""
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text.lower()]
    return tuple(_items(text, item_kind(kind))) if item_kind(kind) else kind(text)


def _items(text: str, kind: type) -> Sequence[Any]:
    """The items of ``(1, 2)``, ``1,2`` or ``a,b``. Raises ValueError."""
    try:
        items = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        items = None
    items = items if isinstance(items, tuple | list) else None if items is None else (items,)
    if kind is str and (items is None or not all(isinstance(i, str) for i in items)):
        items = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    if items is None:
        raise ValueError(text)
    return [convert(kind, item) for item in items]
