"""Several processes on this machine, each on a GPU of its own (or on the CPU).

One process uses all GPUs of a machine as well; several are quicker where each has its own work, as in ``annotate``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess

from mmprm_jax import interruption
from mmprm_jax.launch.job import Job, print_progress, terminate
from mmprm_jax.records import UserError

_GRACE = 60.0  # seconds to stop in


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def variables(job: Job, processes: int, port: int) -> list[dict[str, str]]:
    """What each process gets into its environment."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(processes)))).split(",")
    if len(gpus) < processes:
        raise UserError(f"--processes={processes}: CUDA_VISIBLE_DEVICES names {len(gpus)} only")
    joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    return [{**joined, "JAX_PROCESS_ID": str(i), "CUDA_VISIBLE_DEVICES": gpus[i], **job.env} for i in range(processes)]


def attempt(job: Job, processes: int) -> tuple[int, int]:
    """Runs all processes until they are done or one of them fails. Returns that one and its return code, or (0, 0)."""
    argv, running = ["mmprm", *job.words], []
    try:
        for i, more in enumerate(variables(job, processes, _free_port())):
            with (job.logs / f"{i}.log").open("a") as log:
                # a group of its own: what is sent to ours comes once, from ``terminate``
                running.append(subprocess.Popen(argv, env=os.environ | more, stdout=log, stderr=log, process_group=0))
        while True:
            codes = [process.poll() for process in running]
            failed = next(((i, code) for i, code in enumerate(codes) if code), None)
            if failed:
                return failed
            if None not in codes:
                return 0, 0
            interruption.sleep(interruption.POLL)
    except FileNotFoundError:
        raise UserError("mmprm: not in the PATH; activate the environment that it was installed into") from None
    finally:
        terminate(running, _GRACE)


def launch(options: argparse.Namespace, job: Job) -> None:
    """Raises UserError naming the log of the process that failed."""
    if job.dry_run:
        print(shlex.join(["mkdir", "-p", str(job.logs)]))
        for i, more in enumerate(variables(job, options.processes, 0)):
            more["JAX_COORDINATOR_ADDRESS"] = "127.0.0.1:PORT"  # a free one
            words = ["env", *(f"{key}={value}" for key, value in more.items()), "mmprm", *job.words]
            print(f"{shlex.join(words)} >>{shlex.quote(str(job.logs / f'{i}.log'))} 2>&1 &")
        print("wait")
        return
    job.logs.mkdir(parents=True, exist_ok=True)
    for restart in range(job.restarts + 1):
        print_progress(f"{options.processes} processes; their logs: {job.logs}/N.log")
        index, code = attempt(job, options.processes)
        if code == 0:
            return
        log = job.logs / f"{index}.log"
        if code > 0:
            raise UserError(f"process {index} failed with exit status {code}; see {log}")
        print_progress(f"process {index} was killed by {signal.Signals(-code).name}; see {log}; restart {restart + 1}")
    raise UserError(f"process {index} was killed, after {job.restarts} restarts; see {log}; the same launch goes on")
