"""The stage ``evaluate``: candidates are sampled and scored, the selectors compared.

Files in its folder: {dev,test}_candidates.jsonl, test_greedy.jsonl, test_steps.jsonl (Monte Carlo estimates, for the
calibration), test_shuffled_candidates.jsonl, and {dev,test,blank_image,shuffled_image}_scored.jsonl. A file that is
there is read; one that an interruption left unfinished goes on piece by piece. Several processes share the problems,
each with the policy and the PRM on its own devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mmprm_jax import annotation, io, records
from mmprm_jax.data import digits
from mmprm_jax.data.prompts import final_answer
from mmprm_jax.evaluation import aggregate, best_of_n, calibration, statistics
from mmprm_jax.evaluation.pieces import Pieces
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.metrics import progress
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.processes import is_first, share
from mmprm_jax.records import Candidate, Problem, Request, Rollout, ScoredCandidate, StepExample, UserError
from mmprm_jax.rollout.rollouts import LocalSampler

if TYPE_CHECKING:
    from mmprm_jax.stages import Run

Figures = dict[str, Any]
Grouped = dict[str, list[Candidate]]  # by problem id, in the order of the problems
Scored = list[list[ScoredCandidate]]
Make = Callable[[], LocalSampler]


# ------------------------------------------------------------------------------------------------- sampling


@contextlib.contextmanager
def lazy_sampler(run: Run) -> Iterator[Make]:
    """A sampler of the run's policy that is made when it is called first: one engine, and processes that verify."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def make() -> LocalSampler:
            c = run.config.evaluate
            verify = stack.enter_context(annotation.verifier(c))
            return run.policy(c, run.own_mesh).sampler(c, run.data, c.n, run.config.seed, "evaluate", verify)

        yield make


def stepwise(sampler: LocalSampler, purpose: str, **sampling: Any) -> LocalSampler:
    """Samples that end with their first step, or their answer. Raises UserError if their tags are no tokens."""
    tokenizer = sampler.language.tokenizer
    stop = tuple(tokenizer.id(tag) for tag in (tok.TURN_END, tok.STEP_END, tok.ANSWER_END))
    return sampler.variant(purpose, stop=stop, **sampling)


def shuffled(problems: Sequence[Problem]) -> list[Problem]:
    """For each problem the one before it that has an image, of the last one on; itself for one without an image."""
    with_image = [p for p in problems if p.image is not None]
    before = {p.id: with_image[i - 1] for i, p in enumerate(with_image)}
    return [before.get(p.id, p) for p in problems]


def _loads(left: Sequence[Any]) -> bool:
    """Whether this process needs a model for what is left of its share. Several processes can only load it together."""
    return bool(left) or jax.process_count() > 1


def candidates_of(pieces: Pieces, problems: Sequence[Problem], n: int, make: Make, title: str) -> Grouped:
    """``n`` solutions of each problem: what the file of ``pieces`` holds, or else sampled and written there."""
    path = pieces.path
    if not path.exists():
        mine = share(problems)
        requests = [Request(p, (), n) for p in mine if p.id not in pieces.done]
        bar = progress(len(mine), title, "problem", len(mine) - len(requests), enabled=is_first())
        with pieces, bar:
            if _loads(requests):
                for request, group in make().answers(requests):
                    found = [_candidate(request.problem, rollout, logprob) for rollout, logprob in group]
                    pieces.add(request.problem.id, [dataclasses.asdict(x) for x in found])
                    bar.update()
            pieces.finish(records.from_dict(Candidate, row) for p in problems for row in pieces.done[p.id])
    io.check(path)
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
        requests = share([Request(p, segments[:j], n) for p, segments in firsts for j in range(1, len(segments))])
        left = [r for r in requests if _step_key(r) not in pieces.done]
        bar = progress(len(requests), "estimate test", "prefix", len(requests) - len(left), enabled=is_first())
        with pieces, bar:
            if _loads(left):
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
    io.check(pieces.path)
    return list(records.read(pieces.path, StepExample))


