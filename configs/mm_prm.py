"""As MM-PRM (arXiv 2505.13427): its policy, the constants of its search and sampling, the training of its PRM.

``--config.data.folder`` names your problems, ``--config.policy`` another policy (a folder, a hub id, or what ``mmprm
convert`` wrote), ``--config.annotate.policy`` one for the annotation only (with ``--config.annotate.servers`` the
model's name there). ``--config.sft.steps=N`` trains the policy first, on the folder's sft.jsonl. What the paper does
not say (the batch of the policy's training, packing, dtypes) is our choice. The constants of the search are the
defaults: they are the paper's.
"""

from ml_collections import ConfigDict


def training(steps: int, rate: float, rows: int) -> ConfigDict:
    """What the two trainings have in common; rows: 512 solutions and more."""
    return ConfigDict(
        dict(
            steps=steps, batch_size=rows, dtype="bfloat16", freeze=("vision",), max_length=8192, row_examples=16,
            row_tiles=56, checkpoint_every=200,
            optimizer=dict(name="adamw", learning_rate=rate, warmup=0.03, weight_decay=0.05),
        )
    )  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"mm_prm.py takes no argument, not :{arg}")
    config = ConfigDict()
    config.policy = "OpenGVLab/InternVL2_5-8B"
    config.max_tiles = 6
    config.model = ConfigDict(dict(remat="full"))
    config.sft = training(steps=0, rate=4e-5, rows=32)
    config.train_prm = training(steps=4000, rate=4e-6, rows=64)  # three epochs of 700,000 solutions
    config.annotate = ConfigDict(
        dict(
            dtype="bfloat16", top_k=50, top_p=0.9, repetition_penalty=1.05, max_new_tokens=2048, slots=256,
            in_flight=64, cache_tokens=200_000, trees_per_shard=20,
        )
    )  # fmt: skip
    config.evaluate = ConfigDict(
        dict(
            dtype="bfloat16", top_k=50, top_p=0.9, repetition_penalty=1.05, max_new_tokens=2048, slots=256,
            cache_tokens=200_000, score_rows=16,
        )
    )  # fmt: skip
    return config
