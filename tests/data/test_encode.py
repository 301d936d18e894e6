"""Records to tokens, labels and images."""

import numpy as np
import pytest
from PIL import Image

from mmprm_jax.data import digits, encode
from mmprm_jax.data.training_files import Encoded
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, SFTExample, StepExample, UserError


@pytest.fixture(scope="module")
def tokenizer():
    return digits.tokenizer().with_token(tok.PRM)


@pytest.fixture
def tiles(tmp_path, tiny):
    Image.new("RGB", (40, 10)).save(tmp_path / "wide.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "square.png")
    return encode.tile_count(tmp_path, tiny.cfg, max_tiles=6)


@pytest.fixture
def language(tokenizer, tiny):
    return encode.Language.own(tokenizer, tiny.cfg)


def test_sft(tokenizer, tiny, tiles, language):
    example = SFTExample("a", "Read the image .", "<answer> 3 + 4 </answer>", ("wide.png",))
    found = language.demonstration(example, tiles)
    assert found.id == "a" and found.images == (("wide.png", 5),)  # 4 x 1 and the whole
    assert np.sum(found.tokens == tokenizer.id(tok.IMAGE)) == 5 * tiny.cfg.tokens_per_tile
    wanted = [*tokenizer.encode(example.response), tokenizer.id(tok.TURN_END)]
    assert found.tokens[found.labels["response"]].tolist() == wanted
    prompt = language.prompt(example.question, (), 5)
    assert found.tokens[~found.labels["response"]].tolist() == prompt
    text = language.demonstration(SFTExample("b", "Evaluate 3 + 4 .", "7"), tiles)
    assert text.images == () and tokenizer.id(tok.IMAGE) not in text.tokens


def test_steps(tokenizer, tiles, language):
    segments = ("<step> 3 + 4 = 7 </step>", "<step> 7 - 1 = 6 </step>", "<answer> 6 </answer>")
    example = StepExample("a", "p", "Evaluate the expression .", segments, (3, 0, 1), (8, 0, 1), ("square.png",))
    found = language.steps(example, tiles)
    assert found.images == (("square.png", 1),)
    marks = np.flatnonzero(found.tokens == tokenizer.id(tok.PRM))
    assert found.labels["k"][marks].tolist() == [3, 0, 1] and found.labels["n"][marks].tolist() == [8, 0, 1]
    assert found.labels["k"].sum() == 4 and found.labels["n"].sum() == 9  # nowhere else
    prompt = language.prompt(example.question, (), 1)
    rest = [i for segment in segments for i in (*tokenizer.encode(segment), tokenizer.id(tok.PRM))]
    assert found.tokens.tolist() == prompt + rest


def test_labels_that_are_no_counts(tokenizer, tiles, language):
    """A number in [0, 1] stays what it is, to the precision of float32."""
    step = "<step> 3 + 4 = 7 </step>"
    found = language.steps(StepExample("a", "p", "3 + 4", (step,) * 3, (0.3, 0, 1), (1, 0, 1)), tiles)
    marks = np.flatnonzero(found.tokens == tokenizer.id(tok.PRM))
    assert found.labels["k"].dtype == np.float32 and found.labels["n"][marks].tolist() == [1, 0, 1]
    assert found.labels["k"][marks].tolist() == [np.float32(0.3), 0, 1]
    again = Encoded.from_bytes(found.to_bytes("labels"), "labels")
    np.testing.assert_array_equal(again.labels["k"], found.labels["k"])
    whole = language.steps(StepExample("a", "p", "3 + 4", (step,), (7,), (16,)), tiles)
    assert whole.labels["k"].dtype == np.int32
    assert Encoded.from_bytes(whole.to_bytes("labels"), "labels").labels["k"].max() == 7
    with pytest.raises(TypeError):  # rather than 0 where there was 0.3
        found.to_bytes("prm")
    for k, n, words in ((0.3, 2, "k 0.3 of n 2 is no whole number"), (float("nan"), 1, "needs counts"),
                        (1, 2**24 + 1, "n 16777217 is more than")):  # fmt: skip
        with pytest.raises(UserError, match=f"step example a: .*{words}"):
            language.steps(StepExample("a", "p", "q", (step,), (k,), (n,)), tiles)


@pytest.mark.parametrize(("k", "n"), [((1,), (1, 1)), ((1, 2), (2, 1)), ((-1, 0), (1, 1)), ((1, 1, 1), (1, 1, 1))])
def test_counts_that_cannot_be(language, tiles, k, n):
    with pytest.raises(UserError, match="step example a: needs counts 0 <= k <= n for each of its 2 steps"):
        language.steps(StepExample("a", "p", "q", ("s", "t"), k, n), tiles)


def test_images_are_checked_when_examples_are_encoded(tmp_path, tiny, tiles):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match="bad.png: not a readable image"):
        tiles("bad.png")
    with pytest.raises(UserError, match="none.png: image not found"):
        tiles("none.png")
    text_only = VLMConfig(None, tiny.cfg.decoder)
    with pytest.raises(UserError, match="square.png: the model takes no images"):
        encode.tile_count(tmp_path, text_only, 1)("square.png")


