"""``mmprm bench rollout``: the sampling engine against ``generate`` of Hugging Face transformers (torch), on this CPU.

Same weights, prompts, images, sampling parameters, numbers of tokens and cores. The two run in a process each and take
turns, so that both meet the same machine; loading, compilation and a first run are not timed.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmprm_jax.bench import common
from mmprm_jax.environment import versions
from mmprm_jax.fit import compile, cost, jobs, report
from mmprm_jax.models import build, hf
from mmprm_jax.models.config import DecoderConfig, VisionConfig, VLMConfig
from mmprm_jax.models.hf_config import NATIVE, TEXT_PRM
from mmprm_jax.models.hf_layout import layout
from mmprm_jax.records import UserError
from mmprm_jax.rollout.engine import Engine, Group, Sample
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.sharding import make_mesh
from mmprm_jax.spawn import Child

QWEN2 = VLMConfig(
    vision=None,
    decoder=DecoderConfig(
        vocab_size=4096, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64,
        intermediate_size=1536, rms_norm_eps=1e-6, qkv_bias=True,
    ),
)  # fmt: skip
TINY = VLMConfig(  # the model of configs/digits.py in the layout of Qwen2
    vision=VisionConfig(
        image_size=24, patch_size=4, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128
    ),
    decoder=DecoderConfig(
        vocab_size=128, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128,
        rms_norm_eps=1e-5, rope_theta=1e4, qkv_bias=True,
    ),
)  # fmt: skip
SMALL = VLMConfig(  # 7 million parameters, heads of 64 as the released models have
    vision=VisionConfig(
        image_size=56, patch_size=14, hidden_size=256, num_layers=2, num_heads=4, intermediate_size=1024
    ),
    decoder=DecoderConfig(
        vocab_size=1024, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
        intermediate_size=1024, rms_norm_eps=1e-6, qkv_bias=True,
    ),
)  # fmt: skip
MODELS = {"qwen2": QWEN2, "tiny_vlm": TINY, "small_vlm": SMALL}
IMAGE = 3  # the image token; prompts have larger ids else
SAMPLING: dict[str, Any] = dict(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.05)  # the paper's
_CHECK = 16  # greedy tokens that are compared at most
_TOLERANCE = 1e-3  # nats, of their log-probabilities


@dataclasses.dataclass(frozen=True)
class Case:
    """``groups`` prefixes of ``prefix`` tokens, an image of one tile among them if the model has eyes; ``samples`` of
    ``new`` tokens behind each."""

    name: str
    model: str
    groups: int
    samples: int
    prefix: int
    new: int

    @property
    def cfg(self) -> VLMConfig:
        return MODELS[self.model]

    @property
    def tokens(self) -> int:
        """Sampled tokens of one run."""
        return self.groups * self.samples * self.new

    @property
    def checked(self) -> int:
        """Greedy tokens that are compared."""
        return min(_CHECK, self.new)

    @property
    def splits(self) -> list[int]:
        """Groups in one call of ``generate``: the ways that are tried."""
        return sorted({self.groups, max(1, self.groups // 4), 1}, reverse=True)


CASES = (
    Case("qwen2, 300", "qwen2", 16, 16, 300, 128),
    Case("qwen2, 1792", "qwen2", 4, 16, 1792, 64),
    Case("tiny_vlm, 300", "tiny_vlm", 16, 16, 300, 128),
    Case("tiny_vlm, 1792", "tiny_vlm", 4, 16, 1792, 64),
)


def hf_config(cfg: VLMConfig, positions: int) -> dict[str, Any]:
    """config.json of Qwen2ForCausalLM, or with a vision tower of InternVLForConditionalGeneration around it."""
    d, v = cfg.decoder, cfg.vision
    text = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": d.vocab_size,
        "hidden_size": d.hidden_size, "num_hidden_layers": d.num_layers, "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads, "intermediate_size": d.intermediate_size, "rms_norm_eps": d.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": d.rope_theta}, "tie_word_embeddings": False,
        "max_position_embeddings": positions, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if v is None:
        return text
    vision = {
        "image_size": [v.image_size] * 2, "patch_size": [v.patch_size] * 2, "hidden_size": v.hidden_size,
        "num_hidden_layers": v.num_layers, "num_attention_heads": v.num_heads, "layer_norm_eps": v.layer_norm_eps,
        "intermediate_size": v.intermediate_size, "attention_bias": True, "model_type": "internvl_vision",
    }  # fmt: skip
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "text_config": text,
        "vision_config": vision, "image_token_id": IMAGE, "image_seq_length": cfg.tokens_per_tile,
        "downsample_ratio": 1 / cfg.downsample, "tie_word_embeddings": False,
    }  # fmt: skip


def export(cfg: VLMConfig, params: Any, mesh: Any, folder: Path) -> None:
    """Writes the weights (float32) for transformers."""
    groups = layout(cfg, TEXT_PRM if cfg.vision is None else NATIVE, "qwen2")
    groups = [group for group in groups if not group.leaves[0].startswith("score/")]
    tensors = {key: "F32" for group in groups for key, _, _ in group.tensors()}
    files = {"model.safetensors": {"metadata": {"format": "pt"}, "tensors": tensors}}
    config = hf_config(cfg, positions=1 << 15)
    hf.save(folder, params, mesh, hf.Description(config, cfg, groups, hf.Manifest(files, None)))


def prompts(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Random prefixes int32 [groups, prefix] and the tile of each, normalised float32 [groups, H, W, 3], or None."""
    rng, cfg = np.random.default_rng(seed), case.cfg
    tokens = rng.integers(IMAGE + 1, cfg.decoder.vocab_size, (case.groups, case.prefix), np.int32)
    if cfg.vision is None:
        return tokens, None
    tokens[:, 1 : 1 + cfg.tokens_per_tile] = IMAGE
    return tokens, rng.standard_normal((case.groups, cfg.tile, cfg.tile, 3), np.float32)


