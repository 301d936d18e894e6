"""The tokenizers of our own, word-level and byte-level, and their markers."""

import pytest

from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Segment, Tokenizer
from mmprm_jax.records import UserError

WORDS = ["user", "assistant", "Yes", "No", "+", "-", "=", "-(", "3", "-4", "."]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_words(WORDS)


def test_round_trip(tokenizer):
    text = "<step> 3 - -4 = 3 </step> <answer> -4 </answer>"
    ids = tokenizer.encode(text)
    assert len(ids) == 10 and all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.decode(ids).split() == text.split()
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_markers_are_one_id_each_with_or_without_spaces(tokenizer):
    ids = [tokenizer.id(marker) for marker in tok.MARKERS]
    assert len(set(ids)) == len(tok.MARKERS) and ids[0] == 0  # padding is 0
    assert tokenizer.encode("".join(tok.MARKERS)) == tokenizer.encode(" ".join(tok.MARKERS)) == ids
    assert tokenizer.encode(f"3{tok.STEP}3") == [tokenizer.id("3"), tokenizer.id(tok.STEP), tokenizer.id("3")]


def test_segments_do_not_depend_on_what_follows(tokenizer):
    parts = [
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\n3 - 3 .<|im_end|>\n",
        "<step> 3 = 3 </step>",
        "<answer> 3 </answer>",
    ]
    assert tokenizer.encode("".join(parts)) == [i for part in parts for i in tokenizer.encode(part)]


def test_unknown_word(tokenizer):
    with pytest.raises(UserError, match="cannot tokenise.*banana"):
        tokenizer.encode("3 + banana")


def test_missing_token(tokenizer):
    for token in (tok.PRM, "banana", ""):
        with pytest.raises(UserError, match="exactly one id"):
            tokenizer.id(token)


def test_with_token_adds_one_id_at_the_end(tokenizer):
    text = "<step> 3 - -4 = 3 </step>"
    before, size = tokenizer.encode(text), len(tokenizer)
    grown = tokenizer.with_token(tok.PRM)
    assert grown.id(tok.PRM) == size and len(grown) == size + 1
    assert len(tokenizer) == size  # a copy
    assert grown.encode(text + tok.PRM) == [*before, size]
    assert [grown.id(w) for w in (*tok.MARKERS, *WORDS)] == [tokenizer.id(w) for w in (*tok.MARKERS, *WORDS)]


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.with_token(tok.PRM).save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(loaded) == len(tokenizer) + 1 and loaded.id(tok.PRM) == len(tokenizer)
    with pytest.raises(UserError, match="no tokenizer there"):
        Tokenizer.load(tmp_path / "nothing.json")


def test_literal_text_holds_no_marker(tokenizer):
    assert tokenizer.encode_literal("3 - -4 = 3") == tokenizer.encode("3 - -4 = 3")
    for text in (tok.STEP, f"3 {tok.TURN_END} 3"):  # the markers are words of this vocabulary
        with pytest.raises(UserError, match="as plain text: it would give the special ids"):
            tokenizer.encode_literal(text)
    with pytest.raises(UserError, match="cannot tokenise"):
        tokenizer.encode_literal(f"3{tok.STEP}3")


def test_prompt(tokenizer):
    segments = [
        Segment(tok.IMAGE, marker=True, count=2),
        Segment("3 "),
        Segment("- 3"),
        Segment(" = 3", score="before"),
        Segment(tok.STEP, marker=True, score="at"),
    ]
    ids, where = tokenizer.encode_prompt(segments)
    assert ids == tokenizer.encode(f"{tok.IMAGE}{tok.IMAGE} 3 - 3 = 3 {tok.STEP}") and where == [5, 7]
    for score in ("at", "before"):
        with pytest.raises(UserError, match="no token to read a score"):  # a space is no token
            tokenizer.encode_prompt([Segment("3"), Segment(" ", score=score)])
    with pytest.raises(UserError, match="no token to read a score"):  # nothing stands before it
        tokenizer.encode_prompt([Segment("3", score="before")])


def test_properties_and_vocabulary(tokenizer):
    assert tokenizer.bos == () and tokenizer.pad == tokenizer.id(tok.PAD)
    assert tokenizer.special_ids == {tokenizer.id(marker) for marker in tok.MARKERS}
    assert tokenizer.piece("Yes") == tokenizer.id("Yes")
    assert tokenizer.decode(tokenizer.encode("<step> 3 </step>"), skip_special=True) == "3"
    with pytest.raises(UserError, match="no vocabulary entry 'banana'"):
        tokenizer.piece("banana")
    tokenizer.check([*tok.MARKERS, tok.YES])
    with pytest.raises(UserError, match="'<prm>'.*'banana'"):
        tokenizer.check([tok.STEP, tok.PRM, "banana"])


# Byte-level BPE

TEXTS = [
    "In triangle $ABC$, the angle is $$\\frac{1}{2}\\angle A = 30^\\circ$$.", "Find the area, in cm².", "三角形的面积",
    "<step>So the area is 6.</step><answer>6</answer>",
]  # fmt: skip
STRANGE = [
    "",
    " ",
    "\n\n  x\t",
    "e\u0301 \u200d \u00a0",
    "\x00\x7f",
    "🧮 ½",
    "12345.60",
    "<|im_end|><prm>Yes</step>",
    *tok.MARKERS,
]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train_bpe(TEXTS, 400)


@pytest.mark.parametrize("text", [*TEXTS, *STRANGE])
def test_bytes_lose_nothing(bpe, text):
    literal = bpe.encode_literal(text)
    assert bpe.decode(literal) == bpe.decode(bpe.encode(text)) == text
    assert bpe.special_ids.isdisjoint(literal)


def test_markers_and_classes_of_bytes(bpe):
    bpe.check(tok.MARKERS)
    assert len(bpe) <= 400 and bpe.pad == 0 and len(bpe.special_ids) == len(tok.MARKERS)
    assert bpe.encode_literal("Yes") == [bpe.piece(tok.YES)] and bpe.encode_literal("No") == [bpe.piece(tok.NO)]
    assert len(bpe.encode_literal("triangle")) < 8 and len(bpe.encode_literal("999")) == 3
    prm = bpe.with_token(tok.PRM)
    assert prm.id(tok.PRM) == len(bpe) == len(prm) - 1 and prm.encode_literal(TEXTS[0]) == bpe.encode_literal(TEXTS[0])


def test_bytes_are_learned_again_and_saved(bpe, tmp_path):
    assert Tokenizer.train_bpe(iter(TEXTS), 400).fingerprint == bpe.fingerprint
    assert Tokenizer.train_bpe(TEXTS[:2], 400).fingerprint != bpe.fingerprint
    bpe.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint == bpe.fingerprint and again.encode(TEXTS[3]) == bpe.encode(TEXTS[3])
    with pytest.raises(UserError, match="100 tokens; it needs 2.. at least"):
        Tokenizer.train_bpe(TEXTS, 100)
    assert len(Tokenizer.train_bpe([], 400)) < 300


def test_what_stands_for_its_text(tokenizer, bpe):
    assert bpe.own_markers == tok.TAGS and tokenizer.own_markers == tok.MARKERS
