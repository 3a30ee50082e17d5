"""Uses that read values, dtypes and layouts of logits, or transform and export the model."""

import copy
import functools
import io

import torch
import torch.nn.functional as F
from logits_uses import V, forward, inputs, loss_of, use
from torch import nn

# --- values ---------------------------------------------------------------------------------------


@use
def log_softmax_by_position(model, out):
    return torch.log_softmax(out.logits, -1, torch.float64).dtype, F.log_softmax(
        out.logits, -1, 3, torch.float64
    )


@use
def strides_and_contiguity(model, out):
    z = out.logits
    views = (z, z[:, 1:], z[:, :-1].flatten(0, 1), z.view(-1, V), z.unsqueeze(0), z[0])
    return [(v.shape, v.stride(), v.is_contiguous(), v.storage_offset()) for v in views]


@use
def metadata(model, out):
    z = out.logits
    with torch.no_grad():
        quiet = (z * 2.0).requires_grad, z.detach().requires_grad, z.clone().requires_grad
    return [z.requires_grad, z.is_leaf, z.dtype, z.device.type, z.ndim, z.numel(), *quiet,
            z.float().dtype, z.half().dtype, z.element_size(), z._base is None]  # fmt: skip


@use
def made_without_gradients(model, out):
    with torch.no_grad():
        quiet = forward(model, out.with_labels)
    return quiet.logits.requires_grad, quiet.logits.is_leaf, quiet.logits, quiet.loss


@use
def detach_and_clone_without_gradients(model, out):
    with torch.no_grad():
        kept = out.logits.detach().clone(), out.logits.clone()
    out.loss = out.loss + out.logits.mean()
    return kept


@use
def detach_goes_without_gradient(model, out):
    out.loss = out.loss + (out.logits.detach() * out.logits).mean()


@use
def numpy_lists_and_numbers(model, out):
    z = out.logits.detach()
    return z.numpy().sum(), z[0, 0].tolist(), z[0, 0, 0].item(), z.cpu().numpy().shape


@use
def dlpack(model, out):
    return torch.from_dlpack(out.logits.detach())


@use
def copies_and_files(model, out):
    buffer = io.BytesIO()
    torch.save(out.logits.detach(), buffer)
    buffer.seek(0)
    return torch.load(buffer), copy.deepcopy(out.logits.detach())


@use
def own_autograd_function(model, out):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    out.loss = out.loss + Double.apply(out.logits).square().mean()


@use
def dtypes_under_autocast(model, out):
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(model, out.with_labels)
        own = loss_of(found.logits, inputs()[1])
    return found.loss.dtype, own.dtype, found.logits.dtype


@use
def double_precision_under_autocast(model, out):
    model.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(model, out.with_labels)
        own = loss_of(found.logits.double(), inputs()[1])
    out.loss = out.loss.detach()
    return found.loss.dtype, own.dtype, found.logits.dtype


@use
def large_logits_are_as_exact(model, out):
    """A shift of all logits by 1e4 costs torch some digits; it must cost a kernel no more."""
    model.lm_head.bias = nn.Parameter(torch.full((V,), 1e4))
    found = forward(model, out.with_labels)
    found.loss.backward()
    out.loss = out.loss.detach()
    grads = model.lm_head.weight.grad, model.lm_head.bias.grad
    model.zero_grad()
    return [1e-2 * grad for grad in grads]


@use
def overflow_in_half_precision(model, out):
    model.half()
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
        found = forward(model, out.with_labels)
    out.loss = out.loss.detach()
    return found.logits.isinf().any().item(), found.loss.isfinite().item()


# --- transforms and exporters ---------------------------------------------------------------------


def _loss(model, with_labels, params, ids=None, labels=None):
    """The loss with other weights, as a function of them."""
    ids, labels = inputs() if ids is None else (ids, labels)
    kwargs = {"input_ids": ids, "labels": labels if with_labels else None}
    found = torch.func.functional_call(model, params, kwargs=kwargs)
    return found.loss if with_labels else loss_of(found.logits, labels)


def _weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@use
def functional_gradient(model, out):
    loss = functools.partial(_loss, model, out.with_labels)
    return list(torch.func.grad(loss)(_weights(model)).values())


@use
def functional_call_with_other_weights(model, out):
    params = {name: 0.5 * p for name, p in _weights(model).items()}
    return _loss(model, out.with_labels, params)


@use
def logits_after_a_functional_call(model, out):
    params = {name: 0.5 * p for name, p in _weights(model).items()}
    ids, labels = inputs()
    kwargs = {"input_ids": ids, "labels": labels if out.with_labels else None}
    return torch.func.functional_call(model, params, kwargs=kwargs).logits


@use
def gradients_of_each_example(model, out):
    def loss(params, ids, labels):
        return _loss(model, out.with_labels, params, ids[None], labels[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return list(found(_weights(model), *inputs()).values())


@use
def functional_forward_derivative(model, out):
    loss = functools.partial(_loss, model, out.with_labels)
    params = _weights(model)
    return torch.func.jvp(loss, (params,), ({n: torch.ones_like(p) for n, p in params.items()},))


@use
def forward_mode_of_the_model(model, out):
    embeddings = model.get_input_embeddings()(inputs()[0]).detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(embeddings, torch.ones_like(embeddings))
        found = forward(model, out.with_labels, inputs_embeds=dual)
        value = torch.autograd.forward_ad.unpack_dual(found.loss)
        return value.primal.detach(), value.tangent.detach()


class _Plain(nn.Module):
    """A forward of one tensor, for exporters."""

    def __init__(self, model, with_labels):
        super().__init__()
        self.model, self.with_labels = model, with_labels

    def forward(self, ids):
        return self.model(
            input_ids=ids, labels=ids if self.with_labels else None, use_cache=False
        ).logits


@use
def traced(model, out):
    ids = inputs()[0]
    with torch.no_grad():
        module = _Plain(model.eval(), out.with_labels)
        found = torch.jit.trace(module, ids, check_trace=False)
        return found(ids), found((ids + 1) % V)


@use
def exported(model, out):
    ids = inputs()[0]
    module = _Plain(model.eval(), out.with_labels)
    found = torch.export.export(module, (ids,), strict=False).module()
    return found(ids), found((ids + 1) % V)


@use
def exported_strictly(model, out):
    ids = inputs()[0]
    module = _Plain(model.eval(), out.with_labels)
    return torch.export.export(module, (ids,), strict=True).module()(ids)


@use
def on_the_meta_device(model, out):
    ids, labels = (t.to("meta") for t in inputs())
    found = forward(copy.deepcopy(model).to("meta"), out.with_labels, ids, labels)
    return found.logits.shape, found.loss.shape, found.loss.device.type
