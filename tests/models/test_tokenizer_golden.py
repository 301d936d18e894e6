"""Tokenizers of released checkpoints against the ids and texts that the original classes gave."""

import json
import shutil

import pytest
import sentencepiece

from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Segment, Tokenizer
from mmprm_jax.records import UserError

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


class Entry:
    """One tokenizer of the golden data. ``records``: one per string, with the defaults filled in."""

    def __init__(self, name, goldens, root):
        self.name, self.data = name, goldens["tokenizers"][name]
        self.folder = root / self.data["folder"]
        self.tokenizer = Tokenizer.load(self.folder)
        self.bos = self.data["bos_prefix"]
        same = self.data.get("records_same_as")
        records = list(goldens["tokenizers"][same]["records"]) if same else self.data["records"]
        for i, record in self.data.get("records_that_differ", {}).items():
            records[int(i)] = record
        texts = [string["text"] for string in goldens["strings"]]
        decodes = ("decode", "decode_skip", "decode_bos", "decode_bos_skip")
        self.records = [
            dict.fromkeys(decodes, text) | {"text": text} | record for text, record in zip(texts, records, strict=True)
        ]
        missing = {None, self.data["unk_token_id"]}
        unknown = [t for t, i in self.data["added_vocab"].items() if i == self.data["unk_token_id"]]
        self.pieces = {
            t: None if i in missing and t not in unknown else i for t, i in self.data["convert_tokens_to_ids"].items()
        }

    def special_texts(self):
        """What must not become a special id in plain text: the tokens, and the pieces on their ids in the model."""
        texts = list(self.data["all_special_tokens"])
        if (self.folder / "tokenizer.model").exists():
            sp = sentencepiece.SentencePieceProcessor(model_proto=(self.folder / "tokenizer.model").read_bytes())
            texts += [sp.id_to_piece(i) for i in self.data["all_special_ids"] if i < len(sp)]
        return sorted(set(texts))


@pytest.fixture(scope="module")
def entries(golden):
    goldens = json.loads((golden / "tokenizer" / "goldens.json").read_text())
    return [Entry(name, goldens, golden / "tokenizer") for name in goldens["tokenizers"]]


@pytest.fixture
def copy_of(golden, tmp_path):
    """``copy_of("tokenizer.model")``: a copy of the first golden folder that holds that file."""

    def make(name):
        folder = next(p for p in sorted((golden / "tokenizer").iterdir()) if (p / name).exists())
        return shutil.copytree(folder, tmp_path / "copy")

    return make


