"""House rules: few numeric constants, each explained; short signatures; idiomatic words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import arp_hub
import arp_hub.training

ROOT = Path(__file__).parents[2]
MODULES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
           for path in sorted((ROOT / "arp_hub").rglob("*.py"))}  # fmt: skip
PUBLIC = {*arp_hub.__all__, *arp_hub.training.__all__}
MOST_CONSTANTS = 39
MOST_PARAMETERS = 8
BANNED = (
    "anew", "oftener", "is had", "be had", "in vain", "let go", "make do", "makes do", "measured again",
    "the present version", "the present planning", "an earlier version", "of before", "no script was kept",
    "nobody waits", "as it is now", "no longer",
)  # fmt: skip
LISTS = {f"tests/project/{name}.py" for name in ("test_house_rules", "test_wording", "wording")}
"""Files that list banned words."""
TEXTS = ("arp_hub*/**/*.py", "arp_hub/**/*.md", "arp_hub/**/*.html", "recipes/*.py", "benchmarks/**/*.py",
         "tests/**/*.py", "*.md", "docs/**/*.md")  # fmt: skip
PAGES = [
    name
    for pattern in TEXTS
    for name in sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
    if name not in {"CHANGELOG.md", *LISTS} and not name.startswith("docs/research/")
]


def is_number(node: ast.expr | None) -> bool:
    """Whether an expression is a number, arithmetic of numbers, or a tuple or list of them."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, (ast.Tuple, ast.List)) and bool(node.elts) and all(map(is_number, node.elts))


def constants(body: list[ast.stmt]) -> Iterator[tuple[str, bool]]:
    """The numeric constants of a module, and whether a docstring follows each."""
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and is_number(statement.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            explained = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            for target in targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                yield from ((ast.unparse(name), explained) for name in names)


def functions(node: ast.AST, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    """All functions in a tree, nested ones too, each with the names that lead to it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (*path, child.name), child
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        yield from functions(child, (*path, child.name) if named else path)


def parameters(function: ast.FunctionDef) -> list[str]:
    """The parameters of a function, without ``self`` and ``cls``."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def is_command(function: ast.FunctionDef) -> bool:
    """Whether a function is a command of ``arp-hub``, whose parameters are its options."""
    return any(re.match(r"app\.(command|callback)\b", ast.unparse(mark)) for mark in function.decorator_list)


def banned_words(text: str) -> list[str]:
    """The banned words of a text, line breaks ignored."""
    flat = " ".join(text.split()).lower()
    return [words for words in BANNED if re.search(rf"\b{words}\b", flat)]


def test_there_are_few_numeric_constants():
    found = [f"{name}: {constant}" for name, tree in MODULES.items() for constant, _ in constants(tree.body)]
    assert len(found) <= MOST_CONSTANTS, found


@pytest.mark.parametrize("name", [name for name, tree in MODULES.items() if any(constants(tree.body))])
def test_every_numeric_constant_has_a_docstring(name):
    assert [constant for constant, explained in constants(MODULES[name].body) if not explained] == []


@pytest.mark.parametrize("name", MODULES)
def test_signatures_are_short(name):
    long = [
        f"{'.'.join(path)}: {len(parameters(function))}"
        for path, function in functions(MODULES[name])
        if len(parameters(function)) > MOST_PARAMETERS and path[0] not in PUBLIC and not is_command(function)
    ]
    assert long == []


@pytest.mark.parametrize("name", PAGES)
def test_words_are_idiomatic(name):
    assert banned_words((ROOT / name).read_text(encoding="utf-8")) == []


PLANTED = '''
BARE = -2 * 3**4
TEXT = "no number"
FLAG = True
PAIR: tuple[float, int] = (1e-3, 7)
"""Explained."""
TWO, MORE = 2, 3
def outer(a, b, c, d, e, f, g, h, *, i):
    def inner(self, *args): ...
@app.command("long")
def long(): ...
'''


def test_the_rules_see_what_breaks_them():
    tree = ast.parse(PLANTED)
    assert list(constants(tree.body)) == [("BARE", False), ("PAIR", True), ("TWO", False), ("MORE", False)]
    found = dict(functions(tree))
    assert [len(parameters(function)) for function in found.values()] == [9, 1, 0]
    assert [is_command(function) for function in found.values()] == [False, False, True]
    assert banned_words("it is written\n    anew, and outlet goods are No longer kept") == ["anew", "no longer"]
