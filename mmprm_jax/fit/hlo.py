"""What one device does in an optimised HLO program of the TPU compiler: bytes of main memory (HBM), FLOPs, bytes sent.

``Compiled.cost_analysis()`` is no measure of that: it counts the body of every loop once; of bytes, it adds what is
read from and written to on-chip memory (layouts with ``S(1)``), counts a copy into it up to four times, and whole
arrays where a few rows are gathered or scattered; and it sees no FLOPs in Pallas kernels. Here loops are multiplied by
their trip count, and of a conditional the largest branch counts.

- ``sum_bytes``: each instruction counts its operands and results as far as they lie in HBM; but slices and gathers
  count what they take, scatters and updates in place what they put (once read, once written).
- ``sum_flops``: matrix products and convolutions, a multiplication with its addition as 2, and attention kernels.
- ``collectives``: what a device sends when rings carry them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id",
         "async-update")  # fmt: skip
_TAKE, _PUT = ("slice", "dynamic-slice", "gather"), {"scatter": 2, "dynamic-update-slice": 1}  # operand of the update
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool


Program = dict[str, dict[str, Instruction]]  # computation -> name -> instruction


def hbm_bytes(shape: str) -> int:
    """Bytes of a shape, or of all parts of a tuple, that lie in HBM."""
    total = 0
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        size = 0 if "S(" in layout else _SIZES.get(dtype, 0)
        for n in filter(None, sizes.split(",")):
            size *= int(n)
        total += size
    return total


def parse(text: str) -> Program:
    """The computations of a program's text."""
    program: Program = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        found = _INSTRUCTION.match(line)
        if start and not found:
            current = program.setdefault(start[2], {})
        elif found:
            inside, _, rest = re.sub(r"/\*.*?\*/", "", found[5]).partition(")")
            operands = tuple(part.split()[-1].lstrip("%") for part in inside.split(",") if part.strip())
            current[found[2]] = Instruction(found[2], found[3], found[4], operands, rest, bool(found[1]))
    return program