def edit(path, change):
    """Rewrites a JSON file after ``change(value)``."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def compare(cases):
    """Asserts that the (what, got, wanted) agree; shows the first that do not."""
    cases = list(cases)
    bad = [f"{what}\n  got    {got!r}\n  wanted {wanted!r}" for what, got, wanted in cases if got != wanted]
    assert cases, "nothing was compared"
    assert not bad, "\n".join([f"{len(bad)} of {len(cases)} differ; the first:", *bad[:5]])


def record_cases(entry, tokenizer):
    for i, record in enumerate(entry.records):
        ids, with_bos = record["ids"], entry.bos + record["ids"]
        yield f"{entry.name} string {i} ids", tokenizer.encode(record["text"]), ids
        yield f"{entry.name} string {i} decode", tokenizer.decode(ids), record["decode"]
        yield f"{entry.name} string {i} decode_skip", tokenizer.decode(ids, skip_special=True), record["decode_skip"]
        if entry.bos:
            yield f"{entry.name} string {i} decode_bos", tokenizer.decode(with_bos), record["decode_bos"]
            skipped = tokenizer.decode(with_bos, skip_special=True)
            yield f"{entry.name} string {i} decode_bos_skip", skipped, record["decode_bos_skip"]


def test_every_string(entries):
    compare(case for entry in entries for case in record_cases(entry, entry.tokenizer))


def test_ids_that_no_text_gives(entries):
    compare(
        (f"{entry.name} {only['ids']} skip={skip}", entry.tokenizer.decode(only["ids"], skip), only[key])
        for entry in entries
        for only in entry.data.get("decode_only", [])
        for skip, key in ((False, "decode"), (True, "decode_skip"))
    )


def test_vocabulary(entries):
    def piece(tokenizer, token):
        try:
            return tokenizer.piece(token)
        except UserError as error:
            assert f"no vocabulary entry {token!r}" in str(error)
            return None

    def cases():
        for entry in entries:
            tokenizer, data = entry.tokenizer, entry.data
            yield f"{entry.name} len", len(tokenizer), data["len"]
            yield f"{entry.name} special ids", sorted(tokenizer.special_ids), sorted(data["all_special_ids"])
            yield f"{entry.name} bos", list(tokenizer.bos), data["bos_prefix"]
            yield f"{entry.name} pad", tokenizer.pad, data["pad_token_id"]
            for token, i in entry.pieces.items():
                yield f"{entry.name} piece {token!r}", piece(tokenizer, token), i
            for token, i in data["added_vocab"].items():
                yield f"{entry.name} id {token!r}", tokenizer.id(token), i

    compare(cases())


def test_batches_templates_and_training_segments(entries):
    def cases():
        for entry in entries:
            tokenizer, data = entry.tokenizer, entry.data
            bos = list(tokenizer.bos)
            if batch := data.get("left_padded_batch"):
                rows = [bos + tokenizer.encode(entry.records[i]["text"]) for i in batch["string_indices"]]
                width = max(len(row) for row in rows)
                padded = [[tokenizer.pad] * (width - len(row)) + row for row in rows]
                mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
                yield f"{entry.name} batch", padded, batch["input_ids"]
                yield f"{entry.name} batch mask", mask, batch["attention_mask"]
            if template := data.get("chat_template"):
                ids = tokenizer.encode(template["text"])
                yield f"{entry.name} template, called", bos + ids, template["ids_default_call"]
                if "ids_apply_chat_template" in template:
                    yield f"{entry.name} template, applied", ids, template["ids_apply_chat_template"]
            if train := data.get("train_segments"):
                segments = [i for segment in train["segments"] for i in tokenizer.encode(segment)]
                yield f"{entry.name} training segments", bos + segments, train["ids"]
                yield f"{entry.name} training prompt", bos + tokenizer.encode("".join(train["segments"])), train["ids"]

    compare(cases())


def test_literal_text_is_encoded_as_usual_without_special_tokens(entries):
    def cases():
        for entry in entries:
            special = entry.special_texts()
            plain = [r for r in entry.records if not any(text in r["text"] for text in special)]
            assert plain
            for record in plain:
                what = f"{entry.name} {record['text'][:60]!r}"
                yield what, entry.tokenizer.encode_literal(record["text"]), record["ids"]

    compare(cases())


def test_literal_text_gives_no_special_id(entries):
    for entry in entries:
        caught = 0
        tokenizer, special = entry.tokenizer, entry.special_texts()
        texts = [record["text"] for record in entry.records] + ["".join(special)]
        for s in special:
            texts += [s, s + s, f"a{s}b", f"{s}\n", f"({s})", s[:2] + s + s[2:], f"{special[0]}{s}", f"Yes{s}No\n{s}x"]
        for text in texts:
            ids = tokenizer.encode_literal(text)
            assert tokenizer.special_ids.isdisjoint(ids), (entry.name, text)
            # every character is still there; only clean-up and a dummy prefix touch spaces, NFC some letters
            if text.isascii():
                assert "".join(tokenizer.decode(ids).split()) == "".join(text.split()), (entry.name, text)
            caught += not tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
        assert caught >= 8 * len(entry.data["all_special_tokens"])  # where they are recognised, the same texts inject


def as_segments(tokenizer, text, special):
    """The text as markers and the literal text between them."""
    segments, rest = [], text
    while rest:
        at, _, found = min(((rest.find(s), -len(s), s) for s in special if s in rest), default=(len(rest), 0, ""))
        segments += [Segment(c) for c in rest[:at]]  # one character each: they must be joined
        if found:
            segments.append(Segment(found, marker=True))
        rest = rest[at + len(found) :]
    return segments


def test_prompts_of_markers_and_literal_text(entries):
    def cases():
        for entry in entries:
            tokens, special = entry.data["all_special_tokens"], entry.special_texts()
            for i, record in enumerate(entry.records):
                if not any(text in record["text"] for text in special if text not in tokens):
                    segments = as_segments(entry.tokenizer, record["text"], tokens)
                    got = entry.tokenizer.encode_prompt(segments)
                    yield f"{entry.name} string {i}", got, (entry.bos + record["ids"], [])

    compare(cases())


def test_score_positions(entries):
    for entry in entries:
        tokenizer = entry.tokenizer
        start, image, bos = tokenizer.id(tok.TURN_START), tokenizer.id(tok.IMAGE), list(tokenizer.bos)
        encode = tokenizer.encode_literal
        segments = [
            Segment(tok.TURN_START, marker=True),
            Segment("user\n"),
            Segment(tok.IMAGE, marker=True, count=3),
            Segment("Question: q\nPro"),
            Segment("cess: s Y"),
            Segment("es", score="before"),
            Segment(" next\n\n", score="at"),
            Segment(tok.TURN_START, marker=True, score="at"),
            Segment(tok.TURN_START, marker=True, score="before"),
            Segment("end"),
        ]
        pieces = [
            [*bos, start, *encode("user\n"), image, image, image],
            encode("Question: q\nProcess: s Yes"),
            encode(" next\n\n"),
            [start, start],
            encode("end"),
        ]
        ends = [sum(len(piece) for piece in pieces[: i + 1]) for i in range(len(pieces))]
        ids, where = tokenizer.encode_prompt(segments)
        assert ids == sum(pieces, []), entry.name
        assert where == [ends[1] - 2, ends[2] - 1, ends[2], ends[2]], entry.name
        # joining matters: the texts apart give other ids
        assert encode("Question: q\nPro") + encode("cess: s Y") + encode("es") != pieces[1], entry.name


def test_a_score_on_one_token_after_a_marker(entries):
    for entry in entries:
        ids, where = entry.tokenizer.encode_prompt(
            [Segment(tok.TURN_START, marker=True), Segment("+", score="before"), Segment("+", score="at")]
        )
        one = entry.tokenizer.encode_literal("+")
        assert ids == [*entry.bos, entry.tokenizer.id(tok.TURN_START), *one, *one]
        assert where == [len(entry.bos) + len(one) - 1, len(ids) - 1]


def test_literal_text_of_a_prompt_cannot_inject(entries):
    for entry in entries:
        hostile = "".join(entry.special_texts())
        ids, where = entry.tokenizer.encode_prompt(
            [Segment(hostile), Segment(tok.TURN_END, marker=True, score="at"), Segment(hostile)]
        )
        found = [i for i in ids if i in entry.tokenizer.special_ids]
        assert found == [*entry.bos, entry.tokenizer.id(tok.TURN_END)]
        assert ids[where[0]] == entry.tokenizer.id(tok.TURN_END)


def test_prompts_that_cannot_be(entries):
    for entry in entries:
        for segments in (
            [Segment("text"), Segment("", score="at")],
            [Segment("text"), Segment("", score="before")],
            [Segment("text"), Segment(tok.IMAGE, marker=True, count=0, score="at")],
        ):
            with pytest.raises(UserError, match="no token to read a score"):
                entry.tokenizer.encode_prompt(segments)
        first = [Segment(tok.TURN_START, marker=True, score="before")]
        if entry.bos:
            assert entry.tokenizer.encode_prompt(first)[1] == [0]
        else:
            with pytest.raises(UserError, match="no token to read a score"):
                entry.tokenizer.encode_prompt(first)
        with pytest.raises(UserError, match="exactly one id"):
            entry.tokenizer.encode_prompt([Segment("<nothing>", marker=True)])
    for wrong in ({"score": "after"}, {"count": 2}, {"count": -1, "marker": True}):
        with pytest.raises(ValueError):
            Segment("text", **wrong)


def test_check_names_every_bad_marker(entries):
    for entry in entries:
        tokenizer = entry.tokenizer
        tokenizer.check(entry.data["all_special_tokens"])
        with pytest.raises(UserError) as error:
            tokenizer.check([tok.TURN_END, "<nothing>", tok.IMAGE, "<neither>", ""])
        message = str(error.value)
        assert "'<nothing>'" in message and "'<neither>'" in message and "''" in message and "\n" not in message
        assert tok.TURN_END not in message and tok.IMAGE not in message
        with pytest.raises(UserError, match="no vocabulary entry"):
            tokenizer.piece("<nothing>")


def test_a_piece_that_its_text_does_not_give_is_no_marker(entries):
    found = 0
    for entry in entries:
        for token, i in entry.pieces.items():
            if i is not None and entry.tokenizer.encode(token) != [i]:
                found += 1
                with pytest.raises(UserError, match="exactly one id"):
                    entry.tokenizer.id(token)
    assert found


def test_the_prm_token_as_the_original_adds_it(entries, tmp_path):
    pairs = 0
    for entry in entries:
        same = [e for e in entries if e.name == entry.data.get("records_same_as") and e.data["len"] > entry.data["len"]]
        for after in same:
            pairs += 1
            size = len(entry.tokenizer)
            grown = entry.tokenizer.with_token(tok.PRM)
            assert len(entry.tokenizer) == size  # a copy
            with pytest.raises(UserError):
                entry.tokenizer.id(tok.PRM)
            assert grown.id(tok.PRM) == size == len(grown) - 1
            grown.save(tmp_path / entry.name)
            for name in (CONFIG, SPECIAL, ADDED):
                got, wanted = (json.loads((f / name).read_text()) for f in (tmp_path / entry.name, after.folder))
                if name == CONFIG:  # the training script sets this one, not add_tokens
                    wanted["model_max_length"] = json.loads((entry.folder / name).read_text())["model_max_length"]
                assert got == wanted, (entry.name, name)
            assert {p.name for p in (tmp_path / entry.name).iterdir()} == {p.name for p in after.folder.iterdir()}
            assert (tmp_path / entry.name / "tokenizer.model").read_bytes() == (
                after.folder / "tokenizer.model"
            ).read_bytes()
            compare(record_cases(after, grown))
            compare(record_cases(after, Tokenizer.load(tmp_path / entry.name)))
    assert pairs


def test_with_token_and_save(entries, tmp_path):
    for entry in entries:
        tokenizer, folder = entry.tokenizer, tmp_path / entry.name
        tokenizer.save(folder)
        for path in entry.folder.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes(), path
        grown = tokenizer.with_token("<one>").with_token("<two>")
        grown.save(folder)  # over the old files
        size, text = len(tokenizer), "a<one>b<two>"
        for again in (grown, Tokenizer.load(folder)):
            assert len(again) == size + 2 and (again.id("<one>"), again.id("<two>")) == (size, size + 1)
            assert again.encode(text)[-1] == size + 1 and again.encode(text).count(size) == 1
            assert again.special_ids == tokenizer.special_ids | {size, size + 1}
            assert again.special_ids.isdisjoint(again.encode_literal(text))
            assert again.decode(again.encode(text), skip_special=True).replace(" ", "") == "ab"
            assert again.encode("a + b\n") == tokenizer.encode("a + b\n")
            assert (again.bos, again.pad) == (tokenizer.bos, tokenizer.pad)
        config = json.loads((folder / CONFIG).read_text())
        assert config["additional_special_tokens"][-2:] == ["<one>", "<two>"]
        assert config["added_tokens_decoder"][str(size)]["content"] == "<one>"
        listed = json.loads((folder / SPECIAL).read_text())["additional_special_tokens"]
        assert listed[-2] == "<one>" and listed[-1]["content"] == "<two>"
        assert json.loads((folder / ADDED).read_text())["<two>"] == size + 1
        if (folder / "tokenizer.json").exists():
            assert json.loads((folder / "tokenizer.json").read_text())["added_tokens"][-1]["id"] == size + 1


def test_with_a_token_that_exists(entries):
    for entry in entries:
        tokenizer = entry.tokenizer
        same = tokenizer.with_token(tok.IMAGE)
        assert len(same) == len(tokenizer) and same.special_ids == tokenizer.special_ids
        i = tokenizer.piece(tok.YES)  # an ordinary piece keeps its id
        grown = tokenizer.with_token(tok.YES)
        assert len(grown) == len(tokenizer) and grown.id(tok.YES) == i and i in grown.special_ids
        with pytest.raises(UserError, match="must not be empty"):
            tokenizer.with_token("")


def test_text_and_ids_that_cannot_be(entries):
    for entry in entries:
        for encode in (entry.tokenizer.encode, entry.tokenizer.encode_literal):
            with pytest.raises(UserError, match="cannot tokenise"):
                encode("a\ud800")
        if (entry.folder / "tokenizer.model").exists():  # the original fails as well; Qwen2's drops such ids
            for i in (entry.data["len"], -1):
                with pytest.raises(UserError, match="cannot decode"):
                    entry.tokenizer.decode([i])


def test_the_longest_token_wins(entries):
    for entry in entries:
        tokenizer = entry.tokenizer.with_token(f"{tok.IMAGE}s").with_token("<IM")
        text = f"{tok.IMAGE}s{tok.IMAGE}<IM"
        assert tokenizer.encode(text) == [tokenizer.id(t) for t in (f"{tok.IMAGE}s", tok.IMAGE, "<IM")]


def test_clean_up_and_empty_parts_of_the_slow_class(entries):
    empty = 0
    for tokenizer in (e.tokenizer for e in entries if (e.folder / "tokenizer.model").exists()):
        ids = tokenizer.encode("do n't I 'm it 's we 've you 're a ' b . c ? d ! e , f")
        assert tokenizer.decode(ids) == "don't I'm it's we've you're a'b. c? d! e, f"
        special = tokenizer.special_ids
        for i in (i for i in range(len(tokenizer)) if i not in special and tokenizer.decode([i]) == ""):
            empty += 1
            image = tokenizer.id(tok.IMAGE)
            assert tokenizer.decode([image, i, image]) == f"{tok.IMAGE} {tok.IMAGE}"  # dropped, but not at the end
            assert tokenizer.decode([image, i]) == f"{tok.IMAGE} "
    assert empty


def test_a_character_that_the_vocabulary_lacks(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["aab", "abba"]), model_writer=file, vocab_size=8, model_type="bpe", minloglevel=2
        )
    added = {"0": {"content": "<unk>", "special": True}, "2": {"content": "</s>", "special": True}}
    config = dict(tokenizer_class="InternLM2Tokenizer", added_tokens_decoder=added, add_bos_token=False)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.piece("<unk>") in tokenizer.encode("abx")
    assert tokenizer.encode_literal("ab") == tokenizer.encode("ab")
    with pytest.raises(UserError, match="as plain text: it would give the special ids .0."):
        tokenizer.encode_literal("abx")


def test_no_code_of_the_checkpoint_runs(copy_of):
    folder = copy_of("tokenizer.model")
    classes = json.loads((folder / CONFIG).read_text())["auto_map"]["AutoTokenizer"]
    for name in filter(None, classes):
        (folder / f"{name.split('.')[0]}.py").write_text("raise SystemExit('remote code ran')")
    assert len(Tokenizer.load(folder)) > 0


def test_settings_of_the_files_that_matter(copy_of):
    folder = copy_of("tokenizer.model")
    edit(folder / CONFIG, lambda c: c.update(add_bos_token=False, pad_token={"content": "<unk>"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos == () and tokenizer.pad == tokenizer.piece("<unk>")
    edit(folder / CONFIG, lambda c: [c.pop(k) for k in ("add_bos_token", "bos_token", "pad_token")])  # the defaults
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos == (tokenizer.id("<s>"),) and tokenizer.pad == tokenizer.id("</s>")


def test_a_token_that_is_added_but_not_special(copy_of):
    folder = copy_of("tokenizer.model")

    def plain(config):
        for token in config["added_tokens_decoder"].values():
            token["special"] = token["content"] not in (tok.IMAGE, tok.TURN_END)

    whole = Tokenizer.load(folder)
    i, end, word = whole.id(tok.IMAGE), whole.id(tok.TURN_END), whole.encode("Yes")
    edit(folder / CONFIG, plain)
    tokenizer = Tokenizer.load(folder)
    assert i not in tokenizer.special_ids
    assert tokenizer.encode_literal(f"a{tok.IMAGE}b") == tokenizer.encode(f"a{tok.IMAGE}b")
    assert tokenizer.encode(f"a{tok.IMAGE}b").count(i) == 1 and tokenizer.decode([i], skip_special=True) == tok.IMAGE
    assert whole.decode([*word, end]) == f" Yes{tok.TURN_END}"  # inside the model: the space is before the run
    assert tokenizer.decode([*word, end]) == f"Yes {tok.TURN_END}"  # not special: set off with a space


def test_a_tokenizer_json_that_cuts_and_pads_and_lacks_a_token(copy_of):
    folder = copy_of("tokenizer.json")
    whole = Tokenizer.load(folder)
    size, text = len(whole), "a + b = c " * 20

    def change(value):
        value["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
        value["padding"] = dict(
            strategy={"Fixed": 300}, direction="Left", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="!"
        )
        value["added_tokens"].pop()

    edit(folder / "tokenizer.json", change)
    tokenizer = Tokenizer.load(folder)  # the token comes from tokenizer_config.json
    assert tokenizer.encode(text) == whole.encode(text) and len(tokenizer.encode(text)) > 4
    assert len(tokenizer) == size and tokenizer.special_ids == whole.special_ids


def without(config, token):
    """Drops a token from a configuration."""
    decoder = config["added_tokens_decoder"]
    decoder.pop(next(i for i, t in decoder.items() if t["content"] == token))


MODEL, FAST, VOCAB, MERGES = "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"
DAMAGES = {
    # what is done: (a file of the folder, the file that is changed, new bytes or a change of its JSON, message)
    "no configuration": (MODEL, CONFIG, None, "no tokenizer there .tokenizer_config.json"),
    "no model": (MODEL, MODEL, None, "no tokenizer there .tokenizer.model"),
    "no vocabulary": (VOCAB, VOCAB, None, "no tokenizer there .vocab.json"),
    "no merges": (VOCAB, MERGES, None, "no tokenizer there .merges.txt"),
    "empty model": (MODEL, MODEL, b"", "not a sentencepiece model"),
    "git-lfs pointer": (MODEL, MODEL, b"version https://git-lfs.github.com/spec/v1\n", "not a sentencepiece model"),
    "cut model": (MODEL, MODEL, lambda data: data[:-1], "not a sentencepiece model"),
    "model of another length": (MODEL, CONFIG, lambda c: without(c, tok.IMAGE), "must follow on its"),
    "configuration no JSON": (MODEL, CONFIG, b'{"a": ', "tokenizer_config.json: not valid JSON"),
    "configuration no UTF-8": (MODEL, CONFIG, b'{"a": "\xff"}', "tokenizer_config.json: not valid JSON"),
    "configuration no object": (MODEL, CONFIG, b"[]", "must hold a JSON object"),
    "added tokens no JSON": (MODEL, ADDED, b"{", "added_tokens.json: not valid JSON"),
    "tokenizer.json no JSON": (FAST, FAST, b"{", "tokenizer.json: not a tokenizer.json"),
    "tokenizer.json without a model": (FAST, FAST, b"{}", "tokenizer.json: not a tokenizer.json"),
    "vocabulary no JSON": (VOCAB, VOCAB, b"{", "vocab.json: not valid JSON"),
    "vocabulary of texts": (VOCAB, VOCAB, b'{"a": "b"}', "do not fit"),
    "merges of another vocabulary": (VOCAB, MERGES, b"#version: 0.2\nnever seen\n", "do not fit"),
    "unknown class": (MODEL, CONFIG, lambda c: c.update(tokenizer_class="XTokenizer"), "unknown tokenizer_class 'XTok"),
    "no class": (MODEL, CONFIG, lambda c: c.pop("tokenizer_class"), "unknown tokenizer_class"),
    "no added tokens": (MODEL, CONFIG, lambda c: c.pop("added_tokens_decoder"), "no usable added_tokens_decoder"),
    "empty added token": (
        FAST,
        CONFIG,
        lambda c: c["added_tokens_decoder"].update({"9": {"content": ""}}),
        "no usable",
    ),
    "added token without text": (FAST, CONFIG, lambda c: c["added_tokens_decoder"].update({"9": {}}), "no usable"),
    "other ids": (MODEL, ADDED, lambda a: a.update({tok.IMAGE: 7}), "'<IMG_CONTEXT>' should have the id 7"),
    "unknown added token": (FAST, ADDED, lambda a: a.update({"<nothing>": 7}), "'<nothing>' should have the id 7"),
    "ids with a gap": (
        VOCAB,
        CONFIG,
        lambda c: c["added_tokens_decoder"].update({"99999": {"content": "<far>", "special": True}}),
        "'<far>' should have the id 99999",
    ),
    "tokenizer.json with a gap": (FAST, FAST, lambda t: t["added_tokens"][-1].update(id=99999), "does not follow"),
    "stripping": (
        MODEL,
        CONFIG,
        lambda c: next(iter(c["added_tokens_decoder"].values())).update(lstrip=True),
        "not supported",
    ),
    "end token wanted": (MODEL, CONFIG, lambda c: c.update(add_eos_token=True), "add_eos_token is not supported"),
    "unknown begin": (MODEL, CONFIG, lambda c: c.update(bos_token="<begin>"), "bos_token is '<begin>'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(copy_of, damage):
    has, name, change, message = DAMAGES[damage]
    folder = copy_of(has)
    assert len(Tokenizer.load(folder)) > 0
    if change is None:
        (folder / name).unlink()
    elif isinstance(change, bytes):
        (folder / name).write_bytes(change)
    elif name == MODEL:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    else:
        edit(folder / name, change)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def test_files_that_are_no_word_level_tokenizer(copy_of, tmp_path):
    folder = copy_of(FAST)
    with pytest.raises(UserError, match="neither a word-level tokenizer .* name the folder"):
        Tokenizer.load(folder / FAST)
    with pytest.raises(UserError, match="config.json: not a tokenizer.json"):
        Tokenizer.load(folder / CONFIG)
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="no tokenizer there"):
            Tokenizer.load(nothing)
