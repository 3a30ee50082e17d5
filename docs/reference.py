"""Write the reference pages from the code: python docs/reference.py

Fields, defaults and comments come from the source of the dataclasses, options from the parser of
the command line. Nothing imports torch, so this takes less than a second.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from liger_trainer import cli
from liger_trainer.runs import shipped
from liger_trainer.runs.recipe.methods import METHODS, training_defaults
from liger_trainer.runs.recipe.parse import parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "liger_trainer"
NOTE = "<!-- Written by docs/reference.py. Do not edit. -->"
SECTIONS = {
    "model": ("runs/load.py", "ModelArguments"),
    "data": ("runs/data/arguments.py", "DataArguments"),
    "reward": ("runs/rewards/rewards.py", "RewardArguments"),
}
MIX = ("runs/data/arguments.py", "Source")
KERNELS = ("config.py", "KernelConfig")


class Field(NamedTuple):
    """One field of a dataclass, as its source shows it."""

    name: str
    type: str
    default: str
    comment: str


def fields(file: str, name: str) -> list[Field]:
    """Return the fields of a dataclass of the package, with the comments beside or above them."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
    found = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            default = "required" if item.value is None else ast.unparse(item.value)
            comment = lines[item.end_lineno - 1][item.end_col_offset :].strip().lstrip("# ")
            above = list(_comments_above(lines, item.lineno - 1))
            comment = comment or " ".join(reversed(above))
            found.append(Field(item.target.id, ast.unparse(item.annotation), default, comment))
    return found


def constant(file: str, name: str) -> ast.expr:
    """Return the value that a module of the package gives to a name."""
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return node.value
    raise LookupError(f"{file} has no {name}")


def keys(file: str, name: str) -> list[str]:
    """Return the keys of a dictionary that a module of the package defines."""
    return [ast.literal_eval(key) for key in constant(file, name).keys]


def recipe_reference() -> str:
    """Return the page of everything that a recipe may hold."""
    loaders = keys("runs/data/builtin.py", "LOADERS")
    rewards = keys("runs/rewards/rewards.py", "REWARDS")
    sandboxes = ast.literal_eval(constant("runs/rewards/sandbox.py", "SANDBOXES"))
    return f"""# Recipe reference

{NOTE}

A recipe is a YAML file with a `method` and the sections below. The command line overrides the
recipe, and the recipe overrides defaults. `section.key=null` restores a default. An unknown key is
an error that names the nearest known one.

## method

| method | trainer | columns of an example | fixed settings | unused keys of `data` |
|---|---|---|---|---|
{_lines(_methods())}

The default is `sft`. `kto` also takes pairs and splits each into two examples. `grpo` also takes
the columns that its reward functions ask for.

## model

Keys without a note are arguments of `from_pretrained`.

{_table(*SECTIONS["model"])}

## data

The loaders are {_codes(loaders)}.

{_table(*SECTIONS["data"])}

An entry of `data.mix` has these keys, with the same meaning as for a single data set:

{_table(*MIX)}

## training

The keys are the fields of the installed `transformers.TrainingArguments`, or of the method's TRL
configuration (`DPOConfig` for `dpo`, and so on). `bf16: auto` is the one value that this package
adds: it turns bf16 on if the machine computes it natively. `save_on_each_node: true` is for
machines with a disk each: all save checkpoints, and the first saves the trained model. It is
refused if they share `output_dir`, because they would write the same files. These defaults differ
from the dataclass:

| method | defaults |
|---|---|
{_lines(_row(f"`{name}`", _codes(_defaults(name))) for name in METHODS)}

### training.liger_kernel_config

Switches that apply with `training.use_liger_kernel: true`. Set one to `false` to turn its rule off.

{_table(*KERNELS)}

## peft

The keys are the fields of the installed `peft.LoraConfig`. `task_type` is `CAUSAL_LM` unless you
set it. Without the section, all weights are trained.

## reward

Applies to `grpo` and `rloo`. The functions are {_codes(rewards)}. The sandboxes are
{_codes(sandboxes)}.

{_table(*SECTIONS["reward"])}

## teacher

Applies to `distillation`: the model to learn from. Its keys are those of [model](#model).

## Shipped recipes

*Memory* covers weights, gradients and optimizer; with LoRA, the frozen weights. Activations come on
top: `liger-trainer plan` estimates the total.

| recipe | model | memory | about |
|---|---|---|---|
{_lines(_recipes())}

## Configurations of accelerate

For the option `--accelerate` of `liger-trainer launch`.

| name | about |
|---|---|
{_lines(_accelerate())}
"""


