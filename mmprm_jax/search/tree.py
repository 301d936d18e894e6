"""The search trees of all problems in flight as one pytree of arrays, and pure functions over the whole batch.

Numbers only: which text a node stands for is the caller's business (``omegaprm.Forest``). Row b of every array is one
tree of at most N nodes with n rollouts each. A tree grows by binary searches for the first wrong step of a rollout
(OmegaPRM, arXiv 2406.06592, section 3): ``select`` takes the rollout with the highest Q + U and begins its search,
``record`` adds the node that the search asked for and takes its next step or, at its end, backs up. ``advance`` is
both, jitted: one call per round. Its settings are arrays, and rows without news are left alone, so nothing but another
shape compiles anew.

Ties go to the node with fewer visits, then to the older node; inside a node to the rollout with the higher Q, then to
the earlier one. Equal numbers have equal priorities, whatever their place in the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mmprm_jax.settings import Search

GROWING, FINISHED, FULL = range(3)  # FULL: a node did not fit; the tree is lost


A = TypeVar("A")  # arrays on the host, or of JAX
Scalar = Any  # of NumPy, or of JAX under jit, also many at once


class Constants(NamedTuple):
    """The settings that may change without compiling anew: scalars, float32 and int32."""

    c_puct: Scalar
    alpha: Scalar
    beta: Scalar
    length_scale: Scalar
    max_searches: Scalar
    rollout_budget: Scalar

    @classmethod
    def of(cls, settings: Search) -> Constants:
        reals = (settings.c_puct, settings.alpha, settings.beta, settings.length_scale)
        limits = (min(limit, 2**31 - 1) for limit in (settings.max_searches, settings.rollout_budget))
        return cls(*map(np.float32, reals), *map(np.int32, limits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trees:
    """B trees. int32 but for ``waiting``. Nodes from ``size`` on hold no meaning."""

    size: jax.Array  # [B] nodes in use
    parent: jax.Array  # [B, N] -1 for the root
    k: jax.Array  # [B, N] right rollouts
    visits: jax.Array  # [B, N] finished searches of a rollout of this node
    waiting: jax.Array  # bool [B, N, n] rollouts that may be selected
    length: jax.Array  # [B, N, n] of the rollout without its prefix: tokens, or words
    segments: jax.Array  # [B, N, n] of the rollout without its prefix
    searches: jax.Array  # [B] selections so far
    log: jax.Array  # [B, S, 2] node and rollout of each selection
    # The binary search under way, over the prefixes of left..right segments; left > right: there is none.
    node: jax.Array  # [B] the selected node; -1 before the first selection
    rollout: jax.Array  # [B] the selected rollout
    above: jax.Array  # [B] the node under which the next new one is added
    left: jax.Array  # [B]
    right: jax.Array  # [B]
    status: jax.Array  # [B] GROWING, FINISHED or FULL


class Event(NamedTuple, Generic[A]):
    """What became known of the trees in one round: each row is one sampled prefix, or one met again."""

    which: A  # bool [B] rows with news; what the others hold does not matter
    fresh: A  # bool [B] a new tree begins; its root was sampled
    node: A  # int32 [B] the node that was met again; -1: a new one
    k: A  # int32 [B] right rollouts of the new node; so below
    length: A  # int32 [B, n]
    segments: A  # int32 [B, n]
    candidates: A  # bool [B, n] distinct wrong rollouts with more than one segment


class Report(NamedTuple):
    """What the caller needs after a round. The prefix wanted next: ``middle`` segments of a rollout of ``node``."""

    status: jax.Array  # int32 [B]
    node: jax.Array  # int32 [B]
    rollout: jax.Array  # int32 [B]
    middle: jax.Array  # int32 [B]
    parent: jax.Array  # int32 [B, N]
    visits: jax.Array  # int32 [B, N]
    searches: jax.Array  # int32 [B]
    log: jax.Array  # int32 [B, S, 2]


def empty(trees: int, nodes: int, rollouts: int, searches: int) -> Trees:
    """``trees`` rows with room for ``nodes`` nodes of ``rollouts`` rollouts and a log of ``searches`` selections."""
    b, bn, bnr = (trees,), (trees, nodes), (trees, nodes, rollouts)
    shapes = {"parent": bn, "k": bn, "visits": bn, "waiting": bnr, "length": bnr, "segments": bnr}
    shapes["log"] = (trees, searches, 2)
    return Trees(
        **{
            field.name: jnp.zeros(shapes.get(field.name, b), bool if field.name == "waiting" else jnp.int32)
            for field in dataclasses.fields(Trees)
        }
    )


def restart(trees: Trees, which: jax.Array) -> Trees:
    """Empties the rows ``which`` (bool [B]); the next node recorded there is a root."""
    start = {"size": 0, "visits": 0, "waiting": False, "searches": 0, "node": -1, "rollout": 0, "above": -1}
    start |= {"left": 1, "right": 0, "status": GROWING}
    fields = {}
    for name, value in start.items():
        old = getattr(trees, name)
        rows = jnp.expand_dims(which, tuple(range(1, old.ndim)))
        fields[name] = jnp.where(rows, jnp.full_like(old, value), old)
    return dataclasses.replace(trees, **fields)


def quality(mc: Scalar, length: Scalar, c: Constants) -> Any:
    """Q = alpha^(1 - MC) * beta^(len / L): prefers wrong rollouts of likely right prefixes, and short ones.

    OmegaPRM section 3 (state-rollout value). float32: ``mc`` in [0, 1] is the value of the prefix, ``length`` that of
    the rollout without the prefix.
    """
    return c.alpha ** (1.0 - mc) * c.beta ** (length / c.length_scale)


def exploration(total_visits: Scalar, visits: Scalar, c: Constants) -> Any:
    """U = c_puct * sqrt(sum of N over all nodes) / (1 + N of this node), the PUCT bonus of OmegaPRM section 3."""
    return c.c_puct * jnp.sqrt(total_visits) / (1.0 + visits)


def best(trees: Trees, c: Constants) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The waiting rollout of each tree with the highest Q + U: node, rollout, its priority (-inf: none waits). All [B].

    For the tie rule see above.
    """
    mc = trees.k.astype(jnp.float32) / trees.waiting.shape[2]
    q = quality(mc[:, :, None], trees.length.astype(jnp.float32), c)
    q = jnp.where(trees.waiting, q, -jnp.inf)
    total = trees.visits.sum(1, keepdims=True).astype(jnp.float32)
    priority = q.max(2) + exploration(total, trees.visits.astype(jnp.float32), c)  # [B, N]
    top = priority.max(1)
    tied = priority == top[:, None]
    fewest = jnp.where(tied, trees.visits, jnp.iinfo(jnp.int32).max)
    node = fewest.argmin(1).astype(jnp.int32)  # the first of equals: the older node
    rollout = q[jnp.arange(len(node)), node].argmax(1).astype(jnp.int32)  # likewise the earlier rollout
    return node, rollout, top


