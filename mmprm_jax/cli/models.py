"""``mmprm convert`` and ``mmprm score``: checkpoints, and what a PRM says of solutions."""

from __future__ import annotations

import argparse
import os

from mmprm_jax.cli.command import EVALUATE, MODELS, argument, at_least, command, flag, option
from mmprm_jax.cli.stages import cache_compilations
from mmprm_jax.errors import UserError

_DTYPE = option("--dtype", "of the weights", default=None, unset="as stored", choices=("bfloat16", "float32"))


@command(
    "convert",
    MODELS,
    "takes a released checkpoint to Orbax, or a model folder back to safetensors",
    argument("source", "a folder of a checkpoint or of LoRA adapters, a hub id (org/name@revision) or a model folder"),
    argument("target", "the folder to write"),
    flag("--prm", "add the token <prm>, to train a policy on as a PRM"),
    flag("--verify", "read the result again and compare every tensor"),
    _DTYPE,
    option(
        "--layout",
        "hf: a checkpoint that transformers' own classes load without remote code",
        default=None,
        unset="the model's own",
        choices=("hf",),
    ),
    example="mmprm convert OpenGVLab/InternVL2_5-8B models/policy --verify",
)
def convert(args: argparse.Namespace) -> None:
    from mmprm_jax.convert import convert
    from mmprm_jax.sharding import make_mesh

    mesh = make_mesh({"fsdp": -1})
    print(
        convert(args.source, args.target, mesh, dtype=args.dtype, prm=args.prm, verify=args.verify, layout=args.layout)
    )


@command(
    "score",
    EVALUATE,
    "scores solutions, step by step, with a PRM",
    argument("file", "rows: id, question, images, candidates (lists of steps)", metavar="PROBLEMS.jsonl"),
    option("--model", "a folder of a checkpoint or of LoRA adapters, a hub id (org/name@revision) or a model folder"),
    option("--output", "the file to write", default=None, unset="PROBLEMS.scores.jsonl", metavar="FILE"),
    option("--template", "the prompt", default=None, unset="by the model's kind", metavar="NAME"),
    option(
        "--max-tiles",
        "tiles of one image at most",
        default=0,
        unset="as in the model's config.json",
        type=at_least(0),
        metavar="N",
    ),
    _DTYPE,
    example="mmprm score problems.jsonl --model=Cierra0506/MM-PRM",
    resumes=True,
)
def score(args: argparse.Namespace) -> None:
    if not os.path.isfile(args.file):  # before minutes of loading
        raise UserError(f"{args.file}: no such file")

    from mmprm_jax.prm import PRM, score_file

    cache_compilations(os.path.expanduser("~/.cache/mmprm_jax/compilations"))
    prm = PRM.from_pretrained(args.model, template=args.template, dtype=args.dtype, max_tiles=args.max_tiles)
    output = args.output or f"{args.file.removesuffix('.jsonl')}.scores.jsonl"
    print(score_file(prm, args.model, args.file, output))
