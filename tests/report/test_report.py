"""The page: self-contained, hostile text stays text, nothing optional is needed."""

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import pytest

from mmprm_jax.records import Node, Problem, Rollout, Tree
from mmprm_jax.report.report import choose_trees, format_table, write_report

HOSTILE = "</pre></style><script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>&amp;\ud800"


class Page(HTMLParser):
    """Collects tags and attributes, and checks that the tags are closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def png():
    """A valid 1 x 1 PNG."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b"")


def tree(name="t", text="<step>3+4</step>", image="a.png", values=((-1, 1), (0, 2), (0, 0), (2, 1))):
    rollouts = tuple(Rollout((text, f"<answer>{i}</answer>"), i == 4, 3) for i in range(5))
    nodes = [Node(p, (text,) if p >= 0 else (), k, 2, 1, rollouts) for p, k in values]
    return Tree(Problem(name, text, text, (image,) if image else ()), tuple(nodes), ((0, 1),))


def metrics(sizes=(1, 2, 4, 8, 16)):
    def result(x):
        return {"accuracy": x, "stderr": 0.0125, "ci95": [x - 0.025, x + 0.025]}

    row = {key: result(0.5) for key in ("random", "unique", "greedy", "majority", "policy_logprob", "oracle")}
    both = {"min": result(0.625), "mean": result(0.75)}
    pair = {"difference": 0.25, "stderr": 0.03, "ci95": [0.1912, 0.3088], "p_value": 0.00004}
    bins = [{"steps": 7, "score": 0.25, "value": 0.5, "ci95": [0.3, 0.7]}]
    control = result(0.3) | {"difference_to_random": -0.2, "difference_stderr": 0.05}
    return {
        "n_problems": 40,
        "best_of_n": {str(n): row | {"prm": both, "prm_weighted_majority": both} for n in sizes},
        "prm_selected": "mean",
        "paired": {"majority": pair, "policy_logprob": pair, "random": pair},
        "controls": {"blank_image": control, "shuffled_image": control},
        "against_majority": {"random": pair, "prm.min": pair, "prm.mean": pair},
        "by_length": {"3-4 steps": {"n_problems": 17, "random": result(0.5), "prm.mean": result(0.8125)}},
        "calibration": {
            "steps": 7,
            "ece": 0.25,
            "ece_perfect": 0.125,
            "brier": 0.2,
            "brier_perfect": 0.1,
            "diagram": bins,
        },
        "step_auc": 0.875,
        "labels": {"histogram": list(range(10)), "steps": 45, "examples": 9, "problems": 3},
        "rollouts": {"annotate": 1234, "evaluate": 640},
        "seconds": {"sft": 10.0, "prm": 20.0, "total": 30.0},
    }


@pytest.fixture
def write(tmp_path):
    (tmp_path / "a.png").write_bytes(png())

    def run(numbers, trees, config="x = 1"):
        write_report(tmp_path / "report" / "index.html", numbers, trees, tmp_path, config)
        return (tmp_path / "report" / "index.html").read_bytes().decode("utf-8")

    return run


def test_the_page_needs_nothing_but_itself(write):
    page = Page(write(metrics(), [tree(str(i)) for i in range(5)]))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    resources = [a[key] for _, a in page.tags for key in ("src", "srcset", "href", "poster") if key in a]
    assert len(resources) == 11  # four plots for light and dark, three pictures
    assert all(r.startswith("data:image/") for r in resources)
    for data in (base64.b64decode(r.split(",")[1]).decode() for r in resources if "svg" in r):
        assert not re.search(r"(href|src)=.(?!#)", data)


def test_the_numbers_and_the_trees_are_shown(write):
    page = Page(write(metrics(), [tree()]))
    for piece in (
        "75.0",
        "± 1.2",
        "0.875",
        "1234 rollouts",
        "N = 16",
        "+25.0 [+19.1, +30.9]",
        "17",
        "81.2",
        "ECE 0.250",
        "3+4",
        "0/2",
        "2/2",
        "30 seconds",
        "x = 1",
    ):
        assert piece in page.text, piece
    hues = [a["style"] for _, a in page.tags if a.get("class") == "mc"]
    assert hues == ["--h:60", "--h:120", "--h:0", "--h:60"]  # parents before children, in their order
    kinds = [a["class"] for tag, a in page.tags if tag == "li" and "class" in a]
    assert kinds == ["right", "wrong", "wrong"] * 4