def command_reference() -> str:
    """Return the page of all commands and their options."""
    commands = _commands_action(cli.build_parser())
    about = {choice.dest: choice.help for choice in commands._choices_actions}
    sections = [_command(name, about[name], c) for name, c in commands.choices.items()]
    return f"""# Commands

{NOTE}

Exit codes: 0, success; 1, training failed, `plan` found that the run does not fit, or `--strict` or
`--dry-run` found a problem; 2, wrong input; 130, interrupted. Every command takes `--debug`, which
shows the traceback of an error.

{_lines(sections)}"""


def commands_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of all commands."""
    return list(_commands_action(parser).choices)


PAGES = {"recipe-reference.md": recipe_reference, "commands.md": command_reference}


def _methods() -> Iterator[str]:
    examples = ast.literal_eval(constant("runs/data/alignment.py", "COLUMNS"))
    formats = {"text": "`messages`; `prompt`, `completion`; `text`; or `input_ids`"}
    formats |= {kind: _codes(columns) for kind, columns in examples.items()}
    for name, method in METHODS.items():
        yield _row(
            f"`{name}`",
            f"`{method.trainer}Trainer` of TRL" if method.trainer else "`LigerTrainer`",
            formats[method.examples],
            _codes(f"{key}: {value}" for key, value in method.fixed.items()),
            _codes(method.unused_data),
        )


def _table(file: str, name: str) -> str:
    rows = ["| key | type | default | note |", "|---|---|---|---|"]
    for field in fields(file, name):
        rows.append(_row(f"`{field.name}`", f"`{field.type}`", _yaml(field.default), field.comment))
    return _lines(rows)


def _command(name: str, about: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## {name}", "", _sentence(about), ""]
    arguments = [a for a in parser._actions if a.dest not in ("help", "debug")]
    arguments = [a for a in arguments if a.help != argparse.SUPPRESS]
    if arguments:
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [*(_row(*_option(a)) for a in arguments), ""]
    examples, *rest = parser.epilog.removeprefix("examples:\n").rstrip().split("\n\n")
    lines += ["```bash", *(line.removeprefix("  ") for line in examples.splitlines()), "```", ""]
    for paragraph in rest:
        lines += [paragraph, ""]
    return _lines(lines)


def _defaults(method: str) -> Iterator[str]:
    for key, value in training_defaults(method).items():
        yield f"{key}: {str(value).lower() if isinstance(value, bool) else value}"


def _recipes() -> Iterator[str]:
    for name in shipped.recipe_names():
        path = shipped.shipped(f"{name}.yaml")
        values, header = parse(path.read_text(encoding="utf-8")), shipped.header(path)
        model = values["model"]
        label = model.get("gguf_file") or model["name_or_path"]
        yield _row(f"`{name}`", label, header.memory, header.about)


def _accelerate() -> Iterator[str]:
    for name in shipped.accelerate_names():
        about = shipped.header(shipped.shipped(f"accelerate/{name}.yaml")).about
        yield _row(f"`{name}`", about)


def _commands_action(parser: argparse.ArgumentParser) -> argparse._SubParsersAction:
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _option(action: argparse.Action) -> tuple[str, str]:
    name = ", ".join(action.option_strings) or action.metavar or f"{{{','.join(action.choices)}}}"
    if action.option_strings and action.nargs != 0:
        name += f" {action.metavar or action.dest.upper()}"
    words = (action.help or "") % vars(action)
    if "default:" not in words and action.nargs != 0 and action.default not in (None, []):
        words += f"{' ' if words else ''}(default: {action.default})"
    if action.required and action.option_strings:
        words += " (required)"
    return f"`{name}`", words


def _comments_above(lines: list[str], index: int) -> Iterator[str]:
    """Yield the comment lines that end right above a line, the lowest first."""
    while index > 0 and lines[index - 1].strip().startswith("#"):
        index -= 1
        yield lines[index].strip().lstrip("# ")


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _yaml(default: str) -> str:
    """Return a default as a recipe would write it; nothing for None."""
    value = default if default == "required" else ast.literal_eval(default)
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


if __name__ == "__main__":
    for page, write in PAGES.items():
        (ROOT / "docs" / page).write_text(write(), encoding="utf-8")
