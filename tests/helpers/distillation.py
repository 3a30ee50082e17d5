"""Problems of distillation from hidden states, and what is right for them."""

import torch
from oracle import assert_matches

from liger_trainer.kernels.linear.divergence import (
    linear_divergence,
    linear_divergence_reference,
)
from liger_trainer.kernels.logits.jensen_shannon import DivergenceOptions

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 20, 16, 12, 50
ROWS = {"one workspace": 64, "two": 12, "many": 6}
BETAS = [0.0, 0.1, 0.5, 1.0]
PLAIN = DivergenceOptions()
CHANGES = {
    "temperature": 0.7, "scale": 0.6, "softcap": 5.0, "teacher_scale": 0.4, "teacher_softcap": 9.0,
}  # fmt: skip


def problem(device, dtype=torch.float32, tokens=TOKENS, dropped=3):
    """Return student tensors, the teacher's arguments and the mask."""
    student = {
        "hidden": torch.randn(tokens, WIDTH),
        "weight": torch.randn(VOCAB, WIDTH) * 0.5,
        "bias": torch.randn(VOCAB),
    }
    teacher = {
        "teacher_hidden": torch.randn(tokens, TEACHER_WIDTH),
        "teacher_weight": torch.randn(VOCAB, TEACHER_WIDTH) * 0.5,
        "teacher_bias": torch.randn(VOCAB),
    }
    mask = torch.ones(tokens, dtype=torch.bool)
    if dropped:
        mask[::dropped] = False
    student, teacher = (
        {name: t.to(device, dtype) for name, t in side.items()} for side in (student, teacher)
    )
    return student, teacher, mask.to(device)


def reduced(values, mask, reduction):
    values = values.where(mask, 0.0)
    if reduction == "none":
        return values
    return values.sum() / (mask.sum() if reduction == "mean" else 1)


def reference_of(teacher, mask, options, reduction):
    def reference(hidden, weight, bias=None, low=None, adapter=None):
        terms = ([hidden], [weight]) if low is None else ([hidden, low], [weight, adapter])
        hidden_t, weight_t, bias_t = (None if t is None else t.to(hidden.dtype) for t in teacher)
        values, entropy = linear_divergence_reference(
            *terms, [hidden_t], [weight_t], bias, bias_t, options
        )
        # The oracle wants outputs with a gradient.
        return reduced(values, mask, reduction), entropy.where(mask, 0.0) + 0 * hidden.sum()

    return reference


def candidate_of(teacher, mask, **arguments):
    def candidate(hidden, weight, bias=None, low=None, adapter=None):
        terms = (hidden, weight) if low is None else ([hidden, low], [weight, adapter])
        values, entropy = linear_divergence(
            *terms, *teacher[:2], mask, bias, teacher[2], **arguments
        )
        assert not entropy.requires_grad
        return values, entropy + 0 * hidden.float().sum()

    return candidate


def assert_linear(student, teacher, mask, options=PLAIN, reduction="mean", rows=64):
    teacher = list(teacher.values())
    assert_matches(
        candidate_of(teacher, mask, options=options, reduction=reduction, max_rows=rows),
        reference_of(teacher, mask, options, reduction),
        student,
        # The rows of hidden are rounded once more when g scales them.
        factor=4.0,
    )


def operands(student, teacher, mask):
    return student["hidden"], student["weight"], *list(teacher.values())[:2], mask
