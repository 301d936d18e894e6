"""A Cloud TPU slice as a queued resource: created, used on all workers, created again after preemption, deleted.

The commands on the workers are those of ``launch/tpu_worker.sh``: a command goes on when the connection breaks, and the
same ssh follows it again.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import tarfile
import time

from mmprm_jax import interruption
from mmprm_jax.interruption import Interrupted
from mmprm_jax.launch import job as jobs
from mmprm_jax.launch.job import CLONE, CommandFailed, Job, RetryLimit, call, last_line, print_progress
from mmprm_jax.records import UserError

GONE = ("SUSPENDED", "FAILED", "PREEMPTED")  # states that a slice does not come back from
PACKED = ("mmprm_jax", "configs", "launch", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
_GCLOUD = ["gcloud", "compute", "tpus"]
BUSY = 75  # exit status of tpu_worker.sh
_STATUS = re.compile(r"mmprm launch: exit status (\d+)")
# Not under a command that is running: the launch before this one was interrupted.
UNPACK = (
    "flock --nonblock ~/mmprm.lock true || exit 0; "
    "rm -rf mmprm_jax && mkdir mmprm_jax && tar --extract --gzip --file=mmprm_jax.tar.gz --directory=mmprm_jax && "
    "bash mmprm_jax/launch/tpu_worker.sh install"
)


def pack(path: pathlib.Path) -> None:
    """The parts of this clone that a worker needs, as a .tar.gz."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in member.name else member

    with tarfile.open(path, "w:gz") as tar:
        for name in PACKED:
            tar.add(CLONE / name, name, filter=kept)


