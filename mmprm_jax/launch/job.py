"""What all launchers share: the command to run, calls of other programs, and how often they may go wrong."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from mmprm_jax import interruption
from mmprm_jax.records import UserError

CLONE = pathlib.Path(__file__).parents[2]
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # fits into the names of nodes, pods and Slurm jobs
_TRIES = 5
_END = 2.0  # seconds for a program to end in
_RESET = 600.0  # seconds without trouble after which it is forgotten


@dataclasses.dataclass(frozen=True)
class Job:
    """An mmprm command and where it goes.

    words: behind ``mmprm``, ``--distributed`` among them. config: FILE or FILE:ARG. env: variables for its processes.
    logs: a local folder. restarts: how often it is started again after a lost machine or a killed process.
    """

    name: str
    words: tuple[str, ...]
    config: str
    workdir: str
    env: Mapping[str, str]
    logs: pathlib.Path
    restarts: int
    dry_run: bool

    @property
    def argv(self) -> list[str]:
        """The command as one process runs it."""
        settings = [f"{key}={value}" for key, value in self.env.items()]
        return [*(["env", *settings] if settings else []), "mmprm", *self.words]


def make_job(options: argparse.Namespace, words: Sequence[str], config: str, workdir: str) -> Job:
    """options: of ``mmprm launch``; words: the command to run, whose ``--config`` and ``--workdir`` the others are.

    Raises UserError.
    """
    if not _NAME.fullmatch(options.name):
        raise UserError(f"--name={options.name}: use up to 40 of a-z, 0-9 and -, a letter first")
    for item in options.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", item, re.DOTALL):
            raise UserError(f"--env={item}: write --env=NAME=VALUE")
    env = dict(item.partition("=")[::2] for item in options.env)
    beside = ("logs", options.name) if "://" in workdir else (workdir, "logs")
    logs = pathlib.Path(options.logs) if options.logs else pathlib.Path(*beside)
    more = () if "--distributed" in words else ("--distributed",)
    restarts = getattr(options, "restarts", 0)  # Slurm knows no bound
    return Job(options.name, (*words, *more), config, workdir, env, logs, restarts, options.dry_run)


def template(name: str) -> pathlib.Path:
    """A file of ``launch/``. Raises UserError when the package was installed without it."""
    path = CLONE / "launch" / name
    if not path.is_file():
        raise UserError(f"{path}: not found; mmprm launch needs a clone of the repository (pip install -e . in it)")
    return path


def require_bucket(job: Job) -> None:
    """Raises UserError unless the work directory outlives the machines and all of them see it."""
    if not job.workdir.startswith("gs://"):
        raise UserError(f"--workdir={job.workdir}: the hosts share no disk, and lose theirs; use gs://BUCKET/FOLDER")


def print_progress(text: str) -> None:
    """A line of progress."""
    print(f"mmprm launch: {text}", file=sys.stderr, flush=True)


def call(argv: Sequence[str], text: str | None = None, log: IO[str] | None = None) -> subprocess.CompletedProcess:
    """Runs a program to its end; its output is in the result, or in ``log``.

    Raises UserError if there is no such program; Interrupted, when that has ended, too.
    """
    output = log or subprocess.PIPE
    try:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True)
    except FileNotFoundError:
        raise UserError(f"{argv[0]}: not installed here; --dry-run shows what would be run") from None
    try:
        while True:
            try:
                out, err = process.communicate(text or "", interruption.POLL)
                return subprocess.CompletedProcess(argv, process.returncode, out, err)
            except subprocess.TimeoutExpired:  # what it has read by then is not lost, what it was sent is kept
                text = None
                interruption.check()
    finally:
        terminate([process], _END)


def terminate(running: Sequence[subprocess.Popen], seconds: float) -> None:
    """SIGTERM, and SIGKILL to those that have not ended after ``seconds``."""
    running = [process for process in running if process.poll() is None]
    with interruption.saving():
        for process in running:
            process.terminate()
        deadline = time.monotonic() + seconds
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def last_line(text: str) -> str:
    """What a failed program said last."""
    return (text.strip().splitlines() or ["no output"])[-1]


class CommandFailed(UserError):
    """The command itself failed; the machines are of no more use."""


def detached_message(name: str, deletion: Sequence[str]) -> str:
    """The message after an interruption."""
    how = shlex.join(deletion)
    return f"no longer watching {name}, which goes on (this deletes it: {how})"


class RetryLimit:
    """Counts what goes wrong on the way to the machines, not in the command: it is tried again, within reason."""

    def __init__(self, poll: float):
        self._poll, self._count, self._last = poll, 0, 0.0

    def note(self, reason: str) -> None:
        """Raises UserError when there were too many in a row."""
        now = time.monotonic()
        self._count = 1 if now - self._last > _RESET + self._poll else self._count + 1
        self._last = now
        if self._count >= _TRIES:
            raise UserError(
                f"{reason} ({_TRIES} times); what runs there was left alone, the same launch goes on with it"
            )
        print_progress(f"{reason}; trying again")
