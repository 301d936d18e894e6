"""Annotation as in MM-PRM (arXiv 2505.13427): its policy's size, and the constants of its search and sampling.

``--config.data.folder`` names your problems, ``--config.annotate.policy`` another policy (a folder, a hub id, or what
``mmprm convert`` wrote; with ``--config.annotate.servers`` the model's name there).
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"mm_prm.py takes no argument, not :{arg}")
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("digits.py")))["get_config"]()
    config.annotate.update(
        policy="OpenGVLab/InternVL2_5-8B",
        dtype="bfloat16",
        num_rollouts=16,
        max_searches=200,
        rollout_budget=1000,
        c_puct=0.125,
        alpha=0.5,
        beta=0.9,
        length_scale=500.0,
        right_solutions=0,
        temperature=1.0,
        top_k=50,
        top_p=0.9,
        repetition_penalty=1.05,
        max_new_tokens=2048,
        slots=256,
        in_flight=64,
        cache_tokens=200_000,
        trees_per_shard=20,
    )
    return config
