"""Adapters: nothing at first, alone in being trained, and the same once merged."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import IMAGE_TOKEN, TINY
from flax import nnx

from mmprm_jax.models import build, lora
from mmprm_jax.sharding import put_batch
from mmprm_jax.training import losses, optimizers, trainer

CFG = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, lora_rank=2, lora_alpha=6.0))


@pytest.mark.parametrize("shape", [dict(data=1), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_only_adapters_are_trained_and_merge(tiny, mesh_of, shape):
    mesh = mesh_of(**shape)
    rows = tiny.batch(8, 16, 1, seed=2)
    batch = {"tokens": rows["tokens"], "segment": rows["valid"].astype(np.int32), "response": rows["valid"]}
    with jax.set_mesh(mesh):
        placed = put_batch(batch | {"pixels": rows["pixels"]}, mesh)

        def loss(cfg, params):
            graphdef, _ = build.abstract(cfg, IMAGE_TOKEN, mesh)
            return float(jax.jit(lambda p, b: losses.policy_loss(nnx.merge(graphdef, p), b)[0])(params, placed))

        params = build.complete(tiny.place(mesh), CFG, IMAGE_TOKEN, 1, mesh)
        base = loss(TINY, tiny.place(mesh))
        assert loss(CFG, params) == pytest.approx(base, rel=1e-6)
        graphdef, _ = build.abstract(CFG, IMAGE_TOKEN, mesh)
        adamw = optimizers.Settings("adamw", 1e-1, warmup=0.0)
        s = trainer.Settings(20, 8, adamw, freeze=("vision", "projector", "decoder"))
        task = trainer.make_task(graphdef, losses.policy_loss, s)
        state, frozen = trainer.new_state(params, task, mesh)
        names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(state["params"])[0]}
        assert len(names) == 14 and all("['lora']" in name for name in names)
        for _ in range(3):
            state, _ = trainer.train_step(state, frozen, placed, task=task)
        trained = trainer.join(state["params"], frozen)
        merged = lora.merge(trained, CFG)
        assert jax.tree.structure(merged) == jax.tree.structure(tiny.params)
        after = loss(CFG, trained)
        assert after < 0.95 * base and loss(TINY, merged) == pytest.approx(after, rel=1e-5)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(merged["vision"]), tiny.params["vision"])
