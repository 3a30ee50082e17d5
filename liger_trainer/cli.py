# PYTHON_ARGCOMPLETE_OK
"""The command line: `liger-trainer COMMAND`, one module of `liger_trainer.commands` for each."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import NoReturn

import liger_trainer
from liger_trainer.commands import (
    chat,
    data,
    env,
    evaluate,
    generate,
    inspect,
    launch,
    merge,
    plan,
    push,
    recipes,
    train,
)
from liger_trainer.runs.errors import WRONG_INPUT, Reported, RunError, report

COMMANDS = (train, launch, recipes, data, inspect, plan, env, evaluate, generate, chat, merge, push)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success; 1: training failed, `plan` found that a recipe does not fit, or `--strict` or
    `--dry-run` found a problem; 2: wrong input; 130: interrupted.
    """
    parser = build_parser()
    _complete(parser)
    options, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(options, "overrides") or any(w.startswith("-") for w in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}" + _as_override(rest, options))
    if not (options.debug or sys.warnoptions):  # they are for those who write code, not recipes
        warnings.simplefilter("ignore", FutureWarning)
    if rest:
        options.overrides = [*options.overrides, *rest]  # those that follow an option
    try:
        return options.main(options)
    except Reported as reported:
        return reported.code
    except (ValueError, OSError, RunError, KeyboardInterrupt) as error:
        return report(error, debug=options.debug)


def _as_override(rest: list[str], options: argparse.Namespace) -> str:
    """Return how to write a value of the recipe that was given as an option."""
    name = rest[0].removeprefix("--").partition("=")[0]
    if not hasattr(options, "overrides") or not rest[0].startswith("--"):
        return ""
    key = name if "." in name else f"training.{name}"
    return f" (a value of the recipe is given without dashes: {key}=VALUE)"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, like all other errors of a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, which sets `options.main` to the chosen command's."""
    parser = _Parser(
        prog="liger-trainer",
        description="Fine-tune a model by a recipe, and use what comes out.",
        epilog="`liger-trainer COMMAND --help` has examples.",
    )
    version = f"%(prog)s {liger_trainer.__version__}"
    parser.add_argument("--version", action="version", version=version)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            parents=[shared],
            description=command.main.__doc__,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(main=command.main)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Print completions and exit if the shell requests them and argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    sys.exit(main())
