"""`liger-trainer merge`: merge a trained adapter into its base model."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

HELP = "merge a trained adapter into its base model"
EXAMPLES = """examples:
  liger-trainer merge runs/qwen3-8b-lora
  liger-trainer merge runs/qwen3-8b-lora --into models/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run with a peft section")
    parser.add_argument("--into", metavar="FOLDER", help="output folder (default: RUN-merged)")


def main(options: argparse.Namespace) -> int:
    """Merge the adapter of a run into its base model, and save the whole model."""
    import dataclasses

    from liger_trainer.runs.checks import require_for_model
    from liger_trainer.runs.finished import open_run
    from liger_trainer.runs.load import load_model, load_tokenizer

    run = open_run(options.run)
    if not run.is_adapter:
        raise ValueError(f"{run.path} holds a whole model already, no adapter")
    into = Path(options.into).expanduser() if options.into else Path(f"{run.path}-merged")
    if into.exists():
        raise ValueError(f"--into: {into} exists already; choose another folder")
    if not into.parent.is_dir():
        raise ValueError(f"--into: there is no folder {str(into.parent)!r}")
    # Merging into 4-bit weights would round them again, so the unquantized base is loaded. No
    # attention runs here, so its package is not needed.
    arguments = dataclasses.replace(run.tuned, quantization=None, attn_implementation=None)
    require_for_model(arguments)
    tokenizer = load_tokenizer(arguments)
    model = load_model(arguments).merge_and_unload()
    partial = into.with_name(into.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, into)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"merged into {into}")
    return 0
