"""One run with TRL's own trainer and one with the drop-in: everything that both log, compared.

SGD, because Adam turns the rounding of a gradient near zero into a step of full size.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Before TRL is imported: nothing is asked of a hub, nothing is reported to one.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TQDM_DISABLE": "1",
}

import datasets
import huggingface_hub.constants
import tiny
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

import liger_trainer.trl

huggingface_hub.constants.HF_HUB_OFFLINE = True  # the hub may have been imported already
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
datasets.disable_progress_bars()
disable_progress_bar()

EXPERIMENTAL = ("CPO", "GKD", "GMPO", "ORPO", "TPO")
COMMON = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,  # a run that diverges makes rounding errors large
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
FAR = 20  # a wrong option must differ by at least this many tolerances

ROWS = [  # prompt, chosen, rejected
    ("what is two plus two ?", " four .", " the mat ."),
    ("cat ?", " the cat sat on the mat and is two", " no"),
    ("what sat on the mat ? tell the user .", " cat", " think about what the system is ."),
    ("user", " assistant system", " two plus two is four , user ."),
]


class Tolerance(NamedTuple):
    """`relative` to the number or tensor; `absolute` for numbers, `floor` for gradients: relative
    to the largest gradient of the model, for those which are zero but for rounding."""

    relative: float = 2e-5
    absolute: float = 2e-5
    floor: float = 2e-6


FP32 = Tolerance()


class Run(NamedTuple):
    """What a training run left: `log` as the trainer logged it, `losses` of every micro-batch in
    full precision, `gradients` of the first step (clipped; their norm before it is in the log),
    `weights` after the last."""

    trainer: object
    log: list[dict]
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def classes(method: str, flag: bool) -> tuple[type, type]:
    """Return trainer and config: the drop-ins with `flag`, TRL's own without."""
    if flag:
        home = liger_trainer.trl
    elif method in EXPERIMENTAL:
        home = importlib.import_module(f"trl.experimental.{method.lower()}")
    else:
        home = importlib.import_module("trl")
    return getattr(home, f"{method}Trainer"), getattr(home, f"{method}Config")


def trainer(method: str, folder, build: Callable[[], dict], config: dict | None = None, flag=True):
    """The trainer, ready to train.

    Args:
        build: makes the trainer's arguments, afresh, since a trainer changes its models.
        config: fields of the config that differ from `COMMON`.
    """
    trainer_class, config_class = classes(method, flag)
    fields = {**COMMON, "use_liger_kernel": flag, **(config or {})}
    arguments = {"processing_class": tiny.tokenizer(), **build()}
    return trainer_class(args=config_class(output_dir=str(folder), **fields), **arguments)


def run(method: str, folder, build: Callable[[], dict], config: dict | None = None, flag=True):
    """Train, and evaluate if there is an eval dataset."""
    built = trainer(method, folder, build, config, flag)
    recorder = _Recorder()
    built.add_callback(recorder)
    losses = _record_losses(built)
    set_seed(0)  # what construction drew of random numbers is not what is compared
    built.train()
    if built.eval_dataset is not None:
        built.evaluate()
    weights = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    return Run(built, built.state.log_history, losses, recorder.gradients, weights)


class _Recorder(TrainerCallback):
    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            named = model.named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}


def _record_losses(built) -> list[float]:
    step, losses = built.training_step, []

    def recorded(*args, **kwargs):
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    built.training_step = recorded
    return losses


def distance(got: Run, expected: Run, tolerance: Tolerance = FP32) -> tuple[float, str]:
    """Return the largest error, in tolerances, and which value has it."""
    return max(_errors(got, expected, tolerance), default=(0.0, "nothing was compared"))