def _sample(engine: Engine, case: Case, seed: int, count: int, n: int, sampling: Sampling) -> list[list[Sample]]:
    """n samples of the first ``count`` groups, which the engine has not seen."""
    tokens, pixels = prompts(case, seed)
    keys = np.random.default_rng(seed).integers(0, 1 << 32, (count, 2), np.uint32)
    groups = [
        Group(i, str(i), tuple(tokens[i].tolist()), None if pixels is None else pixels[i][None], keys[i], n, sampling)
        for i in range(count)
    ]
    found = engine.sample(groups)
    for group in groups:
        engine.release(group.problem)
    return found


def run_engine(case: Case, folder: Path) -> Iterator[Any]:
    """A child's work: exports the model and yields greedy samples to compare, then None once warm, then measurements.

    A measurement: seconds of the whole case, and FLOP/s of a large matrix product just before it.
    """
    jax.config.update("jax_platforms", "cpu")
    mesh, cfg = make_mesh({"data": 1}, jax.devices("cpu")[:1]), case.cfg
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(cfg, IMAGE, 0, mesh)
        export(cfg, params, mesh, folder)
        engine = Engine(
            graphdef, params, cfg, IMAGE, mesh, slots=case.groups * case.samples, samples=case.samples,
            max_new=case.new, cache_tokens=case.groups * case.prefix, rows=case.groups, steps=case.new,
        )  # fmt: skip
        yield _sample(engine, case, 0, 1, 1, Sampling(top_k=1, max_new_tokens=case.checked))[0][0]
        for seed in range(1, 1 << 30):
            if seed > 1:
                peak = common.peak_flops()
            start = time.perf_counter()
            found = _sample(
                engine, case, seed, case.groups, case.samples, Sampling(**SAMPLING, max_new_tokens=case.new)
            )
            seconds = time.perf_counter() - start
            if sum(len(sample.tokens) for samples in found for sample in samples) != case.tokens:
                raise UserError("the engine did not sample the requested number of tokens")
            yield None if seed == 1 else {"seconds": seconds, "peak_flops": peak}


