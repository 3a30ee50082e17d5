"""The private or unstable symbols of other packages that this one uses, and for which features.

A release of torch, transformers, TRL or PEFT may remove one without notice. The tests resolve each
in the installed versions and state which feature is affected; `liger-trainer env` lists the missing
ones. A newly used symbol must be added here; the tests find those that are not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from types import CodeType


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A symbol at `path` in `module`.

    After a colon, `path` names an attribute that the class's code gives to its instances.
    `parameters` are keyword arguments with which a function is called.
    """

    module: str
    path: str
    feature: str
    parameters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.module}.{self.path.replace(':', '.')}"

    @property
    def attribute(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def is_relevant(self) -> bool:
        """Whether its package is installed and, for a CUDA symbol, CUDA is available."""
        package = self.module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return False
        return (
            self.attribute not in _CUDA_ONLY or importlib.import_module("torch").cuda.is_available()
        )

    def resolve(self) -> object:
        """Return the symbol, or the class whose instances have it; raise LookupError if missing."""
        owner, _, attribute = self.path.partition(":")
        try:
            found = importlib.import_module(self.module)
            found = functools.reduce(getattr, owner.split("."), found)
        except (ImportError, AttributeError) as error:
            raise LookupError(
                f"{self.name} is gone ({error}), which affects: {self.feature}"
            ) from error
        if attribute and not _gives_instances(found, attribute):
            raise LookupError(
                f"instances of {self.module}.{owner} have no {attribute} any more, which affects: "
                f"{self.feature}"
            )
        lost = [name for name in self.parameters if name not in _parameters(found)]
        if lost:
            raise LookupError(
                f"{self.name} takes no {', '.join(lost)} any more, which affects: {self.feature}"
            )
        return found


def missing() -> list[Symbol]:
    """Return the symbols that the installed packages lack."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that are imported here may warn
        for symbol in filter(lambda s: s.is_relevant, SYMBOLS):
            try:
                symbol.resolve()
            except LookupError:
                found.append(symbol)
    return found


def _parameters(found: object) -> set[str]:
    schema = getattr(found, "_schema", None)
    if schema is not None:  # an operator of torch
        return {argument.name for argument in schema.arguments}
    return set(inspect.signature(getattr(found, "__func__", found)).parameters)


def _gives_instances(cls: type, attribute: str) -> bool:
    return any(attribute in _names_in(base) for base in cls.__mro__ if base is not object)


def _names_in(cls: type) -> set[str]:
    """Return the names of the class's attributes and fields, and names used in its methods."""
    names = {*vars(cls), *vars(cls).get("__annotations__", ())}
    functions = [getattr(value, "__func__", value) for value in vars(cls).values()]
    codes = [inspect.unwrap(f).__code__ for f in functions if inspect.isfunction(f)]
    while codes:
        code = codes.pop()
        names.update(code.co_names, (c for c in code.co_consts if isinstance(c, str)))
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    return names


# --- the table ------------------------------------------------------------------------------------


def _of(module: str, feature: str, *paths: str) -> Iterator[Symbol]:
    """Yield symbols of a module; a path may end in the parameters that are used: `f(a, b)`."""
    for path in paths:
        name, _, parameters = path.removesuffix(")").partition("(")
        yield Symbol(module, name, feature, tuple(filter(None, parameters.split(", "))))


_DEFERRED = "deferred logits: without them, every loss builds [tokens, vocabulary]"
_PLAIN = "the plain model under torch.func and forward-mode differentiation"
_HOOKS = "seeing hooks on a module, which a kernel in its place would skip"
_RECOMPUTE = "activation_memory: lean"
_FLAG = "use_liger_kernel=True of LigerTrainer, and enable()"
_MASKS = "attention without masks, of packed rows too"
_ROTARY = "rope"
_LORA = "lora"
_ADAPTED_HEAD = "adapters on the output head"
_WRAPPED = "models inside a PEFT wrapper"
_TRL = "every trainer of liger_trainer.trl"
_TRL_HEAD = "TRL's stable trainers scoring tokens through our head"
_PAIRS = "ORPO and CPO without whole logits"
_DISTILLATION = "distillation without whole logits"
_RUNS = "liger-trainer train: complete checkpoints, and starting from one"
_CUDA_ONLY = ("_cuda_getCurrentRawStream",)

SYMBOLS: tuple[Symbol, ...] = (
    # torch
    *_of("torch", _DEFERRED, "Tensor._make_wrapper_subclass", "_C.DisableTorchFunctionSubclass"),
    *_of("torch.utils._pytree", _DEFERRED, "tree_map_only"),
    *_of("torch", _DEFERRED, "Tensor._version", "Tensor._base", "Tensor._backward_hooks"),
    *_of("torch", _DEFERRED, "Tensor.retains_grad", "Tensor.output_nr"),
    *_of("torch", _DEFERRED, "_C._set_throw_on_mutable_data_ptr"),
    *_of("torch", _DEFERRED, "UntypedStorage._cdata"),
    *_of("torch._dynamo.eval_frame", "torch.compile: less work of the host in a step", "skip_code"),
    *_of("torch", _PLAIN, "_C._functorch.maybe_current_level"),
    *_of("torch", _PLAIN, "_C._functorch.is_legacy_batchedtensor"),
    *_of("torch.autograd.forward_ad", _PLAIN, "_current_level"),
    *_of("torch.nn", _DEFERRED, "Module:_parameters"),
    *_of("torch.nn", "probing copies of modules", "Module:_modules", "Module:_buffers"),
    *_of("torch.nn", _HOOKS, "Module:_forward_hooks", "Module:_forward_pre_hooks"),
    *_of("torch.nn", _HOOKS, "Module:_backward_hooks", "Module:_backward_pre_hooks"),
    *_of("torch.nn.modules.module", _HOOKS, "_global_forward_hooks", "_global_forward_pre_hooks"),
    *_of("torch.nn.modules.module", _HOOKS, "_global_backward_hooks"),
    *_of("torch.nn.modules.module", _HOOKS, "_global_backward_pre_hooks"),
    *_of("torch._C._autograd", _RECOMPUTE, "_top_saved_tensors_default_hooks"),
    *_of("torch._C._autograd", _RECOMPUTE, "_saved_tensors_hooks_is_enabled"),
    *_of("torch", _RECOMPUTE, "_C._functions.ToCopyBackward0._input_metadata"),
    *_of("torch", _RECOMPUTE, "Tensor._is_view", "_C._cuda_getCurrentRawStream"),
    *_of("torch", _MASKS, "_C._nn.scaled_dot_product_attention"),
    *_of(
        "torch", _MASKS,
        "ops.aten._flash_attention_forward.default(window_size_left, window_size_right, scale)",
    ),
    *_of("torch", "d weight of the head, summed in fp32", "ops.aten.addmm.dtype_out"),
    *_of("torch", _LORA, "ops.aten.mm.dtype"),
    # transformers
    *_of("transformers.trainer", _FLAG, "apply_liger_kernel"),
    *_of("transformers", _FLAG, "TrainingArguments:use_liger_kernel"),
    *_of("transformers", _FLAG, "TrainingArguments:liger_kernel_config"),
    *_of("transformers", "batches without a label", "Trainer._get_num_items_in_batch"),
    *_of("transformers", _DEFERRED, "Trainer.compute_loss(model, inputs)"),
    *_of(
        "transformers.trainer_pt_utils", "label smoothing without whole logits",
        "LabelSmoother:epsilon", "LabelSmoother:ignore_index",
        "LabelSmoother.__call__(model_output, labels, shift_labels)",
    ),
    *_of(
        "transformers.utils.peft_utils", "LigerTrainer(\"an adapter's folder\")",
        "find_adapter_config_file",
    ),
    *_of("transformers", "compiled models", "PreTrainedModel.loss_function"),
    *_of("transformers", _MASKS, "PreTrainedConfig._attn_implementation"),
    *_of(
        "transformers.masking_utils", _MASKS,
        "create_causal_mask(config, inputs_embeds, attention_mask, position_ids)",
        "create_sliding_window_causal_mask(config, inputs_embeds, attention_mask, position_ids)",
    ),
    *_of("transformers.modeling_utils", _MASKS, "AttentionInterface.get_interface"),
    *_of(
        "transformers.integrations.sdpa_attention", _MASKS,
        "sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)",
    ),
    *_of(
        "transformers.models.llama.modeling_llama", _ROTARY, "apply_rotary_pos_emb(q, k, cos, sin)"
    ),
    *_of(
        "transformers.modeling_layers", "activation_memory as a budget",
        "GradientCheckpointingLayer.gradient_checkpointing",
    ),
    *_of("transformers.activations", "swiglu and geglu: where activations are", "ACT2FN"),
    *_of("transformers", _RUNS, "Trainer._save_checkpoint", "Trainer._load_from_checkpoint"),
    *_of("transformers", "checks of tensor-parallel runs", "PreTrainedModel:_tp_size"),
    # accelerate
    *_of("accelerate.hooks", "models placed by a device_map", "AlignDevicesHook:execution_device"),
    # TRL
    *_of("trl.trainer.base_trainer", "enable() for TRL's classes", "_BaseTrainer"),
    *_of(
        "trl.trainer.utils", _TRL_HEAD,
        "add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)",
        "FusedCausalLMOutput(loss, log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1, "
        "label_mask, aux_loss)",
    ),
    *(
        symbol
        for name in ("sft", "dpo", "kto", "grpo", "rloo")
        for symbol in _of(f"trl.trainer.{name}_trainer", _TRL_HEAD, "add_fused_lm_head")
    ),
    *(
        symbol
        for name in ("dpo", "kto", "grpo", "rloo")
        for symbol in _of(f"trl.trainer.{name}_trainer", _ADAPTED_HEAD, "BaseTunerLayer")
    ),
    *_of("trl", "SFT: all GEMMs of the head in forward", "SFTTrainer.compute_loss"),
    *_of("trl.trainer.utils", _TRL, "selective_log_softmax(logits, index, temperature, row_mask)"),
    *_of(
        "trl.trainer.utils", "TPO without whole logits",
        "selective_log_softmax_and_entropy(logits, index, entropy_requires_grad, temperature, "
        "row_mask)",
    ),
    *_of("trl.experimental.tpo.tpo_trainer", "TPO without whole logits",
         "selective_log_softmax_and_entropy", "TPOTrainer._compute_loss"),
    *_of("trl.trainer.distillation_trainer", _DISTILLATION,
         "_chunked_divergence_loss(beta, num_items_in_batch, temperature)",
         "DistillationTrainer._compute_loss",
         "DistillationTrainer._get_last_hidden_state(unwrapped_model, input_ids, attention_mask, "
         "logits_to_keep)"),
    *_of("trl.experimental.gkd", "GKD without whole logits",
         "GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels, beta, "
         "temperature, reduction, num_items_in_batch)"),
    *(
        symbol
        for name in ("ORPO", "CPO")
        for symbol in _of(
            f"trl.experimental.{name.lower()}.{name.lower()}_trainer", _PAIRS,
            "selective_log_softmax", f"{name}Trainer.concatenated_forward(model, batch)",
            f"{name}Trainer.concatenated_inputs(batch, padding_value, device)",
            f"{name}Trainer.get_batch_logps", f"{name}Trainer:aux_loss_enabled",
            f"{name}Trainer:is_encoder_decoder",
        )
    ),
    *_of("trl.experimental.orpo", _PAIRS, "ORPOTrainer:padding_value"),
    *_of("trl.experimental.cpo", _PAIRS, "CPOTrainer:pad_token_id", "CPOTrainer:cpo_alpha"),
    *_of("trl.experimental.gmpo", _TRL, "GMPOTrainer"),
    # PEFT
    *_of("peft", _WRAPPED, "PeftModel.get_base_model"),
    *_of("peft.tuners.lora.layer", _ADAPTED_HEAD, "LoraLayer:base_layer"),
    *_of("peft.utils.other", _ADAPTED_HEAD, "ModulesToSaveWrapper:modules_to_save"),
    *_of("peft.utils.other", _ADAPTED_HEAD, "ModulesToSaveWrapper:original_module"),
    *_of("peft.tuners.lora.layer", _LORA, "LoraLayer:lora_A", "LoraLayer:lora_B"),
    *_of("peft.tuners.lora.layer", _LORA, "LoraLayer:lora_dropout", "LoraLayer:scaling"),
    *_of("peft.tuners.lora.layer", _LORA, "LoraLayer:lora_variant", "LoraLayer:merged_adapters"),
    *_of("peft.tuners.lora.layer", _LORA, "LoraLayer:cast_input_dtype_enabled"),
    *_of("peft.tuners.lora.layer", _LORA, "LoraLayer:_active_adapter", "LoraLayer.active_adapters"),
    *_of("peft.tuners.lora.layer", _LORA, "LoraLayer:_disable_adapters", "LoraLayer.merged"),
    *_of("peft.tuners.lora.layer", _LORA, "ParamWrapper:parameter_name"),
)  # fmt: skip
