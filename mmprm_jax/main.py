"""The command line.

``mmprm <stage> --config=FILE[:ARG] --workdir=DIR [--config.key=value …]`` runs one stage, or with ``pipeline`` all.
``mmprm summary WORKDIR [WORKDIR …]`` compares finished runs, e.g. of several seeds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging

_CONFIG = flags.DEFINE_string("config", None, "configuration file, FILE or FILE:ARG")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of this run: data, weights, trees, report")


def _command(argv: Sequence[str], overrides: Sequence[str]) -> None:
    # The numeric libraries take seconds to import: a wrong command line is told first.
    from mmprm_jax import config as configs
    from mmprm_jax.records import UserError

    if argv[1:2] == ["summary"] and len(argv) > 2:
        from mmprm_jax.report.summary import summarise

        print(summarise(argv[2:]))
        return
    names = ("data", "sft", "annotate", "train_prm", "evaluate", "report", "pipeline")
    if len(argv) != 2 or argv[1] not in names:
        raise UserError(
            f"usage: mmprm {{{','.join(names)}}} --config=FILE[:ARG] --workdir=DIR [--config.key=value …]"
            " or: mmprm summary WORKDIR [WORKDIR …]"
        )
    for flag in (_CONFIG, _WORKDIR):
        if not flag.value:
            raise UserError(
                f"--{flag.name} is missing; e.g. mmprm {argv[1]} --config=configs/digits.py --workdir=runs/digits"
            )
    config = configs.load(_CONFIG.value, overrides)
    workdir = configs.guard_workdir(_WORKDIR.value, config)

    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    from mmprm_jax import stages

    run = stages.Run(config, workdir, configs.to_text(config))
    if argv[1] == "pipeline":
        stages.pipeline(run)
    else:
        stages.run_stage(run, argv[1])


def run() -> None:
    """The console script. A UserError is one line on stderr and exit code 1."""
    from mmprm_jax import config as configs
    from mmprm_jax.records import UserError

    try:
        argv, overrides = configs.split_args(sys.argv)
    except UserError as error:
        sys.exit(f"mmprm: {error}")

    def main(rest: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            _command(rest, overrides)
        except (UserError, OSError) as error:
            sys.exit(f"mmprm: {error}")
        except KeyboardInterrupt:
            sys.exit("mmprm: interrupted; the same command goes on from here")

    app.run(main, argv=argv)


if __name__ == "__main__":
    run()
