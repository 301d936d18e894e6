"""``mmprm launch``, ``mmprm fit`` and ``mmprm bench``: many machines, chips that are not there yet, speed."""

from __future__ import annotations

import argparse
import importlib
import shlex

from mmprm_jax.cli import command as commands
from mmprm_jax.cli.command import (
    JSON,
    MACHINES,
    Function,
    Option,
    argument,
    at_least,
    checking_usage,
    command,
    family,
    flag,
    option,
    repeated,
)
from mmprm_jax.errors import UsageError

TARGETS = ("tpu", "gke", "slurm", "local")
_SFT = "-- sft --config=configs/mm_prm.py"

family("launch", MACHINES, "runs a command on many machines or devices")
family("bench", MACHINES, "measures ratios side by side in one run")

_KEEP = "do not delete the {} at the end"


def _target(name: str, summary: str, *options: Option, example: str) -> None:
    """Declares ``mmprm launch NAME``; without a bound of restarts where it has none."""
    bound = option("--restarts", "after lost machines or processes, at most", default=10, type=at_least(0), metavar="N")
    shared = (
        option("--name", "of the slice, JobSet or job", default="mmprm"),
        repeated("--env", "a variable for the command, seen in process lists", metavar="NAME=VALUE"),
        option("--logs", "where the logs go", default=None, unset="WORKDIR/logs, for gs:// logs/NAME", metavar="DIR"),
        *(() if name == "slurm" else (bound,)),
        flag("--dry-run", "print what would be run, run nothing"),
    )
    declare = command(f"launch {name}", MACHINES, summary, *options, *shared, example=example, resumes=True, wraps=True)
    declare(_launcher(name))


def _launcher(target: str) -> Function:
    def launch(args: argparse.Namespace) -> None:
        wrapped = _wrapped(target, args.rest)

        from mmprm_jax.launch.job import make_job

        with checking_usage():
            job = make_job(args, args.rest, wrapped.config, wrapped.workdir)
        importlib.import_module(f"mmprm_jax.launch.{target}").launch(args, job)

    return launch


def _wrapped(target: str, words: list[str]) -> argparse.Namespace:
    """The options of the command behind ``--``. Raises UsageError if they are wrong: machines cost money."""
    launchable = [each.name for each in commands.TABLE.values() if each.takes("--distributed")]
    if not words:
        raise UsageError(f"launch {target}: the command is missing; write it behind --, e.g. {_SFT} --workdir=DIR")
    if words[0] not in launchable:
        raise UsageError(f"{words[0]}: not a command that can be launched; those are {', '.join(launchable)}")
    found, args = commands.parse(words)
    if args is None:
        raise UsageError(f"launch {target}: {shlex.join(words)} asks for help; mmprm {found.name} --help shows it")
    return args


_target(
    "tpu",
    "on a Cloud TPU slice: created, given this clone, created again after preemption, deleted",
    option("--zone", "of Google Cloud"),
    option("--type", "accelerator type, as in the Cloud TPU documentation"),
    option("--runtime", "TPU software version for that type"),
    option("--project", "of Google Cloud", default=None, unset="gcloud's"),
    flag("--spot", "cheaper, may be preempted"),
    repeated("--create", "one more flag for gcloud's create", metavar="FLAG"),
    flag("--keep", _KEEP.format("slice")),
    option("--poll", "seconds between two polls of the state", default=30.0, type=float),
    example=f"mmprm launch tpu --zone=ZONE --type=v5litepod-32 --runtime=v2-alpha-tpuv5-lite --spot\n"
    f"      {_SFT} --workdir=gs://BUCKET/prm",
)
_target(
    "gke",
    "on a TPU slice of a GKE cluster, as a JobSet",
    option("--image", "made with launch/Dockerfile, in a registry the cluster reads"),
    option("--accelerator", "label cloud.google.com/gke-tpu-accelerator of the nodes"),
    option("--topology", "label cloud.google.com/gke-tpu-topology, e.g. 4x8"),
    option("--chips", "TPU chips of a host", default=4, type=int),
    flag("--spot", "on Spot nodes"),
    option("--service-account", "Kubernetes service account that may use the bucket", default=None, unset="none"),
    option("--namespace", "of the JobSet", default=None, unset="kubectl's"),
    option("--context", "cluster, as in the kubectl configuration", default=None, unset="the current one"),
    flag("--keep", _KEEP.format("JobSet")),
    option("--poll", "seconds between two polls of the state", default=15.0, type=float),
    example=f"mmprm launch gke --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x8\n"
    f"      {_SFT} --workdir=gs://BUCKET/prm",
)
_target(
    "slurm",
    "on GPU nodes under Slurm, a process for each GPU",
    option("--nodes", "that the job gets", default=1, type=at_least(1), metavar="N"),
    option("--gpus", "of a node", type=at_least(1), metavar="N"),
    option("--time", "limit of one stretch, as sbatch takes it; then it is queued again"),
    option("--grace", "seconds before the limit to stop at", default=120, type=at_least(0)),
    repeated("--sbatch", "one more flag for sbatch", metavar="FLAG"),
    example=f"mmprm launch slurm --nodes=4 --gpus=8 --time=12:00:00 {_SFT} --workdir=/shared/prm",
)
_target(
    "local",
    "as several processes on this machine, a GPU for each",
    option("--processes", "how many", type=at_least(1), metavar="N"),
    example=f"mmprm launch local --processes=8 {_SFT} --workdir=runs/prm",
)


