"""The engines of the matrix: how each wraps a model, as users start it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import accelerated
import context_parallel
import torch
import torch.distributed as dist
from small import LOSSES, LR, MICRO, base_of, tiny, with_adapters
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy


@dataclasses.dataclass(frozen=True)
class Engine:
    """One row of the matrix."""

    prepare: Callable[[nn.Module], nn.Module] = lambda model: model  # after the injection
    world: int = 2  # processes
    shares: int = 1  # so many neighboring ranks see the same data
    make: Callable[[bool, str], nn.Module] = tiny  # the model, before the injection
    rounds: bool = (
        False  # computes in bf16: errors are compared with those of the plain model there
    )
    losses: dict[str, Callable] = dataclasses.field(default_factory=lambda: LOSSES)


def ddp(**options):
    def prepare(model):
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, **options)

    return prepare


def reduced_every_time(prepare):
    """Make the engine reduce gradients after every micro-batch, not only after the last one."""

    def prepared(model):
        engine = prepare(model)
        engine.no_sync = contextlib.nullcontext
        return engine

    return prepared


def fsdp2(layout: str, **options):
    """`layout`: where the head lives: in the root, with the final norm, or a unit of its own."""

    def prepare(model):
        from torch.distributed.fsdp import fully_shard

        inner = base_of(model)
        tied = inner.lm_head_weight_is_tied
        root = {k: v for k, v in options.items() if k != "root_resharded"}
        for layer in inner.model.layers:
            fully_shard(layer, **root)
        head = inner.get_output_embeddings()
        tail = [inner.model.norm, *([inner.model.embed_tokens] if tied else []), head]
        if layout == "tail":
            fully_shard(tail, **root | {"reshard_after_forward": False})
        elif layout == "head":
            if tied:
                raise NotImplementedError("torch refuses a tied head as a unit of its own")
            fully_shard(head, **root)
        resharded = options.get("root_resharded")
        root = {k: v for k, v in root.items() if k != "reshard_after_forward"}
        if resharded:
            root["reshard_after_forward"] = True
        return fully_shard(model, **root)

    return prepare


def fsdp1():
    def prepare(model):
        import functools

        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        layer = type(base_of(model).model.layers[0])
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )

    return prepare


def zero(stage: int, **options) -> dict:
    """Return DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **options},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it is to be compiled
    }


def deepspeed(stage: int, **options):
    def prepare(model):
        import deepspeed as ds

        wanted = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(wanted, lr=LR)
        engine, *_ = ds.initialize(
            model=model, config=zero(stage, **options), optimizer=optimizer,
            dist_init_required=False,
        )  # fmt: skip
        return engine

    return prepare


PARTS = {"stage3_param_persistence_threshold": 0}


# --- models before the injection ------------------------------------------------------------------


def checkpointed(tied: bool, kind: str) -> nn.Module:
    model = tiny(tied, kind)
    model.gradient_checkpointing_enable()
    base_of(model).enable_input_require_grads()
    return model


def from_one_process(tied: bool, kind: str) -> nn.Module:
    """Only the first process has weights; the others have a model on the meta device."""
    from accelerate import init_empty_weights

    if dist.get_rank() == 0:
        return tiny(tied, kind)
    with init_empty_weights():
        model = tiny(tied, kind)
    base_of(model).tie_weights()
    assert all(p.is_meta for p in model.parameters())
    return model


def built_in_parts(tied: bool, kind: str) -> nn.Module:
    """No process ever has a whole weight: transformers builds the model within `zero.Init`."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    asked = HfDeepSpeedConfig(zero(3, **PARTS))  # holds as long as it is referred to
    model = LlamaForCausalLM.from_pretrained(saved(tied)).train()
    del asked
    assert all(p.ds_tensor.numel() < p.ds_numel for p in model.parameters())
    dist.barrier()
    return with_adapters(model, kind, tied)


def saved(tied: bool) -> str:
    """Save the model's weights in a folder, for all processes."""
    import tempfile

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        tiny(tied, "full").save_pretrained(folder[0])
    dist.barrier()
    return folder[0]


# --- tensor parallel ------------------------------------------------------------------------------


