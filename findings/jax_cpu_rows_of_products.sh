#!/usr/bin/env bash
# jax 0.10.2 on x86 CPUs. Guess: a row of a float32 matrix product is the same, to the last digit, however many rows are
# multiplied beside it. Behaviour: the order of its sum depends on the number of rows R, for three reasons that XLA's
# options show apart: YNNPACK (on by default) chooses kernels by R; without it, Eigen splits the terms of a sum among
# threads where R is small; with one thread, oneDNN's kernels for AVX2 (on CPUs without AVX-512, or with
# DNNL_MAX_CPU_ISA=AVX2 as here) sum the last R mod 6 rows in another order if these are one to three.
# Seen, 4096 x 256 @ 256 x 512 against the first R rows alone, 8 threads, R with other digits: 2 to 50 (all rows), not 64;
# without YNNPACK 16, 24, 32 (all rows); with one thread as well 50 (the last two), 51 (the last three), not 48, 52, 53, 54.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax[cpu]==0.10.2"
cat > "$folder/check.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
rows = jnp.asarray(rng.standard_normal((4096, 256)), jnp.float32)
matrix = jnp.asarray(rng.standard_normal((256, 512)), jnp.float32)


def different(count, **options):
    product = jax.jit(jnp.matmul, compiler_options=options)
    same = np.asarray(product(rows[:count], matrix)) == np.asarray(product(rows, matrix))[:count]
    return np.flatnonzero(~same.all(axis=1)).tolist()


plain = {"xla_cpu_experimental_ynn_fusion_type": ""}
alone = {**plain, "xla_cpu_multi_thread_eigen": False}
found = {count: len(different(count)) for count in (2, 8, 50, 64)}
print("rows that differ:", found)
assert found[2] and found[8]
split = {count: len(different(count, **plain)) for count in (16, 24, 32)}
print("without YNNPACK, rows that differ:", split)
assert any(split.values())
left = {count: different(count, **alone) for count in (48, 50, 51, 52, 53, 54)}
print("one thread, AVX2, rows that differ:", left)
assert left == {48: [], 50: [48, 49], 51: [48, 49, 50], 52: [], 53: [], 54: []}
PY
PJRT_NPROC=8 DNNL_MAX_CPU_ISA=AVX2 JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/check.py"
