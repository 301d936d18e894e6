"""Records to tokens, labels and images."""

import numpy as np
import pytest
from PIL import Image

from mmprm_jax.data import digits, encode
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.records import SFTExample, StepExample, UserError


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
    example = SFTExample("a", "Read the image .", "<answer> 3 + 4 </answer>", "wide.png")
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
    example = StepExample("a", "p", "Evaluate the expression .", segments, (3, 0, 1), (8, 0, 1), "square.png")
    found = language.steps(example, tiles)
    assert found.images == (("square.png", 1),)
    marks = np.flatnonzero(found.tokens == tokenizer.id(tok.PRM))
    assert found.labels["k"][marks].tolist() == [3, 0, 1] and found.labels["n"][marks].tolist() == [8, 0, 1]
    assert found.labels["k"].sum() == 4 and found.labels["n"].sum() == 9  # nowhere else
    prompt = language.prompt(example.question, (), 1)
    rest = [i for segment in segments for i in (*tokenizer.encode(segment), tokenizer.id(tok.PRM))]
    assert found.tokens.tolist() == prompt + rest


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
    assert encode.tile_count(tmp_path, text_only, 1)(None) == 0
