#!/usr/bin/env bash
# tensorboardX 2.6.5. Guess: each SummaryWriter of one directory has an event file of its own, as each has a time stamp
# in its name. Behaviour: the time stamp is in whole seconds, so that two writers of one process that are opened within
# a second share a name, and the second one truncates what the first one wrote. Seen: 1 file, without the first value.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorboardX==2.6.5
cat > "$folder/check.py" <<'PY'
import os
import sys
import time

import tensorboardX

logs = sys.argv[1]
time.sleep(1 - time.time() % 1)  # the beginning of a second
for step in (1, 2):
    writer = tensorboardX.SummaryWriter(logs)
    writer.add_scalar(f"loss{step}", 0.5, step)
    writer.close()
files = os.listdir(logs)
content = b"".join(open(os.path.join(logs, name), "rb").read() for name in files)
print(f"{len(files)} file; loss1 kept: {b'loss1' in content}; loss2 kept: {b'loss2' in content}")
assert len(files) == 1 and b"loss1" not in content and b"loss2" in content
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/logs"
