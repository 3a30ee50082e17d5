"""Replacements for what TRL's trainers compute from whole logits.

TRL's stable trainers score tokens through their fused-head interface (`trl/fused_head.py`). Its
experimental ones read `outputs.logits`, and distillation reads the heads' weights. The replacements
apply if logits are deferred; otherwise TRL's own functions run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import Trainer

from liger_trainer.deferred.scope import loss_scope
from liger_trainer.deferred.token_scores import divergence, fusable, token_scores
from liger_trainer.injection.rules.head import defers_logits


def defers(trainer: Trainer, model: nn.Module) -> bool:
    """Return whether the trainer's `model`, which may be wrapped, defers its logits."""
    return defers_logits(_inside_peft(trainer.accelerator.unwrap_model(model)))


def _inside_peft(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def in_loss_scope(method: Callable) -> Callable:
    """Return `method` such that the logits of forwards in it are deferred."""

    @functools.wraps(method)
    def scoped(*args, **kwargs):
        with loss_scope():
            return method(*args, **kwargs)

    return scoped


# --- TRL's functions of logits, by their names ---------------------------------------------------


def _selective_log_softmax(original: Callable) -> Callable:
    @functools.wraps(original)
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if fusable(logits) is None or index.shape != logits.shape[:-1]:
            return original(logits, index, temperature=temperature, row_mask=row_mask)
        labels = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
        return token_scores(logits, labels, temperature=temperature).log_probs

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original: Callable) -> Callable:
    @functools.wraps(original)
    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
    ):
        if fusable(logits) is None or index.shape != logits.shape[:-1]:
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        labels = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
        scores = token_scores(logits, labels, temperature=temperature, outputs=("entropy",))
        entropy = scores.entropy if entropy_requires_grad else scores.entropy.detach()
        return scores.log_probs, entropy

    return selective_log_softmax_and_entropy


def _chunked_divergence_loss(original: Callable) -> Callable:
    """Use the deferred logits that the hidden states carry (`_hidden_with_logits`), not scale and
    softcap from the models' configurations."""

    @functools.wraps(original)
    def chunked_divergence_loss(
        student_hidden, teacher_hidden, student_weight, teacher_weight, mask, beta, *args, **kwargs
    ):
        student, teacher = (
            getattr(hidden, "_liger_logits", None) for hidden in (student_hidden, teacher_hidden)
        )
        if student is None or teacher is None or args:
            return original(
                student_hidden, teacher_hidden, student_weight, teacher_weight, mask, beta,
                *args, **kwargs,
            )  # fmt: skip
        mask = mask != 0
        loss, entropy = divergence(
            student,
            teacher,
            mask,
            beta=beta,
            temperature=kwargs.get("temperature", 1.0),
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )
        return loss, entropy.sum(), mask.sum()

    return chunked_divergence_loss


FUNCTIONS: dict[str, Callable[[Callable], Callable]] = {
    "selective_log_softmax": _selective_log_softmax,
    "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
    "_chunked_divergence_loss": _chunked_divergence_loss,
}


# --- whole methods: one pass over the logits where TRL makes several -----------------------------


def _orpo_forward(original: Callable) -> Callable:
    """Score pairs; the negative log-likelihood of the chosen includes the prompt (ORPO)."""

    @functools.wraps(original)
    def concatenated_forward(self, model, batch):
        def nll_labels(inputs, chosen):
            attended = inputs["concatenated_attention_mask"][:chosen] == 1
            return inputs["concatenated_input_ids"][:chosen].masked_fill(~attended, -100)

        if not _scores_pairs(self, model):
            return original(self, model, batch)
        pair = _paired_forward(self, model, batch, self.padding_value, nll_labels)
        chosen, sums, counts, nll, logits, aux = pair
        logps = sums / counts
        return (
            logps[:chosen],
            logps[chosen:],
            logits[:chosen, :-1],
            logits[chosen:, :-1],
            nll,
            *aux,
        )

    return concatenated_forward


