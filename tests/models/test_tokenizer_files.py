"""Tokenizers as people have them: of many kinds, saved by transformers 4 and 5, which is the reference itself."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Segment, Tokenizer
from mmprm_jax.records import UserError

transformers = pytest.importorskip("transformers")

MARKERS = ["<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>"]
TEXTS = [
    "In triangle $ABC$, the angle is $$\\frac{1}{2}\\angle A = 30^\\circ$$.", "The area in cm2. 三角形的面积 é🧮\n\t",
    "<step>So the area is 6.</step><answer>6</answer>", "The quick brown fox can't jump 12345 times.\n\nYes No + - ",
]  # fmt: skip
PIECES = [
    "a",
    "Yes",
    "<step>",
    "</step>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "12345",
    "$x$",
    "角",
    "é",
    "can't",
    "+",
    " is",
    "\t.",
]
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def learned(core, trainer):
    core.train_from_iterator(TEXTS * 3, trainer)
    return core


def with_bos(core, bos):
    special = [(bos, core.token_to_id(bos))]
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return core


def llama3():
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence([words, bytes_]), decoders.ByteLevel()
    learned(core, trainers.BpeTrainer(vocab_size=400, initial_alphabet=ALPHABET, show_progress=False))
    core.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    return with_bos(core, "<|begin_of_text|>"), {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def gpt2():
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    learned(core, trainers.BpeTrainer(vocab_size=400, initial_alphabet=ALPHABET, show_progress=False))
    return core, {}


def llama2(first):
    """SentencePiece's pieces with bytes to fall back on; ``first``: only the very first text gets a space in front."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=model, vocab_size=380, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    parts = ((a[:n], a[n:]) for a in sorted(vocab, key=vocab.get) for n in range(1, len(a)))
    merges = sorted((p for p in parts if p[0] in vocab and p[1] in vocab), key=lambda p: vocab[p[0] + p[1]])
    core = tokenizers.Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    if first:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return with_bos(core, "<s>"), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma():
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    learned(core, trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<pad>", "<bos>", *bytes_]))
    value = json.loads(core.to_str())
    value["added_tokens"] = value["added_tokens"][:2]
    core = with_bos(tokenizers.Tokenizer.from_str(json.dumps(value)), "<bos>")
    return core, {"bos_token": "<bos>", "pad_token": "<pad>"}


def unigram():
    core = tokenizers.Tokenizer(models.Unigram())
    core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>",
        initial_alphabet=sorted(set("".join(PIECES))),
    )  # fmt: skip
    return learned(core, trainer), {"unk_token": "<unk>"}


KINDS = {
    "llama 3": llama3, "gpt-2": gpt2, "llama 2, legacy": lambda: llama2(False), "llama 2": lambda: llama2(True),
    "gemma": gemma, "unigram": unigram,
}  # fmt: skip


def saved(core, named, folder):
    """As transformers 5 saves it; returns what it loads from there."""
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **named)
    reference.add_special_tokens({"additional_special_tokens": MARKERS})
    reference.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "added_tokens_decoder" not in config and config["extra_special_tokens"] == MARKERS
    return transformers.AutoTokenizer.from_pretrained(folder)


