"""`transformers.Trainer` whose `use_liger_kernel=True` means this package."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
)
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils.peft_utils import find_adapter_config_file

from liger_trainer.injection.walk import inject, restore_for
from liger_trainer.kernel_trainer import KernelTrainer
from liger_trainer.request import FLAG, Request, config_of
from liger_trainer.trainer_hook import handled_for


class LigerTrainer(KernelTrainer, Trainer):
    """A drop-in replacement for `transformers.Trainer`.

    Args:
        model: as in Trainer, or the name or path of a causal language model, or of a PEFT adapter,
            which is then trained further on its base. For a model that is loaded here, the default
            `processing_class` is its tokenizer, and the default collator pads labels.
        model_init_kwargs: arguments of `from_pretrained` if `model` is a name or path.
        liger_kernel_config: True, or switches (see `KernelConfig`), injects the kernels at
            construction; False does not. None follows `args.use_liger_kernel` and
            `args.liger_kernel_config`.

    All other arguments are Trainer's. `injection_report` states what was swapped. Without kernels
    it is None and this class behaves exactly like Trainer; a model that an earlier trainer injected
    is restored.

    Raises ValueError for an unknown key in `liger_kernel_config`, and for `model_init_kwargs` with
    a model that is loaded already.
    """

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        model_init_kwargs: dict[str, Any] | None = None,
        liger_kernel_config: Request = None,
        **kwargs,
    ):
        self._requested = liger_kernel_config
        if isinstance(model, (str, os.PathLike)):
            name, init = str(model), model_init_kwargs or {}
            model = _load_model(name, init)
            if processing_class is None:
                processing_class = _load_tokenizer(name, init)
            if data_collator is None:
                data_collator = _collator(processing_class, train_dataset)
        elif model_init_kwargs:
            raise ValueError(
                "model_init_kwargs apply to a model given by name or path; this one is loaded"
            )
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            *positional,
            **kwargs,
        )
        if config_of(self) is not None:
            self._inject()
            if self.label_smoother is not None:
                self.label_smoother = FusedLabelSmoother(self.label_smoother.epsilon)
        else:
            self._set_kernels()

    def _inject(self) -> None:
        self.injection_report = inject(self.model, config_of(self))

    def _set_kernels(self) -> None:
        if config_of(self) is None:
            restore_for(self.model, self)

    def train(self, *args, **kwargs):
        self._set_kernels()
        # Trainer.train calls its hook for another kernel package, after a possible model_init.
        with handled_for(self, self._inject):
            return super().train(*args, **kwargs)

    def call_model_init(self, *args, **kwargs):
        model = super().call_model_init(*args, **kwargs)
        config = config_of(self)
        if config is not None and not getattr(self.args, FLAG, False):  # the hook is not called
            self.injection_report = inject(model, config)
        return model


class FusedLabelSmoother(LabelSmoother):
    """The loss of transformers' label smoother, through `cross_entropy` and without full logits."""

    def __call__(self, model_output, labels, shift_labels=False, num_items_in_batch=None):
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        total = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            labels.reshape(-1).to(logits.device),
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
            reduction="sum",
        )
        if num_items_in_batch is None:
            num_items_in_batch = (labels != self.ignore_index).sum().clamp_min(1)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


def _load_model(name: str, model_init_kwargs: dict[str, Any]):
    hub = {k: v for k, v in model_init_kwargs.items() if k in ("token", "revision", "cache_dir")}
    if find_adapter_config_file(name, **hub) is None:
        return AutoModelForCausalLM.from_pretrained(name, **model_init_kwargs)
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(name, **hub).base_model_name_or_path
    others = {k: v for k, v in model_init_kwargs.items() if k != "revision"}  # the adapter's
    model = AutoModelForCausalLM.from_pretrained(base, **others)
    return PeftModel.from_pretrained(model, name, is_trainable=True, **hub)


def _load_tokenizer(name: str, model_init_kwargs: dict[str, Any]):
    shared = ("revision", "token", "trust_remote_code", "cache_dir", "subfolder", "gguf_file")
    chosen = {k: v for k, v in model_init_kwargs.items() if k in shared}
    try:
        return AutoTokenizer.from_pretrained(name, **chosen)
    except (OSError, ValueError):  # a folder with only weights; the data must be tokenized already
        return None


def _collator(tokenizer, dataset):
    if tokenizer is None:
        return None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "labels" in (getattr(dataset, "column_names", None) or ()):
        return DataCollatorForSeq2Seq(tokenizer)
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)
