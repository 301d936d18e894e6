"""Import and export by two processes that hold half of the devices each."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, MODELS

from mmprm_jax.models import hf


def whole(folder):
    """Whether the mesh divides the large matrices; where it does not, every process reads all of one."""
    decoder = hf.open_checkpoint(folder).model.cfg.decoder
    return all(size % 8 == 0 for size in (decoder.hidden_size, decoder.intermediate_size))


WHOLE = [name for name in MODELS if whole(GOLDEN / "models" / name)]
WORKER = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_default_matmul_precision", "highest")
source, target, address, index = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
import numpy as np
from flax import nnx
from mmprm_jax.models import build, hf
from mmprm_jax.sharding import make_mesh

read = []
original = hf.read_tensor
def counted(*args):
    part = original(*args)
    read.append(part.nbytes)
    return part
hf.read_tensor = counted
mesh = make_mesh({"fsdp": 4, "tensor": 2})
jax.set_mesh(mesh)
checkpoint = hf.open_checkpoint(source)
params = hf.load_params(checkpoint, mesh)
assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(params))
hf.save(Path(target), params, mesh, checkpoint.model)
print(json.dumps({"read": sum(read)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE[-1:])
def test_each_process_reads_its_part_and_the_files_come_back(golden, tmp_path, name):
    source = golden / "models" / name
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(source), str(tmp_path / "back"), address, str(i)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=600) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    whole = (source / "model.safetensors").stat().st_size
    read = [json.loads(out.splitlines()[-1])["read"] for out, _ in outputs]
    assert np.all(np.array(read) < 0.7 * whole) and sum(read) > 0.9 * whole
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
