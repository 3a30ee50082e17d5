"""`liger-trainer data`: what the model will see of a recipe's data."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from liger_trainer.commands import train

if TYPE_CHECKING:
    from liger_trainer.runs.data.view import Counts, Sequence

HELP = "show what the model will see of the data"
EXAMPLES = """examples:
  liger-trainer data sft/smollm2-135m
  liger-trainer data mine.yaml --rows 10 data.max_length=1024
  liger-trainer data mine.yaml --rows 1 --json

Tokens that are trained on are green on a terminal, and enclosed in ⟦ ⟧ in a file. The examples are
the first ones after the data is shuffled and split; training shuffles them again. For a stream,
only the first 1000 rows are counted. The model's weights are not loaded.
"""
_TRAINED, _READ, _MARKS = "bold green", "dim", ("⟦", "⟧")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    train.add_recipe(parser)
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="examples to show (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every token")


def main(options: argparse.Namespace) -> int:
    """Print a few examples as the model sees them, and how many there are, of what length."""
    if options.rows < 0:
        raise ValueError(f"--rows is {options.rows}; it must be at least 0")
    from liger_trainer.runs.build import load_data, load_rewards
    from liger_trainer.runs.checks import require
    from liger_trainer.runs.data.collate import unpacked
    from liger_trainer.runs.data.view import counts, sequences
    from liger_trainer.runs.load import load_tokenizer
    from liger_trainer.runs.recipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    require(recipe)
    tokenizer = load_tokenizer(recipe.model)
    prepared = load_data(recipe, tokenizer, load_rewards(recipe))
    splits = ["training"] + (["held-out"] if prepared.eval is not None else [])
    found = {split: counts(prepared, recipe.data, tokenizer, split) for split in splits}
    shown = [
        sequences(row, tokenizer, recipe.data.max_length, prepared.processor)
        for row in islice(unpacked(prepared.train), options.rows)
    ]
    if options.json:
        print(json.dumps(_json(prepared, found, shown, tokenizer), indent=2, ensure_ascii=False))
        return 0
    for number, example in enumerate(shown, 1):
        for sequence in example:
            _print_sequence(number, sequence, tokenizer)
    _print_counts(found)
    for note in prepared.notes:
        print(note)
    return 0


def _json(prepared, found: dict[str, Counts], shown: list[list[Sequence]], tokenizer) -> dict:
    return {
        "kind": prepared.kind,
        "notes": prepared.notes,
        "counts": {split: asdict(numbers) for split, numbers in found.items()},
        "rows": [[_tokens(sequence, tokenizer) for sequence in example] for example in shown],
    }


def _tokens(sequence: Sequence, tokenizer) -> dict[str, Any]:
    tokens = [
        {"id": i, "text": tokenizer.decode([i]), "trained": trained}
        for i, trained in zip(sequence.ids, sequence.trained, strict=True)
    ]
    return {"name": sequence.name, "length": sequence.length, "tokens": tokens}


def _print_sequence(number: int, sequence: Sequence, tokenizer) -> None:
    from rich.text import Text

    from liger_trainer.commands.console import console

    terminal = console()
    name = f", {sequence.name}" if sequence.name else ""
    cut = f", cut from {sequence.length}" if sequence.length > len(sequence.ids) else ""
    terminal.print(
        Text(
            f"example {number}{name}: {len(sequence.ids)} tokens{cut}, "
            f"{sum(sequence.trained)} trained",
            style="bold",
        )
    )
    text = Text()
    for ids, trained in sequence.runs():
        before, after = _MARKS if trained and not terminal.is_terminal else ("", "")
        text.append(before + tokenizer.decode(ids) + after, _TRAINED if trained else _READ)
    terminal.print(text, soft_wrap=True)
    terminal.print()


def _print_counts(found: dict[str, Counts]) -> None:
    from liger_trainer.commands.console import print_table

    names = {"examples": "examples", "dropped": "left out", "cut": "cut", "tokens": "tokens"}
    names |= {"trained": "trained", "packed_rows": "packed rows"}
    packed = any(numbers.packed_rows is not None for numbers in found.values())
    used = [key for key in names if packed or key != "packed_rows"]
    rows = [
        [split, *(f"{getattr(numbers, key):,}" for key in used)] for split, numbers in found.items()
    ]
    print_table(["", *(names[key] for key in used)], rows)
    print()
    lengths = [[split, *numbers.lengths.values()] for split, numbers in found.items()]
    print_table(["length", *next(iter(found.values())).lengths], lengths)
    print()
