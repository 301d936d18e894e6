"""``mmprm launch TARGET [options] -- COMMAND …``: an mmprm command on many machines or devices.

Targets: ``tpu`` (a Cloud TPU slice as a queued resource), ``gke`` (a slice of a GKE cluster, as a JobSet), ``slurm``
(GPU nodes) and ``local`` (several processes on this machine). Each adds ``--distributed`` to the command and starts it
again after a lost machine: every command goes on where it was. ``--dry-run`` prints what would be run, runs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from mmprm_jax.launch import gke, local, slurm, tpu
from mmprm_jax.launch.job import make_job
from mmprm_jax.records import UserError

TARGETS = {"tpu": tpu, "gke": gke, "slurm": slurm, "local": local}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('mmprm ')}: {message} (--help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mmprm launch", usage="mmprm launch {tpu,gke,slurm,local} [options] -- COMMAND …")
    targets = parser.add_subparsers(dest="target", required=True, metavar="{tpu,gke,slurm,local}")
    for name, module in TARGETS.items():
        usage = f"mmprm launch {name} [options] -- COMMAND --config=FILE --workdir=DIR …"
        sub = targets.add_parser(name, prog=f"mmprm launch {name}", usage=usage, allow_abbrev=False)
        sub.add_argument("--name", default="mmprm", help="of the slice, JobSet or job (default: mmprm)")
        sub.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command; may repeat")
        sub.add_argument("--logs", metavar="DIR", help="default: WORKDIR/logs, for gs:// logs/NAME")
        if module is not slurm:  # which knows no bound
            sub.add_argument("--restarts", type=int, default=10, help="after lost machines or processes (default: 10)")
        sub.add_argument("--dry-run", action="store_true", help="print what would be run, run nothing")
        module.add_arguments(sub)
    return parser


def main(argv: Sequence[str]) -> None:
    """``argv``: what is behind ``mmprm launch``. Raises UserError: wrong arguments, or a command that failed."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = _parser().parse_args(argv[:split])
    restarts = getattr(options, "restarts", 0)
    job = make_job(options.name, argv[split + 1 :], options.env, options.logs, restarts, options.dry_run)
    TARGETS[options.target].launch(options, job)
