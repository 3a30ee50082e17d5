"""The engines of the matrix: how each wraps a model, as users start it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import context_parallel
import torch
import torch.distributed as dist
from small import LOSSES, LR, MICRO, base_of, tiny, with_adapters
from torch import nn


@dataclasses.dataclass(frozen=True)
class Engine:
    """One row."""

    prepare: Callable[[nn.Module], nn.Module] = lambda model: model  # after the injection
    world: int = 2  # processes
    shares: int = 1  # so many neighboring ranks see the same data
    make: Callable[[bool, str], nn.Module] = tiny  # the model, before the injection
    losses: dict[str, Callable] = dataclasses.field(default_factory=lambda: LOSSES)


def ddp(**options):
    def prepare(model):
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, **options)

    return prepare


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


def deepspeed(stage: int, **options):
    def prepare(model):
        import deepspeed as ds

        config = {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **options},
            "optimizer": {"type": "SGD", "params": {"lr": LR}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        wanted = [p for p in model.parameters() if p.requires_grad]
        config.pop("optimizer")
        optimizer = torch.optim.SGD(wanted, lr=LR)
        engine, *_ = ds.initialize(
            model=model, config=config, optimizer=optimizer, dist_init_required=False
        )
        return engine

    return prepare


# --- tensor parallel ------------------------------------------------------------------------------


def loaded(**sizes: int):
    """A model that transformers loads in parts, by its own plan."""

    def make(tied: bool, kind: str) -> nn.Module:
        import tempfile

        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            tiny(tied, "full").save_pretrained(folder[0])
        dist.barrier()
        config = DistributedConfig(tp_plan="auto", **sizes)
        model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=config).train()
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
    "FSDP2, head with the final norm": Engine(fsdp2("tail")),
    "FSDP2, head with the final norm, layers kept": Engine(
        fsdp2("tail", reshard_after_forward=False)
    ),
    "FSDP2, head in the root": Engine(fsdp2("root")),
    "FSDP2, head in the root, resharded": Engine(fsdp2("root", root_resharded=True)),
    "FSDP2, head a unit": Engine(fsdp2("head")),
    "HSDP": Engine(hybrid, world=4),
    "FSDP1": Engine(fsdp1()),
    "ZeRO-1": Engine(deepspeed(1)),
    "ZeRO-2": Engine(deepspeed(2)),
    "ZeRO-3": Engine(deepspeed(3, stage3_param_persistence_threshold=0)),
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
