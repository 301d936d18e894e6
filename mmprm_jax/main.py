"""The command line.

``mmprm <stage> --config=FILE[:ARG] --workdir=DIR [--config.key=value …]`` runs one stage, or with ``pipeline`` all.
``mmprm config --config=FILE [--check]`` prints every setting: value, default, meaning.
``mmprm summary WORKDIR [WORKDIR …]`` compares finished runs, e.g. of several seeds.
``mmprm bench train [CASE]`` compares training steps with a loop of torch and transformers, ``mmprm bench rollout
[CASE …]`` the sampling engine with Hugging Face's generate, ``mmprm bench annotate`` many trees at once with one after
the other; all take ``--json=FILE``.
``mmprm fit --model=internvl2_5-8b --job=train_prm --topology=v5e-32 [key=value …] [--json=FILE]`` compiles a job ahead
of time for chips that are not there: memory, FLOPs, traffic, the least time; exit code 1 when it does not fit.
``mmprm convert SOURCE TARGET [--prm] [--verify] [--dtype=…]`` takes a released checkpoint (a folder or a hub id) to
Orbax, or back; with ``--layout=hf`` any model to transformers' own classes. ``mmprm score PROBLEMS.jsonl
--model=MODEL`` scores solutions with a PRM.
``mmprm prepare SOURCE PATH_OR_HUB_ID --output=FOLDER`` turns a named data set into the files that the stages read.
``mmprm split PROBLEMS.jsonl --dev=N --test=N`` holds problems out, where a data set has one file only.
``mmprm bon CANDIDATES`` compares selectors on stored candidates, ``mmprm detect SCORES.jsonl`` finds wrong steps,
``mmprm sweep --config=… --workdir=… --grid=KEY=V1,V2`` trains and compares PRMs on one annotated set.
``mmprm guide --config=… --workdir=…`` searches with the PRM, step by step, and compares it with Best-of-N.
``mmprm benchmark PROBLEMS.jsonl --config=… --workdir=…`` evaluates a run on a prepared benchmark, officially scored.
``mmprm verify PAIRS.jsonl [--mode=M] [--jobs=N] [--output=FILE] [--judge=URL --judge_model=NAME]`` says of each
{gold, prediction} whether they are equal, and why.
``mmprm launch {tpu,gke,slurm,local} [options] -- STAGE …`` runs a stage on many machines or devices.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from mmprm_jax import interruption
from mmprm_jax.launch.job import COMMANDS

_CONFIG = flags.DEFINE_string("config", None, "configuration file, FILE or FILE:ARG")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of this run: data, weights, trees, report")
_FORCE_STAGE = flags.DEFINE_string("force-stage", None, "stages: the one to make anew, with all that follows from it")
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "convert, score: of the weights; default: as stored")
_PRM = flags.DEFINE_bool("prm", False, "convert: add the token <prm>, to train a policy on as a PRM")
_VERIFY = flags.DEFINE_bool("verify", False, "convert: read the result again and compare every tensor")
_LAYOUT = flags.DEFINE_enum(
    "layout", None, ["hf"], "convert: hf: to a checkpoint that transformers' own classes load without remote code"
)
_MODEL = flags.DEFINE_string(
    "model", None, "score: a checkpoint folder, hub id (org/name@revision) or converted model; fit: a name"
)
_JOB = flags.DEFINE_string("job", "train_prm", "fit: sft, train_prm, decode or score")
_TOPOLOGY = flags.DEFINE_string("topology", None, "fit: chips by their name on Google Cloud, e.g. v5e-32; or h100-8")
_OUTPUT = flags.DEFINE_string(
    "output", None, "score, verify: the file to write; default: PROBLEMS.scores.jsonl, stdout"
)
_MODE = flags.DEFINE_string("mode", "default", "verify: default: our own rules, else a benchmark's official ones")
_JOBS = flags.DEFINE_integer("jobs", 0, "verify: processes; 0: one for each CPU, at most 8")
_JUDGE = flags.DEFINE_string("judge", None, "verify: an OpenAI-compatible server to ask about the unknown pairs")
_JUDGE_MODEL = flags.DEFINE_string("judge_model", None, "verify: the name of the judge's model")
_TEMPLATE = flags.DEFINE_string("template", None, "score: the prompt; default: by the model's kind")
_MAX_TILES = flags.DEFINE_integer("max_tiles", 0, "score: tiles of one image; 0: as in the model's config.json")

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "annotate, sft, train_prm, evaluate, pipeline: one of several processes; on TPU pods and under Slurm they find each"
    " other, elsewhere the variables JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it",
)
_JSON = flags.DEFINE_string("json", None, "bench, fit: a file for the figures and what they were measured on")
_PAIRS = flags.DEFINE_integer("pairs", 2, "bench rollout, bench train: runs of each side")
_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e-8"], "bench rollout: TPUs to compile for; empty: none")

_USAGE = (
    "usage: mmprm {data,sft,annotate,train_prm,evaluate,report,pipeline} --config=FILE[:ARG] --workdir=DIR"
    " [--config.key=value …] [--force-stage=STAGE]"
    " or: mmprm summary WORKDIR [WORKDIR …] or: mmprm convert SOURCE TARGET [--prm] [--verify]"
    " [--dtype=bfloat16] [--layout=hf] or: mmprm score PROBLEMS.jsonl --model=MODEL [--output=FILE] [--template=NAME]"
    " or: mmprm bench {rollout [CASE …],annotate,train} [--json=FILE] or: mmprm launch {tpu,gke,slurm,local} --help"
    " or: mmprm config --config=FILE[:ARG] [--config.key=value …] [--check]"
    " or: mmprm prepare SOURCE PATH_OR_HUB_ID --output=FOLDER [--split=NAME]"
    " or: mmprm split PROBLEMS.jsonl --dev=N --test=N"
    " or: mmprm {bon,detect,sweep,guide,benchmark} --help"
    " or: mmprm verify PAIRS.jsonl [--mode=M] [--jobs=N] [--output=FILE] [--judge=URL --judge_model=NAME]"
    " or: mmprm fit --model=NAME --job={sft,train_prm,decode,score} --topology=NAME [key=value …] [--json=FILE]"
)


def _command(argv: Sequence[str], overrides: Sequence[str]) -> None:
    # The numeric libraries take seconds to import: a wrong command line is told first.
    from mmprm_jax.records import UserError

    if argv[1:2] == ["summary"] and len(argv) > 2:
        from mmprm_jax.report.summary import summarise

        print(summarise(argv[2:]))
        return
    if argv[1:2] == ["convert"] and len(argv) == 4:
        from mmprm_jax.convert import convert
        from mmprm_jax.sharding import make_mesh

        mesh = make_mesh({"fsdp": -1})
        print(
            convert(
                argv[2], argv[3], mesh, dtype=_DTYPE.value, prm=_PRM.value, verify=_VERIFY.value, layout=_LAYOUT.value
            )
        )
        return
    if argv[1:2] == ["score"] and len(argv) == 3:
        if not _MODEL.value:
            raise UserError("--model is missing: a checkpoint folder, a hub id or a converted model")
        from mmprm_jax.prm import PRM, score_file

        if not os.path.isfile(argv[2]):  # before minutes of loading
            raise UserError(f"{argv[2]}: no such file")
        _cache_compilations(os.path.expanduser("~/.cache/mmprm_jax/compilations"))
        prm = PRM.from_pretrained(
            _MODEL.value, template=_TEMPLATE.value, dtype=_DTYPE.value, max_tiles=_MAX_TILES.value
        )
        output = _OUTPUT.value or f"{argv[2].removesuffix('.jsonl')}.scores.jsonl"
        print(score_file(prm, _MODEL.value, argv[2], output))
        return
    if argv[1:2] == ["verify"] and len(argv) == 3:
        _verify(argv[2])
        return
    if argv[1:2] == ["bench"] and argv[2:3] in (["rollout"], ["annotate"], ["train"]):
        _bench(argv[2], argv[3:])
        return
    if argv[1:2] == ["fit"]:
        _fit(argv[2:])
        return
    names = ("data", "sft", "annotate", "train_prm", "evaluate", "report", "pipeline")
    if len(argv) != 2 or argv[1] not in names:
        raise UserError(_USAGE)
    for flag in (_CONFIG, _WORKDIR):
        if not flag.value:
            raise UserError(
                f"--{flag.name} is missing; e.g. mmprm {argv[1]} --config=configs/digits.py --workdir=runs/digits"
            )
    if _DISTRIBUTED.value and argv[1] not in COMMANDS:
        raise UserError(f"--distributed is for {', '.join(COMMANDS)}; run mmprm {argv[1]} in one process")
    run = _open(_CONFIG.value, overrides, _WORKDIR.value, _DISTRIBUTED.value)
    from mmprm_jax import stages

    if _FORCE_STAGE.value:
        stages.force(run, _FORCE_STAGE.value, argv[1])
    if argv[1] == "pipeline":
        stages.pipeline(run)
    else:
        stages.run_stage(run, argv[1])


def _bench(name: str, cases: Sequence[str]) -> None:
    """``mmprm bench``."""
    from mmprm_jax.bench import annotate, common, rollout, train

    if name == "rollout":
        result = rollout.run(cases, _PAIRS.value, _TOPOLOGIES.value)
    elif name == "train":
        result = train.run(_PAIRS.value, train.named(" ".join(cases) or "tiny_vlm"))
        print(train.describe(result))
    else:
        result = annotate.run()
        print(annotate.table(result))
    if _JSON.value:
        common.write_json(_JSON.value, result)


def _fit(items: Sequence[str]) -> None:
    """``mmprm fit``. Exits with 1 when the job does not fit."""
    from mmprm_jax.bench import common
    from mmprm_jax.fit import compile, jobs, report
    from mmprm_jax.records import UserError

    if not _MODEL.value or not _TOPOLOGY.value:
        raise UserError("mmprm fit needs a model and chips, e.g. --model=internvl2_5-8b --topology=v5e-32")
    settings = jobs.parse(items, model=_MODEL.value, job=_JOB.value, topology=_TOPOLOGY.value)
    found = compile.measure(settings)
    print(report.describe(found))
    if _JSON.value:
        verdict = {"fits": report.fits(found), "seconds": report.roofline(found)}
        common.write_json(_JSON.value, {**found, **verdict, "advice": [] if verdict["fits"] else report.advice(found)})
    if not report.fits(found):
        sys.exit(1)


def _verify(path: str) -> None:
    """``mmprm verify``. Exits with 1 when a row was bad."""
    from mmprm_jax.answers import audit
    from mmprm_jax.records import UserError
    from mmprm_jax.rollout.servers import reach

    if bool(_JUDGE.value) != bool(_JUDGE_MODEL.value):
        raise UserError("a judge needs both --judge=http://host:8000/v1 and --judge_model=NAME")
    reach([_JUDGE.value] if _JUDGE.value else [])
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(audit.Judge(_JUDGE.value, _JUDGE_MODEL.value)) if _JUDGE.value else None
        summary, good = audit.verify_file(path, _OUTPUT.value, _MODE.value, _JOBS.value, judge)
    print(summary, file=sys.stderr)
    if not good:
        sys.exit(1)


def _open(path: str, overrides: Sequence[str], folder: str, distributed: bool = False) -> Any:
    """The ``stages.Run`` of a configuration in a work directory, when all its processes are there. Raises UserError."""
    from mmprm_jax import config as configs

    config, primary = configs.load(path, overrides), True
    if distributed:
        from mmprm_jax import processes

        primary = processes.meet()
    workdir = configs.guard_workdir(folder, config, primary=primary)
    _cache_compilations(os.fspath(workdir / "compilation_cache"))

    from mmprm_jax import stages

    return stages.Run(config, workdir, configs.to_text(config))


def _cache_compilations(folder: str) -> None:
    """Keeps compiled programs in ``folder``, unless the user has chosen another one."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# They keep nothing to go on from.
