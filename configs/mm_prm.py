"""As MM-PRM (arXiv 2505.13427): its policy, the constants of its search and sampling, the training of its PRM.

``--config.data.folder`` names your problems, ``--config.policy`` another policy (a folder, a hub id, or what ``mmprm
convert`` wrote), ``--config.annotate.policy`` one for the annotation only (with ``--config.annotate.servers`` the
model's name there). ``--config.sft.steps=N`` trains the policy first, on the folder's sft.jsonl. What the paper does
not say (the batch of the policy's training, packing, dtypes) is our choice.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"mm_prm.py takes no argument, not :{arg}")
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("digits.py")))["get_config"]()
    config.policy = "OpenGVLab/InternVL2_5-8B"
    config.max_tiles = 6
    config.model.remat = "full"
    for stage, rate, rows in (("sft", 4e-5, 32), ("train_prm", 4e-6, 64)):  # rows: 512 solutions and more
        config[stage].update(
            batch_size=rows, dtype="bfloat16", freeze=("vision",), shift=0, noise=0.0, max_length=8192,
            row_examples=16, row_tiles=56, checkpoint_every=200,
        )  # fmt: skip
        config[stage].optimizer.update(
            name="adamw", learning_rate=rate, warmup=0.03, weight_decay=0.05, clip=1.0, moments="float32"
        )
    config.sft.steps = 0
    config.train_prm.steps = 4000  # three epochs of 700,000 solutions
    config.annotate.update(
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
    config.evaluate.update(
        temperature=1.0, dtype="bfloat16", max_new_tokens=2048, slots=256, cache_tokens=200_000, score_rows=16
    )
    return config
