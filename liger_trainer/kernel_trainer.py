"""What a trainer does in each step if its model runs on this package's kernels."""

from __future__ import annotations

import functools
import logging

import torch
from accelerate.utils import gather_object

from liger_trainer.deferred import loss_scope
from liger_trainer.injection.memory_budget import repeated
from liger_trainer.injection.rules.masks import note_full
from liger_trainer.report import InjectionReport
from liger_trainer.request import config_of
from liger_trainer.trainer_hook import without_skip_logits

logger = logging.getLogger(__name__)


class KernelTrainer:
    """The first base of every trainer of this package; the second is transformers' or TRL's.

    Without kernels, each method is exactly the second base's.
    """

    injection_report: InjectionReport | None = None

    def _set_kernels(self) -> None:
        """Inject or restore the models, according to the trainer's flag and config."""
        raise NotImplementedError

    def train(self, *args, **kwargs):
        self._compare_ranks()
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        step = functools.partial(super().training_step, model, inputs, *args, **kwargs)
        return repeated(self, model, step)

    def evaluation_loop(self, *args, **kwargs):
        self._set_kernels()
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if config_of(self) is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self.args.torch_compile:
            note_full(inputs.get("attention_mask"))
        with loss_scope():  # label smoothing and compute_loss_func remove the labels
            return super().compute_loss(model, without_skip_logits(inputs), *args, **kwargs)

    def _get_num_items_in_batch(self, *args, **kwargs):
        number = super()._get_num_items_in_batch(*args, **kwargs)
        if config_of(self) is not None and torch.is_tensor(number):
            return number.clamp(min=1)  # without any label in the batch, the loss is 0 / 1, not NaN
        return number

    def _compare_ranks(self) -> None:
        """Warn if a site is swapped in some processes only.

        That takes different devices or versions. An engine that gathers weights may then wait
        forever, because it expects the same calls in the same order from every process.
        """
        if self.args.world_size == 1 or self.injection_report is None:
            return
        swapped = {(row.site, row.rule) for row in self.injection_report.rows if row.swapped}
        everywhere = gather_object([swapped])
        differing = sorted(set.union(*everywhere) - set.intersection(*everywhere))
        if differing:
            logger.warning(
                "fused in some processes only: %s%s; use the same devices and versions everywhere, "
                "or switch the rule off in liger_kernel_config",
                ", ".join(f"{site} ({rule})" for site, rule in differing[:3]),
                f" and {len(differing) - 3} more" if len(differing) > 3 else "",
            )
