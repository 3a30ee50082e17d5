"""TRL's fused-head interface, implemented through the model's own forward.

TRL's trainers score tokens with `model(..., labels=labels, fused_lm_head=True)`. Here the model's
own forward runs, its logits stay deferred, and the scores include what it did to them (scale,
softcap, adapters on the head). None of this is read from the model's configuration.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import nn

from liger_trainer.deferred.scope import loss_scope
from liger_trainer.deferred.token_scores import token_scores
from liger_trainer.injection.rules.head import defers_logits


def attach_fused_head(
    model: nn.Module,
    *,
    original: Callable,
    plain: Callable | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    weighting: str | None = None,
) -> None:
    """Make `model(..., fused_lm_head=True)` return TRL's `FusedCausalLMOutput` from our kernels.

    Args:
        original: the forward that TRL gave the model. It handles such calls if the head's logits
            are not deferred (after `restore`), unless there is an adapter on the head, which it
            would ignore.
        plain: handles all other calls; by default the current forward of the model's class. (TRL's
            own forward would call the class's forward from before the injection.)
        temperature, outputs: those of TRL's `add_fused_lm_head`.
        weighting: as in `linear_log_probs`.
    """
    options = {
        "temperature": temperature,
        "outputs": tuple(name for name in outputs if name != "log_probs"),
        "weighting": weighting,
    }

    @functools.wraps(type(model).forward)
    def forward(
        self,
        *args,
        fused_lm_head=False,
        labels=None,
        shift_labels=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
        }
        if not fused_lm_head:
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return plain(*args, **kwargs) if plain else type(self).forward(self, *args, **kwargs)
        if not (defers_logits(self) or has_adapter(self)):
            return original(*args, fused_lm_head=True, **given, **kwargs)
        return _score(self, args, kwargs, **given, **options)

    model.forward = types.MethodType(forward, model)


def _score(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    **options,
):
    """Return TRL's `FusedCausalLMOutput` of a call of `model`, with scores of its labels.

    `options` are those of `token_scores`.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    with loss_scope():
        own = type(model).forward(model, *args, **{**kwargs, "use_cache": False})
        logits = own.logits
        if shift_labels is None:
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        targets = shift_labels.to(logits.device)
        scores = token_scores(logits, targets, **options)
    mask = targets != -100
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -scores.log_probs.sum() / count
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _router_loss(own)
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=scores.log_probs,
        entropy=scores.entropy,
        log_sum_sq_probs=scores.log_sum_sq_probs,
        mean_logits=scores.mean_logits,
        is_top1=scores.is_top1,
        label_mask=mask,
        aux_loss=aux_loss,
    )


def has_adapter(model: nn.Module) -> bool:
    """Return whether an adapter is on the head.

    PEFT wraps the head in a module with `base_layer` or, if it is tied to embeddings with trainable
    tokens, `token_adapter`.
    """
    head = model.get_output_embeddings()
    return hasattr(head, "base_layer") or hasattr(head, "token_adapter")


def _router_loss(own) -> torch.Tensor:
    aux_loss = getattr(own, "aux_loss", None)
    if aux_loss is None:
        raise RuntimeError(
            "router logits were asked for, but the model's forward returns no aux_loss. Set "
            "fused_linear_cross_entropy to false in liger_kernel_config to train with TRL's head."
        )
    return aux_loss
