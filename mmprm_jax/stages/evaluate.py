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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mmprm_jax import annotation, io, records
from mmprm_jax.data.steps import final_answer
from mmprm_jax.evaluation import aggregate, best_of_n, figures, statistics
from mmprm_jax.evaluation.figures import Figures, Scored
from mmprm_jax.evaluation.pieces import Pieces
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.metrics import progress
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.policy import Policy
from mmprm_jax.prm import PRM
from mmprm_jax.processes import is_first, share
from mmprm_jax.records import Candidate, Problem, Request, Rollout, ScoredCandidate, StepExample, UserError
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.rollout.rollouts import LocalSampler
from mmprm_jax.settings import Evaluate
from mmprm_jax.stages import models
from mmprm_jax.stages.run import Run, process_mesh

Grouped = dict[str, list[Candidate]]  # by problem id, in the order of the problems
Make = Callable[[], LocalSampler]


class Rules:
    """Who is right: whoever was verified when it was sampled; and what the figures are broken down by."""

    verdicts: Mapping[str, int] = {}  # how many of each kind there were, where other rules decide

    def judge(self, candidate: Candidate) -> Candidate:
        """A candidate as the evaluation counts it."""
        return candidate

    def category(self, problem: Problem) -> str:
        return problem.source


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an evaluation is made of.

    data: the folder that the problems' images are relative to. sampled, folder: what the policy sampled, and the
    scores. policy, prm: load a model onto ``mesh``, when it is needed. controls: also with other images.
    """

    config: Evaluate
    dev: Sequence[Problem]
    test: Sequence[Problem]
    data: epath.Path
    sampled: epath.Path
    folder: epath.Path
    policy: Callable[[], Policy]
    prm: Callable[[], PRM]
    mesh: Any
    seed: int
    controls: bool = True
    rules: Rules = Rules()

    def problems(self, split: str) -> Sequence[Problem]:
        return self.dev if split == "dev" else self.test


def make_inputs(run: Run) -> Inputs:
    """The evaluation of a run, with its own models and problems."""
    mesh, folder = process_mesh(run.config), run.folder("evaluate")
    return Inputs(
        run.config.evaluate, run.problems("dev"), run.problems("test"), run.data, folder, folder,
        lambda: models.load_policy(run, run.config.evaluate, mesh), lambda: models.load_prm(run, mesh), mesh,
        run.config.seed,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- sampling


@contextlib.contextmanager
def lazy_sampler(inputs: Inputs) -> Iterator[Make]:
    """A sampler of the policy that is made when it is called first: one engine, and processes that verify."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def make() -> LocalSampler:
            verify = stack.enter_context(annotation.verifier(inputs.config))
            c = inputs.config
            return inputs.policy().sampler(c, inputs.data, c.n, inputs.seed, "evaluate", verify)

        yield make


def stepwise(sampler: LocalSampler, purpose: str, **sampling: Any) -> LocalSampler:
    """Samples that end with their first step, or their answer, in tags. Raises UserError if these are no tokens."""
    tokenizer = sampler.language.tokenizer
    stop = tuple(tokenizer.id(tag) for tag in (tok.TURN_END, tok.STEP_END, tok.ANSWER_END))
    return sampler.variant(purpose, reader=Reader(), stop=stop, **sampling)


def shuffled(problems: Sequence[Problem]) -> list[Problem]:
    """For each problem the one before it that has as many images, of the last one on; itself for one without images."""
    last: dict[int, Problem] = {len(p.images): p for p in problems if p.images}
    before = []
    for p in problems:
        before.append(last.get(len(p.images), p))
        if p.images:
            last[len(p.images)] = p
    return before


def _loads(left: Sequence[Any]) -> bool:
    """Whether this process needs a model for what is left of its share. Several processes can only load it together."""
    return bool(left) or jax.process_count() > 1


def sample_candidates(pieces: Pieces, problems: Sequence[Problem], n: int, make: Make, title: str) -> Grouped:
    """``n`` solutions of each problem: what the file of ``pieces`` holds, or else sampled and written there."""
    path = pieces.path
    if not path.exists():
        mine = share(problems)
        requests = [Request(p, (), n) for p in mine if p.id not in pieces.done]
        bar = progress(len(mine), title, "problem", len(mine) - len(requests), enabled=is_first())
        with pieces, bar:
            if _loads(requests):
                sampler = make()
                for request, group in sampler.answers(requests):
                    found = [_candidate(request.problem, rollout, logprob) for rollout, logprob in group]
                    pieces.add(request.problem.id, [dataclasses.asdict(x) for x in found])
                    bar.update()
                    if reader := getattr(sampler, "reader", None):
                        reader.check()
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
                    (n,) * (len(segments) - 1) + (0,) * bool(segments), p.images,
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


def sample(inputs: Inputs) -> Samples:
    """All that the evaluation needs of the policy, in ``inputs.sampled``. Raises Interrupted, UserError."""
    with jax.set_mesh(inputs.mesh), lazy_sampler(inputs) as sampler:
        return _sample(inputs, sampler)


