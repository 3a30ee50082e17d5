"""`liger-trainer chat`: a conversation with the model of a run."""

from __future__ import annotations

import argparse

HELP = "chat with the model of a run"
EXAMPLES = """examples:
  liger-trainer chat runs/smollm2-135m

`/new` begins another conversation; Ctrl-D ends.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N")


def main(options: argparse.Namespace) -> int:
    """Read a turn, write the answer, until the input ends."""
    from transformers import TextStreamer

    from liger_trainer.runs.checks import require_for_model
    from liger_trainer.runs.data.conversation import prompt_ids
    from liger_trainer.runs.finished import open_run
    from liger_trainer.runs.load import load_for_generation, load_tokenizer
    from liger_trainer.runs.samples import complete

    run = open_run(options.run)
    require_for_model(run.tuned)
    tokenizer = load_tokenizer(run.tuned)
    if tokenizer.chat_template is None:
        raise ValueError(f"chat: the tokenizer in {run.path} has no chat template; use generate")
    model = load_for_generation(run.tuned)
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