def test_nesting_follows_the_parents(write):
    text = write({}, [tree(values=((-1, 1), (0, 2), (1, 0)))])
    items = re.sub(r'<details class="rollouts">.*?</details>', "", text[text.index('class="tree"') :], flags=re.S)
    shape = re.findall(r"</?ul>|\d/2", items)
    assert shape == ["<ul>", "1/2", "<ul>", "2/2", "<ul>", "0/2", "<ul>", *["</ul>"] * 4]


def test_hostile_text_stays_text(write):
    numbers = metrics() | {"prm_selected": HOSTILE, "rollouts": {HOSTILE: 1}, "seconds": {"$\\frac{<b>": 1.0}}
    page = Page(write(numbers, [tree(HOSTILE, HOSTILE, HOSTILE)], HOSTILE))
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all("evil" not in a.get("src", "") for _, a in page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 4 and "image not found" in page.text


@pytest.mark.parametrize("image", ["missing.png", "secret.txt", "../nowhere/a.png", "nul\0.png", "."])
def test_what_is_no_image_gives_a_placeholder(write, tmp_path, image):
    (tmp_path / "secret.txt").write_text("secret")
    text = write({}, [tree(image=image)])
    assert "image not found" in text and base64.b64encode(b"secret").decode() not in text


def test_a_text_problem_has_no_picture(write):
    page = Page(write({}, [tree(image=None)]))
    assert "img" not in {tag for tag, _ in page.tags} and "image not found" not in page.text


@pytest.mark.parametrize("key", [None, *metrics()])
def test_every_key_is_optional(write, key):
    numbers = {k: v for k, v in metrics().items() if k != key} if key else {}
    Page(write(numbers, []))
    assert isinstance(format_table(numbers), str)


def test_unknown_standard_errors_and_unestimated_nodes(write):
    numbers = metrics((1,))
    numbers["best_of_n"]["1"]["random"] = {"accuracy": 1.0, "stderr": float("nan")}
    bare = Tree(Problem("p", "q", "a"), (Node(-1, (), 0, 0, 0, (Rollout((), False, 1),)),), ())
    page = Page(write(numbers, [bare]))
    assert "nan" in page.text and "0/0" in page.text and "nothing could be parsed" in page.text


def test_a_deep_tree_needs_no_recursion(write):
    values = ((-1, 1), *((i, i % 2) for i in range(1500)))
    assert write({}, [tree(values=values)]).count("<li><details") == 1501


def test_equal_arguments_give_equal_bytes(write):
    assert write(metrics(), [tree()]) == write(metrics(), [tree()])


def test_choose_trees_prefers_mixed_then_large_ones():
    small, large = tree("small"), tree("large", values=((-1, 1), (0, 2), (0, 0), (2, 1), (2, 0)))
    solved = tree("solved", values=((-1, 2),) + ((0, 2),) * 9)
    assert [t.problem.id for t in choose_trees([solved, small, large])] == ["large", "small", "solved"]
    assert len(choose_trees([small] * 5)) == 3


def test_table():
    lines = format_table(metrics()).splitlines()
    assert lines[0].split()[-5:] == ["N=1", "N=2", "N=4", "N=8", "N=16"]
    marked = [line for line in lines if line.startswith("> PRM")]
    assert marked == ["> PRM mean" + 18 * " " + "    75.0 ± 1.2" * 5]
    assert len({len(line) for line in lines[:10]}) == 1  # the columns are aligned
    text = "\n".join(lines)
    assert "blank image: 30.0 ± 1.2 % (-20.0 ± 5.0 points against random choice)" in text
    assert "0.875" in text and "40 test problems" in text
    assert (
        "PRM minus majority vote, same problems: +25.0 ± 3.0 points (95% interval +19.1 to +30.9, p: <0.0001)" in text
    )
    versus = [line.split() for line in lines if "[" in line]
    assert versus == [
        [*name, str(x), f"[{x - 2.5},", f"{x + 2.5}]", "+25.0", "[+19.1,", "+30.9]", "<0.0001"]
        for name, x in ((["random"], 50.0), (["PRM", "mean"], 75.0))  # not the aggregators that were not chosen
    ]
