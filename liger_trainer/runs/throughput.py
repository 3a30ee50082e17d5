"""Callbacks of a recipe run: tokens per second, peak memory, progress."""

from __future__ import annotations

import resource
import sys
import time

import torch
from transformers import ProgressCallback, TrainerCallback

GIB = 1024**3


def peak_memory_gib() -> float:
    """Return this process's peak memory: allocated on GPUs, or resident if there is no GPU."""
    if torch.cuda.is_initialized():
        return (
            sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count())) / GIB
        )
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def trained_parameters(model) -> int:
    """Return how many numbers of the whole model are trained, wherever their shards lie."""
    # ZeRO-3 leaves nothing in a parameter and its size beside it.
    trained = (p for p in model.parameters() if p.requires_grad)
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained)


class Outline(TrainerCallback):
    """Prints what is about to be trained: rows, steps, rows in a step, parameters."""

    def __init__(self, trainer, rows: str):
        self._trainer, self._rows = trainer, rows

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        together = self._trainer.get_total_train_batch_size(args)
        alone, steps = args.per_device_train_batch_size, state.max_steps
        factors = f"{alone} per device x {args.gradient_accumulation_steps} accumulated"
        factors += f" x {args.world_size} processes" if args.world_size > 1 else ""
        count = trained_parameters(self._trainer.model)
        print(
            f"training: {self._rows} row{'s' if self._rows != '1' else ''}, "
            f"{steps:,} step{'s' if steps > 1 else ''} of {together}"
            f"{'' if together == alone else f' ({factors})'}, {count:,} parameters trained",
            flush=True,
        )


class Throughput(TrainerCallback):
    """Add `tokens` (since the last log), `tokens_per_second` and `peak_memory_gib` to the log.

    Counts non-padding tokens on all devices; time excludes evaluation and saving. The numbers are
    also written to `state.log_history`, which checkpoints save. Unless logging is off, the first
    step is logged, and so are the last one and those with a checkpoint, because no later log would
    cover the steps before them.
    """

    def __init__(self):
        self._seconds = 0.0
        self._tokens = 0
        self._mark = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._seconds, self._tokens = 0.0, state.num_input_tokens_seen
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._lap(counts=True)
        return self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        due = state.global_step == 1 or control.should_save or control.should_training_stop
        if due and args.logging_strategy != "no":
            control.should_log = True
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        self._lap(counts=False)

    def on_save(self, args, state, control, **kwargs):
        self._lap(counts=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        self._lap(counts=True)  # reading the loss has waited for the device
        # TRL's trainers count tokens themselves. Some start at 0 with every `train`, and the state,
        # which they do not update, is then 0 too; the others start with the state's number.
        seen = int(logs.get("num_tokens", state.num_input_tokens_seen))
        tokens = seen - self._tokens
        measured = {
            "tokens": tokens,
            "tokens_per_second": round(tokens / max(self._seconds, 1e-9), 1),
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }
        logs.update(measured)
        state.log_history[-1].update(measured)
        self._seconds, self._tokens = 0.0, seen

    def _lap(self, *, counts: bool) -> None:
        now = time.perf_counter()
        if counts:
            self._seconds += now - self._mark
        self._mark = now


def count_tokens(trainer) -> None:
    """Make a trainer count the tokens of pairs in `state.num_input_tokens_seen`.

    For the trainers of ORPO and CPO, which do not count tokens: their batches hold chosen and
    rejected sequences, each with a mask, and transformers counts only `input_ids`.
    """
    step = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        masks = (inputs["chosen_attention_mask"], inputs["rejected_attention_mask"])
        count = sum(mask.sum() for mask in masks).to(trainer.args.device)
        trainer.state.num_input_tokens_seen += int(trainer.accelerator.gather(count).sum())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step


class Progress(ProgressCallback):
    """The trainer's progress bar, with one short line per log above it."""

    COLUMNS = (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "held-out loss {:.4f}"),
        *(
            (prefix + key, split + text)
            for prefix, split in (("", ""), ("eval_", "held-out "))
            for key, text in (
                ("reward", "reward {:.3f}"),
                ("rewards/margins", "margin {:.3f}"),
                ("rewards/accuracies", "accuracy {:.2f}"),
                ("margin", "margin {:.3f}"),
                ("accuracy", "accuracy {:.2f}"),
                ("kl", "KL {:.4f}"),
            )
        ),
        ("grad_norm", "gradient norm {:.2f}"),
        ("learning_rate", "learning rate {:.2e}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("peak_memory_gib", "{:.2f} GiB"),
    )

    def on_log(self, args, state, control, logs=None, **kwargs):
        known = [text.format(float(logs[key])) for key, text in self.COLUMNS if key in (logs or {})]
        if state.is_world_process_zero and self.training_bar is not None and known:
            self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(known))
