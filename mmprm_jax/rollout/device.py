"""The programs of the sampling engine that run on the device, and the arrays they work on.

Names of sizes: B shards of the batch (data x fsdp), S slots, R rows (resident prefixes), M samples of a row, P width of
the rows, T columns of a slot, C entries of the pool, L layers, G key/value heads, Q query heads of each, D head size.

A slot decodes one sample. Its attention has two parts, joined by their log-sum-exps: over the row of its prefix, of
which all samples of a group share one copy, and over its own tokens. Slots are dense, whatever rows their samples
belong to: only the queries of the shared part are sorted by row, [R, M], for one batched matmul. When a sample ends,
its slot takes the next one from the queue inside of the loop; the first token of a sample was drawn on admission.

Every sum runs over positions in their order, with zeros behind: which slot, row, width or batch a token met does not
change its rounding, as long as the backend's matrix products treat their rows alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmprm_jax.models.config import DecoderConfig
from mmprm_jax.models.layers import attention
from mmprm_jax.models.vlm import VLM
from mmprm_jax.rollout.sampling import Sampling, draw, uniforms
from mmprm_jax.sharding import BATCH, dot, fit_spec, reshape, take_rows

State = dict[str, Any]
_BLOCK = 64  # columns of a part of a slot's cache, at least
_NONE = -1e30  # the score of what must not be attended to


# On CPUs the order of a sum can depend on the number of rows: a sample would depend on how many others there are.
# YNNPACK chooses its kernels by it, and Eigen splits the terms of a sum among threads where rows are few.
_EXACT = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_multi_thread_eigen": False}}
# oneDNN's kernels for AVX2 take six rows at a time; one to three that are left over are summed otherwise.
MAX_REMAINDER = 3
SMALL_PRODUCT = 48  # rows; products with fewer are summed otherwise, too


def rounding_depends_on_rows(mesh: Any) -> bool:
    """Whether the sums of a row of a matrix product can depend on the number of rows, even in a ``Program``."""
    return mesh.devices.flat[0].platform == "cpu"


def has_remainder_rows(rows: int) -> bool:
    """Whether the last rows of a product of so many are summed in another order where ``rounding_depends_on_rows``."""
    return 0 < rows % 6 <= MAX_REMAINDER


@functools.cache
def _options(platform: str) -> dict[str, Any]:
    """For the compiler, if it knows them."""
    options = _EXACT.get(platform, {})
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class Program:
    """A jitted function that is compiled so that what becomes of a row does not depend on the other rows."""

    def __init__(self, function: Callable[..., Any], **settings: Any):
        self.function, self._settings, self.__name__ = function, settings, function.__name__
        self._jitted: dict[str, Any] = {}

    def _of_platform(self) -> Any:
        device = jax.sharding.get_abstract_mesh().abstract_device
        platform = "cpu" if device is None else device.platform
        if platform not in self._jitted:
            options = _options(platform) if platform == jax.default_backend() else {}
            self._jitted[platform] = jax.jit(self.function, compiler_options=options, **self._settings)
        return self._jitted[platform]

    def __call__(self, *args: Any, **static: Any) -> Any:
        return self._of_platform()(*args, **static)

    def lower(self, *args: Any, **static: Any) -> Any:
        return self._of_platform().lower(*args, **static)

    def compiled(self) -> int:
        """How often it was compiled."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())


def program(**settings: Any) -> Callable[[Callable[..., Any]], Program]:
    """Decorator; settings as of ``jax.jit``."""
    return lambda function: Program(function, **settings)