class Slice:
    """The gcloud commands about one slice, and what they are for."""

    def __init__(self, options: argparse.Namespace, job: Job):
        self.options, self.job = options, job
        self.place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
        self.archive = job.logs / "mmprm_jax.tar.gz"
        self.started = time.strftime("%Y%m%d-%H%M%S")
        self.restarts, self.retries, self._shown = 0, RetryLimit(options.poll), ""

    def queued(self, verb: str, *flags: str) -> list[str]:
        return [*_GCLOUD, "queued-resources", verb, self.job.name, *self.place, *flags]

    def creation(self) -> list[str]:
        o = self.options
        spot = ["--spot"] if o.spot else []
        kind = [f"--accelerator-type={o.type}", f"--runtime-version={o.runtime}"]
        return self.queued("create", f"--node-id={self.job.name}", *kind, *spot, *o.create)

    def description(self) -> list[str]:
        return self.queued("describe", "--format=value(state.state)")

    def deletion(self) -> list[str]:
        return self.queued("delete", "--force", "--quiet")

    def copying(self) -> list[str]:
        target = f"{self.job.name}:mmprm_jax.tar.gz"
        return [*_GCLOUD, "tpu-vm", "scp", str(self.archive), target, *self.place, "--worker=all"]

    def ssh(self, command: str, logs: pathlib.Path) -> list[str]:
        flags = ["--worker=all", f"--command={command}", f"--output-directory={logs}"]
        return [*_GCLOUD, "tpu-vm", "ssh", self.job.name, *self.place, *flags]

    def running(self) -> tuple[list[str], pathlib.Path]:
        """The ssh that runs or follows the command, and the folder of its logs."""
        run = f"{self.started}-{self.restarts}"
        folder = self.job.logs / run
        command = ["bash", "mmprm_jax/launch/tpu_worker.sh", "run", run, *self.job.argv]
        return self.ssh(shlex.join(command), folder), folder

    def state(self) -> str | None:
        """As Google Cloud names it; "" if there is no such resource, None if that could not be found out."""
        found = call(self.description())
        if found.returncode and "NOT_FOUND" not in found.stderr:
            self.retries.note(f"no state of {self.job.name}: {last_line(found.stderr)}")
            return None
        state = "" if found.returncode else found.stdout.strip()
        if state != self._shown:
            print_progress(f"{self.job.name}: {state or 'not there yet'}")
            self._shown = state
        return state

    def create(self) -> None:
        made = call(self.creation())
        if made.returncode and not self.restarts:
            raise UserError(f"{self.job.name} was not created: {last_line(made.stderr)}")
        if made.returncode:
            self.retries.note(f"{self.job.name} was not created: {last_line(made.stderr)}")

    def delete(self) -> None:
        print_progress(f"deleting {self.job.name}")
        while (done := call(self.deletion())).returncode and "NOT_FOUND" not in done.stderr:
            self.retries.note(f"{self.job.name} was not deleted: {last_line(done.stderr)}")
            interruption.sleep(self.options.poll)

    def count_restart(self, reason: str) -> None:
        if self.restarts >= self.job.restarts:
            raise CommandFailed(f"{reason}, after {self.restarts} restarts; the same launch goes on from there")
        self.restarts += 1
        print_progress(f"{reason}; restart {self.restarts} of at most {self.job.restarts}")

    def install(self) -> bool:
        """Puts this clone on all workers; False if that did not work out."""
        folder = self.job.logs / "install"
        folder.mkdir(parents=True, exist_ok=True)
        pack(self.archive)
        for argv in (self.copying(), self.ssh(UNPACK, folder)):
            done = call(argv)
            if done.returncode:
                self.retries.note(f"installing failed: {last_line(done.stderr)}; see {folder}/*.log")
                return False
        return True

    def attempt(self) -> bool:
        """Runs or follows the command. True: it is done; False: look at the state, go on. Raises UserError."""
        argv, folder = self.running()
        folder.mkdir(parents=True, exist_ok=True)
        print_progress(f"running; each worker's log is in {folder}")
        if call(argv).returncode == 0:
            return True
        ends = {log: _STATUS.fullmatch(last_line(log.read_text(errors="replace"))) for log in folder.glob("*.log")}
        statuses = {log: int(end[1]) for log, end in sorted(ends.items()) if end}
        if not ends or len(statuses) < len(ends):
            self.retries.note(f"lost the connection to {self.job.name}")
            return False
        failed = {log: status for log, status in statuses.items() if status}
        if not failed:  # all have ended well, only gcloud has not
            return True
        if BUSY in failed.values():
            raise UserError(f"another command is running on {self.job.name}; see {next(iter(failed))}")
        named = ", ".join(f"{log} (exit status {status})" for log, status in failed.items())
        if max(failed.values()) < 128:
            raise CommandFailed(f"the command failed; see {named}")
        self.count_restart(f"killed by a signal; see {named}")
        return False

    def run(self) -> None:
        """Until the command is done. Raises UserError."""
        ready = False
        while True:
            state = self.state()
            if state == "":
                self.create()
            elif state in GONE:
                self.count_restart(f"{self.job.name} is {state}")
                self.delete()
            elif state == "ACTIVE":
                ready = ready or self.install()
                if ready and self.attempt():
                    return
            ready = ready and state in ("ACTIVE", None)
            interruption.sleep(self.options.poll)

    def show(self) -> None:
        """Prints the commands of a run without incidents."""
        run, folder = self.running()
        print(f"# the state, every {self.options.poll:g} s; no such resource: create it; {', '.join(GONE)}: delete it")
        for argv in (self.description(), self.creation()):
            print(shlex.join(argv))
        print(f"# ACTIVE: this clone ({', '.join(PACKED)}) to every worker")
        print(shlex.join(["mkdir", "-p", str(self.job.logs / "install"), str(folder)]))
        print(shlex.join(["tar", "--create", "--gzip", f"--file={self.archive}", f"--directory={CLONE}", *PACKED]))
        for argv in (self.copying(), self.ssh(UNPACK, self.job.logs / "install")):
            print(shlex.join(argv))
        print("# the command; the same again follows it where the connection was lost")
        print(shlex.join(run))
        if not self.options.keep:
            print("# at the end")
            print(shlex.join(self.deletion()))


def launch(options: argparse.Namespace, job: Job) -> None:
    """Raises UserError: the command failed (its log is named), or the slice is not available."""
    jobs.template("tpu_worker.sh")
    jobs.require_bucket(job)
    config = job.config.partition(":")[0]
    if pathlib.PurePath(config).is_absolute() or not (CLONE / config).is_file():
        raise UserError(f"--config={config}: not a file of this clone; name it from the root of the clone ({CLONE})")
    slice_ = Slice(options, job)
    if job.dry_run:
        slice_.show()
        return
    try:
        slice_.run()
    except CommandFailed:
        if not options.keep:
            slice_.delete()
        raise
    except Interrupted as interrupted:
        interrupted.message = jobs.detached_message(job.name, slice_.deletion())
        raise
    if not options.keep:
        slice_.delete()
