"""Accelerators and the slices of them that can be rented, by the names that Google Cloud gives them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from mmprm_jax.records import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. bytes: of HBM; flops: bf16 FLOP/s, dense; hbm: bytes/s; link: bytes/s of one link, one way."""

    name: str
    bytes: float
    flops: float
    hbm: float
    link: float
    links: int  # that a collective over one axis of the chips can use at once
    tpu: bool = True


# Google Cloud's pages give the bidirectional ICI bandwidth of all of a chip's links: 4 of them (2D torus) or 6 (3D). A
# ring along one axis of the torus uses two. "16 GB" and the like are GiB there (libtpu reports 15.75 GiB of a v5e).
# NVIDIA gives NVLink's bandwidth both ways, all links together, which a switch makes usable by any collective.
_GIB = 1 << 30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GIB, 275e12, 1228e9, 50e9, 2),  # cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433
        Chip("v5e", 16 * _GIB, 197e12, 819e9, 50e9, 2),  # cloud.google.com/tpu/docs/v5e: 400 GB/s of ICI
        Chip("v5p", 95 * _GIB, 459e12, 2765e9, 100e9, 2),  # cloud.google.com/tpu/docs/v5p: 1,200 GB/s of ICI
        Chip("v6e", 32 * _GIB, 918e12, 1638e9, 100e9, 2),  # cloud.google.com/tpu/docs/v6e: 800 GB/s of ICI
        Chip("a100", 80e9, 312e12, 2039e9, 300e9, 1, tpu=False),  # NVIDIA A100 datasheet, SXM 80 GB
        Chip("h100", 80e9, 989e12, 3350e9, 450e9, 1, tpu=False),  # NVIDIA H100 datasheet, SXM
        Chip("h200", 141e9, 989e12, 4800e9, 450e9, 1, tpu=False),  # NVIDIA H200 datasheet, SXM
    )
}

# The slices of cloud.google.com/tpu/docs/{v5e,v6e,v4,v5p}. v4 and v5p are named by TensorCores, two on each chip.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBES, "v5p": _CUBES}
_GPUS = (1, 2, 4, 8)  # of one host; beyond it, NVLink does not reach


@dataclasses.dataclass(frozen=True)
class Topology:
    """``count`` chips of a kind; ``shape``: of the slice, in libtpu's form, e.g. 4x8; empty on CUDA."""

    name: str
    chip: Chip
    count: int
    shape: str = ""

    @property
    def libtpu(self) -> dict[str, str]:
        """Arguments of ``jax.experimental.topologies.get_topology_desc``."""
        cores = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}  # one device per chip, as on v5p
        return {"platform": "tpu", "topology_name": f"{self.chip.name}:{self.shape}", **cores}


def _size(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _all() -> dict[str, Topology]:
    found = {}
    for kind, shapes in _SHAPES.items():
        cores = 2 if kind in ("v4", "v5p") else 1
        for shape in shapes:
            name = f"{kind}-{cores * _size(shape)}"
            found[name] = Topology(name, CHIPS[kind], _size(shape), shape)
    for chip in CHIPS.values():
        if not chip.tpu:
            found |= {f"{chip.name}-{n}": Topology(f"{chip.name}-{n}", chip, n) for n in _GPUS}
    return found


TOPOLOGIES = _all()


def topology(name: str) -> Topology:
    """The topology of a name as v5e-32 (or v5litepod-32), v5p-64, h100-8. Raises UserError that lists the choices."""
    plain = re.sub(r"^v5litepod-", "v5e-", name.lower())
    if plain in TOPOLOGIES:
        return TOPOLOGIES[plain]
    kind = plain.partition("-")[0]
    same = [t for t in TOPOLOGIES if t.partition("-")[0] == kind]
    if same:
        raise UserError(f"topology {name!r} is unknown; of {kind} there are {', '.join(same)}")
    near = difflib.get_close_matches(plain, TOPOLOGIES, 1, 0)[0]
    raise UserError(f"topology {name!r} is unknown; did you mean {near}? There are {', '.join(TOPOLOGIES)}")


def larger(t: Topology) -> list[Topology]:
    """Topologies of the same chip with more of them, the smallest first."""
    return [other for other in TOPOLOGIES.values() if other.chip == t.chip and other.count > t.count]
