"""The stages of the pipeline. Each reads record files and writes record files below ``<workdir>/<stage>``.

A finished stage leaves ``done.json`` (its figures) and is skipped from then on; an interrupted one goes on where it
was: training from its newest checkpoint, annotation and evaluation after the last finished file.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mmprm_jax import records
from mmprm_jax.data import digits, encode
from mmprm_jax.data.prompts import final_answer
from mmprm_jax.evaluation import best_of_n
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.metrics import Metrics, progress
from mmprm_jax.models import build
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Candidate, Problem, Request, ScoredCandidate, SFTExample, Tree, UserError
from mmprm_jax.report import report as report_page
from mmprm_jax.rollout.engine import Engine
from mmprm_jax.rollout.rollouts import Sampler
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.search import labels, omegaprm, paper
from mmprm_jax.sharding import make_mesh
from mmprm_jax.training import losses, optimizers, trainer
from mmprm_jax.training.checkpoints import load_params, save_params

Figures = dict[str, Any]


class Run:
    """A configuration, a work directory and the mesh; what every stage needs."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, config_text: str):
        self.config, self.workdir, self.config_text = config, workdir, config_text
        choose(SEARCHES, config.annotate.mode, "annotate.mode")  # told before minutes of training
        choose(EXAMPLES, config.train_prm.mode, "train_prm.mode")
        self.mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), config.mesh, strict=True)))
        jax.set_mesh(self.mesh)
        self.data = epath.Path(config.data.folder) if config.data.folder else workdir / "data"

    def folder(self, stage: str) -> epath.Path:
        return self.workdir / stage

    def figures(self, stage: str) -> Figures | None:
        """What a finished stage reported; None when it has not finished."""
        path = self.folder(stage) / "done.json"
        return json.loads(path.read_text()) if path.exists() else None

    def problems(self, split: str) -> list[Problem]:
        return records.read_all(self.data / f"{split}.jsonl", Problem)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.data / "tokenizer.json")

    def model(self, tokenizer: Tokenizer) -> VLMConfig:
        """The model's sizes; the vocabulary is the tokenizer's, so that no id can be outside of it."""
        sizes = self.config.model.to_dict()
        sizes["decoder"]["vocab_size"] = len(tokenizer)
        return VLMConfig.from_dict(sizes)

    def pixels(self, problems: Sequence[Problem], cfg: VLMConfig) -> dict[str, np.ndarray]:
        """uint8 [tiles, H, W, 3] by problem id."""
        index, pixels = encode.load_pixels(self.data, [p.image for p in problems], cfg)
        return {p.id: pixels[i] for p, i in zip(problems, index, strict=True)}

    def load(self, stage: str, tokenizer: Tokenizer, cfg: VLMConfig) -> tuple[Any, Any]:
        """The graph definition and the weights that ``stage`` trained."""
        graphdef, abstract = build.abstract(cfg, tokenizer.id(tok.IMAGE), self.mesh)
        return graphdef, load_params(self.folder(stage) / "params", abstract)

    def engine(self, rows: int, tokenizer: Tokenizer, cfg: VLMConfig, settings: ConfigDict) -> Engine:
        """The policy as a sampling engine for ``rows`` prefixes at a time."""
        graphdef, params = self.load("sft", tokenizer, cfg)
        sampling = settings_of(Sampling, settings)
        stop = tokenizer.id(tok.TURN_END)
        return Engine(graphdef, params, self.mesh, sampling, stop=stop, rows=rows, max_new=settings.max_new_tokens)


def settings_of(cls: type, config: Mapping[str, Any], **more: Any) -> Any:
    """The dataclass ``cls`` from the keys of ``config`` that it has."""
    names = {f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{k: v for k, v in config.items() if k in names}, **more)
    except ValueError as error:
        raise UserError(str(error)) from None


# "paper": as the original MM-PRM does, quirks included.
SEARCHES = {"default": omegaprm.search, "paper": paper.search}
EXAMPLES = {"default": labels.step_examples, "paper": paper.step_examples}


def choose(choices: Mapping[str, Any], name: str, key: str) -> Any:
    """The choice of that name. Raises UserError naming the config key."""
    if name not in choices:
        raise UserError(f"{key}: {name!r} is not one of {', '.join(choices)}")
    return choices[name]


def training_settings(config: ConfigDict, seed: int) -> trainer.Settings:
    """The settings of one training stage."""
    values = {**config.to_dict(), "optimizer": settings_of(optimizers.Settings, config.optimizer)}
    return settings_of(trainer.Settings, values, seed=seed)