# One language for training, sampling and scoring

SEGMENTS = ("<step> Its base is 4.</step>", "<step>So: <|im_end|> 6\n</step>", "<answer>$6$</answer>")
QUESTION = "What is the area of <prm> $ABC$?"


@pytest.fixture(scope="module", params=["own", "qwen2", "internlm2_nodummy"])
def spoken(request, golden, tiny):
    if request.param == "own":
        return encode.Language.own(Tokenizer.train_bpe([QUESTION, *SEGMENTS], 400), tiny.cfg)
    return encode.Language.released(Tokenizer.load(golden / "tokenizer" / request.param), tiny.cfg)


@pytest.mark.parametrize("images", [(), ("wide.png",)])
def test_a_policy_goes_on_as_its_demonstrations_do(spoken, tiles, images):
    """The prompt with any number of steps is the beginning of the demonstration with the same solution."""
    found = spoken.demonstration(SFTExample("a", QUESTION, "".join(SEGMENTS), images), tiles)
    ids, count = found.tokens.tolist(), sum(map(tiles, images))
    assert ids[-1] == spoken.tokenizer.id(tok.TURN_END) and found.labels["response"][-1]
    assert ids.count(spoken.image_token) == count * spoken.cfg.tokens_per_tile
    text = spoken.tokenizer.decode(found.tokens[found.labels["response"]][:-1])
    assert text.split() == "".join(SEGMENTS).split() or text.replace(" ", "") == "".join(SEGMENTS).replace(" ", "")
    for j in range(len(SEGMENTS)):
        prompt = spoken.prompt(QUESTION, SEGMENTS[:j], count)
        same = sum(a == b for a, b in zip(prompt, ids, strict=False))
        assert same >= len(prompt) - 1  # where a step meets the next one, a token may be of both
    assert not found.labels["response"][: len(spoken.prompt(QUESTION, (), count)) - 1].any()


def test_the_prm_is_trained_on_what_it_scores(spoken, tiles):
    judge = spoken.with_prm()
    example = StepExample("a", "p", QUESTION, SEGMENTS, (3, 0, 1), (8, 0, 1), ("wide.png",))
    found = judge.steps(example, tiles)
    ids, marks = judge.solution(QUESTION, SEGMENTS, 5)
    assert found.tokens.tolist() == ids and len(marks) == 3
    assert np.flatnonzero(found.labels["n"]).tolist() == [marks[0], marks[2]]
    assert [i for i, token in enumerate(ids) if token == judge.tokenizer.id(tok.PRM)] == marks  # none by the question
    assert max(ids) < judge.cfg.decoder.vocab_size and ids.count(judge.image_token) == 5 * judge.cfg.tokens_per_tile
    assert all(judge.tokenizer.decode([i]).strip() in ("Yes", "No") for i in judge.classes)


def test_pixels_are_opened_when_they_are_needed(tmp_path, tiny, tiles):
    pixels = encode.file_pixels(tmp_path, tiny.cfg, 6)
    assert pixels(Problem("a", "q", "1")) == []
    assert len(*pixels(Problem("a", "q", "1", ("wide.png",)))) == tiles("wide.png") == 5
    with pytest.raises(UserError, match="wide.png: the model takes no images"):
        encode.file_pixels(tmp_path, VLMConfig(None, tiny.cfg.decoder), 6)(Problem("a", "q", "1", ("wide.png",)))


def test_what_a_word_level_policy_sampled_keeps_its_tokens(language, tokenizer):
    """A marker inside of a step has no other ids."""
    segment = "<step> 3 <|im_start|> <IMG_CONTEXT> </step>"
    assert language.prompt("Evaluate the expression .", [segment], 0)[-5:] == tokenizer.encode(segment)


def test_several_images_in_order(tokenizer, tiles, language, tmp_path, tiny):
    names = ("wide.png", "square.png")
    ids = language.prompt("Read the image .", (), [5, 1])
    example = StepExample("a", "p", "Read the image .", ("<step> 3 </step>",), (1,), (2,), names)
    found = language.steps(example, tiles)
    assert found.images == (("wide.png", 5), ("square.png", 1)) and found.tiles == 6
    assert found.tokens.tolist()[: len(ids) - 3] == ids[:-3]
    assert language.demonstration(SFTExample("a", "Read the image .", "3", names), tiles).images == found.images
    opened = encode.file_pixels(tmp_path, tiny.cfg, 6)(Problem("a", "q", "1", names))
    assert [len(x) for x in opened] == [5, 1] and encode.joined(opened).shape[0] == 6 and encode.joined([]) is None