@command(
    "fit",
    MACHINES,
    "compiles a job ahead of time for chips that are not there: memory, FLOPs, least time",
    argument("settings", "sizes of the job, such as examples=700000; an unknown one lists all", nargs="*",
             metavar="KEY=VALUE"),
    option("--model", "sizes of a released model; mmprm list models shows them"),
    option("--topology", "chips by their name on Google Cloud, e.g. v5e-32; or a100-8, h100-8, h200-8"),
    option("--job", "what is compiled", default="train_prm", choices=("sft", "train_prm", "decode", "score")),
    JSON,
    example="mmprm fit --model=internvl2_5-8b --job=train_prm --topology=v5e-32 examples=700000",
)  # fmt: skip
def fit(args: argparse.Namespace) -> int:
    """Exit code 1 when the job does not fit."""
    from mmprm_jax import io
    from mmprm_jax.fit import compile, jobs, report

    with checking_usage():
        settings = jobs.parse(args.settings, model=args.model, job=args.job, topology=args.topology)
    found = compile.measure(settings)
    print(report.describe(found))
    fits = report.fits(found)
    if args.json:
        verdict = {"fits": fits, "seconds": report.roofline(found), "advice": [] if fits else report.advice(found)}
        io.write_json(args.json, {**found, **verdict})
    return 0 if fits else 1


_PAIRS = option("--pairs", "runs of each side", default=2, type=at_least(1), metavar="N")


@command(
    "bench rollout",
    MACHINES,
    "the sampling engine against Hugging Face's generate",
    argument("cases", "beginnings of their names; default: all", nargs="*", metavar="CASE"),
    _PAIRS,
    option("--topologies", "TPUs to count bytes for; empty: none", default="v5e-8", metavar="NAME,…"),
    JSON,
    example="mmprm bench rollout qwen2",
)
def bench_rollout(args: argparse.Namespace) -> None:
    from mmprm_jax import io
    from mmprm_jax.bench import rollout

    result = rollout.run(args.cases, args.pairs, [name for name in args.topologies.split(",") if name])
    if args.json:
        io.write_json(args.json, result)


@command(
    "bench train",
    MACHINES,
    "a packed training step against a loop of torch and transformers",
    argument("case", "tiny_vlm (default) or small_vlm", nargs="?", default="tiny_vlm", metavar="CASE"),
    _PAIRS,
    JSON,
    example="mmprm bench train small_vlm",
)
def bench_train(args: argparse.Namespace) -> None:
    from mmprm_jax import io
    from mmprm_jax.bench import train

    with checking_usage():
        case = train.find_case(args.case)
    result = train.run(args.pairs, case)
    print(train.describe(result))
    if args.json:
        io.write_json(args.json, result)


@command(
    "bench annotate",
    MACHINES,
    "many trees at once against one after the other",
    JSON,
    example="mmprm bench annotate",
)
def bench_annotate(args: argparse.Namespace) -> None:
    from mmprm_jax import io
    from mmprm_jax.bench import annotate

    result = annotate.run()
    print(annotate.table(result))
    if args.json:
        io.write_json(args.json, result)