def loaded(**sizes: int):
    """Load a model with transformers' own tensor-parallel plan."""

    def make(tied: bool, kind: str) -> nn.Module:
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_plan="auto", **sizes)
        model = LlamaForCausalLM.from_pretrained(saved(tied), distributed_config=config).train()
        dist.barrier()
        return with_adapters(model, kind, tied)

    return make


def split(tied: bool, kind: str) -> nn.Module:
    """The same plan on the inner dimension of a mesh, to be wrapped along the outer one."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = tiny(tied, "full")
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # tied again when both are split
    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=2))
    model = apply_tensor_parallelism(model, mesh("data", "tensor")["tensor"], plan)
    model.tie_weights()
    return with_adapters(model, kind, tied)


def mesh(outer: str, inner: str):
    shape = (dist.get_world_size() // 2, 2)
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=(outer, inner))


def over_data(model: nn.Module) -> nn.Module:
    return fsdp2("tail", mesh=mesh("data", "tensor")["data"])(model)


def hybrid(model: nn.Module) -> nn.Module:
    return fsdp2("tail", mesh=mesh("replicas", "shards"))(model)


ENGINES: dict[str, Engine] = {
    "DDP": Engine(ddp()),
    "DDP, find_unused_parameters": Engine(ddp(find_unused_parameters=True)),
    "DDP, bucket views": Engine(ddp(gradient_as_bucket_view=True)),
    "DDP, static_graph": Engine(reduced_every_time(ddp(static_graph=True))),
    "DDP, static_graph, no_sync": Engine(ddp(static_graph=True)),  # torch's own assertion
    "FSDP2, head with the final norm": Engine(fsdp2("tail")),
    "FSDP2, head with the final norm, layers kept": Engine(
        fsdp2("tail", reshard_after_forward=False)
    ),
    "FSDP2, head in the root": Engine(fsdp2("root")),
    "FSDP2, head in the root, resharded": Engine(fsdp2("root", root_resharded=True)),
    "FSDP2, head a unit": Engine(fsdp2("head")),
    "FSDP2 by accelerate": Engine(accelerated.fsdp2()),
    "FSDP2 by accelerate, bf16": Engine(accelerated.fsdp2("bf16"), rounds=True),
    "FSDP2 by accelerate, checkpointed": Engine(accelerated.fsdp2(activation_checkpointing=True)),
    "FSDP2 by accelerate, loaded by one process": Engine(
        accelerated.fsdp2(cpu_ram_efficient_loading=True), make=from_one_process
    ),
    "FSDP2, checkpointed by transformers": Engine(fsdp2("tail"), make=checkpointed),
    "FSDP2, offloaded": Engine(fsdp2("tail", offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "HSDP": Engine(hybrid, world=4),
    "FSDP1": Engine(fsdp1()),
    "ZeRO-1": Engine(deepspeed(1)),
    "ZeRO-2": Engine(deepspeed(2)),
    "ZeRO-3": Engine(deepspeed(3, **PARTS)),
    "ZeRO-1, offloaded": Engine(deepspeed(1, offload_optimizer={"device": "cpu"})),
    "ZeRO-2, offloaded": Engine(deepspeed(2, offload_optimizer={"device": "cpu"})),
    "ZeRO-3, offloaded": Engine(
        deepspeed(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    ),
    "ZeRO-3, built in parts": Engine(deepspeed(3, **PARTS), make=built_in_parts),
    "ZeRO-3, small parameters kept": Engine(deepspeed(3, stage3_param_persistence_threshold=1000)),
    "TP": Engine(shares=2, make=loaded(tp_size=2)),
    "FSDP2 x TP": Engine(over_data, 4, shares=2, make=split),
    "FSDP2 x TP, sharded as it is loaded": Engine(
        world=4, shares=2, make=loaded(tp_size=2, fsdp_size=2)
    ),
    "CP": Engine(fsdp2("tail"), shares=2, losses=context_parallel.HALVES),
    "CP, ends and middle": Engine(fsdp2("tail"), shares=2, losses=context_parallel.BALANCED),
    "FSDP2 x CP": Engine(fsdp2("tail"), 4, shares=2, losses=context_parallel.BALANCED),
}
