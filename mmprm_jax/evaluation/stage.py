"""The stage ``evaluate``: candidates are sampled and scored, the selectors compared.

Files in its folder: {dev,test}_candidates.jsonl, test_greedy.jsonl, test_steps.jsonl (Monte Carlo estimates, for the
calibration), test_shuffled_candidates.jsonl, and {dev,test,blank_image,shuffled_image}_scored.jsonl. A file that is
there is read; one that an interruption left unfinished goes on piece by piece.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmprm_jax import records
from mmprm_jax.answers.verify import is_correct
from mmprm_jax.data import digits, encode
from mmprm_jax.data.prompts import final_answer
from mmprm_jax.evaluation import aggregate, best_of_n, calibration, statistics
from mmprm_jax.evaluation.pieces import Pieces
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.metrics import progress
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Candidate, Problem, Request, Rollout, ScoredCandidate, StepExample, UserError
from mmprm_jax.rollout.rollouts import LocalSampler
from mmprm_jax.training.preemption import Preemption

if TYPE_CHECKING:
    from mmprm_jax.stages import Run

Figures = dict[str, Any]
Grouped = dict[str, list[Candidate]]  # by problem id, in the order of the problems
Scored = list[list[ScoredCandidate]]


def is_correct_all(pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
    """Whether the answer of each (answer, gold) pair is right."""
    return [is_correct(answer, gold) for answer, gold in pairs]


# ------------------------------------------------------------------------------------------------- sampling


class Policy:
    """The run's policy, made when the first sample is asked for: its weights, and one engine for all purposes."""

    def __init__(self, run: Run):
        self._run, self._pixels = run, {}

    @functools.cached_property
    def _sampler(self) -> LocalSampler:
        run, tokenizer = self._run, self._run.tokenizer()
        cfg = run.model(tokenizer)
        for split in ("dev", "test"):
            self._pixels.update(run.pixels(run.problems(split), cfg))
        c = run.config.evaluate
        policy = run.policy(c, run.mesh, tokenizer, cfg, self._see)
        return policy.sampler(run, c, run.mesh, "evaluate", c.n, is_correct_all)

    def _see(self, problem: Problem) -> np.ndarray | None:
        return self._pixels[problem.id] if problem.image else None

    def sampler(
        self, purpose: str, greedy: bool = False, image_of: Mapping[str, str] | None = None, by_step: bool = False
    ) -> LocalSampler:
        """purpose: names the random numbers. image_of: whose image a problem is shown with; None: its own.

        by_step: a sample ends with its first step, or its answer.
        """
        engine, policy = self._sampler.engine, self._sampler.policy
        sampling = policy.sampling
        if greedy:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        if by_step:
            ends = (policy.tokenizer.id(tok.STEP_END), policy.tokenizer.id(tok.ANSWER_END))
            sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *ends))
        policy = dataclasses.replace(policy, sampling=sampling)
        if image_of:
            policy = dataclasses.replace(policy, pixels=lambda p: self._pixels[image_of[p.id]] if p.image else None)
        return LocalSampler(engine, policy, self._run.config.seed, purpose, is_correct_all)


Make = Callable[[], LocalSampler]


def candidates_of(pieces: Pieces, problems: Sequence[Problem], n: int, make: Make, title: str) -> Grouped:
    """``n`` solutions of each problem: what the file of ``pieces`` holds, or else sampled and written there."""
    path = pieces.path
    if not path.exists():
        requests = [Request(p, (), n) for p in problems if p.id not in pieces.done]
        with pieces, progress(len(problems), title, "problem", len(problems) - len(requests)) as bar:
            if requests:
                for request, group in make().answers(requests):
                    found = [_candidate(request.problem, rollout, logprob) for rollout, logprob in group]
                    pieces.add(request.problem.id, [dataclasses.asdict(x) for x in found])
                    bar.update()
            pieces.finish(records.from_dict(Candidate, row) for p in problems for row in pieces.done[p.id])
    groups: Grouped = {p.id: [] for p in problems}
    for candidate in records.read_all(path, Candidate):
        if candidate.problem_id not in groups:
            raise UserError(f"{path}: a candidate of the unknown problem {candidate.problem_id!r}")
        groups[candidate.problem_id].append(candidate)
    return groups


def _candidate(problem: Problem, r: Rollout, logprob: float) -> Candidate:
    return Candidate(problem.id, r.segments, final_answer(r.segments), r.correct, logprob, r.n_tokens)


