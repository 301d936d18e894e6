"""Eight CPU devices, and a tiny vision-language model that many tests share."""

import fcntl
import functools
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from mmprm_jax.allocator import keep_memory

keep_memory()  # before threads start

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from mmprm_jax import sharding  # noqa: E402
from mmprm_jax.models import build, hf, hf_config  # noqa: E402
from mmprm_jax.models.config import VLMConfig  # noqa: E402
from mmprm_jax.models.hf_layout import layout  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # compiles 5 times as fast; the programs stay the same


def pytest_configure(config):
    """Not when this file is imported: programs that tests start have devices of their own, and XLA as users have it."""
    if "MMPRM_TEST_SHARED" not in os.environ:  # workers of xdist get the folder of the first process
        config.shared = tempfile.TemporaryDirectory(prefix="mmprm_tests", ignore_cleanup_errors=True)
        os.environ["MMPRM_TEST_SHARED"] = config.shared.name
    share_compilations()
    if "XLA_FLAGS" not in os.environ:  # XLA's older code for fused loops on CPUs compiles twice as fast again
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
        jax.devices()  # reads it
        del os.environ["XLA_FLAGS"]


def share_compilations():
    """One cache of compiled programs for all that this session starts; the tests themselves have a folder beside it.

    JAX_COMPILATION_CACHE_DIR may name a folder that later sessions find again.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ['MMPRM_TEST_SHARED']}/compilations"
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # XLA_FLAGS is gone again when a program is looked up: those of the tests must not be found by others.
    jax.config.update("jax_compilation_cache_dir", f"{os.environ['JAX_COMPILATION_CACHE_DIR']}/tests")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# The files whose slow tests take longest, for runs with --no-loadscope-reorder: no process is left with one at the end.
LONGEST = ("test_pipeline", "test_stage", "test_launch_local", "test_annotate", "test_real_problems", "test_notebooks")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if "golden" in item.fixturenames:
            item.add_marker("golden")
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_unconfigure(config):
    if hasattr(config, "shared"):
        config.shared.cleanup()
        del os.environ["MMPRM_TEST_SHARED"]


IMAGE_TOKEN = 4
TINY = VLMConfig.from_dict(
    {
        "vision": dict(
            image_size=8, patch_size=2, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
            layer_scale_init=0.5,
        ),
        "decoder": dict(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=24,
            rms_norm_eps=1e-2, rope_theta=100.0,
        ),
        "remat": "none",
    }
)  # fmt: skip


# Golden data of the original implementation; another set with other sizes is checked with MMPRM_GOLDEN=FOLDER.
GOLDEN = Path(os.environ.get("MMPRM_GOLDEN", Path(__file__).parent / "golden")).absolute()
MODELS = sorted(path.parent.name for path in (GOLDEN / "models").glob("*/config.json"))


def some_models():
    """Parameters of a test: golden models of every layout, decoder and kind of embedding; the others are slow."""
    paths = {}
    for name in MODELS:
        model = hf.open_checkpoint(GOLDEN / "models" / name).model
        paths[name] = {
            hf_config.checkpoint_kind(model.config),
            hf_config.decoder_kind(model.config),
            f"tied {model.cfg.decoder.tied}",
        }
    chosen, missing = [], set().union(*paths.values())
    while missing:
        chosen.append(max(paths, key=lambda name: len(paths[name] & missing)))
        missing -= paths[chosen[-1]]
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="session")
def golden():
    """The folder of the golden data: models/, images/, text/, tokenizer/, bon/."""
    return GOLDEN


@pytest.fixture(scope="session")
def mesh_of():
    """``mesh_of(data=2, fsdp=4)``: a mesh of as many devices as that takes."""

    @functools.cache
    def make(**shape):
        count = math.prod(shape.values())
        if jax.device_count() < count:
            pytest.skip(f"needs {count} devices")
        return sharding.make_mesh(shape, devices=jax.devices()[:count])

    return make


@pytest.fixture
def mesh(mesh_of):
    """The mesh of one device, set for the test."""
    with jax.set_mesh(mesh_of(data=1)):
        yield mesh_of(data=1)


@pytest.fixture(scope="session")
def smoke_run():
    """An uninterrupted smoke run that only this fixture writes, and what it printed; one for all processes of xdist."""
    shared = Path(os.environ["MMPRM_TEST_SHARED"])
    workdir, printed = shared / "smoke", shared / "smoke.txt"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    config = f"--config={Path(__file__).parent.parent / 'configs' / 'digits.py'}:smoke"
    command = [sys.executable, "-m", "mmprm_jax.main", "pipeline", config, f"--workdir={workdir}"]
    with open(shared / "smoke.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1700)
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout)
    return workdir, printed.read_text()


class Tiny:
    """A tiny model. ``params`` are host arrays: ``initial`` (seed 0), with norms and biases off one and zero."""

    cfg, image_token = TINY, IMAGE_TOKEN

    def __init__(self, mesh):
        with jax.set_mesh(mesh):
            self.graphdef, initial = build.initialise(self.cfg, self.image_token, 0, mesh)
        self.initial = jax.device_get(initial)
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), self.initial)

    def place(self, mesh, params=None):
        """Fresh device copies of the parameters."""
        params = self.params if params is None else params
        return jax.tree.map(
            lambda x, s: jax.device_put(jnp.array(x), s), params, sharding.parameter_shardings(params, mesh)
        )

    def batch(self, rows, width, tiles, seed):
        """Right-padded rows of random length: tokens, valid, pixels. Row 1 has no image tokens."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(5, self.cfg.decoder.vocab_size, (rows, width), np.int32)
        tokens[:, 1 : 1 + tiles * self.cfg.tokens_per_tile] = self.image_token
        tokens[1] = rng.integers(5, self.cfg.decoder.vocab_size, width)
        lengths = rng.integers(width * 3 // 4, width + 1, rows)
        size = self.cfg.vision.image_size
        pixels = rng.standard_normal((rows, tiles, size, size, 3), np.float32)
        return {"tokens": tokens, "valid": np.arange(width) < lengths[:, None], "pixels": pixels}


@pytest.fixture(scope="session")
def tiny(mesh_of):
    return Tiny(mesh_of(data=1))


def generate_greedily(graphdef, params, cfg, image_token, mesh, batch, new):
    """The ``new`` likeliest tokens behind each row of a padded batch, by the engine. int [B, new]."""
    from mmprm_jax.rollout.engine import Engine, Group
    from mmprm_jax.rollout.sampling import Sampling

    groups = []
    for i, (tokens, valid, pixels) in enumerate(zip(batch["tokens"], batch["valid"], batch["pixels"], strict=True)):
        prefix = tuple(tokens[valid].tolist())
        tiles = prefix.count(image_token) // cfg.tokens_per_tile
        key = np.zeros(2, np.uint32)
        sampling = Sampling(temperature=0, max_new_tokens=new)
        groups.append(Group(i, str(i), prefix, np.asarray(pixels[:tiles]) if tiles else None, key, 1, sampling))
    with jax.set_mesh(mesh):
        engine = Engine(graphdef, params, cfg, image_token, mesh, slots=4, samples=1, max_new=new, cache_tokens=2000)
        return np.array([samples[0].tokens for samples in engine.sample(groups)])


@pytest.fixture
def scenario(tmp_path, monkeypatch):
    """Stand-in programs for tests/launch, which has no conftest.py of its own: this one could not be imported then."""
    import launch_stubs

    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenario").mkdir()
    scenario = launch_stubs.Scenario(tmp_path / "scenario")
    for name, value in scenario.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return scenario


@pytest.fixture
def dry_run(capsys):
    """``dry_run("tpu", …)``: what ``mmprm launch --dry-run`` prints."""
    from mmprm_jax import cli

    def shown(*argv):
        split = argv.index("--")
        cli.run(["launch", *argv[:split], "--dry-run", *argv[split:]])
        return capsys.readouterr().out

    return shown


@pytest.fixture
def mmprm_here(capfd):
    """``mmprm_here(*words)``: a command in this process, which spares the imports; returncode, stdout and stderr.

    For commands that fail early or need no device: there are eight devices here, and other options for XLA.
    """
    from mmprm_jax import interruption, main

    def run(*words):
        capfd.readouterr()
        root = logging.getLogger()
        handlers = list(root.handlers)
        try:
            with interruption.handling():
                main.dispatch(list(map(str, words)))
        except SystemExit as ended:
            code = ended.code
        root.handlers[:] = handlers  # dispatch adds its own
        out, err = capfd.readouterr()
        return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def release(folder, golden, tokenizer):
    """Writes a tiny policy in the released format there, InternLM2 with random weights and ``tokenizer``."""
    folder.mkdir()
    configs = [json.loads(p.read_text()) for p in sorted((golden / "models").glob("*/config.json"))]
    config = next(
        c
        for c in configs
        if hf_config.checkpoint_kind(c) == hf_config.CHAT and hf_config.decoder_kind(c) == "internlm2"
    )
    config["llm_config"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    rng, tensors = np.random.default_rng(0), {}
    groups = layout(hf_config.from_hf_config(config), hf_config.checkpoint_kind(config), hf_config.decoder_kind(config))
    for key, shape, _ in (tensor for group in groups for tensor in group.tensors()):
        tensors[key] = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(folder)
    return folder