def data(run: Run) -> Figures:
    """Generates the embedded problem set, unless the configuration names a folder with a data set."""
    if run.config.data.folder:
        return {"problems": {split: len(run.problems(split)) for split in digits.SPLITS}}
    settings = settings_of(digits.Settings, run.config.data, seed=run.config.seed)
    digits.check(settings)
    digits.generate(run.data, settings)
    return {"problems": {split: getattr(settings, split) for split in digits.SPLITS}}


def sft(run: Run) -> Figures:
    """Supervised fine-tuning of the policy, from random weights."""
    tokenizer = run.tokenizer()
    cfg, folder = run.model(tokenizer), run.folder("sft")
    examples = records.read_all(run.data / "sft.jsonl", SFTExample)
    dataset = encode.sft_dataset(examples, run.data, tokenizer, cfg, run.config.sft.max_length)
    graphdef, params = build.initialise(cfg, tokenizer.id(tok.IMAGE), run.config.seed, run.mesh)
    settings = training_settings(run.config.sft, run.config.seed)
    params = trainer.fit("sft", folder, graphdef, params, losses.policy_loss, dataset, settings, run.mesh)
    save_params(folder / "params", params)
    return {"examples": len(examples), "parameters": sum(x.size for x in jax.tree.leaves(params))}


def annotate(run: Run) -> Figures:
    """OmegaPRM tree search over the training problems; a shard of finished trees at a time."""
    c, folder = run.config.annotate, run.folder("annotate")
    tokenizer = run.tokenizer()
    cfg, problems = run.model(tokenizer), run.problems("train")
    settings, search = settings_of(omegaprm.Settings, c), choose(SEARCHES, c.mode, "annotate.mode")
    sampler = Sampler(
        run.engine(c.rows, tokenizer, cfg, c), tokenizer, cfg, run.pixels(problems, cfg), run.config.seed, "annotate"
    )
    folder.mkdir(parents=True, exist_ok=True)
    shards = [range(i, min(i + c.trees_per_shard, len(problems))) for i in range(0, len(problems), c.trees_per_shard)]
    left = [shard for shard in shards if not shard_path(folder, shard).exists()]
    todo = [i for shard in left for i in shard]
    done: dict[int, Tree] = {}
    first = len(problems) - len(todo)
    with Metrics(folder, resume_step=first + 1) as metrics, progress(len(problems), "annotate", "tree", first) as bar:
        searches = (search(problems[i], settings) for i in todo)
        for index, tree in omegaprm.grow(searches, sampler, c.in_flight):
            done[todo[index]] = tree
            bar.update()
            bar.set_postfix(rollouts=sampler.rollouts, refresh=False)
            while left and all(i in done for i in left[0]):
                shard = left.pop(0)
                records.write(shard_path(folder, shard), [done[i] for i in shard])
                metrics.write(len(problems) - sum(map(len, left)), rollouts=sampler.rollouts, tokens=sampler.tokens)
    trees = read_trees(folder)
    if [tree.problem for tree in trees] != problems:
        raise UserError(f"{folder}: holds trees of other problems than {run.data}; use another --workdir")
    return {"trees": len(trees), "rollouts": sum(node.n for tree in trees for node in tree.nodes)}


def shard_path(folder: epath.Path, shard: range) -> epath.Path:
    """The file of the trees of problems ``shard``."""
    return folder / f"trees-{shard.start:06d}.jsonl"


def read_trees(folder: epath.Path) -> list[Tree]:
    """All finished trees of an annotation folder, in the order of the problems."""
    shards = sorted(folder.glob("trees-*.jsonl"))
    if not shards:
        raise UserError(f"{folder}: no trees there; run `mmprm annotate` first")
    return [tree for shard in shards for tree in records.read(shard, Tree)]


def train_prm(run: Run) -> Figures:
    """Trees to step labels, and a PRM trained on them from the policy's weights."""
    c, folder = run.config.train_prm, run.folder("train_prm")
    policy_tokenizer = run.tokenizer()
    tokenizer = policy_tokenizer.with_token(tok.PRM)
    cfg = run.model(tokenizer)
    chosen = settings_of(labels.LabelSettings, c)
    trees = read_trees(run.folder("annotate"))
    labelled = choose(EXAMPLES, c.mode, "train_prm.mode")
    examples = [e for tree in trees for e in labelled(tree, chosen, run.config.seed)]
    if not examples:
        raise UserError("train_prm: no tree has both right and wrong solutions; the policy is too weak or too strong")
    records.write(folder / "examples.jsonl", examples)
    dataset = encode.step_dataset(examples, run.data, tokenizer, cfg, c.max_length)
    _, policy = run.load("sft", policy_tokenizer, run.model(policy_tokenizer))
    graphdef, _ = build.abstract(cfg, tokenizer.id(tok.IMAGE), run.mesh)
    params = build.add_token(policy, run.mesh)
    loss = losses.prm_loss(c.label, c.threshold, tokenizer.piece(tok.YES), tokenizer.piece(tok.NO))
    settings = training_settings(c, run.config.seed)
    params = trainer.fit("train_prm", folder, graphdef, params, loss, dataset, settings, run.mesh)
    save_params(folder / "params", params)
    tokenizer.save(folder / "tokenizer.json")
    return {"labels": labels.histogram(examples)}


