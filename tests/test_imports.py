"""The sources import one way: no circles, and nothing from a layer above."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "mmprm_jax"
# Folders and modules, the lowest layer first. What is not named here is of the lowest one: records and what all use.
LAYERS = (
    ("models", "data", "answers"),
    ("evaluation", "search", "rollout", "training", "report"),
    ("convert", "policy", "prm", "annotation", "finished_run", "fit"),
    ("stages",),
    ("bench", "launch"),
    ("cli", "main", ""),  # "": the package itself, which names what is public
)
APART = ("evaluation", "search", "rollout", "training")  # none of these needs another one


def sources():
    """The syntax tree of each module; names without ``mmprm_jax.``, a folder's ``__init__`` by the folder's."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def imports(modules):
    """The modules that each module imports, also in functions and for type checkers.

    ``from mmprm_jax.stages import sft`` is an import of ``stages.sft``, and not of the folder around it.
    """
    found = {}
    for name, tree in modules.items():
        wanted = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: a relative import"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    wanted.append(inner if inner.removeprefix("mmprm_jax.") in modules else node.module)
        inside = (module.removeprefix("mmprm_jax").removeprefix(".") for module in wanted if is_ours(module))
        found[name] = set(inside) & set(modules)
    return found


def is_ours(module):
    return module.split(".")[0] == "mmprm_jax"


def layer(module):
    """The layer of a module; the longest name that fits counts."""
    named = [(len(name), number) for number, names in enumerate(LAYERS, 1) for name in names if fits(module, name)]
    return max(named)[1] if named else 0


def fits(module, name):
    return module == name or (bool(name) and module.startswith(f"{name}."))


def circle(graph):
    """The modules of a circle in the graph, in order; empty: there is none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        path.append(node)
        found = next(filter(None, map(visit, sorted(graph[node]))), [])
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), [])


GRAPH = imports(sources())


def test_no_module_imports_itself_over_others():
    assert circle(GRAPH) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


def test_no_folder_imports_itself_over_others():
    folders = {}
    for module, others in GRAPH.items():
        folder = folder_of(module)
        folders.setdefault(folder, set()).update({folder_of(other) for other in others} - {folder})
    assert circle(folders) == []


def folder_of(module):
    return module.split(".")[0]


def test_imports_go_down():
    upward = [(a, b) for a, others in GRAPH.items() for b in others if layer(b) > layer(a)]
    assert upward == []
    beside = [
        (a, b) for a, others in GRAPH.items() for b in others if len({folder_of(a), folder_of(b)} & set(APART)) > 1
    ]
    assert beside == []


def test_the_graph_is_not_empty():
    assert {"models.vlm", "sharding"} <= GRAPH["models.build"] and "stages.sft" in GRAPH["stages"]
    assert GRAPH["main"] and GRAPH[""]  # imports inside of functions, and those of type checkers
    assert len(GRAPH) > 100 and all(name in {m.split(".")[0] for m in GRAPH} for name in ("models", "bench", "stages"))