def select(trees: Trees, c: Constants, which: jax.Array) -> Trees:
    """Begins the next search of the rows ``which`` (bool [B]) that have none under way; their candidate waits no more.

    A tree is finished instead if max_searches were begun, rollout_budget is used up, or nothing waits.
    """
    rows = jnp.arange(len(trees.size))
    node, rollout, priority = best(trees, c)
    which = which & (trees.status == GROWING) & (trees.left > trees.right)
    used = trees.size * trees.waiting.shape[2]
    ends = (trees.searches >= c.max_searches) | (used >= c.rollout_budget) | (priority == -jnp.inf)
    begins = which & ~ends
    at = jnp.where(begins, node, trees.k.shape[1])  # out of bounds: dropped
    entry = jnp.where(begins, trees.searches, trees.log.shape[1])
    return dataclasses.replace(
        trees,
        waiting=trees.waiting.at[rows, at, rollout].set(False, mode="drop"),
        log=trees.log.at[rows, entry].set(jnp.stack([node, rollout], 1), mode="drop"),
        searches=trees.searches + begins.astype(jnp.int32),
        node=jnp.where(begins, node, trees.node),
        rollout=jnp.where(begins, rollout, trees.rollout),
        above=jnp.where(begins, node, trees.above),
        left=jnp.where(begins, 1, trees.left),
        right=jnp.where(begins, trees.segments[rows, node, rollout] - 1, trees.right),
        status=jnp.where(which & ends, FINISHED, trees.status),
    )


def record(trees: Trees, event: Event[jax.Array]) -> Trees:
    """Enters an event: adds the new node, or takes the one that was met again, and lets the search take its step.

    Only nodes with 0 < k < n have candidates. A row without room for the node becomes FULL and stays as it was.
    """
    rows, (_, nodes, rollouts) = jnp.arange(len(trees.size)), trees.waiting.shape
    new = event.which & (event.node < 0)
    full = new & (trees.size == nodes)
    at = jnp.where(new & ~full, trees.size, nodes)  # out of bounds: dropped
    mixed = (event.k > 0) & (event.k < rollouts)
    added = dataclasses.replace(
        trees,
        parent=trees.parent.at[rows, at].set(trees.above, mode="drop"),
        k=trees.k.at[rows, at].set(event.k, mode="drop"),
        waiting=trees.waiting.at[rows, at].set(event.candidates & mixed[:, None], mode="drop"),
        length=trees.length.at[rows, at].set(event.length, mode="drop"),
        segments=trees.segments.at[rows, at].set(event.segments, mode="drop"),
        size=trees.size + (new & ~full).astype(jnp.int32),
        status=jnp.where(full, FULL, trees.status),
    )
    return _narrow(added, event.which & ~full, jnp.where(new, trees.size, event.node))


def _narrow(trees: Trees, which: jax.Array, met: jax.Array) -> Trees:
    """One step of the binary search for the shortest prefix with MC = 0, now that its middle is node ``met`` [B].

    The whole solution is known to be wrong, so it is never sampled; if every proper prefix has MC > 0, the last segment
    is the error. At the end of a search comes the back-up: one more visit of the selected node.
    """
    rows = jnp.arange(len(trees.size))
    middle = (trees.left + trees.right) // 2
    wrong = trees.k[rows, met] == 0
    right = jnp.where(which & wrong, middle - 1, trees.right)
    left = jnp.where(which & ~wrong, middle + 1, trees.left)
    over = which & (left > right) & (trees.node >= 0)  # a root is no part of a search
    at = jnp.where(over, trees.node, trees.k.shape[1])
    return dataclasses.replace(
        trees,
        left=left,
        right=right,
        above=jnp.where(which & ~wrong, met, trees.above),
        visits=trees.visits.at[rows, at].add(1, mode="drop"),
    )


@functools.partial(jax.jit, donate_argnums=0)
def advance(trees: Trees, c: Constants, event: Event) -> tuple[Trees, Report]:
    """One round of all trees: new roots, what was sampled or met again, the next selections. ``trees`` is donated."""
    trees = record(restart(trees, event.fresh), event)
    trees = select(trees, c, event.which)
    middle = (trees.left + trees.right) // 2
    return trees, Report(
        trees.status, trees.node, trees.rollout, middle, trees.parent, trees.visits, trees.searches, trees.log
    )