def sample_candidates(run: Run, split: str, tokenizer: Tokenizer, cfg: VLMConfig) -> list[list[Candidate]]:
    """N solutions of each problem of a split, from ``evaluate/<split>_candidates.jsonl`` if they are there."""
    c, path = run.config.evaluate, run.folder("evaluate") / f"{split}_candidates.jsonl"
    problems = run.problems(split)
    if not path.exists():
        engine = run.engine(c.rows, tokenizer, cfg, c)
        sampler = Sampler(engine, tokenizer, cfg, run.pixels(problems, cfg), run.config.seed, "evaluate")
        found = []
        with progress(len(problems), f"sample {split}", "problem") as bar:
            for start in range(0, len(problems), c.rows):
                part = problems[start : start + c.rows]
                for problem, group in zip(part, sampler([Request(p, (), c.n) for p in part]), strict=True):
                    found += [
                        Candidate(problem.id, r.segments, final_answer(r.segments), r.correct, r.logprob, r.n_tokens)
                        for r in group
                    ]
                bar.update(len(part))
        records.write(path, found)
    stored = records.read_all(path, Candidate)
    groups: dict[str, list[Candidate]] = {p.id: [] for p in problems}
    for candidate in stored:
        if candidate.problem_id not in groups:
            raise UserError(f"{path}: a candidate of the unknown problem {candidate.problem_id!r}")
        groups[candidate.problem_id].append(candidate)
    return list(groups.values())


Scored = list[list[ScoredCandidate]]


