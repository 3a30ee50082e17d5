"""`liger-trainer generate`: what the model wrote before training, and what it writes now."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "generate completions with the base and the trained model, side by side"
EXAMPLES = """examples:
  liger-trainer generate runs/smollm2-135m --prompts questions.txt
  liger-trainer generate runs/mine --prompts rows.jsonl --new-tokens 256 --output answers.jsonl

In a text file, each line is a prompt. In a .jsonl file, each row has `prompt` (text or chat
messages) or `messages`. Decoding is greedy.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="prompts, .txt or .jsonl")
    add_new_tokens(parser, default=128)
    parser.add_argument(
        "--output", metavar="FILE.jsonl", help="file to write to, in place of the terminal"
    )


def add_new_tokens(parser: argparse.ArgumentParser, *, default: int) -> None:
    """Add the option of every command that generates text."""
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=default,
        metavar="N",
        help="most tokens of a completion (default: %(default)s)",
    )


def check_new_tokens(options: argparse.Namespace) -> None:
    """Raise ValueError for `--new-tokens` below 1."""
    if options.new_tokens < 1:
        raise ValueError(f"--new-tokens is {options.new_tokens}; it must be at least 1")


def main(options: argparse.Namespace) -> int:
    """Generate a completion of each prompt, with the base model and with the trained one."""
    from liger_trainer.commands.console import print_titled
    from liger_trainer.runs.checkpoints import write_whole
    from liger_trainer.runs.checks import require_for_model
    from liger_trainer.runs.finished import open_run
    from liger_trainer.runs.load import load_tokenizer
    from liger_trainer.runs.report.samples import shown

    output = Path(options.output).expanduser() if options.output else None
    if output is not None and output.exists() and not output.is_file():
        raise ValueError(f"--output: {output} exists and is not a regular file")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {str(output.parent)!r}")
    run = open_run(options.run)
    prompts = read_prompts(Path(options.prompts).expanduser())
    check_new_tokens(options)
    require_for_model(run.recipe.model)
    require_for_model(run.tuned)
    tokenizer = load_tokenizer(run.tuned)
    if tokenizer.chat_template is not None:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    base = _completions(run.recipe.model, tokenizer, prompts, options.new_tokens)
    tuned = _completions(run.tuned, tokenizer, prompts, options.new_tokens)
    rows = [
        {"prompt": p, "base": b, "tuned": t} for p, b, t in zip(prompts, base, tuned, strict=True)
    ]
    if output is not None:
        write_whole(output, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        print(f"{len(rows)} rows in {output}")
        return 0
    for row in rows:
        print_titled("prompt", shown(row["prompt"]))
        print_titled("base", row["base"])
        print_titled("tuned", row["tuned"])
        print()
    return 0


def read_prompts(path: Path) -> list[Any]:
    """Return the prompts of a file: texts, or lists of messages.

    Raises ValueError if the file is missing, empty or malformed.
    """
    from liger_trainer.runs.data.rows import RowError, check_text
    from liger_trainer.runs.files import read_text

    if not path.is_file():
        raise ValueError(f"--prompts: there is no file {str(path)!r}")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"--prompts: {path} is neither .txt, with a prompt on each line, nor .jsonl"
        )
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {path} is empty")
    if path.suffix == ".txt":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--prompts: line {number} of {path} is not JSON: {error}") from error
        row = row if isinstance(row, dict) else {}
        prompt = row.get("prompt", row.get("messages"))
        try:
            check_text("prompt", prompt)
        except RowError as error:
            raise ValueError(f"--prompts: line {number} of {path}: {error}") from error
        prompts.append(prompt)
    return prompts


def _completions(arguments, tokenizer, prompts: list[Any], new_tokens: int) -> list[str]:
    from liger_trainer.runs.data.conversation import prompt_ids
    from liger_trainer.runs.load import load_for_generation
    from liger_trainer.runs.report.samples import complete

    model = load_for_generation(arguments)
    return [complete(model, tokenizer, prompt_ids(p, tokenizer), new_tokens) for p in prompts]