def _cpo_forward(original: Callable) -> Callable:
    """Score pairs; the negative log-likelihood of the chosen covers the completion (CPO, SimPO)."""

    @functools.wraps(original)
    def concatenated_forward(self, model, batch):
        def nll_labels(inputs, chosen):
            return inputs["concatenated_labels"][:chosen]

        if not _scores_pairs(self, model):
            return original(self, model, batch)
        pair = _paired_forward(self, model, batch, self.pad_token_id, nll_labels)
        chosen, sums, counts, nll, logits, aux = pair
        logps = sums / counts if self.loss_type in ("ipo", "simpo") else sums
        if self.cpo_alpha == 0:
            nll = torch.zeros_like(nll)
        return (logps[:chosen], logps[chosen:], logits[:chosen], logits[chosen:], nll, *aux)

    return concatenated_forward


def _scores_pairs(trainer, model) -> bool:
    return not trainer.is_encoder_decoder and defers(trainer, model)


@in_loss_scope
def _paired_forward(self, model, batch, padding_value, nll_labels):
    """Run one forward over chosen and rejected, and score each token once.

    Returns (number of chosen, log-probability [B] and number of tokens [B] of each completion, NLL
    per token of the chosen, logits, (aux loss,) or ()).
    """
    inputs = self.concatenated_inputs(
        batch, padding_value=padding_value, device=self.accelerator.device
    )
    chosen = batch["chosen_labels"].shape[0]
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    outputs = model(
        inputs["concatenated_input_ids"],
        attention_mask=inputs["concatenated_attention_mask"],
        use_cache=False,
        **router,
    )
    logits = outputs.logits
    completion = inputs["concatenated_labels"]
    nll = nll_labels(inputs, chosen)
    # A token is scored if either term needs it; in both, its label is the token itself.
    labels = completion.clone()
    labels[:chosen] = torch.where(nll != -100, nll, completion[:chosen])
    log_probs = token_scores(logits[:, :-1], labels[:, 1:]).log_probs
    mask, nll_mask = completion[:, 1:] != -100, nll[:, 1:] != -100
    sums, counts = (log_probs * mask).sum(-1), mask.sum(-1)
    nll = -(log_probs[:chosen] * nll_mask).sum() / nll_mask.sum()
    return chosen, sums, counts, nll, logits, (outputs.aux_loss,) if router else ()


def _hidden_with_logits(original: Callable) -> Callable:
    """Return hidden states from the model's own forward, with the deferred logits attached."""

    @functools.wraps(original)
    @in_loss_scope
    def get_last_hidden_state(
        self, unwrapped_model, input_ids, attention_mask, logits_to_keep, **images
    ):
        model = _inside_peft(unwrapped_model)
        if defers_logits(model):
            given = {name: value for name, value in images.items() if value is not None}
            outputs = model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given
            )
            logits = outputs.logits[:, :-1][:, -logits_to_keep:]
            head = fusable(logits)
            if head is not None:
                hidden = head.terms[0].hidden
                # A separate view: an attribute on a tensor that the logits hold would be a cycle.
                carrier = hidden.view_as(hidden)
                carrier._liger_logits = logits
                return carrier
        return original(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, **images)

    return get_last_hidden_state


def _generalized_jsd(original: staticmethod) -> staticmethod:
    function = original.__func__

    @functools.wraps(function)
    def generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels=None,
        beta=0.5,
        temperature=1.0,
        reduction="batchmean",
        num_items_in_batch=None,
    ):
        deferred = fusable(student_logits) is not None and fusable(teacher_logits) is not None
        if not deferred or labels is None or (num_items_in_batch is None and reduction == "mean"):
            return function(
                student_logits, teacher_logits, labels, beta, temperature, reduction,
                num_items_in_batch,
            )  # fmt: skip
        loss, _ = divergence(
            student_logits,
            teacher_logits,
            labels != -100,
            beta=beta,
            temperature=temperature,
            reduction="mean" if reduction == "batchmean" else reduction,
            num_items_in_batch=num_items_in_batch,
        )
        return loss

    return staticmethod(generalized_jsd_loss)


_ONCE = "each token is scored once, from deferred logits"
METHODS: dict[str, dict[str, tuple[Callable, str]]] = {
    "ORPOTrainer": {"concatenated_forward": (_orpo_forward, _ONCE)},
    "CPOTrainer": {"concatenated_forward": (_cpo_forward, _ONCE)},
    "DistillationTrainer": {
        "_get_last_hidden_state": (_hidden_with_logits, "hidden states carry deferred logits")
    },
    "GKDTrainer": {"generalized_jsd_loss": (_generalized_jsd, "divergence of deferred logits")},
}