class TorchBaseline:
    """``generate`` of transformers on the weights in ``folder``: float32, sdpa attention, all cores."""

    def __init__(self, case: Case, folder: Path):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(common.cores())
        self._torch, self._case = torch, case
        kind = (
            transformers.Qwen2ForCausalLM if case.cfg.vision is None else transformers.InternVLForConditionalGeneration
        )
        model, loading_info = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        if any(loading_info.values()):
            raise UserError(f"transformers does not read the exported weights: {loading_info}")
        self._model = model.eval()

    def _inputs(self, seed: int, count: int) -> dict[str, Any]:
        tokens, pixels = prompts(self._case, seed)
        ids = self._torch.tensor(tokens[:count], dtype=self._torch.long)
        inputs = {"input_ids": ids, "attention_mask": self._torch.ones_like(ids)}
        if pixels is not None:
            inputs["pixel_values"] = self._torch.tensor(pixels[:count].transpose(0, 3, 1, 2))
        return inputs

    def greedy(self) -> Sample:
        with self._torch.inference_mode():
            out = self._model.generate(
                **self._inputs(0, 1), do_sample=False, max_new_tokens=self._case.checked, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        tokens = out.sequences[0, self._case.prefix :]
        scores = self._torch.log_softmax(self._torch.stack(out.logits)[:, 0], dim=-1)
        return Sample(tuple(tokens.tolist()), tuple(scores[range(len(tokens)), tokens].tolist()))

    def run(self, seed: int, split: int, new: int) -> float:
        """Seconds of the case with ``split`` groups in a call."""
        case, inputs = self._case, self._inputs(seed, self._case.groups)
        start = time.perf_counter()
        with self._torch.inference_mode():
            for at in range(0, case.groups, split):
                part = {name: value[at : at + split] for name, value in inputs.items()}
                out = self._model.generate(
                    **part, do_sample=True, **SAMPLING, num_return_sequences=case.samples, min_new_tokens=new,
                    max_new_tokens=new,
                )  # fmt: skip
                rows = min(split, case.groups - at) * case.samples
                if tuple(out.shape) != (rows, case.prefix + new):
                    raise UserError(f"generate made {tuple(out.shape)} tokens")
        return time.perf_counter() - start


def run_torch(case: Case, folder: Path) -> Iterator[Any]:
    """A child's work, as ``run_engine``; once warm it yields the seconds of a quarter of the work for
    each way to batch, and goes on with the best."""
    model = TorchBaseline(case, folder)
    yield model.greedy()
    model.run(1, case.groups, min(4, case.new))
    ways = {}
    for split in case.splits:
        try:
            ways[split] = model.run(1, split, max(4, case.new // 4))
        except (MemoryError, RuntimeError) as error:  # torch's allocator
            if "memory" not in str(error):
                raise
    if not ways:
        raise UserError("transformers: out of memory with one group at a time")
    yield ways
    for seed in range(2, 1 << 30):
        yield {"seconds": model.run(seed, min(ways, key=ways.__getitem__), case.new)}


def _agreement(engine: Sample, baseline: Sample) -> dict[str, Any]:
    """Raises UserError when the two models differ."""
    difference = float(np.max(np.abs(np.subtract(engine.logprobs, baseline.logprobs))))
    if engine.tokens != baseline.tokens or not difference <= _TOLERANCE:
        raise UserError(
            f"the models differ: greedy tokens {engine.tokens} here, {baseline.tokens} in transformers;"
            f" log-probabilities by {difference:.2g}"
        )
    return {"greedy_tokens": len(engine.tokens), "logprob_difference": difference}


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """One case. The ratio is the median over ``pairs`` of neighbouring runs; the rates are those of the best runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        with Child(run_engine, case, folder) as left, Child(run_torch, case, folder) as right:
            agreement = _agreement(next(left), next(right))
            next(left)
            ways = next(right)
            runs = [(next(left), next(right)) for _ in range(pairs)]
    here, there = ([run[side]["seconds"] for run in runs] for side in (0, 1))
    flops = cost.rollout_flops(
        case.cfg, case.groups, case.samples, case.prefix, case.new, int(case.cfg.vision is not None)
    )
    peaks = [left["peak_flops"] for left, _ in runs]
    return {
        "case": dataclasses.asdict(case),
        "agreement": agreement,
        "engine": {"seconds": here, "tokens_per_s": case.tokens / min(here)},
        "transformers": {
            "seconds": there,
            "tokens_per_s": case.tokens / min(there),
            "groups_per_call": min(ways, key=ways.__getitem__),
            "seconds_by_groups_per_call": {str(split): seconds for split, seconds in ways.items()},
        },
        "ratio": statistics.median(t / h for h, t in zip(here, there, strict=True)),
        "ratio_of_best": min(there) / min(here),
        "flops": flops,
        "flops_per_s": flops / min(here),
        "peak_flops_per_s": max(peaks),
        "fraction_of_peak": statistics.median(flops / h / peak for h, peak in zip(here, peaks, strict=True)),
        "load": common.load(),
    }


def run(names: Sequence[str] = (), pairs: int = 2, topologies: Sequence[str] = ("v5e-8",)) -> dict[str, Any]:
    """Measures the cases whose names begin with one of ``names`` (default: all), and counts bytes for TPU topologies.

    Prints as it goes on. pairs: runs of each side. Raises UserError when torch or transformers is
    missing, or the two models differ.
    """
    chosen = [case for case in CASES if not names or case.name.startswith(tuple(names))]
    if not chosen:
        raise UserError(f"no case is called {', '.join(names)}; there are: {'; '.join(case.name for case in CASES)}")
    if not {"torch", "transformers"} <= versions().keys():
        raise UserError("torch or transformers is missing: pip install 'mmprm_jax[bench]'")
    result: dict[str, Any] = {
        "benchmark": "rollout", "machine": common.machine(), "sampling": SAMPLING, "pairs": pairs, "cases": [],
        "tpu": [],
    }  # fmt: skip
    there = result["machine"]
    print(f"{there['cpu']}, {there['cores']} cores, load {there['load']:.1f}")
    if there["load"] > 0.5:
        print("something else runs on this machine: the figures are too low, and those of torch suffer most")
    print(_HEAD)
    for case in chosen:
        result["cases"].append(measure(case, pairs))
        print(_row(result["cases"][-1]), flush=True)
    print("tokens/s: best run; ratio: median of neighbouring runs; FLOP/s by formula over those of a matrix product")
    for topology in topologies:
        try:
            found = compile.measure(jobs.Settings(job="decode", topology=topology))
            print(report.describe(found), flush=True)
        except UserError as error:  # what was measured before is not lost
            found = {"topology": topology, "error": str(error)}
            print(f"{topology}: {error}", flush=True)
        result["tpu"].append(found)
    return result


_HEAD = (
    f"{'case':16} {'groups x samples':>16} {'new':>4} {'engine, tok/s':>14} {'transformers':>13} {'ratio':>6}"
    f" {'GFLOP/s':>8} {'of peak':>8} {'agree to':>9}"
)


def _row(found: dict[str, Any]) -> str:
    case = found["case"]
    return (
        f"{case['name']:16} {case['groups']:>11} x {case['samples']:>2} {case['new']:>4}"
        f" {found['engine']['tokens_per_s']:>14,.0f} {found['transformers']['tokens_per_s']:>13,.0f}"
        f" {found['ratio']:>6.1f} {found['flops_per_s'] / 1e9:>8.0f} {found['fraction_of_peak']:>8.0%}"
        f" {found['agreement']['logprob_difference']:>9.0e}"
    )