def step_values(
    pieces: Pieces, problems: Sequence[Problem], candidates: Grouped, n: int, make: Make
) -> list[StepExample]:
    """Monte Carlo estimates, k of ``n`` rollouts, behind each step of the first candidate of each problem.

    The last segment has no estimate (its n is 0): a finished solution is right or wrong.
    """
    if not pieces.path.exists():
        firsts = [(p, candidates[p.id][0].segments) for p in problems if candidates[p.id]]
        requests = [Request(p, segments[:j], n) for p, segments in firsts for j in range(1, len(segments))]
        left = [r for r in requests if _step_key(r) not in pieces.done]
        with pieces, progress(len(requests), "estimate test", "prefix", len(requests) - len(left)) as bar:
            if left:
                for request, group in make().answers(left):
                    pieces.add(_step_key(request), sum(r.correct for r, _ in group))
                    bar.update()
            pieces.finish(
                StepExample(
                    f"{p.id}-0", p.id, p.question, segments,
                    tuple(pieces.done[f"{p.id}/{j}"] for j in range(1, len(segments))) + (0,) * bool(segments),
                    (n,) * (len(segments) - 1) + (0,) * bool(segments), p.image,
                )
                for p, segments in firsts
            )  # fmt: skip
    return list(records.read(pieces.path, StepExample))


