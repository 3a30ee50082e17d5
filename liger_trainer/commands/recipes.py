"""`liger-trainer recipes`: the recipes that come with the package."""

from __future__ import annotations

import argparse
import difflib
import sys

HELP = "list the recipes that come with the package, or show one"
EXAMPLES = """examples:
  liger-trainer recipes
  liger-trainer recipes show sft/qwen3-8b-lora > mine.yaml
  liger-trainer train sft/smollm2-135m
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "action", nargs="?", default="list", metavar="{list,show}", help="(default: %(default)s)"
    )
    name = parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to show")
    name.completer = _names  # pyright: ignore[reportAttributeAccessIssue] (of argcomplete)


def _names(prefix: str, **_) -> list[str]:
    """For completion in the shell."""
    from liger_trainer.runs.shipped import recipe_names

    return [name for name in recipe_names() if name.startswith(prefix)]


def main(options: argparse.Namespace) -> int:
    """List the recipes with their model, memory and needs, or print one of them."""
    from liger_trainer.runs.shipped import recipe_names, shipped

    if options.action == "list" and options.name is None:
        return _list(recipe_names())
    if options.action not in ("list", "show"):
        raise ValueError(f"recipes: did you mean `liger-trainer recipes show {options.action}`?")
    if options.action == "list":
        raise ValueError(f"recipes list takes no name: `liger-trainer recipes show {options.name}`")
    if options.name is None:
        raise ValueError("recipes show: which one? `liger-trainer recipes` lists the names")
    if options.name not in recipe_names():
        close = difflib.get_close_matches(options.name, recipe_names(), n=3, cutoff=0.5)
        told = f"there is {', '.join(close)}" if close else "`liger-trainer recipes` lists them"
        raise ValueError(f"recipes show: no recipe {options.name!r}; {told}")
    sys.stdout.write(shipped(f"{options.name}.yaml").read_text(encoding="utf-8"))
    return 0


def _list(names: list[str]) -> int:
    from liger_trainer.commands.console import print_table
    from liger_trainer.runs.recipe.parse import parse
    from liger_trainer.runs.shipped import header, shipped

    rows = []
    for name in names:
        path = shipped(f"{name}.yaml")
        values = parse(path.read_text(encoding="utf-8"))
        model = values["model"]
        label = model.get("gguf_file") or model["name_or_path"]
        rows.append([name, values.get("method", "sft"), label, header(path).memory, _needs(values)])
    print_table(["name", "method", "model", "weights, gradients, optimizer", "needs"], rows)
    return 0


def _needs(values: dict) -> str:
    """Return what a recipe needs besides the package itself."""
    from liger_trainer.runs.packages import needed

    needs = ["trl"] if values.get("method", "sft") != "sft" else []
    needs += ["peft"] if values.get("peft") else []
    needs += [need.names[0] for need in needed(values)]
    needs += [] if values["model"].get("package") else ["a model hub"]
    return ", ".join(dict.fromkeys(needs))
