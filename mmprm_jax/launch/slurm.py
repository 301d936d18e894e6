"""GPU nodes under Slurm: submits ``launch/slurm.sh``, one process for each GPU."""

from __future__ import annotations

import argparse
import shlex

from mmprm_jax.launch.job import Job, call, last_line, print_progress, template
from mmprm_jax.records import UserError


def submission(options: argparse.Namespace, job: Job) -> list[str]:
    """The sbatch command line."""
    settings = [f"{key}={value}" for key, value in job.env.items()]
    return [
        *(["env", *settings] if settings else []), "sbatch", f"--job-name={job.name}", f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.gpus}", f"--gpus-per-node={options.gpus}", f"--time={options.time}",
        f"--signal=B:USR1@{options.grace}", f"--output={job.logs}/%j.log", *options.sbatch,
        str(template("slurm.sh")), str(job.logs), *job.words,
    ]  # fmt: skip


def launch(options: argparse.Namespace, job: Job) -> None:
    """Raises UserError when the job is not accepted."""
    argv = submission(options, job)
    if job.dry_run:
        print(shlex.join(["mkdir", "-p", str(job.logs)]))
        print(shlex.join(argv))
        return
    job.logs.mkdir(parents=True, exist_ok=True)
    submitted = call(argv)
    if submitted.returncode:
        raise UserError(f"sbatch: {last_line(submitted.stderr)}")
    print_progress(
        f"{last_line(submitted.stdout)}; the logs: {job.logs}/JOB.log and, for each process, {job.logs}/JOB.TASK.log"
    )
