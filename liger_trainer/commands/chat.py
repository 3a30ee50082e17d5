"""`liger-trainer chat`: a conversation with the model of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from liger_trainer.commands.generate import add_new_tokens, check_new_tokens

HELP = "chat with the model of a run, or any other"
EXAMPLES = """examples:
  liger-trainer chat runs/smollm2-135m
  liger-trainer chat runs/qwen3-8b-lora-merged

`/new` begins another conversation; Ctrl-D ends.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="folder of a finished run, or hub name or folder of a model",
    )
    add_new_tokens(parser, default=256)


def main(options: argparse.Namespace) -> int:
    """Answer each line of the input, until it ends."""
    from transformers import TextStreamer

    from liger_trainer.runs.checks import require_for_model
    from liger_trainer.runs.data.conversation import prompt_ids
    from liger_trainer.runs.load import load_for_generation, load_tokenizer
    from liger_trainer.runs.report.samples import complete

    check_new_tokens(options)
    arguments = _model(options.model)
    require_for_model(arguments)
    tokenizer = load_tokenizer(arguments)
    if tokenizer.chat_template is None:
        raise ValueError(f"chat: the tokenizer of {options.model} has no chat template")
    model = load_for_generation(arguments)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text == "/new":
            turns = []
        elif text:
            turns.append({"role": "user", "content": text})
            ids = prompt_ids(turns, tokenizer)
            answer = complete(model, tokenizer, ids, options.new_tokens, streamer=streamer)
            turns.append({"role": "assistant", "content": answer})


def _model(name: str):
    """Return the arguments of a run's model, or of one that no run has left."""
    from liger_trainer.runs import folder
    from liger_trainer.runs.finished import open_run
    from liger_trainer.runs.load import ModelArguments

    path = Path(name).expanduser()
    if (path / folder.RUN_FILE).is_file():
        return open_run(path).tuned
    if not path.is_dir() and name.count("/") != 1:
        raise ValueError(f"there is no folder {str(path)!r}; a hub name is of the form user/model")
    return ModelArguments(str(path) if path.is_dir() else name)