def as_version_4(folder):
    """tokenizer_config.json as transformers 4 writes it, and the same tokenizer.json."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["added_tokens_decoder"] = {str(t.pop("id")): t for t in tokens}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}}
    path.write_text(json.dumps(config))


def prompts(count):
    draw = random.Random(0)
    for _ in range(count):
        yield [
            Segment(draw.choice(MARKERS), marker=True)
            if draw.random() < 0.4
            else Segment("".join(draw.choices(PIECES, k=draw.randint(1, 8))))
            for _ in range(draw.randint(1, 6))
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind, tmp_path):
    """Whole texts, and prompts whose literal parts are encoded one by one; tokens added by us as well."""
    reference = saved(*KINDS[kind](), tmp_path)
    for version in (5, 4):
        if version == 4:
            as_version_4(tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
        tokenizer.check(MARKERS)
        assert len(tokenizer) == len(reference)
        assert sorted(tokenizer.special_ids) == sorted(
            i for i, t in reference.added_tokens_decoder.items() if t.special
        )
        wrong = []
        for segments in prompts(100):
            text = "".join(s.text for s in segments)
            ids = reference(text)["input_ids"]
            if ids != [*tokenizer.bos, *tokenizer.encode(text)] or ids != tokenizer.encode_prompt(segments)[0]:
                wrong.append((segments, ids, tokenizer.encode_prompt(segments)[0]))
        assert not wrong, f"{len(wrong)} prompts, such as {wrong[0]}"
        grown = tokenizer.with_token(tok.PRM)
        grown.for_transformers().save(tmp_path / f"grown{version}")
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / f"grown{version}")
        assert grown.id(tok.PRM) == len(tokenizer) == again.convert_tokens_to_ids(tok.PRM) == len(again) - 1
        assert (again.start_image_token, again.context_image_token_id) == (tok.IMAGE_START, grown.id(tok.IMAGE))
        assert again.encode("a<prm>b") == [*grown.bos, *grown.encode("a<prm>b")]


def test_a_released_tokenizer_that_transformers_5_saved_again(golden, tmp_path):
    before = Tokenizer.load(golden / "tokenizer" / "qwen2")
    transformers.AutoTokenizer.from_pretrained(golden / "tokenizer" / "qwen2").save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    after = Tokenizer.load(tmp_path)
    assert (len(after), after.special_ids, after.bos, after.pad) == (
        len(before), before.special_ids, before.bos, before.pad
    )  # fmt: skip
    texts = [s["text"] for s in json.loads((golden / "tokenizer" / "goldens.json").read_text())["strings"]]
    assert [after.encode(t) for t in texts] == [before.encode(t) for t in texts]
    assert [after.encode_literal(t) for t in texts] == [before.encode_literal(t) for t in texts]


def test_tokenizer_json_alone_is_enough(tmp_path):
    core, _ = llama3()
    core.add_special_tokens(MARKERS)
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos == (tokenizer.id("<|begin_of_text|>"),) and tokenizer.pad == 0
    tokenizer.with_token(tok.PRM).in_folder().save(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.encode("a<prm>") == [*tokenizer.bos, *tokenizer.encode("a"), len(tokenizer)]


BEGIN = {  # tokenizer_config.json's words on the first token: ids that stand in front
    "silent": ({}, True), "asked for": ({"add_bos_token": True}, True), "not wanted": ({"add_bos_token": False}, False),
    "no name": ({"add_bos_token": True, "bos_token": None}, False), "nor an end": ({"add_eos_token": False}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", BEGIN)
def test_the_first_token(case, tmp_path):
    saved(*llama3(), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | BEGIN[case][0]))
    tokenizer = Tokenizer.load(tmp_path)
    assert bool(tokenizer.bos) == BEGIN[case][1] and tokenizer.pad == tokenizer.id("<|eot_id|>")


def test_what_stands_behind_a_text_is_refused(tmp_path):
    core, named = llama3()
    ends = [(t, core.token_to_id(t)) for t in ("<|begin_of_text|>", "<|eot_id|>")]
    core.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A <|eot_id|>", special_tokens=ends)
    saved(core, named, tmp_path)
    with pytest.raises(UserError, match="post-processor puts 2 tokens around a text") as told:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(told.value)


OTHERS = {  # files of kinds that are not read: what the one line calls them
    "tokenizer.model": "SentencePiece's tokenizer.model", "tekken.json": "Mistral's tekken.json",
    "qwen.tiktoken": "tiktoken's ranks", "vocab.txt": "WordPiece's vocab.txt", "spiece.model": "spiece.model",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_named_with_what_to_do(name, tmp_path):
    (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match=OTHERS[name]) as told:
        Tokenizer.load(tmp_path)
    assert "'LlamaTokenizer'" in str(told.value) and "save_pretrained" in str(told.value)
    assert "\n" not in str(told.value)
