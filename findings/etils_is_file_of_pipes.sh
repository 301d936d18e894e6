#!/usr/bin/env bash
# etils 1.15.0. Guess: `epath.Path.is_file` is true for regular files, as `pathlib.Path.is_file` is, so that a pipe or a
# device, which may have no end, is told apart before it is opened. Behaviour: it is true for all that exists and is no
# folder. Seen: a named pipe and /dev/zero are files to epath, and none to pathlib.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "etils[epath]==1.15.0"
mkfifo "$folder/pipe"
"$folder/venv/bin/python" - "$folder/pipe" /dev/zero <<'PY'
import pathlib
import sys

from etils import epath

for name in sys.argv[1:]:
    theirs, ours = epath.Path(name).is_file(), pathlib.Path(name).is_file()
    print(name.rpartition("/")[2], "epath:", theirs, "pathlib:", ours)
    assert theirs and not ours
PY
