"""Bytes that an optimised HLO program moves to and from a TPU's main memory (HBM).

``Compiled.cost_analysis()`` of the TPU compiler is no measure of that: it adds what is read from and written to on-chip
memory (layouts with ``S(1)``), counts a copy into it up to four times, whole arrays where a few rows are gathered or
scattered, and the body of every loop once. Here each instruction counts its operands and results as far as they lie in
HBM, with these exceptions: slices and gathers count what they take, scatters and updates in place what they put (once
read, once written), loops are multiplied by their trip count, of a conditional the largest branch counts.
"""

from __future__ import annotations

import dataclasses
import re

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id")
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
    """The computations of ``Compiled.as_text()``."""
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


def _called(i: Instruction, attribute: str) -> str:
    return re.search(rf"{attribute}=%?([\w.\-]+)", i.rest)[1]


def _trips(program: Program, i: Instruction) -> int:
    """The trip count of a loop that counts from 0 to a constant."""
    limits = [
        int(j.operands[0])
        for j in program[_called(i, "condition")].values()
        if j.op == "constant" and j.shape.startswith("s32[]")
    ]
    return max(limits, default=1)


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
        names = re.findall(r"%?([\w.\-]+)", re.search(r"branch_computations=\{(.*?)\}", i.rest)[1])
        return max(sum_bytes(program, name) for name in names)
    sizes = [hbm_bytes(computation[name].shape) if name in computation else 0 for name in i.operands]
    if i.op == "fusion":
        return _fusion(program, i, sizes)
    if i.op in ("copy-start", "slice-start"):
        parts = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.shape)
        target = parts[0] if i.op == "copy-start" else parts[1]
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