def _step_key(request: Request) -> str:
    return f"{request.problem.id}/{len(request.prefix)}"


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What was sampled, by file."""

    dev: Grouped
    test: Grouped
    greedy: Grouped
    steps: list[StepExample]


def sample(run: Run, preemption: Preemption) -> Sampled:
    """All that the evaluation needs of the policy, in ``run.sampled``. Raises Preempted, UserError."""
    c, policy = run.config.evaluate, Policy(run)
    dev, test = run.problems("dev"), run.problems("test")

    def file(name: str) -> Pieces:
        return Pieces(run.sampled / f"{name}.jsonl", preemption)

    def plain() -> LocalSampler:
        return policy.sampler("evaluate")

    found_dev = candidates_of(file("dev_candidates"), dev, c.n, plain, "sample dev")
    found_test = candidates_of(file("test_candidates"), test, c.n, plain, "sample test")
    greedy = candidates_of(file("test_greedy"), test, 1, lambda: policy.sampler("greedy", greedy=True), "greedy test")
    steps = step_values(
        file("test_steps"), test[: c.calibration_problems], found_test, c.calibration_rollouts,
        lambda: policy.sampler("calibrate"),
    )  # fmt: skip
    if run.controls:
        image_of = {p.id: test[i - 1].id for i, p in enumerate(test)}
        candidates_of(
            file("test_shuffled_candidates"), test, c.n, lambda: policy.sampler("control", image_of=image_of),
            "shuffled test",
        )  # fmt: skip
    return Sampled(found_dev, found_test, greedy, steps)


def policy_control(run: Run) -> Figures:
    """How often the policy is right about a problem when it sees the image of another one, and how often by chance.

    Chance: the probability that a sampled answer equals the gold answer of a problem drawn independently.
    """
    problems, groups = run.problems("test"), {}
    for x in records.read(run.sampled / "test_shuffled_candidates.jsonl", Candidate):
        groups.setdefault(x.problem_id, []).append(x)
    accuracy, stderr = statistics.mean_and_stderr(
        np.array([np.mean([x.correct for x in groups[p.id]]) for p in problems])
    )
    answers = Counter(x.answer for g in groups.values() for x in g)
    gold = Counter(p.answer for p in problems)
    chance = sum(answers[a] * gold[a] for a in gold) / (answers.total() * gold.total())
    return {"accuracy": accuracy, "stderr": stderr, "chance": chance}


# ------------------------------------------------------------------------------------------------- scoring

# What the PRM sees instead of the image of problem i.
SETS: dict[str, tuple[str, Callable[[Sequence[np.ndarray], int], np.ndarray]]] = {
    "dev": ("dev", lambda stack, i: stack[i]),
    "test": ("test", lambda stack, i: stack[i]),
    "blank_image": ("test", lambda stack, i: np.zeros_like(stack[i])),
    "shuffled_image": ("test", lambda stack, i: stack[i - 1]),
}


class TrainedPRM:
    """The run's PRM; its weights are loaded when the first solution is scored."""

    def __init__(self, run: Run):
        self._run, self._tokenizer = run, Tokenizer.load(run.folder("train_prm") / "tokenizer.json")
        self.cfg = run.prm(self._tokenizer)

    @functools.cached_property
    def scorer(self) -> Scorer:
        run, tokenizer = self._run, self._tokenizer
        graphdef, params = run.load("train_prm", tokenizer, self.cfg)
        classes = (tokenizer.piece(tok.YES), tokenizer.piece(tok.NO))
        rows = run.config.evaluate.score_rows
        return Scorer(graphdef, params, run.mesh, classes, problems=rows // 4, solutions=4)

    def solutions(self, problem: Problem, found: Sequence[tuple[str, ...]], pixels: np.ndarray) -> Solutions:
        """pixels: what the PRM sees, uint8 [tiles, H, W, 3]."""
        prompt = encode.prompt_ids(self._tokenizer, self.cfg, problem.question, int(problem.image is not None))
        return Solutions([encode.prm_ids(self._tokenizer, prompt, x) for x in found], pixels)


def score(run: Run, sampled: Sampled, preemption: Preemption) -> dict[str, Scored]:
    """The scored candidates of each set, by problem. Raises Preempted, UserError."""
    c, prm, splits = run.config.evaluate, TrainedPRM(run), {"dev": sampled.dev, "test": sampled.test}

    def solutions(split: str, seen: Callable[[Sequence[np.ndarray], int], np.ndarray]) -> Callable[[int], Solutions]:
        problems, groups = run.problems(split), list(splits[split].values())
        stack = list(run.pixels(problems, prm.cfg).values())

        def of(i: int) -> Solutions:
            return prm.solutions(problems[i], [x.segments for x in groups[i]], seen(stack, i))

        return of

    results: dict[str, Scored] = {}
    names = [name for name, (split, _) in SETS.items() if run.controls or name == split]
    with progress(len(names), "score", "set") as bar:
        for name in names:
            split, seen = SETS[name]
            pieces = Pieces(run.folder("evaluate") / f"{name}_scored.jsonl", preemption)
            if not pieces.path.exists():
                groups = list(splits[split].values())
                _score_file(pieces, groups, solutions(split, seen), lambda: prm.scorer, 4 * c.score_rows)
            results[name] = _by_problem(records.read_all(pieces.path, ScoredCandidate), splits[split])
            bar.update()
    return results


def _score_file(
    pieces: Pieces, groups: list[list[Candidate]], solutions: Callable[[int], Solutions], scorer: Callable[[], Scorer],
    rows: int,
) -> None:  # fmt: skip
    """Scores problems in chunks of about ``rows`` candidates; a chunk is always scored whole, whatever was finished."""
    size = max(1, rows // max(1, max(map(len, groups), default=1)))
    with pieces:
        for start in range(0, len(groups), size):
            if str(start) not in pieces.done:
                chunk = range(start, min(start + size, len(groups)))
                pieces.add(str(start), scorer().score([solutions(i) for i in chunk]))
        found = (scores for start in range(0, len(groups), size) for scores in pieces.done[str(start)])
        pieces.finish(
            ScoredCandidate(x, tuple(s))
            for group, scores in zip(groups, found, strict=True)
            for x, s in zip(group, scores, strict=True)
        )


def _by_problem(scored: Sequence[ScoredCandidate], groups: Grouped) -> Scored:
    found: dict[str, list[ScoredCandidate]] = {name: [] for name in groups}
    for x in scored:
        found[x.candidate.problem_id].append(x)
    return list(found.values())


def stored(run: Run, split: str) -> Scored:
    """The scored candidates of a finished evaluation, by problem."""
    rows = records.read_all(run.folder("evaluate") / f"{split}_scored.jsonl", ScoredCandidate)
    return _by_problem(rows, {p.id: [] for p in run.problems(split)})


def values(run: Run, split: str, aggregator: str) -> Callable[[Any], list[list[float]]]:
    """A ``guided.Value`` of problems of ``split``: the run's PRM by one aggregator."""
    prm, combine = TrainedPRM(run), aggregate.AGGREGATORS[aggregator]
    pixels = run.pixels(run.problems(split), prm.cfg)

    def value(found: Sequence[tuple[Problem, Sequence[tuple[str, ...]]]]) -> list[list[float]]:
        scores = prm.scorer.score([prm.solutions(p, solutions, pixels[p.id]) for p, solutions in found])
        return [[combine(np.array(s)) for s in group] for group in scores]

    return value


# ------------------------------------------------------------------------------------------------- figures


def evaluate(run: Run) -> Figures:
    """Best-of-N on the test problems; the PRM's aggregator is chosen on dev. Raises Preempted, UserError."""
    with Preemption() as preemption:
        sampled = sample(run, preemption)
        results = score(run, sampled, preemption)
    figures = compare(run, sampled, results)
    if run.controls:
        figures["controls"]["policy_shuffled_image"] = policy_control(run)
    return figures


def compare(run: Run, sampled: Sampled, results: Mapping[str, Scored]) -> Figures:
    """All figures of metrics.json that come from scored candidates."""
    test, n, problems = results["test"], run.config.evaluate.n, run.problems("test")
    greedy = [group[0].correct for group in sampled.greedy.values()]
    selected = best_of_n.select_aggregator(results["dev"], n)
    figures, each = selectors(test, n, greedy=greedy)
    prm = each["prm"][selected]
    others = {x: each[x] for x in ("random", "greedy", "majority", "policy_logprob")}
    if selected != "last":
        others["outcome"] = each["prm"]["last"]
    figures |= {
        "prm_selected": selected,
        "paired": {name: statistics.paired(prm, values) for name, values in others.items()},
        "controls": {},
        "rollouts": sum(len(group) for name in ("dev", "test") for group in results[name]),
        "calibration": calibrate(sampled.steps, test),
    }
    if len({p.source for p in problems}) > 1:
        figures["by_category"] = best_of_n.by_group(each, [p.source for p in problems])
    for name in ("blank_image", "shuffled_image") if run.controls else ():
        blind = best_of_n.per_problem(results[name], n)["prm"][selected]
        difference = statistics.paired(blind, each["random"])
        accuracy, stderr = statistics.mean_and_stderr(blind)
        figures["controls"][name] = {
            "accuracy": accuracy,
            "stderr": stderr,
            "difference_to_random": difference["difference"],
            "difference_stderr": difference["stderr"],
        }
    return figures | _truth_figures(run, test, each)


def selectors(
    problems: best_of_n.Problems, n: int, greedy: Sequence[bool] | None = None, without: Sequence[str] = ()
) -> tuple[Figures, dict[str, Any]]:
    """(what can be said of any scored candidates, the accuracies of each problem at ``n``)."""
    each = best_of_n.per_problem(problems, n, without=without)
    if greedy is not None:
        each["greedy"] = np.asarray(greedy, np.float64)
    figures: Figures = {
        "n_problems": len(problems),
        "best_of_n": best_of_n.best_of_n(problems, without=without, greedy=greedy),
        "by_length": best_of_n.by_group(each, [best_of_n.length_group(group) for group in problems]),
    }
    if "majority" in each:
        others = {k: v for k, v in best_of_n.flat(each).items() if k not in ("majority", "oracle")}
        figures["against_majority"] = {k: statistics.paired(v, each["majority"]) for k, v in others.items()}
    return figures, each


def calibrate(steps: Sequence[StepExample], test: Scored) -> Figures | None:
    """Scores of the steps that have Monte Carlo estimates against these; None if there are none."""
    scores = {group[0].candidate.problem_id: group[0].scores for group in test if group}
    found = [
        (s, k, n) for x in steps for s, k, n in zip(scores[x.problem_id], x.k, x.n, strict=True) if n
    ]  # fmt: skip
    return calibration.calibrate(*np.array(found).T) if found else None


def _truth_figures(run: Run, test: Scored, each: Mapping[str, Any]) -> Figures:
    """What can be said where the true state of each step is known: of the embedded problems."""
    truth_file = run.data / "truth.jsonl"
    if not truth_file.exists():
        return {}
    truth = {t.id: t for t in records.read(truth_file, digits.Truth)}
    pairs = [
        pair
        for group in test
        for x in group
        for pair in zip(x.scores, digits.steps_right(truth[x.candidate.problem_id], x.candidate.segments), strict=False)
    ]
    tricky = [str(truth[p.id].tricky) for p in run.problems("test")]
    return {
        "step_auc": best_of_n.step_auc([s for s, _ in pairs], [t for _, t in pairs]),
        "by_tricky_sites": best_of_n.by_group(each, tricky),  # sites at which the demonstrations' habits apply
    }
