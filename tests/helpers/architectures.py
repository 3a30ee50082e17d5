"""A tiny random model of every architecture of the installed transformers, plain and injected.

    python tests/helpers/architectures.py > docs/coverage.md          # all of them, some minutes
    python tests/helpers/architectures.py llama qwen3_next            # a few

Sizes are set by the names that configurations give them; what a configuration does not have is left
out. The few models whose sizes must fit each other in their own way are listed.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys

import torch
import transformers
from small_configurations import small_values
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.models.auto import modeling_auto

from liger_trainer import inject
from liger_trainer.kernels import runtime
from liger_trainer.report import InjectionReport

TASKS = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (
        AutoModelForImageTextToText,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
}
def names(task: str) -> list[str]:
    return sorted(TASKS[task][1])


def tiny(task: str, model_type: str) -> torch.nn.Module:
    """Return the model in training mode, its every parameter random."""
    torch.manual_seed(0)
    values = small_values(AutoConfig.for_model(model_type))
    model = TASKS[task][0].from_config(AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def text() -> dict[str, torch.Tensor]:
    """Two sequences of ordinary tokens, the first five positions without label."""
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model with its kernels beside the plain one."""

    loss: float  # difference, relative
    gradient: float  # the largest difference of a parameter's gradient, relative to its norm
    report: InjectionReport

    @property
    def equal(self) -> bool:
        return self.loss < 1e-5 and self.gradient < 1e-4


class NotTrainedError(Exception):
    """The plain model cannot be built or trained on text alone."""


def compare(task: str, model_type: str) -> Comparison:
    try:
        plain = tiny(task, model_type)
        model = copy.deepcopy(plain)
        expected = plain(**text()).loss
        expected.backward()
    except Exception as error:  # a stranger's model may raise anything
        raise NotTrainedError(f"{type(error).__name__}: {str(error).splitlines()[:1]}") from error
    report = inject(model)
    with runtime.every_size():
        loss = model(**text()).loss
        loss.backward()
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        if q.grad is not None
    ]
    largest = max(q.norm().item() for _, q in pairs)
    # The floor makes 1e-7 of the largest gradient, fp32 rounding, count as nothing.
    errors = [(p - q).norm().item() / (q.norm().item() + 1e-3 * largest) for p, q in pairs]
    difference = abs(loss.item() - expected.item()) / max(1.0, abs(expected.item()))
    return Comparison(difference, max(errors), report)


_RULES = ("rms_norm", "layer_norm", "rope", "swiglu", "geglu", "fused_linear_cross_entropy")


def row(task: str, model_type: str) -> str:
    """Return the line of a table for one architecture."""
    try:
        found = compare(task, model_type)
    except NotTrainedError as reason:
        return _failed(model_type, f"plain model not trained: {reason}")
    except Exception as error:  # a fault: the plain model trains
        return _failed(model_type, f"raises {type(error).__name__}: {error}")
    coverage = [found.report.coverage.get(rule) for rule in _RULES]
    cells = [f"{c.swapped}/{c.eligible}" if c and c.eligible else "" for c in coverage]
    reasons = dict.fromkeys(f"{r.rule}: {r.reason}" for r in found.report.refused)
    state = "equal" if found.equal else f"differs ({found.loss:.0e}, {found.gradient:.0e})"
    return f"| {' | '.join([model_type, state, *cells, '; '.join(reasons)])} |".replace("  ", " ")


def _failed(model_type: str, why: str) -> str:
    why = " ".join(why.split())[:120].replace("|", "/")
    return f"| {model_type} | {why} |" + " |" * (len(_RULES) + 1)


def page(chosen: list[str]) -> None:
    """Print the page, of the chosen model types or of all."""
    transformers.logging.set_verbosity_error()
    print(f"""# Coverage

Every architecture of transformers {transformers.__version__}, as a tiny random model in fp32 on a
CPU, trained on text: loss and every gradient with kernels against the plain model. Cells are
swapped / eligible places. Written by `python tests/helpers/architectures.py > docs/coverage.md`.
""")
    for task in TASKS:
        print(f"## {task}\n")
        print(f"| model | result | {' | '.join(_RULES)} | not swapped |")
        print("|---" * (len(_RULES) + 3) + "|")
        for model_type in names(task):
            if not chosen or model_type in chosen:
                print(row(task, model_type), flush=True)
                gc.collect()
        print()


if __name__ == "__main__":
    page(sys.argv[1:])
