"""Names of topologies, and what is counted without a compiler."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mmprm_jax import cli
from mmprm_jax.fit import chips, compile, jobs, report
from mmprm_jax.models import build
from mmprm_jax.records import UserError
from mmprm_jax.training import trainer


@pytest.mark.parametrize(
    "name, count, form",
    [
        ("v5e-32", 32, "v5e:4x8"),
        ("v5litepod-32", 32, "v5e:4x8"),
        ("v5e-1", 1, "v5e:1x1"),
        ("v6e-64", 64, "v6e:8x8"),
        ("v5p-64", 32, "v5p:2x4x4"),  # TensorCores, two on a chip
        ("v5p-128", 64, "v5p:4x4x4"),
        ("v4-32", 16, "v4:2x2x4"),
        ("V5E-256", 256, "v5e:16x16"),
    ],
)
def test_names(name, count, form):
    t = chips.topology(name)
    assert (t.count, t.libtpu["topology_name"]) == (count, form)


def test_every_name_counts_its_chips():
    for name, t in chips.TOPOLOGIES.items():
        kind, _, number = name.partition("-")
        assert t.count == int(number) // (2 if kind in ("v4", "v5p") else 1)
    assert chips.topology("h200-8").chip.bytes == 141e9 and not chips.topology("h200-8").chip.tpu


@pytest.mark.parametrize("name, said", [("v5e-33", "v5e-32"), ("v9x-8", "v5p-8"), ("h100-16", "h100-8")])
def test_wrong_names(name, said):
    with pytest.raises(UserError, match=f"{name}.*{said}"):
        chips.topology(name)


@pytest.mark.parametrize(
    "items, said",
    [
        (["job=dance"], "dance.*decode"),
        (["model=internvl2_5-9b"], "internvl2_5-8b"),
        (["rowz=3"], "rowz.*rows="),
        (["rows=many"], "number"),
        (["rows=0"], "at least 1"),
        (["tensor=3"], "does not divide"),
        (["rows=48"], "multiple of 32"),
    ],
)
def test_wrong_settings(items, said):
    with pytest.raises(UserError, match=said):
        jobs.resolve(jobs.parse(items))


def test_choices():
    def chosen(*items):
        s, t = jobs.resolve(jobs.parse(items))
        return t.count // s.tensor, s.tensor, s.microbatches

    assert chosen("topology=v5e-16") == (16, 1, 4)  # one of 64 rows at a time on each chip
    assert chosen("topology=v5e-256") == (64, 4, 1)  # more chips than rows: four share each
    assert chosen("topology=v5e-8", "job=decode")[:2] == (1, 8)
    assert chosen("topology=v5e-16", "job=decode")[:2] == (2, 8)  # eight key/value heads


def tiny(*items):
    return jobs.parse(items, model="tiny-internlm2", topology="h100-2")


def test_cuda_by_hand():
    """The analytic part, of a model that is small enough to be counted by hand."""
    found = compile.measure(tiny("rows=4", "row_tokens=64", "tiles=0", "tensor=1", "layers=1"))
    # q and o 48 x 48, k and v 48 x 16, three of 48 x 96 for the one layer; two norms, one more, embedding and head
    layer = 2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 96
    decoder = layer + 3 * 48 + 2 * 320 * 48
    pairs = 64 * 65 // 2
    assert found["flops"] == 3 * 4 * (2 * layer * 64 + 4 * 48 * pairs)
    assert found["tokens"] == 256 and found["chips"] == 2
    tower = found["parameters"] - decoder
    # float32 masters and two moments on every second chip for what is split, with the tower in bfloat16; the rest twice
    arguments = found["programs"][0]["arguments"]
    assert 12 * decoder / 2 < arguments < 12 * (decoder + tower) / 2 + 50_000
    assert report.roofline(found)["step"] == pytest.approx(found["flops"] / 2 / 989e12)
    assert report.fits(found) and "temporaries are not counted" in report.describe(found)


def test_does_not_fit_on_cuda(tmp_path, capsys):
    """Exit code 1, advice and the file; nothing has to be compiled for that."""
    file = tmp_path / "fit.json"
    options = ["--model=internvl2_5-78b", "--job=train_prm", "--topology=h100-8", f"--json={file}"]
    assert cli.run(["fit", *options, "examples=700000"]) == 1
    out = capsys.readouterr().out
    assert "does NOT fit" in out and "moments=bfloat16" in out and "--topology=v5" in out
    written = json.loads(file.read_text())
    assert written["fits"] is False and written["advice"] and written["settings"]["model"] == "internvl2_5-78b"
    # 12 bytes for each trained parameter, an eighth on each chip
    assert written["programs"][0]["arguments"] == pytest.approx(12 * 72.7e9 / 8, rel=0.03)


GB = 1e9


def found_of(program, **settings):
    s, t = jobs.resolve(jobs.parse([f"{k}={v}" for k, v in settings.items()]))
    return {
        "settings": dataclasses.asdict(s), "chip": dataclasses.asdict(t.chip), "chips": t.count, "mesh": {"fsdp": 32},
        "parameters": 8e9, "flops": 3.2e15, "tokens": 1000, "examples": 448, "fewest_bytes": None,
        "programs": [{"name": "step", **program}],
    }  # fmt: skip


COMPILED = {
    "arguments": 3 * GB, "temporaries": 4 * GB, "peak": 7 * GB, "flops": 1.97e14, "bytes": 8.19e11,
    "sent": {"all-gather": int(3e11), "reduce-scatter": 0, "all-reduce": 0, "all-to-all": 0, "collective-permute": 0},
    "compile_seconds": 1.0,
}  # fmt: skip


def test_roofline():
    found = found_of(COMPILED, examples=4480)
    # a second of compute and of memory, three of the network: two links of 50 GB/s
    assert report.roofline(found) == pytest.approx({"compute": 1, "memory": 1, "network": 3, "step": 3})
    said = report.describe(found)
    assert "10 steps: at least 30 s" in said and "it fits" in said and "all-gather 300.00" in said


def test_advice():
    e = {"used": 20 * GB, "available": 16 * GB, "largest": [{"bytes": GB, "what": "f32[1]"}], "message": ""}
    few = report.advice(found_of({"arguments": 3 * GB, "exceeded": e}, microbatches=1, remat="none"))
    assert few[0].startswith("remat=full") and few[1].startswith("microbatches=2")
    most = report.advice(found_of({"arguments": 3 * GB, "exceeded": e}))
    assert most[0].startswith("tensor=2") and most[1].startswith("row_tokens=4096")
    assert any("--topology=v5e-64" in text for text in most)
    # nothing that splits a row helps where the weights alone are too much
    weights = report.advice(found_of({"arguments": 20 * GB}))
    assert weights[0].startswith("moments=bfloat16") and not any("row" in text for text in weights)
    assert "does NOT fit" in report.describe(found_of({"arguments": 20 * GB}))
    assert "20.00 of 16.00 GB" in report.describe(found_of({"arguments": 3 * GB, "exceeded": e}))


MESSAGE = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO \
temporaries (46.83G) exceeds available HBM (15.75G). HLO module: jit_train_step.
See https://openxla.org/xla/errors/error_1000 for more details."""
USAGE = """Memory Space: default (color=0)
Total bytes: 50282193920 (46.83GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    4.75GiB(  9%);    4.75GiB;      5013504;               15; bf16[16,8192,896], bf16[32,1024,1024], 6×bf16[224,896]
   42.25GiB( 83%);  896.00MiB;  44431081472;                5; 5×bf16[4,16,8192,896]
   46.83GiB(100%);       512B;            0;                1; bf16[]

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
       512B(100%);       512B;            0;                1; bf16[]
"""


