"""The policy and what is public around it, on a tiny random model: sampling, trees in memory, training, choosing."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from mmprm_jax import PRM, Policy, annotate, best_of_n, convert, open_run, records, train_prm
from mmprm_jax.data.encode import Language
from mmprm_jax.models import build, hf_config
from mmprm_jax.models.config import DecoderConfig, VisionConfig, VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Grading, Node, Problem, Rollout, StepExample, Tree, UserError

QUESTION = "What is 3 + 4?"
STEPS = ("<step> 3 + 4 = 7 </step>", "<step> So it is 7. </step>", "<answer> 7 </answer>")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 20, 3), np.uint8))
BPE = Tokenizer.train_bpe([QUESTION, *STEPS], 300)
VISION = VisionConfig(
    image_size=8, patch_size=2, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, layer_scale_init=0.5
)
DECODER = DecoderConfig(
    vocab_size=len(BPE), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    rope_theta=100.0,
)  # fmt: skip


def write(folder, vision, mesh):
    """A model folder as a training leaves it."""
    cfg = VLMConfig(vision, DECODER, remat="none")
    language = Language.own(BPE, cfg)
    with jax.set_mesh(mesh):
        _, params = build.initialise(cfg, language.image_token, 0, mesh)
    params = {**params, "decoder": {**params["decoder"], "lm_head": 8 * params["decoder"]["lm_head"]}}
    loaded = convert.from_scratch(cfg, BPE, params, mesh)
    named = {hf_config.TEMPLATES: {"policy": "own", "prm": "own"}, "max_dynamic_patch": 2}
    model = dataclasses.replace(loaded.model, config={**loaded.model.config, **named})
    convert.write_folder(folder, dataclasses.replace(loaded, model=model), BPE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mesh_of):
    return write(tmp_path_factory.mktemp("policy") / "model", VISION, mesh_of(data=1))


@pytest.fixture(scope="module")
def policy(folder, mesh_of):
    return Policy.from_pretrained(folder, mesh=mesh_of(data=1))


def tokens(completions):
    return [completion.tokens for completion in completions]


def test_a_completion_depends_on_its_own_problem_only(policy):
    found = policy.sample([QUESTION, "3 + 4", QUESTION], n=3, max_new_tokens=12)
    assert [len(group) for group in found] == [3, 3, 3]
    assert len(set(itertools.chain(*map(tokens, found)))) == 9  # also of the question that is there twice
    assert tokens(policy.sample(["3 + 4"], n=3, max_new_tokens=12)[0]) == tokens(found[1])
    assert tokens(policy.sample(["3 + 4"], n=2, max_new_tokens=12)[0]) == tokens(found[1])[:2]
    assert tokens(policy.sample(["3 + 4"], n=3, max_new_tokens=12, seed=1)[0]) != tokens(found[1])
    for completion in itertools.chain(*found):
        assert len(completion.tokens) == len(completion.logprobs) <= 12
        assert completion.logprob == pytest.approx(sum(completion.logprobs)) and max(completion.logprobs) <= 0
        stopped = completion.tokens[-1] == policy.stop
        assert completion.text == BPE.decode(completion.tokens[:-1] if stopped else completion.tokens)
        assert stopped or len(completion.tokens) == 12
    greedy = policy.sample([QUESTION], n=2, max_new_tokens=12, temperature=0.0)[0]
    assert greedy[0] == greedy[1]
    assert policy.sample([]) == []


def test_images(policy, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    record = Problem("a", QUESTION, "7", (str(tmp_path / "a.png"),))
    ways = dict(max_new_tokens=6, temperature=0.0)
    (own,), (none,) = policy.sample([record, QUESTION], **ways)
    (file,), (picture,), (two,), (left_out,) = policy.sample(
        [QUESTION, QUESTION, QUESTION, record],
        images=[[tmp_path / "a.png"], [PICTURE], [PICTURE, PICTURE], []], **ways,
    )  # fmt: skip
    assert own.logprobs == file.logprobs == picture.logprobs
    assert left_out.logprobs == none.logprobs
    both = dataclasses.replace(record, images=record.images * 2)
    assert policy.sample([both], **ways)[0][0].logprobs == two.logprobs
    assert len({own.logprobs, none.logprobs, two.logprobs}) == 3
    fewer = dataclasses.replace(policy, max_tiles=1)
    assert policy.max_tiles == 2 and fewer.sample([record], **ways)[0][0].logprobs != own.logprobs


def test_chats(policy):
    user = {"role": "user", "content": QUESTION}
    plain = policy.sample([QUESTION], n=2, max_new_tokens=6)[0]
    assert policy.sample([[user]], n=2, max_new_tokens=6)[0] == plain
    begun = [user, {"role": "assistant", "content": "\n".join(STEPS[:2])}]
    (after,) = policy.sample([begun], max_new_tokens=6, temperature=0.0)[0]
    ids = policy.language.prompt(QUESTION, STEPS[:2], 0)
    assert ids == policy.language.prompt(QUESTION, (), 0) + BPE.encode(STEPS[0]) + BPE.encode(STEPS[1])
    (before,) = policy.sample([[user]], max_new_tokens=6, temperature=0.0)[0]
    assert after.logprobs != before.logprobs


@pytest.mark.parametrize(
    ("problems", "options", "words"),
    [
        (QUESTION, {}, "must be a list; put brackets"),
        ([[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]], {}, "a chat of system, user"),
        ([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "<step> so"}]], {}, "whole steps"),
        ([QUESTION], {"images": []}, "images for 0 problems, but there are 1"),
        ([QUESTION], {"images": [["none.png"]]}, "none.png: image not found"),
        ([QUESTION], {"images": ["a.png"]}, "images must be a list of files"),
        (["<image> and <image>"], {"images": [[PICTURE]]}, "2 <image> placeholders, but 1 images"),
    ],
)
def test_what_cannot_be_asked(policy, problems, options, words):
    with pytest.raises(UserError, match=words):
        policy.sample(problems, **options)


def test_a_policy_without_eyes(tmp_path, mesh):
    blind = Policy.from_pretrained(write(tmp_path / "text", None, mesh), mesh=mesh)
    with pytest.raises(UserError, match="reads text only"):
        blind.sample([QUESTION], images=[[PICTURE]])
    with pytest.raises(UserError, match="'interval': no such policy template; did you mean internvl"):
        Policy.from_pretrained(tmp_path / "text", mesh=mesh, template="interval")
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        Policy.from_pretrained(tmp_path / "other", mesh=mesh)


def even(pairs):
    """Verdicts that a random policy gets right now and then."""
    return [answer is not None or number % 2 == 0 for number, (answer, *_) in enumerate(pairs)]


SEARCH = dict(num_rollouts=4, max_searches=2, max_new_tokens=8, slots=8)


def test_trees_in_memory(policy, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    problems = [Problem("a", QUESTION, "7", ("a.png",)), Problem("b", QUESTION, "7")]
    trees = annotate(policy, problems, images=tmp_path, verify=even, **SEARCH)
    assert [tree.problem for tree in trees] == problems
    assert all(tree.nodes[0].n == 4 and tree.nodes[0].k == 2 for tree in trees)
    seen = []

    def heard(answers):
        seen.extend(answers)
        return even(answers)

    graded = Problem("c", QUESTION, "7", ("a.png", "a.png"), grading=Grading.of(["7", "8"], kind="choice"))
    (tree,) = annotate(policy, [graded], images=tmp_path, verify=heard, **SEARCH)
    assert tree.problem == graded and {asked[1:] for asked in seen} == {("7", graded.grading)}
    assert annotate(policy, problems[1:], verify=even, **SEARCH)[0].nodes[0].rollouts == trees[1].nodes[0].rollouts
    (tree,) = annotate(policy, problems[1:], **SEARCH)  # really verified
    assert tree.nodes[0].k == 0
    with pytest.raises(UserError, match="problem a: .*a.png: image not found"):
        annotate(policy, problems, images=tmp_path / "other", **SEARCH)
    with pytest.raises(UserError, match="num_rolouts: no such setting; did you mean num_rollouts"):
        annotate(policy, problems, num_rolouts=4)
    with pytest.raises(UserError, match="are for `mmprm annotate`"):
        annotate(policy, problems, policy="other/policy")


def tree(name, right, images=("a.png",)):
    """A right and a wrong solution, of which the first step was estimated."""
    wrong = (STEPS[0], "<answer> 8 </answer>")
    rollouts = (Rollout(STEPS, True, 9), Rollout(wrong, False, 7))
    nodes = (
        Node(-1, (), 1, 2, 1, rollouts),
        Node(0, STEPS[:1], right, 2, 0, (Rollout(STEPS[1:], True, 6), Rollout(wrong[1:], False, 4))),
    )
    return Tree(Problem(name, QUESTION, "7", images), nodes, ((0, 1),))


def test_a_prm_is_trained_and_chooses(folder, tmp_path, mesh):
    PICTURE.save(tmp_path / "a.png")
    PICTURE.resize((8, 8)).save(tmp_path / "small.png")
    trees = [tree(f"p{i}", 1, ("a.png", "small.png") if i == 3 else ("a.png",)) for i in range(4)]
    settings = dict(steps=4, batch_size=2, max_length=80, row_tiles=4, checkpoint_every=2)
    prm = train_prm(folder, trees, tmp_path / "prm", images=tmp_path, mesh=mesh, **settings)
    assert prm.max_tiles == 2 and prm.template == "own"
    written = records.read_all(tmp_path / "prm" / "examples.jsonl", StepExample)
    assert {x.images for x in written if x.problem_id == "p3"} == {("a.png", "small.png")}
    problem = Problem("a", QUESTION, "7", (str(tmp_path / "a.png"),))
    scores = prm.score(problem, STEPS)
    assert len(scores) == 3 and all(0 < score < 1 for score in scores)
    assert prm.score(QUESTION, STEPS, images=[PICTURE]) == scores != prm.score(QUESTION, STEPS)
    stored = PRM.from_pretrained(tmp_path / "prm", mesh=mesh)
    assert stored.score(problem, STEPS) == scores

    candidates = [STEPS, (STEPS[0], "<answer> 8 </answer>"), ()]
    best = best_of_n(prm, problem, candidates, aggregator="last")
    assert best.scores[0] == pytest.approx(scores[-1]) and best.scores[2] == -np.inf
    assert best.index == int(np.argmax(best.scores[:2]))
    with pytest.raises(UserError, match="aggregator: 'least' is not one of min, mean"):
        best_of_n(prm, problem, candidates, aggregator="least")
    with pytest.raises(UserError, match="no candidates"):
        best_of_n(prm, problem, [])
    with pytest.raises(UserError, match="labels: no such setting; did you mean label"):
        train_prm(folder, trees, tmp_path / "other", labels="soft")


def test_a_run_that_is_not_there_or_not_finished(tmp_path):
    with pytest.raises(UserError, match="no run is there"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 3, "sft": {"steps": 5}}')
    run = open_run(tmp_path)
    assert run.config.seed == 3 and run.config.sft.steps == 5
    for read in (lambda: run.policy, lambda: run.prm, run.trees, run.examples, run.candidates, lambda: run.metrics):
        with pytest.raises(UserError, match="has not finished; run `mmprm"):
            read()
    with pytest.raises(UserError, match="test.jsonl: no such file"):
        run.problems()
    (tmp_path / "config.json").write_text('{"sede": 3}')
    with pytest.raises(UserError, match="config.json: sede: no such setting; did you mean seed"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a config"):
        open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_solutions_without_tags_are_read_by_their_structure(policy):
    """And continued: the tokens behind a solution so far are those of the whole text."""
    begun = "First we add.\n\nSo 3 + 4 = 7, "
    user = {"role": "user", "content": QUESTION}
    chat = [user, {"role": "assistant", "content": begun}]
    (found,) = policy.sample([chat], max_new_tokens=8, steps="structure", temperature=0.0)[0]
    assert "".join(found.prefix) == begun and len(found.prefix) == 2
    assert "".join(found.segments) == found.text.split("<|im_end|>")[0] or not found.segments
    assert policy.language.prompt(QUESTION, found.prefix, 0) == policy.language.prompt(QUESTION, (begun,), 0)
    with pytest.raises(UserError, match="whole steps"):
        policy.sample([chat], max_new_tokens=8)
    with pytest.raises(UserError, match="steps: 'struct' is not one of tags, structure, auto"):
        policy.sample([QUESTION], steps="struct")