def shards(mesh: Any) -> int:
    """B: into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def blocks(columns: int) -> list[int]:
    """The columns of each part of a slot's cache: up to four parts, so that short samples do not read all of it."""
    size = max(_BLOCK, -(-columns // 4))
    return [min(size, columns - start) for start in range(0, columns, size)]


def _heads(cfg: DecoderConfig) -> P:
    """Layout of arrays whose first axis is the batch (or shard) and whose third is the key/value head."""
    return P(BATCH, None, fit_spec((cfg.num_kv_heads,), ("tensor",))[0])


def per_shard(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``f`` on each shard's part of its arguments: gathers and scatters stay on their device."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _first(tree: Any) -> Any:
    """Takes the shard axis, of local size 1, off."""
    return jax.tree.map(lambda x: x[0], tree)


def _put_first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array that is to be made."""

    shape: tuple[int, ...]
    dtype: Any
    spec: P


Make = Callable[[Any, Any], Any]  # (mesh, tree of ArraySpec) -> the same tree of arrays, or of their shapes


def zeros(mesh: Any, tree: Any) -> Any:
    """Zeros for a tree of ``ArraySpec``."""
    # Of full rank, as programs return them: otherwise the second call would compile again.
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P(*x.spec, *(None,) * (len(x.shape) - len(x.spec)))), tree)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree), out_shardings=shardings)()


def new_pool(cfg: DecoderConfig, mesh: Any, entries: int, dtype: Any) -> State:
    """k, v [B, L, C, G, D] and the hidden states after the last norm [B, C, size] of known tokens."""
    b, spec = shards(mesh), P(BATCH, None, None, _heads(cfg)[2])
    shape = (b, cfg.num_layers, entries, cfg.num_kv_heads, cfg.head_dim)
    hidden = ArraySpec((b, entries, cfg.hidden_size), dtype, P(BATCH))
    return zeros(mesh, {"k": ArraySpec(shape, dtype, spec), "v": ArraySpec(shape, dtype, spec), "hidden": hidden})


def new_rows(
    cfg: DecoderConfig, mesh: Any, rows: int, width: int, dtype: Any, make: Make = zeros
) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values of resident prefixes for each layer, [B, R, G, P, D]."""
    x = ArraySpec((shards(mesh), rows, cfg.num_kv_heads, width, cfg.head_dim), dtype, _heads(cfg))
    return make(mesh, [(x, x)] * cfg.num_layers)


@functools.partial(jax.jit, static_argnames=("width",))
def resize(rows: Any, width: int) -> Any:
    """The same rows with another P: zeros are added, or the unused end is cut off."""

    def change(x: jax.Array) -> jax.Array:
        more = max(0, width - x.shape[3])
        return jnp.pad(x, [(0, 0)] * 3 + [(0, more), (0, 0)])[:, :, :, :width]

    return jax.tree.map(change, rows)


def new_state(
    cfg: DecoderConfig, mesh: Any, slots: int, rows: int, samples: int, columns: int, dtype: Any, make: Make = zeros
) -> State:
    """Slots, all free; the parameters of rows; the samples' tokens so far."""
    b, depth, vocab = shards(mesh), cfg.head_dim, cfg.vocab_size

    def array(*shape: int, dtype: Any = jnp.int32) -> ArraySpec:
        return ArraySpec((b, *shape), dtype, P(BATCH))

    def cache(*shape: int) -> ArraySpec:
        return ArraySpec((b * slots, cfg.num_kv_heads, *shape), dtype, P(BATCH, _heads(cfg)[2]))

    parameters = {name: array(rows, *value.shape, dtype=value.dtype) for name, value in Sampling().arrays().items()}
    tree = {
        # keys and values, for each layer and block
        "own": [[(cache(depth, size), cache(size, depth)) for size in blocks(columns)]] * cfg.num_layers,
        "slot": {
            "sample": array(slots),  # row * M + number of the sample in its row
            "start": array(slots),  # tokens of the prefix
            "t": array(slots),  # tokens sampled so far, the first one included
            "last": array(slots),
            "alive": array(slots, dtype=bool),
        },
        "seen": ArraySpec((b, slots, vocab), bool, P(BATCH, *fit_spec((slots,), ("tensor",), mesh))),
        "row": {
            "length": array(rows),
            "key": array(rows, 2, dtype=jnp.uint32),
            "offset": array(rows),  # number of the row's first sample in its group
            "seen": array(rows, vocab, dtype=bool),
            **parameters,
        },
        "out": {
            "tokens": array(rows, samples, columns),
            "logprobs": array(rows, samples, columns, dtype=jnp.float32),
            "count": array(rows, samples),  # tokens of a finished sample, 0 before
        },
    }
    return make(mesh, tree)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def unstack(params: Any, *, graphdef: Any) -> dict[str, Any]:
    """The weights of the decoder's layers one by one, for ``decode``: slicing them there would copy them each time."""
    decoder = nnx.merge(graphdef, params).decoder
    stacked = nnx.split(decoder.layers)[1]
    count = jax.tree.leaves(stacked)[0].shape[0]
    head = decoder.embed[...].T if decoder.lm_head is None else decoder.lm_head[...]
    tensor = dict(jax.sharding.get_abstract_mesh().shape)["tensor"]
    if tensor > 1:  # a vocabulary of an odd size is padded: each device has its part of it
        head = jnp.pad(jax.sharding.reshard(head, P()), ((0, 0), (0, -head.shape[1] % (128 * tensor))))
        head = jax.sharding.reshard(head, fit_spec(head.shape, ("fsdp", "tensor")))
    return {"layers": [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)], "head": head}


@program(static_argnames=("graphdef",))
def tower(params: Any, pixels: jax.Array, *, graphdef: Any) -> jax.Array:
    """pixels [B, V, H, W, 3] normalised -> visual tokens [B, V * tokens of a tile, size]."""
    return nnx.merge(graphdef, params).embed_images(pixels)


@program(static_argnames=("graphdef",), donate_argnames=("pool",))
def extend(params: Any, pool: State, batch: State, visual: jax.Array | None, *, graphdef: Any) -> State:
    """Computes new tokens of E prefixes in each shard, on top of what the pool knows of them.

    batch, all int32: tokens [B, E, W]; picture [B, E, W]: index into ``visual``, -1 at text; known [B, E, K]: the
    entries of the tokens before, with room for W more; length [B, E]: how many there are; pool_entries [B, E, W]:
    where to put the new ones, beyond the pool at padding (which is on the right).
    """
    model: VLM = nnx.merge(graphdef, params)
    b, e, w = batch["tokens"].shape
    heads = _heads(model.decoder.cfg)[2]
    stacked = P(None, BATCH, None, heads)
    x = model.decoder.embed_tokens(reshape(batch["tokens"], (b * e, w), BATCH))
    if visual is not None:

        def mix(x: jax.Array, visual: jax.Array, at: jax.Array) -> jax.Array:
            return jnp.where(at[0][..., None] >= 0, visual[0][jnp.maximum(at[0], 0)], x)

        x = per_shard(mix, P(BATCH), P(BATCH))(x, visual, batch["picture"])
    length = reshape(batch["length"], (b * e,), BATCH)
    positions = length[:, None] + jnp.arange(w)
    rope = model.decoder.rope(positions, jnp.ones_like(length))
    mask = jnp.arange(batch["known"].shape[2]) <= positions[..., None]
    gather = per_shard(lambda c, at: c[0][:, at[0]], (P(BATCH, None, None, heads), P(BATCH)), stacked)
    before = tuple(gather(pool[name], batch["known"]) for name in ("k", "v"))  # [L, B E, K, G, D]
    insert = per_shard(
        jax.vmap(lambda all_, new, at: jax.lax.dynamic_update_slice(all_, new, (at, 0, 0))),
        (P(BATCH, None, heads), P(BATCH, None, heads), P(BATCH)),
        P(BATCH, None, heads),
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> tuple[jax.Array, Any]:
        # By position, whatever was known: a sum's order, and so its rounding, is that of any other way to the prefix.
        context = (jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in before)
        whole_k, whole_v = (insert(c, x, length) for c, x in zip(context, (k, v), strict=True))
        return attention(q, whole_k, whole_v, mask), (k, v)

    hidden, (k, v) = model.decoder(x, rope, attend)

    def store(pool: State, k: jax.Array, v: jax.Array, hidden: jax.Array, entries: jax.Array) -> State:
        at = entries[0].reshape(-1)

        def put(c: jax.Array, x: jax.Array) -> jax.Array:
            x = x.reshape(x.shape[0], -1, *x.shape[3:])
            return c.at[0, :, at].set(jnp.moveaxis(x, 1, 0), mode="drop")  # separated indices come first

        flat = hidden.reshape(-1, hidden.shape[-1])
        state = pool["hidden"].at[0, at].set(flat, mode="drop")
        return {"k": put(pool["k"], k), "v": put(pool["v"], v), "hidden": state}

    layout = {"k": P(BATCH, None, None, heads), "v": P(BATCH, None, None, heads), "hidden": P(BATCH)}
    return per_shard(store, (layout, stacked, stacked, P(BATCH), P(BATCH)), layout)(
        pool, k, v, hidden, batch["pool_entries"]
    )


def _flat_logits(model: VLM, hidden: jax.Array, b: int) -> jax.Array:
    """[B N, 1, size] -> [B, N, V] float32; every device has the whole vocabulary."""
    logits = model.decoder.logits(hidden)
    logits = jax.sharding.reshard(logits, fit_spec(logits.shape, (BATCH,)))
    return reshape(logits, (b, logits.shape[0] // b, logits.shape[2]), BATCH)


def _sampling(row: State, at: jax.Array) -> State:
    """The sampling parameters of the rows ``at``."""
    return {name: row[name][at] for name in Sampling().arrays()}


def _ends(token: jax.Array, t: jax.Array, p: State) -> jax.Array:
    """Whether a sample ends with ``token``, its t-th (from 1)."""
    return jnp.any(token[..., None] == p["stop"], axis=-1) | (t >= p["max_new"])


@program(static_argnames=("graphdef",), donate_argnames=("rows", "state"))
def admit(params: Any, rows: Any, state: State, pool: State, batch: State, *, graphdef: Any) -> tuple[Any, State]:
    """Copies A prefixes in each shard from the pool into rows and draws the first token of their samples.

    batch: at int32 [B, A], the row, beyond R for none; pool_entries, tokens int32 [B, A, P]; length, offset int32 [B,
    A]; key uint32 [B, A, 2]; and the sampling parameters [B, A, ...].
    """
    model: VLM = nnx.merge(graphdef, params)
    b, a = batch["at"].shape
    heads = _heads(model.decoder.cfg)
    kv = P(BATCH, None, None, heads[2])

    def copy(rows: Any, k: jax.Array, v: jax.Array, at: jax.Array, entries: jax.Array) -> Any:
        def one(i: jax.Array, rows: Any) -> Any:  # one by one: the copies of all would need much memory
            found = tuple(c[0][:, entries[0, i]].swapaxes(1, 2) for c in (k, v))  # [L, G, P, D]
            return [
                tuple(r.at[0, at[0, i]].set(x[layer], mode="drop") for r, x in zip(pair, found, strict=True))
                for layer, pair in enumerate(rows)
            ]

        return jax.lax.fori_loop(0, a, one, rows)

    layout = [(heads, heads)] * len(rows)
    rows = per_shard(copy, (layout, kv, kv, P(BATCH), P(BATCH)), layout)(
        rows, pool["k"], pool["v"], batch["at"], batch["pool_entries"]
    )

    def last(hidden: jax.Array, entries: jax.Array, length: jax.Array) -> jax.Array:
        at = jnp.take_along_axis(entries[0], jnp.maximum(length[0] - 1, 0)[:, None], axis=1)
        return hidden[0][at]

    hidden = per_shard(last, P(BATCH), P(BATCH))(pool["hidden"], batch["pool_entries"], batch["length"])
    logits = _flat_logits(model, hidden, b)

    def start(row: State, out: State, batch: State, logits: jax.Array) -> tuple[State, State]:
        row, out, batch, logits = _first((row, out, batch, logits))
        at, samples = batch["at"], out["count"].shape[1]
        counted = jnp.arange(batch["tokens"].shape[1]) < batch["length"][:, None]
        tokens = jnp.where(counted, batch["tokens"], logits.shape[-1])
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(a)[:, None], tokens].set(True, mode="drop")

        def spread(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x[:, None], (a, samples, *x.shape[1:]))

        number = batch["offset"][:, None] + jnp.arange(samples)
        uniform = uniforms(spread(batch["key"]), number, jnp.zeros_like(number))
        p = {name: spread(batch[name]) for name in Sampling().arrays()}
        token, logprob = draw(spread(logits), spread(seen), uniform, p)
        done = _ends(token, jnp.ones_like(token), p)
        out = {
            "tokens": out["tokens"].at[at, :, 0].set(token, mode="drop"),
            "logprobs": out["logprobs"].at[at, :, 0].set(logprob, mode="drop"),
            "count": out["count"].at[at].set(done.astype(jnp.int32), mode="drop"),
        }
        new = {**{name: batch[name] for name in row if name != "seen"}, "seen": seen}
        row = {name: value.at[at].set(new[name], mode="drop") for name, value in row.items()}
        return _put_first((row, out))

    row, out = per_shard(start, P(BATCH), P(BATCH))(state["row"], state["out"], batch, logits)
    return rows, {**state, "row": row, "out": out}


def _join(parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]], dtype: Any) -> jax.Array:
    """Attention from its parts: the largest score, the sum of exponentials and the weighted values of each."""
    top = functools.reduce(jnp.maximum, (top for top, _, _ in parts))
    scaled = [(jnp.exp(t - top), total, out) for t, total, out in parts]
    total = sum(scale * total for scale, total, _ in scaled)
    out = sum(scale[..., None] * out for scale, _, out in scaled)
    return (out / jnp.maximum(total, 1e-30)[..., None]).astype(dtype)  # a free slot attends to nothing


def _part(scores: jax.Array, mask: jax.Array, equation: str, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One part of an attention, not normalised; all in float32."""
    scores = jnp.where(mask, scores, _NONE)
    top = jnp.maximum(jnp.max(scores, axis=-1), 0.5 * _NONE)  # where nothing counts, all weights are still 0
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum(equation, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return top, jnp.sum(weights, axis=-1), out


def _attend(q: Any, k: Any, v: Any, own: Any, prefix: Any, plan: State, length: Any) -> Any:
    """One shard: q [S, 1, G, Q, D], k and v [S, 1, G, D] -> like q, and the blocks of ``own`` with k and v added."""
    plan, length = _first((plan, length))
    q = (q[:, 0] * q.shape[-1] ** -0.5).astype(q.dtype)
    slots, start, parts, after = jnp.arange(len(q)), 0, [], []
    for own_k, own_v in own:
        size, column = own_v.shape[2], plan["column"] - start
        at = jnp.where((column >= 0) & (column < size), column, size)
        own_k = own_k.at[slots, :, :, at].set(k[:, 0], mode="drop", unique_indices=True)
        own_v = own_v.at[slots, :, at].set(v[:, 0], mode="drop", unique_indices=True)
        mine = (jnp.arange(size) <= column[:, None])[:, None, None, :]
        scores = jnp.einsum("sgqd,sgdt->sgqt", q, own_k, preferred_element_type=jnp.float32)
        parts.append(_part(scores, mine, "sgqt,sgtd->sgqd", own_v))
        after.append((own_k, own_v))
        start += size
    prefix_k, prefix_v = _first(prefix)
    s, g, per_group, d = q.shape
    r, samples = prefix_k.shape[0], plan["slot_of"].shape[0] // prefix_k.shape[0]
    by_row = q.at[plan["slot_of"]].get(mode="fill", fill_value=0).reshape(r, samples, g, per_group, d)
    by_row = by_row.swapaxes(1, 2).reshape(r, g, samples * per_group, d)
    scores = jnp.einsum("rgnd,rgpd->rgnp", by_row, prefix_k, preferred_element_type=jnp.float32)
    there = (jnp.arange(prefix_k.shape[2]) < length[:, None])[:, None, None, :]

    def to_slots(x: jax.Array) -> jax.Array:
        x = x.reshape(r, g, samples, per_group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(r * samples, g, per_group, *x.shape[4:])[plan["place"]]

    top, total, values = _part(scores, there, "rgnp,rgpd->rgnd", prefix_v)
    before = (to_slots(top), to_slots(total), to_slots(values))
    return _join([before, *parts], q.dtype)[:, None], after


def _plan(slot: State, out: State) -> State:
    """Where the slots' queries go in the order of rows: place [S], and slot_of [R M], beyond S where there is none.

    column [S]: where in its cache a slot writes, -1 for none.
    """
    slot, count = _first((slot, out["count"]))
    size, s = count.size, slot["t"].shape[0]
    place = jnp.where(slot["alive"], slot["sample"], size)
    slot_of = jnp.full((size,), s, jnp.int32).at[place].set(jnp.arange(s), mode="drop")
    column = jnp.where(slot["alive"], slot["t"] - 1, -1)
    return _put_first({"place": jnp.minimum(place, size - 1), "slot_of": slot_of, "column": column})


def _draw(logits: jax.Array, seen: jax.Array, uniform: jax.Array, p: State) -> Any:
    """Some slots of a shard."""
    return _put_first(draw(logits[0, :, : seen.shape[-1]], seen[0], uniform[0], _first(p)))


def _chances(slot: State, row: State, samples: int) -> Any:
    slot, row = _first((slot, row))
    at, number = jnp.divmod(slot["sample"], samples)
    return _put_first((uniforms(row["key"][at], row["offset"][at] + number, slot["t"]), _sampling(row, at)))


def _mark(seen: jax.Array, rows: jax.Array, token: jax.Array, taken: jax.Array, at: jax.Array, last: jax.Array) -> Any:
    """Some slots of a shard: the tokens that count for the repetition penalty."""
    seen, rows, token, taken, at, last = _first((seen, rows, token, taken, at, last))
    slots = jnp.arange(len(token))
    seen = seen.at[slots, token].set(True)

    def fill(seen: jax.Array) -> jax.Array:
        chosen = (taken[:, None] & (at[:, None] == jnp.arange(len(rows)))).astype(jnp.bfloat16)
        fresh = jnp.einsum("sr,rv->sv", chosen, rows.astype(jnp.bfloat16)) > 0  # a gather does not fit in VMEM
        return jnp.where(taken[:, None], fresh, seen).at[slots, last].set(True)

    return jax.lax.cond(jnp.any(taken), fill, lambda seen: seen, seen)[None]


def _advance(slot: State, row: State, out: State, queue: State, drawn: Any) -> Any:
    """One shard: every live slot gets its next token; slots whose sample has ended take the next of the queue."""
    slot, row, out, queue, (token, logprob) = _first((slot, row, out, queue, drawn))
    at, number = jnp.divmod(slot["sample"], out["count"].shape[1])
    p = _sampling(row, at)
    t = slot["t"] + 1
    done = slot["alive"] & _ends(token, t, p)
    at = jnp.where(slot["alive"], at, row["length"].shape[0])
    out = {
        "tokens": out["tokens"].at[at, number, slot["t"]].set(token, mode="drop"),
        "logprobs": out["logprobs"].at[at, number, slot["t"]].set(logprob, mode="drop"),
        "count": out["count"].at[jnp.where(done, at, row["length"].shape[0]), number].set(t, mode="drop"),
    }
    slot = {**slot, "t": t, "last": token, "alive": slot["alive"] & ~done}
    slot, queue, new = _refill(slot, row, out, queue)
    return _put_first((slot, out, queue, new))


def _refill(slot: State, row: State, out: State, queue: State) -> tuple[State, State, State]:
    """One shard: free slots take the next samples of the queue, which have their first token already."""
    rank = queue["head"] + jnp.cumsum(~slot["alive"]) - 1
    taken = ~slot["alive"] & (rank < queue["tail"])
    sample = jnp.where(taken, queue["order"][jnp.minimum(rank, queue["order"].shape[0] - 1)], slot["sample"])
    at, number = jnp.divmod(sample, out["count"].shape[1])
    last = jnp.where(taken, out["tokens"][at, number, 0], slot["last"])
    slot = {
        "sample": sample,
        "start": jnp.where(taken, row["length"][at], slot["start"]),
        "t": jnp.where(taken, 1, slot["t"]),
        "last": last,
        "alive": jnp.where(taken, out["count"][at, number] == 0, slot["alive"]),
    }
    return slot, {**queue, "head": queue["head"] + jnp.sum(taken)}, {"taken": taken, "at": at, "last": last}


def _goes_on(limit: State, carry: Any) -> jax.Array:
    """Whether ``decode`` makes another step."""
    state, queue, steps, _ = carry
    free = jnp.sum(~state["slot"]["alive"], axis=1)
    dry = jnp.any((queue["head"] == queue["tail"]) & (free > limit["free_slots"]))
    waiting = jnp.any(queue["head"] < queue["tail"])
    full = jnp.any(state["slot"]["alive"] & (state["slot"]["t"] > limit["columns"]))
    enough = (steps >= limit["steps"]) | ((steps >= limit["min_steps"]) & dry) | full
    return (jnp.any(state["slot"]["alive"]) | waiting) & ~enough


@program(static_argnames=("graphdef", "used"), donate_argnames=("state",))
def decode(
    params: Any, layers: Any, rows: Any, state: State, queue: State, limit: State, *, graphdef: Any, used: int
) -> tuple[State, State]:
    """Decodes until ``limit["steps"]`` steps are done, or earlier when slots run dry.

    layers: from ``unstack``. queue: order int32 [B, R M] of samples (row * M + number) waiting for a slot, head and
    tail int32 [B]. limit, int32: steps, min_steps and free_slots: after ``min_steps`` the loop ends once a shard with
    an empty queue has more than ``free_slots`` free slots. used: blocks of the slots' caches that are read and written;
    the loop ends when a slot needs more. Returns the state and a report that every process can read: count, tokens and
    logprobs of the samples, head of the queues, steps made, ``live``, the sum over steps of live slots, and
    ``longest``, the tokens of the longest sample in a slot.
    """
    model: VLM = nnx.merge(graphdef, params)
    b, s = state["slot"]["t"].shape
    heads = _heads(model.decoder.cfg)
    kv, batch, block = P(BATCH, None, heads[2]), P(BATCH), P(BATCH, heads[2])
    own = [(block, block)] * used
    attend_shard = per_shard(_attend, (kv, kv, kv, own, (heads, heads), batch, batch), (kv, own))
    known = [block[1].shape[2] for block in state["own"][0]]
    limit = {**limit, "columns": sum(known[:used]) if used < len(known) else jnp.inf}
    unused = [layer[used:] for layer in state["own"]]
    state = {**state, "own": [layer[:used] for layer in state["own"]]}
    length = state["row"]["length"]
    # All angles at once: inside of the loop, every layer would compute their sines anew.
    longest = rows[0][0].shape[3] + sum(known[:used])
    angles = [table[0] for table in model.decoder.rope(jnp.arange(longest)[None], jnp.ones(1, jnp.int32))]
    layer = nnx.split(model.decoder.layers)[0]
    head, layers = layers["head"], [nnx.merge(layer, weights) for weights in layers["layers"]]
    split = P(BATCH, *fit_spec((s,), ("tensor",)))  # slots over all devices: each draws for its own
    drawing = per_shard(_draw, split, split)
    samples = state["out"]["count"].shape[2]

    def mark(seen: jax.Array, rows: jax.Array, token: jax.Array, new: State) -> jax.Array:
        each = per_shard(_mark, (split, batch, *(split,) * 4), split)
        spread = [jax.sharding.reshard(x, split) for x in (token, new["taken"], new["at"], new["last"])]
        return each(seen, rows, *spread)

    def step(carry: Any) -> Any:
        state, queue, steps, live = carry
        slot = state["slot"]
        plan = per_shard(_plan, batch, batch)(slot, state["out"])
        position = reshape(slot["start"] + slot["t"] - 1, (b * s, 1), BATCH)
        x = model.decoder.embed_tokens(reshape(slot["last"], (b * s, 1), BATCH))
        sines, cosines = angles
        rope = take_rows(sines, position, BATCH), take_rows(cosines, position, BATCH)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
            own, prefix = caches
            return attend_shard(q, k, v, own, prefix, plan, length)

        caches = list(zip(state["own"], rows, strict=True))
        hidden, own = model.decoder.decode(layers, x, rope, attend, caches)
        logits = dot("bsd,dv->bsv", hidden, head, BATCH, None, "tensor", dtype=jnp.float32)
        logits = reshape(logits, (b, s, logits.shape[2]), BATCH, None, "tensor")
        logits = jax.sharding.reshard(logits, split)
        chances = per_shard(functools.partial(_chances, samples=samples), batch, batch)(slot, state["row"])
        drawn = drawing(logits, state["seen"], *jax.tree.map(lambda x: jax.sharding.reshard(x, split), chances))
        drawn = jax.tree.map(lambda x: jax.sharding.reshard(x, P(BATCH)), drawn)
        live = live + jnp.sum(slot["alive"])
        slot, out, queue, new = per_shard(_advance, batch, batch)(slot, state["row"], state["out"], queue, drawn)
        seen = mark(state["seen"], state["row"]["seen"], drawn[0], new)
        state = {**state, "own": own, "slot": slot, "out": out, "seen": seen}
        return state, queue, steps + 1, live

    fill = per_shard(lambda *x: _put_first(_refill(*_first(x))), batch, batch)
    slot, queue, new = fill(state["slot"], state["row"], state["out"], queue)
    # a slot that takes nothing has its last token marked already
    seen = mark(state["seen"], state["row"]["seen"], slot["last"], new)
    state = {**state, "slot": slot, "seen": seen}
    goes_on = functools.partial(_goes_on, limit)
    state, queue, steps, live = jax.lax.while_loop(goes_on, step, (state, queue, jnp.int32(0), jnp.int32(0)))
    state = {**state, "own": [[*layer, *more] for layer, more in zip(state["own"], unused, strict=True)]}
    longest = jnp.max(jnp.where(state["slot"]["alive"], state["slot"]["t"], 1))
    report = {**state["out"], "head": queue["head"], "steps": steps, "live": live, "longest": longest}
    return state, jax.tree.map(lambda x: jax.sharding.reshard(x, P()), report)