_BEGIN_AGAIN = ("verify", "fit", "bench", "summary", "bon", "detect", "split", "prepare", "convert")


def run() -> None:
    """The console script. A UserError is one line on stderr and exit code 1; SIGINT ends with 130, SIGTERM with 143."""
    from mmprm_jax.allocator import keep_memory

    keep_memory()  # before the numeric libraries start threads
    again = "begins again" if sys.argv[1:2] and sys.argv[1] in _BEGIN_AGAIN else "goes on from here"
    with interruption.handling(again, stays=True):
        dispatch()


def dispatch() -> None:
    """Runs the command of ``sys.argv``."""
    from mmprm_jax import config as configs
    from mmprm_jax.records import UserError

    try:
        if sys.argv[1:2] == ["launch"]:  # its options are not absl's, and behind -- is another command line
            from mmprm_jax.launch import cli

            return cli.main(sys.argv[2:])
        if sys.argv[1:2] == ["config"]:
            return configs.main(sys.argv[2:])
        if sys.argv[1:2] == ["prepare"]:
            from mmprm_jax.data import prepare

            return prepare.main(sys.argv[2:])
        if sys.argv[1:2] == ["split"]:
            from mmprm_jax.data import split

            return split.main(sys.argv[2:])
        if sys.argv[1:2] in (["bon"], ["detect"], ["sweep"], ["guide"], ["benchmark"]):
            from mmprm_jax.evaluation import cli

            return cli.main(sys.argv[1:], _open)
        argv, overrides = configs.split_args(sys.argv)
    except UserError as error:
        sys.exit(f"mmprm: {error}")

    def main(rest: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            _command(rest, overrides)
        except (UserError, OSError) as error:
            sys.exit(f"mmprm: {error}")

    app.run(main, argv=argv)


if __name__ == "__main__":
    run()
