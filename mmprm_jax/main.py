"""The console script ``mmprm``; its commands are declared in ``cli``."""

from __future__ import annotations

import faulthandler
import logging
import sys
import traceback
from collections.abc import Sequence

from mmprm_jax import cli, interruption
from mmprm_jax.allocator import keep_memory
from mmprm_jax.errors import UserError


def run() -> None:
    """Runs the command of ``sys.argv``.

    Exit codes: 1 for a failure that a line on stderr explains, 2 for a wrong command line, 130 for SIGINT, 143 for
    SIGTERM, 129 for SIGHUP.
    """
    keep_memory()  # before the numeric libraries start threads
    faulthandler.enable()
    words = sys.argv[1:]
    with interruption.handling("goes on from here" if cli.resumes(words) else "begins again", permanent=True):
        dispatch(words)


def dispatch(words: Sequence[str]) -> None:
    """Runs a command line, without ``mmprm``. Always raises SystemExit."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)  # absl's messages arrive there as well
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    try:
        code = cli.run([word for i, word in enumerate(words) if i >= end or word != "--debug"])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"mmprm: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    run()
