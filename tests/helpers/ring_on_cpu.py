"""torch's ring attention for context parallelism, with the attention operator of the CPU.

torch has it for three operators of CUDA only, and raises "does not have a sharding strategy" on the
CPU. `install` adds the fourth by torch's own templates, which exchange keys and values, merge
partial results, and balance the load, whatever operator computes them.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

_AHEAD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_TOKENS = 2  # the dimension


def install() -> None:
    ring.custom_ops[_AHEAD] = _ahead
    ring.custom_ops[_BACK] = _back


def _ahead(op, args, kwargs):
    mesh, (q, k, v, _, causal) = _opened(args)
    found = ring._templated_ring_attention(
        mesh.get_group(), _TOKENS, _AHEAD, q, k, v, is_causal=causal, scale=kwargs.get("scale")
    )
    return _closed(mesh, found)


def _back(op, args, kwargs):
    mesh, (grad, q, k, v, out, logsumexp, dropout, causal) = _opened(args)
    found = ring._templated_ring_attention_backward(
        mesh.get_group(), _TOKENS, _BACK, grad, "grad_out", q, k, v, out, logsumexp, causal,
        dropout_p=dropout, scale=kwargs.get("scale"),
    )  # fmt: skip
    return _closed(mesh, found)


def _opened(args):
    locals_ = [a._local_tensor if isinstance(a, DTensor) else a for a in args]
    return args[0].device_mesh, locals_


def _closed(mesh, tensors):
    return tuple(DTensor.from_local(t, mesh, [Shard(_TOKENS)], run_check=False) for t in tensors)