def _step_key(request: Request) -> str:
    return f"{request.problem.id}/{len(request.prefix)}"


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was sampled, by file."""

    dev: Grouped
    test: Grouped
    greedy: Grouped
    steps: list[StepExample]


def sample(run: Run) -> Samples:
    """All that the evaluation needs of the policy, in ``run.sampled``. Raises Interrupted, UserError."""
    with lazy_sampler(run) as sampler:
        return _sample(run, sampler)


def _sample(run: Run, sampler: Make) -> Samples:
    c, dev, test = run.config.evaluate, run.problems("dev"), run.problems("test")

    def file(name: str) -> Pieces:
        return Pieces(run.sampled / f"{name}.jsonl")

    def likeliest() -> LocalSampler:
        return sampler().variant("greedy", temperature=0.0)

    found_dev = candidates_of(file("dev_candidates"), dev, c.n, sampler, "sample dev")
    found_test = candidates_of(file("test_candidates"), test, c.n, sampler, "sample test")
    greedy = candidates_of(file("test_greedy"), test, 1, likeliest, "greedy test")
    found_test, greedy = ({p: list(map(run.judged, g)) for p, g in x.items()} for x in (found_test, greedy))
    steps = step_values(
        file("test_steps"), test[: c.calibration_problems], found_test, c.calibration_rollouts,
        lambda: sampler().variant("calibrate"),
    )  # fmt: skip
    if run.controls:
        shown = {p.id: other for p, other in zip(test, shuffled(test), strict=True)}

        def elsewhere() -> LocalSampler:
            own = sampler().pixels
            return sampler().variant("control", pixels=lambda p: own(shown[p.id]))

        candidates_of(file("test_shuffled_candidates"), test, c.n, elsewhere, "shuffled test")
    return Samples(found_dev, found_test, greedy, steps)


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

# The sets of candidates, and what the PRM sees with each: "own" image, a "blank" or "another" problem's one.
SETS = {
    "dev": ("dev", "own"),
    "test": ("test", "own"),
    "blank_image": ("test", "blank"),
    "shuffled_image": ("test", "another"),
}


def score(run: Run, sampled: Samples) -> dict[str, Scored]:
    """The scored candidates of each set, by problem. Raises Interrupted, UserError."""
    c, splits = run.config.evaluate, {"dev": sampled.dev, "test": sampled.test}
    prm = functools.cache(lambda: run.prm(run.own_mesh))

    def solutions(split: str, seen: str) -> Callable[[int], Solutions]:
        problems, groups = run.problems(split), list(splits[split].values())
        shown = shuffled(problems) if seen == "another" else problems

        def of(i: int) -> Solutions:
            pixels = prm().pixels(run.data)(shown[i])
            if pixels is not None and seen == "blank":
                pixels = np.zeros_like(pixels)
            tiles = [] if pixels is None else [pixels]
            return prm().tokens(problems[i].question, [x.segments for x in groups[i]], tiles)

        return of

    results: dict[str, Scored] = {}
    names = [name for name, (split, _) in SETS.items() if run.controls or name == split]
    with progress(len(names), "score", "set", enabled=is_first()) as bar:
        for name in names:
            split, seen = SETS[name]
            pieces = Pieces(run.folder("evaluate") / f"{name}_scored.jsonl")
            if not pieces.path.exists():
                groups = list(splits[split].values())
                _score_file(pieces, groups, solutions(split, seen), lambda: prm().scorer, 4 * c.score_rows)
            io.check(pieces.path)
            results[name] = _by_problem(records.read_all(pieces.path, ScoredCandidate), splits[split])
            bar.update()
    return results


def _score_file(
    pieces: Pieces, groups: list[list[Candidate]], solutions: Callable[[int], Solutions], scorer: Callable[[], Scorer],
    rows: int,
) -> None:  # fmt: skip
    """Scores problems in chunks of about ``rows`` candidates; a chunk is always scored whole, whatever was finished."""
    size = max(1, rows // max(1, max(map(len, groups), default=1)))
    left = [start for start in share(range(0, len(groups), size)) if str(start) not in pieces.done]
    with pieces:
        if _loads(left):
            prm = scorer()
            for start in left:
                chunk = range(start, min(start + size, len(groups)))
                pieces.add(str(start), prm.score([solutions(i) for i in chunk]))
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


def values(run: Run, aggregator: str) -> Callable[[Any], list[list[float]]]:
    """A ``guided.Value``: the run's PRM by one aggregator."""
    prm, combine = functools.cache(lambda: run.prm(run.own_mesh)), aggregate.AGGREGATORS[aggregator]

    def value(found: Sequence[tuple[Problem, Sequence[tuple[str, ...]]]]) -> list[list[float]]:
        pixels = [prm().pixels(run.data)(problem) for problem, _ in found]
        asked = [
            prm().tokens(problem.question, solutions, [] if seen is None else [seen])
            for (problem, solutions), seen in zip(found, pixels, strict=True)
        ]
        return [[combine(np.array(s)) for s in group] for group in prm().scorer.score(asked)]

    return value


# ------------------------------------------------------------------------------------------------- figures


def evaluate(run: Run) -> Figures:
    """Best-of-N on the test problems; the PRM's aggregator is chosen on dev. Raises Interrupted, UserError."""
    with jax.set_mesh(run.own_mesh):
        sampled = sample(run)
        results = score(run, sampled)
    figures = compare(run, sampled, results)
    if run.controls:
        figures["controls"]["policy_shuffled_image"] = policy_control(run)
    return figures


def compare(run: Run, sampled: Samples, results: Mapping[str, Scored]) -> Figures:
    """All figures of metrics.json that come from scored candidates."""
    test, n, problems = results["test"], run.config.evaluate.n, run.problems("test")
    greedy = [group[0].correct for group in sampled.greedy.values()]
    selected = best_of_n.select_aggregator(results["dev"], n)
    figures, each = selectors(test, n, greedy=greedy, key=best_of_n.equivalent(test))
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
    categories = list(map(run.category, problems))
    if len(set(categories)) > 1:
        figures["by_category"] = best_of_n.by_group(each, categories)
    if run.verdicts:
        figures["scoring"] = dict(run.verdicts)
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
    problems: best_of_n.Problems, n: int, greedy: Sequence[bool] | None = None, without: Sequence[str] = (),
    key: best_of_n.Key = best_of_n.plain,
) -> tuple[Figures, dict[str, Any]]:  # fmt: skip
    """(what can be said of any scored candidates, the accuracies of each problem at ``n``)."""
    each = best_of_n.per_problem(problems, n, key, without)
    if greedy is not None:
        each["greedy"] = np.asarray(greedy, np.float64)
    figures: Figures = {
        "n_problems": len(problems),
        "best_of_n": best_of_n.best_of_n(problems, key, without, greedy),
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
