#!/usr/bin/env bash
# jax 0.10.2. Guess: jax.random.key takes any Python integer as a seed, or raises OverflowError as numpy does for
# integers that do not fit. Behaviour: with 64-bit types off (the default) only the lower 32 bits count, without a word,
# so that seeds made of a time stamp in ns or of a hash may be equal. Seen: key(2**32) == key(0), key(2**32 + 7) == key(7).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax[cpu]==0.10.2"
cat > "$folder/check.py" <<'PY'
import warnings

import jax

warnings.simplefilter("error")
for large, small in ((2**32, 0), (2**32 + 7, 7)):
    same = bool((jax.random.key_data(jax.random.key(large)) == jax.random.key_data(jax.random.key(small))).all())
    print(f"key({large}) == key({small}): {same}")
    assert same
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/check.py"
