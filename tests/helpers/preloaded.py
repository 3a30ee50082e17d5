"""What the server of `processes.py` has ready for every process that it forks.

Imports, and what is made in plain Python: nothing here may use OpenMP or autograd.
"""

import contextlib
import gc
import importlib

gc.disable()  # imports leave little to collect
for name in (
    "transformers.models.llama.modeling_llama",
    "peft",
    "matplotlib.pyplot",
    "liger_trainer.runs.run",
    "liger_trainer.trl",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.kto_trainer",
    "trl.experimental.orpo",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
with contextlib.suppress(ImportError):  # older releases have none
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles the patterns of all models
gc.freeze()  # a collection in a fork would copy all of it
gc.enable()
