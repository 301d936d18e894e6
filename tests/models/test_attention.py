"""Attention over packed rows: the reference against numpy, splash against the reference, and the TPU compiler."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmprm_jax.models import attention
from mmprm_jax.sharding import put_batch

SEGMENT = np.array([[0, 0, 1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 2, 2, 0, 0]], np.int32)


def draw(rows, length, groups, heads, depth):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((rows, length, groups, heads, depth), np.float32)
    k, v = rng.standard_normal((2, rows, length, groups, depth), np.float32)
    return q, k, v


@pytest.mark.parametrize("causal", [True, False])
def test_reference_against_numpy(mesh, causal):
    q, k, v = draw(2, 8, 2, 3, 4)
    got = attention.self_attention(*(jnp.array(x) for x in (q, k, v, SEGMENT)), causal)
    for b, s, g, r in np.ndindex(q.shape[:4]):
        seen = [t for t in range(8) if SEGMENT[b, t] == SEGMENT[b, s] and (t <= s or not causal)]
        scores = k[b, seen, g] @ q[b, s, g, r] / 2
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(got[b, s, g, r], weights @ v[b, seen, g] / weights.sum(), atol=1e-5)


@pytest.mark.parametrize("causal, packed", [(True, True), (False, False)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_splash_is_the_reference(mesh_of, causal, packed, shape):
    """Interpreted: a length and a depth that are no multiples of 128, forward and backward."""
    q, k, v = draw(2, 200, 2, 2, 24)
    batch = {"q": q, "k": k, "v": v, "w": np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)}
    segment = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 50, axis=1).astype(np.int32) if packed else None

    def run(backend):
        def total(x):
            ids = None if segment is None else x["segment"]
            out = attention.self_attention(x["q"], x["k"], x["v"], ids, causal, backend)
            return jnp.sum(out * x["w"]), out

        mesh = mesh_of(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
        with jax.set_mesh(mesh):
            placed = put_batch(batch if segment is None else batch | {"segment": segment}, mesh)
            ids = {"segment": placed.pop("segment")} if packed else {}
            grad = jax.jit(jax.grad(lambda x: total(x | ids), has_aux=True))
            return jax.device_get(grad(placed))

    want, got = run("xla"), run("splash")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_back_ends(mesh):
    q = jnp.zeros((1, 512, 1, 1, 64), jnp.bfloat16)
    assert attention.choose_backend(q) == "xla"
    for platform, dtype, length, want in [
        ("tpu", jnp.bfloat16, 512, "splash"),
        ("tpu", jnp.bfloat16, 100, "xla"),
        ("cuda", jnp.bfloat16, 512, "cudnn"),
        ("cuda", jnp.float32, 512, "xla"),
        ("cuda", jnp.bfloat16, 1, "xla"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_platform", lambda platform=platform: platform)
            assert attention.choose_backend(q[:, :length].astype(dtype)) == want


def test_where_examples_begin():
    rng = np.random.default_rng(0)
    for max_segments in (3, 6):
        segment = np.zeros((5, 20), np.int32)
        for row in segment:
            ends = np.sort(rng.choice(np.arange(1, 20), rng.integers(1, max_segments), replace=False))
            for number, part in enumerate(np.split(row, ends)[:-1], 1):
                part[:] = number  # the last one stays padding
        starts, sizes = attention.segment_runs(jnp.array(segment), max_segments)
        for row, start, size in zip(segment, starts.tolist(), sizes.tolist(), strict=True):
            runs = [list(run) for _, run in itertools.groupby(row)]
            want = [len(run) for run in runs]
            assert size == want + [-1] * (max_segments - len(runs))
            assert start == [sum(want[:i]) for i in range(len(runs))] + [-1] * (max_segments + 1 - len(runs))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device")
@pytest.mark.parametrize("max_segments", [0, 4], ids=["mask", "packed"])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_the_reference(mesh_of, causal, max_segments):
    """Two rows with different numbers of examples, bfloat16: forward and backward."""
    q, k, v = draw(2, 640, 2, 3, 64)
    segment = np.repeat([[1, 1, 1, 0, 0], [1, 2, 2, 3, 4]], 128, axis=1).astype(np.int32)
    # padding may be anything finite
    w = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32) * (segment > 0)[..., None, None, None]

    def run(backend, dtype):
        def total(x):
            q, k, v = (x[name].astype(dtype) for name in "qkv")
            out = attention.self_attention(q, k, v, x["segment"], causal, backend, max_segments)
            return jnp.sum(out.astype(jnp.float32) * x["w"])

        mesh = mesh_of(data=1)
        with jax.set_mesh(mesh):
            x = put_batch({"q": q, "k": k, "v": v, "w": w}, mesh)
            segments = put_batch({"segment": segment}, mesh)
            return jax.device_get(jax.jit(jax.value_and_grad(lambda x: total(x | segments)))(x))

    (want, wants), (got, gots) = run("xla", jnp.float32), run("cudnn", jnp.bfloat16)
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.5)
    for name in "qkv":
        assert np.isfinite(gots[name]).all()
        np.testing.assert_allclose(gots[name], wants[name], atol=0.02 * np.abs(wants[name]).max())


COMPILE = """
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from jax.experimental import topologies
from mmprm_jax.models.attention import self_attention
from mmprm_jax.sharding import make_mesh, BATCH
from jax.sharding import NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = make_mesh({"fsdp": 4, "tensor": 2}, devices)
with jax.set_mesh(mesh):
    def shape(*sizes, dtype=jnp.bfloat16, spec=P(BATCH, None, "tensor")):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def grad(causal):
        def total(q, k, v, *segment):
            return self_attention(q, k, v, segment[0] if segment else None, causal).astype(jnp.float32).sum()
        return jax.jit(jax.grad(total, (0, 1, 2)))

    decoder = shape(4, 8192, 8, 4, 128), shape(4, 8192, 8, 128), shape(4, 8192, 8, 128)
    tower = shape(8, 1025, 16, 1, 64), shape(8, 1025, 16, 64), shape(8, 1025, 16, 64)
    for args, causal in ((decoder + (shape(4, 8192, dtype=jnp.int32, spec=P(BATCH)),), True), (tower, False)):
        compiled = grad(causal).lower(*args).compile()
        assert compiled.as_text().count("tpu_custom_call") >= 3, "no splash kernels"
        print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_compiles_for_tpus_with_the_sizes_of_an_8b_model():
    pytest.importorskip("libtpu")
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # of what comes from there nothing can be read
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    decoder, tower = (int(line) for line in done.stdout.split())
    assert decoder < 2**30  # a matrix of 8,192 x 8,192 for each of a device's 16 heads takes 2 GiB
    assert tower < 2**30
