"""`liger-trainer env`: versions, devices, and what is missing."""

from __future__ import annotations

import argparse

_OPTIONAL = {
    "peft": "LoRA",
    "trl": "DPO, KTO, ORPO, SimPO, GRPO",
    "bitsandbytes": "4-bit and 8-bit weights, 8-bit optimizers",
    "flash-attn": "model.attn_implementation: flash_attention_2",
    "deepspeed": "ZeRO",
    "wandb": "training.report_to: wandb",
    "tensorboard": "training.report_to: tensorboard",
    "trackio": "training.report_to: trackio",
    "gguf": "GGUF files",
    "lm-eval": "evaluate --tasks",
    "argcomplete": "completion in the shell",
}

HELP = "print versions, devices, and missing packages"
EXAMPLES = """examples:
  liger-trainer env
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add none."""


def main(options: argparse.Namespace) -> int:
    """Print versions, devices, missing packages, and what the installed versions lack."""
    import platform

    import torch

    from liger_trainer.commands.console import print_table
    from liger_trainer.runs.packages import installed
    from liger_trainer.runs.recipe.recipe import native_bf16
    from liger_trainer.runs.report.summary import machine, version_of
    from liger_trainer.symbols import missing

    facts = {"Platform": platform.platform(), **machine()}
    facts["CUDA of torch"] = torch.version.cuda or "none"
    facts["bf16 at full speed"] = "yes" if native_bf16() else "no"
    print_table(["what", "value"], facts.items())
    print()
    print_table(
        ["optional", "version", "for", "command"],
        [
            [name, version_of(name), what, "" if installed(name) else f"pip install {name}"]
            for name, what in _OPTIONAL.items()
        ],
    )
    lacking = missing()
    if lacking:
        print()
        print_table(["missing symbol", "affects"], [[s.name, s.feature] for s in lacking])
    return 0