def evaluate(run: Run) -> Figures:
    """Best-of-N on the test problems; the PRM's aggregator is chosen on dev."""
    c, folder = run.config.evaluate, run.folder("evaluate")
    policy_tokenizer = run.tokenizer()
    tokenizer = Tokenizer.load(run.folder("train_prm") / "tokenizer.json")
    cfg = run.model(tokenizer)
    candidates = {s: sample_candidates(run, s, policy_tokenizer, run.model(policy_tokenizer)) for s in ("dev", "test")}
    graphdef, params = run.load("train_prm", tokenizer, cfg)
    classes = (tokenizer.piece(tok.YES), tokenizer.piece(tok.NO))
    scorer = Scorer(graphdef, params, run.mesh, classes, problems=c.score_rows // 4, solutions=4)

    def scored(split: str, change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Scored:
        problems = run.problems(split)
        stack = change(np.stack(list(run.pixels(problems, cfg).values())))
        solutions = []
        for problem, group, pixels in zip(problems, candidates[split], stack, strict=True):
            prompt = encode.prompt_ids(tokenizer, cfg, problem.question, problem.image is not None)
            solutions.append(Solutions([encode.prm_ids(tokenizer, prompt, x.segments) for x in group], pixels))
        return [
            [ScoredCandidate(x, scores) for x, scores in zip(group, found, strict=True)]
            for group, found in zip(candidates[split], scorer.score(solutions), strict=True)
        ]

    with progress(4, "score", "set") as bar:
        results: dict[str, Scored] = {}
        for name, split, change in (
            ("dev", "dev", lambda x: x),
            ("test", "test", lambda x: x),
            ("blank_image", "test", np.zeros_like),
            ("shuffled_image", "test", lambda x: np.roll(x, 1, axis=0)),
        ):
            results[name] = scored(split, change)
            bar.update()
    for split in ("dev", "test"):
        records.write(folder / f"{split}_scored.jsonl", [x for group in results[split] for x in group])
    figures = compare(run, results)
    figures["controls"]["policy_shuffled_image"] = policy_control(run, policy_tokenizer, run.model(policy_tokenizer))
    return figures


def policy_control(run: Run, tokenizer: Tokenizer, cfg: VLMConfig) -> Figures:
    """How often the policy is right about a problem when it sees the image of another one, and how often by chance.

    Chance: the probability that a sampled answer equals the gold answer of a problem drawn independently.
    """
    c, problems = run.config.evaluate, run.problems("test")
    pixels = run.pixels(problems, cfg)
    shuffled = dict(zip(pixels, np.roll(np.stack(list(pixels.values())), 1, axis=0), strict=True))
    sampler = Sampler(run.engine(c.rows, tokenizer, cfg, c), tokenizer, cfg, shuffled, run.config.seed, "control")
    groups = sampler([Request(p, (), c.n) for p in problems])
    accuracy, stderr = best_of_n.mean_and_stderr(np.array([[r.correct for r in g] for g in groups]).mean(axis=1))
    answers = Counter(final_answer(r.segments) for g in groups for r in g)
    gold = Counter(p.answer for p in problems)
    chance = sum(answers[a] * gold[a] for a in gold) / (answers.total() * gold.total())
    return {"accuracy": accuracy, "stderr": stderr, "chance": chance}


def compare(run: Run, results: Mapping[str, Scored]) -> Figures:
    """All figures of metrics.json that come from scored candidates."""
    test, n = results["test"], run.config.evaluate.n
    selected = best_of_n.select_aggregator(results["dev"], n)
    each = best_of_n.per_problem(test, n)
    prm = each["prm"][selected]
    figures: Figures = {
        "n_problems": len(test),
        "best_of_n": best_of_n.best_of_n(test),
        "prm_selected": selected,
        "paired": {name: best_of_n.paired(prm, each[name]) for name in ("random", "majority", "policy_logprob")},
        "controls": {},
        "rollouts": sum(len(group) for name in ("dev", "test") for group in results[name]),
    }
    for name in ("blank_image", "shuffled_image"):
        blind = best_of_n.per_problem(results[name], n)["prm"][selected]
        difference = best_of_n.paired(blind, each["random"])
        accuracy, stderr = best_of_n.mean_and_stderr(blind)
        figures["controls"][name] = {
            "accuracy": accuracy,
            "stderr": stderr,
            "difference_to_random": difference["difference"],
            "difference_stderr": difference["stderr"],
        }
    truth_file = run.data / "truth.jsonl"
    if truth_file.exists():
        truth = {t.id: t for t in records.read(truth_file, digits.Truth)}
        pairs = [
            pair
            for group in test
            for x in group
            for pair in zip(
                x.scores, digits.steps_right(truth[x.candidate.problem_id], x.candidate.segments), strict=False
            )
        ]
        figures["step_auc"] = best_of_n.step_auc([s for s, _ in pairs], [t for _, t in pairs])
        figures["by_tricky_sites"] = by_tricky_sites(each, selected, [truth[p.id].tricky for p in run.problems("test")])
    return figures


def by_tricky_sites(each: Mapping[str, Any], selected: str, tricky: Sequence[int]) -> Figures:
    """Accuracy by the number of sites at which the demonstrations' habits apply."""
    sites = np.array(tricky)
    return {
        str(count): {
            "n_problems": int((sites == count).sum()),
            "random": float(each["random"][sites == count].mean()),
            "majority": float(each["majority"][sites == count].mean()),
            "prm": float(each["prm"][selected][sites == count].mean()),
        }
        for count in sorted(set(tricky))
    }


def report(run: Run) -> Figures:
    """``report/metrics.json`` and the page ``report/index.html``."""
    figures = {stage: run.figures(stage) for stage in STAGES if stage != "report"}
    missing = [stage for stage, found in figures.items() if found is None]
    if missing:
        raise UserError(f"report: these stages have not finished: {', '.join(missing)}")
    seconds = {stage: found["seconds"] for stage, found in figures.items()}
    result = dict(figures["evaluate"])
    result["labels"] = figures["train_prm"]["labels"]
    result["rollouts"] = {"annotate": figures["annotate"]["rollouts"], "evaluate": result["rollouts"]}
    result["seconds"] = seconds | {"total": sum(seconds.values())}
    folder = run.folder("report")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", result)
    report_page.write_report(
        folder / "index.html", result, read_trees(run.folder("annotate")), run.data, run.config_text
    )
    return {}


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes strict JSON atomically; a NaN becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(json.dumps(clean(values), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


STAGES: dict[str, Callable[[Run], Figures]] = {
    "data": data,
    "sft": sft,
    "annotate": annotate,
    "train_prm": train_prm,
    "evaluate": evaluate,
    "report": report,
}


def run_stage(run: Run, stage: str) -> None:
    """Runs one stage and writes its ``done.json``; a finished stage is left alone (the report is always made anew)."""
    if run.figures(stage) is not None and stage != "report":
        logging.info("%s: already done", stage)
        return
    before = list(STAGES)[: list(STAGES).index(stage)]
    unfinished = [name for name in before if run.figures(name) is None and name != "report"]
    if unfinished:
        raise UserError(f"{stage}: the stage {unfinished[0]} has not finished; run `mmprm {unfinished[0]}` first")
    run.folder(stage).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    figures = STAGES[stage](run)
    write_json(run.folder(stage) / "done.json", figures | {"seconds": round(time.monotonic() - started, 1)})


def pipeline(run: Run) -> None:
    """All stages, and the table of results."""
    for stage in STAGES:
        run_stage(run, stage)
    print(report_page.format_table(json.loads((run.folder("report") / "metrics.json").read_text())))
    print(f"\nreport: {run.folder('report') / 'index.html'}")
