"""What this package leans on in others is there, and all of it is in the table."""

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

from liger_trainer import cli, symbols
from liger_trainer.symbols import SYMBOLS, Symbol

ROOT = Path(__file__).parents[2]
FILES = [p for d in ("liger_trainer", "kernels") for p in (ROOT / d).rglob("*.py")]
FILES.remove(Path(symbols.__file__))
FOREIGN = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"}
# Of the standard library: named tuples, frames of `os`.
STANDARD = {"_replace", "_asdict", "_fields", "_exit"}


@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda s: s.name)
@pytest.mark.filterwarnings("ignore")
def test_is_there(symbol):
    if not symbol.is_relevant:
        pytest.skip("not of what is installed")
    symbol.resolve()


@pytest.mark.parametrize(
    "symbol",
    [
        Symbol("torch._C._nowhere", "x", "this and that"),
        Symbol("torch", "Tensor._nothing", "this and that"),
        Symbol("torch.nn", "Module:_nothing", "this and that"),
        Symbol("torch.nn", "Module.to_empty", "this and that", ("device", "nothing")),
        Symbol("torch", "ops.aten.mm.default", "this and that", ("nothing",)),
        Symbol("torch", "ops.aten.mm.nothing", "this and that"),
    ],
    ids=lambda s: s.path,
)
def test_missing_one_says_what_is_affected(symbol, monkeypatch, capsys):
    with pytest.raises(LookupError, match="which affects: this and that"):
        symbol.resolve()
    monkeypatch.setattr(symbols, "SYMBOLS", (*SYMBOLS[:2], symbol))
    assert symbols.missing() == [symbol]
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert symbol.name in printed
    assert "this and that" in printed


def test_nothing_missing_is_not_listed(monkeypatch, capsys):
    monkeypatch.setattr(symbols, "SYMBOLS", SYMBOLS[:2])
    assert cli.main(["env"]) == 0
    assert "missing symbol" not in capsys.readouterr().out


def test_a_package_that_is_not_installed_lacks_nothing(monkeypatch):
    monkeypatch.setattr(symbols, "SYMBOLS", (Symbol("no_such_package.part", "x", "anything"),))
    assert symbols.missing() == []


def test_every_private_name_is_in_the_table():
    """By reading: names with an underscore that no file of ours defines, and private modules."""
    trees = [ast.parse(path.read_text()) for path in FILES]
    own = {name for tree in trees for name in _defined(tree)}
    used = {name for tree in trees for name in _private(tree)} - own - STANDARD
    parts = {part for s in SYMBOLS for part in s.name.split(".")}
    assert used - parts == set()
    assert "_flash_attention_forward" in used, "the search finds nothing"


def _private(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in dir(builtins):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        for name in names:
            private = isinstance(name, str) and name.startswith("_") and not name.endswith("__")
            if private and not name.startswith("_liger"):
                yield name


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id