def _errors(got: Run, expected: Run, tolerance: Tolerance) -> Iterator[tuple[float, str]]:
    yield from _number_errors(
        [{"micro-batch loss": loss} for loss in got.losses],
        [{"micro-batch loss": loss} for loss in expected.losses],
        tolerance,
    )
    yield from _number_errors(got.log, expected.log, tolerance)
    for kind in ("gradients", "weights"):
        ours, theirs = getattr(got, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys(), f"{kind} of other parameters: {ours.keys() ^ theirs}"
        largest = max((x.norm().item() for x in theirs.values()), default=0.0)
        for name, tensor in theirs.items():
            allowed = tolerance.relative * tensor.norm() + tolerance.floor * largest
            error = ((ours[name] - tensor).norm() / allowed).item() if allowed else 0.0
            yield math.inf if math.isnan(error) else error, f"{kind[:-1]} of {name}"


def _number_errors(got: list[dict], expected: list[dict], tolerance: Tolerance):
    assert len(got) == len(expected), f"{len(got)} entries instead of {len(expected)}"
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys(), f"entry {i}: keys differ by {ours.keys() ^ theirs}"
        for key, value in theirs.items():
            if not _is_time(key):
                yield (
                    _error(ours[key], value, tolerance),
                    f"{key} (entry {i}): {ours[key]}, {value}",
                )


def _is_time(key: str) -> bool:
    return key.endswith(("runtime", "_per_second", "step_time")) or key.startswith("profiling/")


def _error(got: float | None, expected: float | None, tolerance: Tolerance) -> float:
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    if math.isnan(got) or math.isnan(expected):
        return 0.0 if math.isnan(got) and math.isnan(expected) else math.inf
    return abs(got - expected) / (tolerance.relative * abs(expected) + tolerance.absolute)


def assert_same(got: Run, expected: Run, tolerance: Tolerance = FP32) -> None:
    error, what = distance(got, expected, tolerance)
    assert error <= 1, f"{error:.3g} tolerances away: {what}"


def assert_far(got: Run, expected: Run, tolerance: Tolerance = FP32) -> None:
    """Assert that the two runs differ clearly."""
    try:
        error, what = distance(got, expected, tolerance)
    except AssertionError:  # other keys, other parameters
        return
    assert error >= FAR, f"only {error:.3g} tolerances away: {what}"


def parity(
    method: str,
    folder,
    build: Callable[[], dict],
    config: dict | None = None,
    tolerance: Tolerance = FP32,
) -> tuple[Run, Run]:
    """Run the drop-in and TRL's own trainer, and assert that both runs are the same."""
    expected = run(method, folder / "expected", build, config, flag=False)
    got = run(method, folder / "got", build, config)
    report = got.trainer.injection_report
    assert any(row.swapped for row in report.rows if row.rule != "trl"), report
    assert_same(got, expected, tolerance)
    return got, expected


def sharpen(model: PreTrainedModel, seed: int = 0, scale: float = 1.5) -> PreTrainedModel:
    """Every weight random (norms and biases too) and large enough for logits that tell tokens
    apart, so that an error in the loss shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * noise / max(1, parameter.shape[-1]) ** 0.5
    return model


def policy(seed: int = 0, **changes) -> PreTrainedModel:
    return sharpen(tiny.model(seed, **changes), seed)


def policy_with_reference(folder, make: Callable[[], PreTrainedModel] = policy):
    """A policy, and in a subfolder another model, which TRL loads as its reference: the log ratios
    are then not zero from the first step on."""
    model = make()
    folder = folder / model.config.model_type
    if not folder.exists():
        sharpen(copy.deepcopy(model), seed=7, scale=0.1).save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def lora(**changes) -> LoraConfig:
    """Return the configuration of an adapter that is not zero at the start."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return LoraConfig(**settings | {"task_type": "CAUSAL_LM"} | changes)


def typical_error(run: Run, truth: Run) -> torch.Tensor:
    """Return the median over parameters of the first gradients' relative errors."""
    pairs = [(run.gradients[n] - t).norm() / t.norm() for n, t in truth.gradients.items()]
    return torch.stack(pairs).median()
