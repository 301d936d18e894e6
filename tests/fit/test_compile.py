"""Certified by the TPU compiler, on a machine without a TPU. Slow; each program in a process of its own."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmprm_jax.fit import chips, compile, hlo, jobs, report
from mmprm_jax.sharding import make_mesh
from mmprm_jax.spawn import Child
from mmprm_jax.training import trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


def known_programs():
    """Collectives and FLOPs of small programs on v5e:2x2: what a child finds."""
    os.environ.update(compile.OFFLINE)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there writes no text
    mesh = make_mesh({"fsdp": -1}, compile._devices(chips.topology("v5e-4")))
    shape = (4 * 1024, 256)
    ring = [(i, (i + 1) % 4) for i in range(4)]
    bodies = {
        "all-gather": (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P()),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P("fsdp")),
        "all-reduce": (lambda x: jax.lax.psum(x, "fsdp"), P()),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), P("fsdp")),
        "collective-permute": (lambda x: jax.lax.ppermute(x, "fsdp", ring), P("fsdp")),
    }

    def parsed(f, *args):
        with tempfile.TemporaryDirectory() as folder:
            _, text = compile.compile_text(jax.jit(f).lower(*args), folder)
        return hlo.parse(text), hlo.entry(text)

    def array(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))

    found = {}
    with jax.set_mesh(mesh):
        for kind, (body, out) in bodies.items():
            run = jax.shard_map(body, in_specs=P("fsdp"), out_specs=out, check_vma=False)
            found[kind] = hlo.collectives(*parsed(run, array(shape, "fsdp")), 4)

        def layers(x, w):  # six layers, their weights split over the devices
            def layer(x, w):
                w = jax.sharding.reshard(w, P())
                return jnp.einsum("bhd,hdf->bhf", x, w.reshape(4, 64, 64)).astype(x.dtype), None

            return jax.lax.scan(layer, x, w)[0]

        program, entry = parsed(layers, array((512, 4, 64), "fsdp"), array((6, 256, 64), None, "fsdp"))
        found["layers"] = {"flops": hlo.sum_flops(program, entry), **hlo.collectives(program, entry, 4)}
    yield found


def test_known_programs():
    with Child(known_programs) as child:
        found = next(child)
    part = 1024 * 256 * 2  # bytes of a device
    for kind, sent in {
        "all-gather": 3 * part,
        "reduce-scatter": part * 3 // 4,
        "all-reduce": 2 * part * 3 // 4,
        "all-to-all": part * 3 // 4,
        "collective-permute": part,
    }.items():
        assert sum(found[kind].values()) == sent and found[kind][kind] == sent, (kind, found[kind])
    # batched products are convolutions with holes there, and the loop counts six times
    assert found["layers"]["flops"] == 6 * 2 * 512 // 4 * 4 * 64 * 64
    assert found["layers"]["all-gather"] == 6 * 3 * 256 * 64 * 2 // 4


# sft: biases, an image tower that is trained, a tied head. train_prm: adapters.
SUMS = {
    "sft": dict(qkv_bias=True, mlp_bias=True, tied=True),
    "train_prm": dict(lora_rank=8),
}


def adds(parsed, i):
    """Whether an instruction adds up elements, rows or what devices have."""
    if i.op.removesuffix("-start") not in ("reduce", "scatter", "all-reduce", "reduce-scatter"):
        return False
    if "unique_indices=true" in i.rest:  # puts
        return False
    return any(j.op == "add" for j in parsed[hlo._called(i, "to_apply")].values())


def reshapes(i, computation):
    """Whether a reduction is one over dimensions of size 1."""
    operand = computation.get(i.operands[0])
    return i.op == "reduce" and operand and math.prod(hlo._dims(operand.shape)) == math.prod(hlo._dims(i.shape))


def narrow_sums():
    """Sums over tokens, rows or devices that the compiled training step makes in bfloat16, by job: instructions."""
    os.environ.update(compile.OFFLINE)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh({"data": 2, "fsdp": -1}, compile._devices(chips.topology("v5e-8")))
    settings = jobs.Settings(rows=16, row_tokens=1024, row_examples=4, tiles=4, microbatches=2)
    released = jobs.config(settings)
    found = {}
    for job, changed in SUMS.items():
        decoder = dict(
            vocab_size=2048, hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128,
            intermediate_size=512,
        )  # fmt: skip
        cfg = dataclasses.replace(
            released,
            decoder=dataclasses.replace(released.decoder, **decoder, **changed),
            vision=dataclasses.replace(
                released.vision, hidden_size=256, num_layers=2, num_heads=2, intermediate_size=512
            ),
        )
        with jax.set_mesh(mesh), mock.patch.object(trainer, "split", trained(job)):
            (program,) = jobs.train(dataclasses.replace(settings, job=job), cfg, mesh).programs
            with tempfile.TemporaryDirectory() as folder:
                _, text = compile.compile_text(program.run.lower(*program.args, **program.kwargs), folder)
        parsed = hlo.parse(text)
        sums = [(i, computation) for computation in parsed.values() for i in computation.values() if adds(parsed, i)]
        found[job] = [
            f"{i.op} {i.shape} {i.rest[:300]}"
            for i, computation in sums
            if i.shape.lstrip("(").startswith("bf16") and not reshapes(i, computation)
        ]
        found[job, "float32"] = sum(i.shape.lstrip("(").startswith("f32") for i, _ in sums)
    yield found


def trained(job):
    """``trainer.split`` that freezes nothing for sft, and for train_prm what is beside adapters."""
    split = trainer.split
    return lambda params, freeze: split(params, ("decoder",) if job == "train_prm" else ())


def test_sums_are_float32():
    with Child(narrow_sums) as child:
        found = next(child)
    assert found["sft", "float32"] and found["train_prm", "float32"]  # the text was understood
    assert not found["sft"] and not found["train_prm"], found


@functools.cache
def measured(*items):
    return compile.measure(jobs.parse(items))


SHARED = pytest.mark.xdist_group("v5e")  # what one of these tests compiles, the other reads
TRAINED = [
    pytest.param("internvl2_5-8b", "v5e-16", marks=SHARED),
    pytest.param("internvl2_5-8b", "v5e-256", marks=SHARED),
    ("internvl2_5-78b", "v5p-128"),
]


@pytest.mark.parametrize("model, topology", TRAINED)
def test_training_fits(model, topology):
    """PRM training on packed rows of 8,192 tokens with images, at full depth."""
    found = measured(f"model={model}", f"topology={topology}")
    print(f"\n{report.describe(found)}")
    (program,) = found["programs"]
    assert report.fits(found) and program["peak"] < found["chip"]["bytes"]
    assert found["settings"]["row_tokens"] == 8192 and found["settings"]["tiles"] >= 7
    # Full rematerialisation: the decoder's 6 per token and weight become 8; the frozen tower has no backward pass.
    assert 1.2 < program["flops"] * found["chips"] / found["flops"] < 8 / 6 * 1.1
    json.dumps(found)


@SHARED
def test_flops_fall_with_the_chips():
    totals = {}
    for topology in ("v5e-16", "v5e-256"):
        found = measured("model=internvl2_5-8b", f"topology={topology}")
        totals[topology] = found["programs"][0]["flops"] * found["chips"]
    assert max(totals.values()) < 1.1 * min(totals.values()), totals


def test_flops_without_remat():
    """A quarter of the 8B model's decoder and of a row's tiles: their proportion is that of the whole."""
    found = measured("topology=v5p-8", "layers=8", "rows=4", "tiles=6", "remat=none")
    print(f"\n{report.describe(found)}")
    assert 0.97 < found["programs"][0]["flops"] * found["chips"] / found["flops"] <= 1.10


def test_program_does_not_grow_with_depth():
    sizes, seconds = {}, {}
    for layers in (8, 64):
        found = measured(
            "model=internvl2_5-1b", "topology=v5e-4", "rows=4", "row_tokens=1024", "tiles=2", f"layers={layers}"
        )
        sizes[layers] = found["programs"][0]["instructions"]
        seconds[layers] = found["programs"][0]["compile_seconds"]
    print(f"\ncompile time of 64 layers over that of 8: {seconds[64] / seconds[8]:.2f}; instructions: {sizes}")
    assert sizes[64] < 1.3 * sizes[8]


def test_decode_fits():
    found = measured("job=decode", "topology=v5e-8")
    print(f"\n{report.describe(found)}")
    (program,) = found["programs"]
    assert report.fits(found) and found["device"] == "TPU v5 lite" and found["mesh"] == {"tensor": 8}
    assert 1.0 <= program["bytes"] / found["fewest_bytes"]["total"] < 1.25


def test_score_fits():
    found = measured("job=score", "topology=v5e-8")
    print(f"\n{report.describe(found)}")
    assert report.fits(found) and [p["name"] for p in found["programs"]] == ["prompts", "solutions"]
    assert 1.0 < sum(p["flops"] for p in found["programs"]) * 8 / found["flops"] < 1.3


def test_too_large_is_reported_at_once():
    """78B on four chips of 16 GB: the arguments alone exceed them, and nothing is compiled."""
    found = measured("model=internvl2_5-78b", "topology=v5e-4", "rows=4")
    (program,) = found["programs"]
    assert not report.fits(found) and "compile_seconds" not in program and "exceeded" not in program
    assert any("--topology=" in text for text in report.advice(found))


def test_compiler_says_no():
    """Found out by the compiler: the arguments fit, the buffers do not."""
    found = measured(
        "model=internvl2_5-1b", "topology=v5e-4", "rows=64", "tiles=2", "microbatches=1", "remat=none", "layers=4"
    )
    (program,) = found["programs"]
    assert not report.fits(found) and program["exceeded"]["used"] > program["exceeded"]["available"] > 15e9
    assert program["exceeded"]["largest"][0]["bytes"] > 1e8
    said = report.advice(found)
    assert said[0].startswith("remat=full") and said[1].startswith("microbatches=16")
