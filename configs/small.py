"""A small model of your own on real problems, from scratch; ``--config.data.folder`` names them.

The folder has {train,dev,test}.jsonl and sft.jsonl (``mmprm prepare``, ``mmprm split``); a tokenizer is made for it. A
model of this size shows that the data go through all stages; it learns no mathematics. ``small.py:smoke`` is shorter.
"""

from ml_collections import ConfigDict


def training(steps: int) -> ConfigDict:
    """What the two trainings have in common."""
    return ConfigDict(
        dict(
            steps=steps, batch_size=4, optimizer=dict(name="muon", learning_rate=4e-3), noise=8.0,
            max_length=640, row_examples=8, row_tiles=16,
        )
    )  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"small.py takes no argument or :smoke, not :{arg}")
    config = ConfigDict()
    config.max_tiles = 4
    config.model = ConfigDict(
        dict(
            vision=dict(image_size=42, patch_size=7),
            decoder=dict(hidden_size=128, num_layers=4, head_dim=32, intermediate_size=256),
        )
    )
    config.sft = training(steps=600)
    config.train_prm = training(steps=300)
    config.annotate = ConfigDict(
        dict(
            num_rollouts=8, max_searches=12, rollout_budget=80, right_solutions=2,
            temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=128, slots=64, in_flight=32, cache_tokens=30_000,
        )
    )  # fmt: skip
    config.evaluate = ConfigDict(
        dict(
            temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=128, slots=64, cache_tokens=30_000,
            score_rows=16, calibration_problems=20, calibration_rollouts=8,
        )
    )  # fmt: skip
    config.annotate.max_unread = config.evaluate.max_unread = 1.0  # many of its solutions never end
    if arg == "smoke":
        config.model.decoder.update(hidden_size=64, num_layers=2, head_dim=16, intermediate_size=128)
        config.annotate.update(num_rollouts=4, max_searches=4, rollout_budget=24, trees_per_shard=16)
        config.evaluate.update(n=8, calibration_problems=4)
    return config