def _found(pattern: str, text: str) -> re.Match[str]:
    """The first match of what the compiler always writes."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return match


def _called(i: Instruction, attribute: str) -> str:
    return _found(rf"{attribute}=%?([\w.\-]+)", i.rest)[1]


def _inner(i: Instruction) -> str | None:
    """The computation that a fusion, a call, or what starts beside the others (also on a sparse core) runs once."""
    if i.op == "call":
        return _called(i, "to_apply")
    found = re.search(r"(?:calls=|called_computations=\{)%?([\w.\-]+)", i.rest)
    return found and found[1]


def _branches(i: Instruction) -> list[str]:
    """The computations of a conditional."""
    if found := re.search(r"branch_computations=\{(.*?)\}", i.rest):
        return re.findall(r"%?([\w.\-]+)", found[1])
    return [_called(i, f"{which}_computation") for which in ("true", "false")]


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    i = computation.get(name)
    return int(i.operands[0]) if i and i.op == "constant" and re.match(r"[su]\d+\[\]", i.shape) else None


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _trips(program: Program, loop: Instruction) -> int:
    """The trip count of a loop that counts from 0 to a constant; 1 where it ends otherwise."""
    condition, body = (program[_called(loop, name)] for name in ("condition", "body"))
    limits = [n for name in condition if (n := _constant(condition, name)) is not None]
    test = _root(condition)
    counter = next((condition[name] for name in test.operands if condition[name].op == "get-tuple-element"), None)
    if len(limits) != 1 or counter is None:
        return max(limits, default=1)
    after = _root(body).operands[int(_found(r"index=(\d+)", counter.rest)[1])]
    steps = [_constant(body, name) for name in body[after].operands] if body[after].op == "add" else []
    step = next((n for n in steps if n), 1)  # more than 1 in an unrolled loop
    return -(-limits[0] // step)


def _fusion(program: Program, i: Instruction, sizes: list[int]) -> int:
    """Bytes of a fusion whose operands have ``sizes``: parameters that are only sliced or updated count in part."""
    inner = program[_called(i, "calls")]
    users: dict[str, list[Instruction]] = {}
    for j in inner.values():
        for name in j.operands:
            users.setdefault(name, []).append(j)
    total, result = 0, hbm_bytes(i.shape)
    for j in inner.values():
        if j.op != "parameter":
            continue
        size = sizes[int(j.operands[0])]
        found, frontier = [], [j]
        while frontier:  # through bitcasts
            node = frontier.pop()
            for user in users.get(node.name, []):
                frontier.append(user) if user.op == "bitcast" else found.append((node.name, user))
        first = all(user.operands[0] == name for name, user in found)
        if size and found and first and all(user.op in _TAKE for _, user in found):
            size = min(size, sum(_unplaced(user.shape) for _, user in found))
        elif size and len(found) == 1 and first and found[0][1].op in _PUT and _unplaced(i.shape) >= size:
            update = _unplaced(inner[found[0][1].operands[_PUT[found[0][1].op]]].shape)
            size, result = update, min(result, update)
        total += size
    return total + result


def _unplaced(shape: str) -> int:
    """Bytes of a shape inside of a fusion, where it says nothing about memory."""
    return hbm_bytes(re.sub(r"S\(\d+\)", "", shape))


def _bytes(program: Program, computation: dict[str, Instruction], i: Instruction) -> int:
    if i.op in _FREE or i.op.endswith("-done"):
        return 0
    if i.op == "while":
        return _trips(program, i) * sum_bytes(program, _called(i, "body"))
    if i.op == "conditional":
        return max(sum_bytes(program, name) for name in _branches(i))
    sizes = [hbm_bytes(computation[name].shape) if name in computation else 0 for name in i.operands]
    if i.op == "fusion":
        return _fusion(program, i, sizes)
    if inner := _inner(i):
        return sum_bytes(program, inner)
    if i.op == "copy-start":
        target = _found(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.shape)[0]
        return (_unplaced(target) if sizes[0] else 0) + hbm_bytes(target)
    if i.op.endswith("-start"):
        return sum(sizes) + max(0, hbm_bytes(i.shape) - sum(sizes))
    if i.op in _TAKE:
        return (_unplaced(i.shape) if sizes[0] else 0) + sum(sizes[1:]) + hbm_bytes(i.shape)
    if i.op in _PUT:
        return 2 * sizes[_PUT[i.op]] + (sizes[1] if i.op == "scatter" else 0)
    return sum(sizes) + hbm_bytes(i.shape)


def sum_bytes(program: Program, name: str) -> int:
    """HBM bytes of one run of a computation."""
    return sum(_bytes(program, program[name], i) for i in program[name].values())


def largest(program: Program, name: str, count: int) -> list[tuple[int, str]]:
    """The instructions of a computation that move most: bytes, and what they are."""
    computation = program[name]
    found = [(_bytes(program, computation, i), i) for i in computation.values()]
    found.sort(key=lambda item: -item[0])

    def describe(i: Instruction) -> str:
        source = re.search(r'op_name="([^"]*)"', i.rest)
        return f"{i.op} {i.name} {i.shape[:60]} {source[1][-60:] if source else ''}"

    return [(size, describe(i)) for size, i in found[:count]]


def outer_loop(program: Program) -> str:
    """The body of the loop with the most instructions."""
    bodies = [_called(i, "body") for c in program.values() for i in c.values() if i.op == "while"]
    return max(bodies, key=lambda body: len(program[body]))


def _dims(shape: str) -> list[int]:
    """The sizes of an array's shape."""
    return [int(n) for n in _found(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def _positions(size: int, window: int, out: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """How many pairs of an output and a window position meet an element, neither padding nor a dilation's hole.

    The compiler makes batch dimensions of matrix products into such windows, where most pairs meet nothing.
    """
    at = np.arange(out)[:, None] * stride + np.arange(window) * spread - low
    return int(np.sum((at >= 0) & (at % dilate == 0) & (at < size * dilate)))


def _convolution(i: Instruction, lhs: list[int], rhs: list[int]) -> int:
    """FLOPs of a convolution; matrix products are convolutions on a TPU."""
    left, right, out = _found(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    spans = re.search(r"window=\{([^}]*)\}", i.rest)
    window = dict(re.findall(r"(\w+)=(\S+)", spans[1] if spans else ""))
    sizes, count = _dims(i.shape), 1
    for n, label in enumerate(sorted(c for c in left if c.isdigit())):

        def each(name: str, default: int, n: int = n) -> int:
            return int(window[name].split("x")[n].partition("_")[0]) if name in window else default

        count *= _positions(
            lhs[left.index(label)], rhs[right.index(label)], sizes[out.index(label)],
            each("stride", 1), each("pad", 0), each("lhs_dilate", 1), each("rhs_dilate", 1),
        )  # fmt: skip
    return 2 * count * rhs[right.index("i")] * rhs[right.index("o")] * sizes[out.index("b")]


def _dot(i: Instruction, lhs: list[int]) -> int:
    contracted = _found(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
    return 2 * math.prod(_dims(i.shape)) * math.prod(lhs[int(n)] for n in contracted.split(",") if n)


Kernels = Callable[[str, list[list[int]]], int]  # (name, shapes of the operands) of a Pallas call -> FLOPs


def sum_flops(program: Program, name: str, kernels: Kernels = lambda name, shapes: 0) -> int:
    """FLOPs of one run of a computation, in matrix products and kernels."""
    total, computation = 0, program[name]
    for i in computation.values():
        if i.op == "while":
            total += _trips(program, i) * sum_flops(program, _called(i, "body"), kernels)
        elif i.op == "conditional":
            total += max(sum_flops(program, branch, kernels) for branch in _branches(i))
        elif i.op == "convolution":
            lhs, rhs = (_dims(computation[operand].shape) for operand in i.operands[:2])
            total += _convolution(i, lhs, rhs)
        elif i.op == "dot":
            total += _dot(i, _dims(computation[i.operands[0]].shape))
        elif i.op == "custom-call" and "tpu_custom_call" in i.rest:
            total += kernels(i.name, [_dims(computation[operand].shape) for operand in i.operands])
        elif inner := _inner(i):
            total += sum_flops(program, inner, kernels)
    return total


KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def _members(i: Instruction, devices: int) -> int:
    """How many devices take part in one group of a collective."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", i.rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", i.rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _sent(kind: str, size: int, n: int) -> int:
    """Bytes that a device sends when it puts ``size`` bytes into a collective of ``n``, around a ring."""
    if kind == "all-gather":
        return size * (n - 1)
    if kind == "collective-permute":
        return size
    return size * (n - 1) // n * (2 if kind == "all-reduce" else 1)


def collectives(program: Program, name: str, devices: int) -> dict[str, int]:
    """Bytes that a device sends in one run of a computation, by the kind of collective."""
    total: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0))
    computation = program[name]
    for i in computation.values():
        kind = i.op.removesuffix("-start")
        if i.op == "while":
            body = collectives(program, _called(i, "body"), devices)
            total.update({k: _trips(program, i) * v for k, v in body.items()})
        elif i.op == "conditional":
            parts = [collectives(program, branch, devices) for branch in _branches(i)]
            total.update(max(parts, key=lambda part: sum(part.values())))
        elif kind in KINDS:
            # A gather that other work overlaps appears in several fusions; it starts in the one with flag -1.
            flag = re.search(r'"async_collective_fusion_config":\{[^}]*"flag_start":"(-?\d+)"', i.rest)
            if flag is None or flag[1] == "-1":
                size = sum(_unplaced(computation[operand].shape) for operand in i.operands)
                scatter = kind == "all-reduce" and name.startswith("all-reduce-scatter")  # each keeps a part of it
                kind = "reduce-scatter" if scatter else kind
                total[kind] += _sent(kind, size, _members(i, devices))
        elif inner := _inner(i):
            total.update(collectives(program, inner, devices))
    return dict(total)


def entry(text: str) -> str:
    """The name of the computation where a program starts."""
    return _found(r"(?m)^ENTRY %?([\w.\-]+)", text)[1]
