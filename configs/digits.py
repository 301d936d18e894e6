"""The embedded default: handwritten arithmetic, from data to a report on two CPU cores.

``digits.py`` is the run that makes claims; ``digits.py:smoke`` walks the same path in a minute or two and makes none.
Here is what differs from the defaults (``mmprm_jax/settings.py``); ``mmprm config --config=FILE`` prints every setting.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"digits.py takes no argument or :smoke, not :{arg}")
    config = ConfigDict()
    config.sft = ConfigDict(
        dict(steps=900, optimizer=dict(name="muon", learning_rate=1e-2), shift=1, noise=8.0, max_length=52)
    )
    config.annotate = ConfigDict(
        dict(
            num_rollouts=8, max_searches=12, rollout_budget=80, right_solutions=2,
            temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=40, cache_tokens=200_000,
        )
    )  # fmt: skip
    config.train_prm = ConfigDict(
        dict(steps=550, optimizer=dict(name="muon", learning_rate=4e-3), shift=1, noise=8.0, max_length=60)
    )
    config.evaluate = ConfigDict(dict(temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=40))
    if arg == "smoke":
        config.data = ConfigDict(dict(train=64, dev=16, test=32, demonstrations=256, transcriptions=256, text_only=256))
        config.model = ConfigDict(dict(decoder=dict(num_layers=2)))
        config.sft.update(steps=60, checkpoint_every=20)
        config.annotate.update(
            num_rollouts=4, max_searches=4, rollout_budget=24, slots=64, in_flight=32, trees_per_shard=16
        )
        config.train_prm.update(steps=40, checkpoint_every=20)
        config.evaluate.update(slots=64, score_rows=64, calibration_problems=8, calibration_rollouts=8)
        config.annotate.max_unread = config.evaluate.max_unread = 1.0  # a policy of so few steps may write anything
    return config
