#!/usr/bin/env bash
# jax 0.10.2. Guess: a handler for SIGTERM that a program has installed with signal.signal stays when it calls
# jax.distributed.initialize. Behaviour: the preemption notice of the distributed runtime replaces it in C, while
# signal.getsignal still shows the program's own. Seen: getsignal unchanged, the handler is not called, the process lives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax[cpu]==0.10.2"
cat > "$folder/check.py" <<'PY'
import os
import signal
import socket
import time

import jax

called = []


def handler(number, frame):
    called.append(number)


signal.signal(signal.SIGTERM, handler)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
before = len(called)
with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1.0)
shown = signal.getsignal(signal.SIGTERM) is handler
print(f"calls before: {before}; after initialize: {len(called) - before}; getsignal shows our handler: {shown}")
assert before == 1 and len(called) == 1 and shown
os._exit(0)
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