def test_exceeded():
    """A message of libtpu 0.0.52, and some lines of its report: the total counts the arguments, too."""
    found = compile.exceeded(MESSAGE, USAGE)
    assert found["used"] == 46.83 * 2**30 and found["available"] == 15.75 * 2**30
    assert [b["bytes"] for b in found["largest"]] == [4.75 * 2**30, 896 * 2**20, 512]
    assert found["largest"][1]["what"] == "5×bf16[4,16,8192,896]"


def test_refused_by_the_compiler():
    """Its error becomes a report; another error stays one."""
    said = MESSAGE

    class Lowered:
        def lower(self):
            return self

        def compile(self, compiler_options):
            folder = pathlib.Path(compiler_options["xla_dump_to"])
            (folder / "module_0000.jit_step.after_optimizations-memory-usage-report.txt").write_text(USAGE, "utf-8")
            raise jax.errors.JaxRuntimeError(said)

    program = jobs.Program("step", Lowered(), (), {})
    found = compile._compiled(program, None, chips.topology("v5e-4"))
    assert found["exceeded"]["used"] == 46.83 * 2**30 and len(found["exceeded"]["largest"]) == 3
    for said in ("INTERNAL: no HBM was found", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            compile._compiled(program, None, chips.topology("v5e-4"))


def test_same_shapes_as_real_arrays(mesh):
    """Abstract arguments of the training job are what the trainer makes of real ones."""
    s, _ = jobs.resolve(tiny("rows=2", "row_tokens=16", "tiles=1", "topology=h100-1"))
    job, _ = jobs.make(s, jax.devices()[:1])
    state, kept, batch = job.programs[0].args
    task = job.programs[0].kwargs["task"]
    _, params = build.initialise(jobs.config(s), 0, 0, mesh)
    real = trainer.new_state(params, task, mesh)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), (state, kept), real)
    assert all(jax.tree.leaves(same)) and batch["pixels"].shape == (2, 1, 28, 28, 3)
    assert batch["pixels"].dtype == jnp.float32
