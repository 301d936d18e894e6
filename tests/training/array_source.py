"""Batches from arrays in memory, for tests of what consumes them."""

import numpy as np


class ArraySource:
    """Endless shuffled batches of ``columns`` [rows, ...]; the state is the number of rows handed out."""

    def __init__(self, columns, batch_size, seed=0):
        self.columns, self.batch_size, self.seed, self.at = columns, batch_size, seed, 0
        self.rows = len(next(iter(columns.values())))

    def __next__(self):
        epochs = range(self.at // self.rows, (self.at + self.batch_size - 1) // self.rows + 1)
        order = np.concatenate([np.random.default_rng((self.seed, e)).permutation(self.rows) for e in epochs])
        start = self.at - epochs[0] * self.rows
        chosen = order[start : start + self.batch_size]
        self.at += self.batch_size
        return {**{k: v[chosen] for k, v in self.columns.items()}, "example": chosen[:, None].astype(np.int32)}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]
