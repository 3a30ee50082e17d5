"""A tiny random model of every architecture of the installed transformers, plain and injected.

python tests/helpers/architectures.py > docs/coverage.md          # all of them, some minutes
python tests/helpers/architectures.py llama qwen3_next            # a few
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
import re
import sys
from collections.abc import Iterable

import small_inputs
import torch
import transformers
from small_configurations import DEFAULTS, TOWERS, small_values
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from liger_trainer import inject
from liger_trainer.kernels import runtime
from liger_trainer.report import InjectionReport

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def names(task: str) -> list[str]:
    return sorted(TASKS[task])


def tiny(task: str, model_type: str) -> PreTrainedModel:
    """Return the model in training mode, its every parameter random."""
    torch.manual_seed(0)
    defaults = AutoConfig.for_model(model_type, **DEFAULTS.get(model_type, {}))
    config = AutoConfig.for_model(model_type, **small_values(defaults))
    if model_type in TOWERS:  # past the check of the attribute's type
        vars(config)["vision_config"] = AutoConfig.for_model(**TOWERS[model_type])
    cls = getattr(transformers, TASKS[task][model_type])
    if not isinstance(config, cls.config_class):  # the class may be for a part alone
        parts = (part for part in vars(config).values() if isinstance(part, cls.config_class))
        config = next(parts, config)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of a model with kernels and the plain model."""

    loss: float  # difference, relative
    gradient: float  # the largest difference of a parameter's gradient, relative to its norm
    images: bool  # trained on images, too
    report: InjectionReport

    @property
    def equal(self) -> bool:
        return self.loss < 1e-5 and self.gradient < 1e-4


class NotTrainedError(Exception):
    """The plain model cannot be built or trained here."""


def compare(task: str, model_type: str) -> Comparison:
    try:
        plain = tiny(task, model_type)
        model = copy.deepcopy(plain)
        inputs, expected = _first_that_trains(plain)
    except Exception as error:  # a stranger's model may raise anything
        raise NotTrainedError(_in_words(error)) from error
    report = inject(model)
    with runtime.every_size():
        loss = _trained(model, inputs)
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        if q.grad is not None
    ]
    differences = torch.stack([(p - q).norm() for p, q in pairs])
    norms = torch.stack([q.norm() for _, q in pairs])
    # The floor makes 1e-7 of the largest gradient, fp32 rounding, count as nothing.
    gradient = (differences / (norms + 1e-3 * norms.max())).max()  # NaN if any is
    difference = abs(loss - expected) / max(1.0, abs(expected))
    images = not small_inputs.PIXELS.isdisjoint(inputs)
    return Comparison(difference, gradient.item(), images, report)


def _first_that_trains(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], float]:
    """Return the first inputs that `model` trains on, and its loss."""
    for images in small_inputs.images(model):
        try:
            inputs = small_inputs.around(model, images)
            return inputs, _trained(model, inputs)
        except Exception:  # not in this form
            model.zero_grad()
    inputs = small_inputs.around(model, {})
    return inputs, _trained(model, inputs)


def _trained(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Return the loss, after backward."""
    torch.manual_seed(0)  # some draw noise
    outputs = model(**inputs)
    loss = outputs.loss if "loss" in outputs else _loss_of(outputs.logits)
    loss.backward()
    return loss.item()


def _loss_of(logits: torch.Tensor) -> torch.Tensor:
    """Return a loss for a model that computes none."""
    rows = logits.flatten(0, -2).float()
    return torch.nn.functional.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[-1])


def _in_words(error: Exception) -> str:
    missing = re.search(r"requires the (\w+) library|No module named '(\w+)'", str(error))
    if missing:
        return f"needs {missing[1] or missing[2]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


_RULES = ("rms_norm", "layer_norm", "rope", "swiglu", "geglu", "fused_linear_cross_entropy")


def outcome(task: str, model_type: str) -> Comparison | str:
    """Return the comparison, or why there is none."""
    try:
        return compare(task, model_type)
    except NotTrainedError as reason:
        return f"not trained: {reason}"
    except Exception as error:  # a fault: the plain model trains
        return f"differs (raises {type(error).__name__}: {' '.join(str(error).split())[:100]})"


def row(model_type: str, found: Comparison | str) -> str:
    """Return the line of a table for one architecture."""
    if isinstance(found, str):
        return f"| {model_type} | {found.replace('|', '/')} |" + " |" * (len(_RULES) + 2)
    coverage = [found.report.coverage.get(rule) for rule in _RULES]
    cells = [f"{c.swapped}/{c.eligible}" if c and c.eligible else "" for c in coverage]
    reasons = dict.fromkeys(f"{r.rule}: {r.reason}" for r in found.report.refused)
    state = "equal" if found.equal else f"differs ({found.loss:.0e}, {found.gradient:.0e})"
    kind = "text, images" if found.images else "text"
    return f"| {' | '.join([model_type, state, kind, *cells, '; '.join(reasons)])} |".replace(
        "  ", " "
    )


def summary(found: dict[str, dict[str, Comparison | str]]) -> Iterable[str]:
    """Yield the lines of two tables: architectures by result, and places by rule."""
    yield "| architectures | equal | of these on images | differ | not trained |"
    yield "|---" * 5 + "|"
    for task, outcomes in found.items():
        compared = [c for c in outcomes.values() if isinstance(c, Comparison)]
        equal = [c for c in compared if c.equal]
        untrained = sum(str(c).startswith("not trained") for c in outcomes.values())
        counts = [len(equal), sum(c.images for c in equal)]
        counts += [len(outcomes) - len(equal) - untrained, untrained]
        yield f"| {task} | {' | '.join(map(str, counts))} |"
    swapped, eligible = collections.Counter(), collections.Counter()
    for outcomes in found.values():
        for comparison in outcomes.values():
            if isinstance(comparison, Comparison):
                for rule, coverage in comparison.report.coverage.items():
                    swapped[rule] += coverage.swapped
                    eligible[rule] += coverage.eligible
    yield ""
    yield f"| places | {' | '.join(_RULES)} |"
    yield "|---" * (len(_RULES) + 1) + "|"
    yield f"| swapped / eligible | {' | '.join(f'{swapped[r]}/{eligible[r]}' for r in _RULES)} |"


def page(chosen: list[str]) -> None:
    """Print the page, of the chosen model types or of all."""
    transformers.logging.set_verbosity_error()
    found = {task: {} for task in TASKS}
    for task in TASKS:
        for model_type in names(task):
            if not chosen or model_type in chosen:
                found[task][model_type] = outcome(task, model_type)
                print(row(model_type, found[task][model_type]), file=sys.stderr, flush=True)
                gc.collect()
    print(f"""# Coverage

Every architecture of transformers {transformers.__version__}, as a tiny random model in fp32 on a
CPU, trained on text, and on images where it takes them: loss and every gradient with kernels
against the plain model. Cells are swapped / eligible places. Written by
`python tests/helpers/architectures.py > docs/coverage.md`.
""")
    print(*summary(found), sep="\n")
    for task, outcomes in found.items():
        print(f"\n## {task}\n")
        print(f"| model | result | trained on | {' | '.join(_RULES)} | not swapped |")
        print("|---" * (len(_RULES) + 4) + "|")
        print(*(row(model_type, found) for model_type, found in outcomes.items()), sep="\n")


if __name__ == "__main__":
    page(sys.argv[1:])