def _sample(inputs: Inputs, sampler: Make) -> Samples:
    c, dev, test = inputs.config, inputs.dev, inputs.test

    def file(name: str) -> Pieces:
        return Pieces(inputs.sampled / f"{name}.jsonl")

    def greedy_sampler() -> LocalSampler:
        return sampler().variant("greedy", temperature=0.0)

    found_dev = sample_candidates(file("dev_candidates"), dev, c.n, sampler, "sample dev")
    found_test = sample_candidates(file("test_candidates"), test, c.n, sampler, "sample test")
    for found in (found_dev, found_test):
        candidates = (x for group in found.values() for x in group)
        Reader.of(c, "evaluate").check_all((x.problem_id, (), x.segments) for x in candidates)
    greedy = sample_candidates(file("test_greedy"), test, 1, greedy_sampler, "greedy test")
    found_test, greedy = ({p: list(map(inputs.rules.judge, g)) for p, g in x.items()} for x in (found_test, greedy))
    steps = step_values(
        file("test_steps"), test[: c.calibration_problems], found_test, c.calibration_rollouts,
        lambda: sampler().variant("calibrate"),
    )  # fmt: skip
    if inputs.controls:
        shown = {p.id: other for p, other in zip(test, shuffled(test), strict=True)}

        def shuffled_sampler() -> LocalSampler:
            own = sampler().pixels
            return sampler().variant("control", pixels=lambda p: own(shown[p.id]))

        sample_candidates(file("test_shuffled_candidates"), test, c.n, shuffled_sampler, "shuffled test")
    return Samples(found_dev, found_test, greedy, steps)


# ------------------------------------------------------------------------------------------------- scoring

# The sets of candidates, and what the PRM sees with each: "own" image, a "blank" or "another" problem's one.
SETS = {
    "dev": ("dev", "own"),
    "test": ("test", "own"),
    "blank_image": ("test", "blank"),
    "shuffled_image": ("test", "another"),
}


def score(inputs: Inputs, sampled: Samples) -> dict[str, Scored]:
    """The scored candidates of each set, by problem. Raises Interrupted, UserError."""
    c, splits, prm = inputs.config, {"dev": sampled.dev, "test": sampled.test}, functools.cache(inputs.prm)

    def solutions(split: str, seen: str) -> Callable[[int], Solutions]:
        problems, groups = inputs.problems(split), list(splits[split].values())
        shown = shuffled(problems) if seen == "another" else problems

        def of(i: int) -> Solutions:
            tiles = prm().pixels(inputs.data)(shown[i])
            if seen == "blank":
                tiles = [np.zeros_like(pixels) for pixels in tiles]
            return prm().tokens(problems[i].question, [x.segments for x in groups[i]], tiles)

        return of

    results: dict[str, Scored] = {}
    names = [name for name, (split, _) in SETS.items() if inputs.controls or name == split]
    with jax.set_mesh(inputs.mesh), progress(len(names), "score", "set", enabled=is_first()) as bar:
        for name in names:
            split, seen = SETS[name]
            pieces = Pieces(inputs.folder / f"{name}_scored.jsonl")
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


def _by_problem(scored: Sequence[ScoredCandidate], groups: Mapping[str, Any]) -> Scored:
    found: dict[str, list[ScoredCandidate]] = {name: [] for name in groups}
    for x in scored:
        found[x.candidate.problem_id].append(x)
    return list(found.values())


def stored(inputs: Inputs, split: str) -> Scored:
    """The scored candidates of a finished evaluation, by problem."""
    rows = records.read_all(inputs.folder / f"{split}_scored.jsonl", ScoredCandidate)
    return _by_problem(rows, {p.id: [] for p in inputs.problems(split)})


def values(inputs: Inputs, aggregator: str) -> Callable[[Any], list[list[float]]]:
    """A ``guided.Value``: the PRM by one aggregator."""
    prm, combine = functools.cache(inputs.prm), aggregate.AGGREGATORS[aggregator]

    def value(found: Sequence[tuple[Problem, Sequence[tuple[str, ...]]]]) -> list[list[float]]:
        groups = []
        for problem, solutions in found:
            groups.append(prm().tokens(problem.question, solutions, prm().pixels(inputs.data)(problem)))
        return [[combine(np.array(s)) for s in group] for group in prm().scorer.score(groups)]

    return value


# ------------------------------------------------------------------------------------------------- the stage


def evaluate(inputs: Inputs) -> Figures:
    """Best-of-N on the test problems; the PRM's aggregator is chosen on dev. Raises Interrupted, UserError."""
    sampled = sample(inputs)
    results = score(inputs, sampled)
    found = compare(inputs, sampled, results)
    if inputs.controls:
        shuffled_file = inputs.sampled / "test_shuffled_candidates.jsonl"
        found["controls"]["policy_shuffled_image"] = figures.policy_control(inputs.test, shuffled_file)
    return found


def compare(inputs: Inputs, sampled: Samples, results: Mapping[str, Scored]) -> Figures:
    """All figures of metrics.json that come from scored candidates."""
    test, n, problems = results["test"], inputs.config.n, inputs.test
    greedy = [group[0].correct for group in sampled.greedy.values()]
    selected = best_of_n.select_aggregator(results["dev"], n)
    key = best_of_n.equivalent(test, {p.id: p.grading for p in problems})
    found, each = figures.selectors(test, n, greedy=greedy, key=key)
    prm = each["prm"][selected]
    others = {x: each[x] for x in ("random", "greedy", "majority", "policy_logprob")}
    if selected != "last":
        others["outcome"] = each["prm"]["last"]
    found |= {
        "prm_selected": selected,
        "paired": {name: statistics.paired(prm, values) for name, values in others.items()},
        "controls": {},
        "rollouts": sum(len(group) for name in ("dev", "test") for group in results[name]),
        "calibration": figures.calibrate(sampled.steps, test),
    }
    categories = list(map(inputs.rules.category, problems))
    if len(set(categories)) > 1:
        found["by_category"] = best_of_n.by_group(each, categories)
    if inputs.rules.verdicts:
        found["scoring"] = dict(inputs.rules.verdicts)
    for name in ("blank_image", "shuffled_image") if inputs.controls else ():
        found["controls"][name] = figures.control(results[name], n, selected, each["random"])
    return found | figures.with_truth(inputs.data / "truth.jsonl", problems, test, each)
