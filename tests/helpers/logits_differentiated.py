"""Uses that ask for gradients of logits, of gradients, or in checkpoints."""

import torch
import torch.nn.functional as F
from logits_uses import forward, inputs, loss_of, use
from torch.utils.checkpoint import checkpoint

# --- gradients of the logits ----------------------------------------------------------------------


@use
def retained_gradient(model, out):
    out.logits.retain_grad()
    out.loss.backward()
    out.loss = out.loss.detach()
    return out.logits.grad


@use
def retained_gradient_with_a_term(model, out):
    out.logits.retain_grad()
    (out.loss + out.logits.square().mean()).backward()
    out.loss = out.loss.detach()
    return out.logits.grad


@use
def observing_hook(model, out):
    seen = []
    out.logits.register_hook(lambda grad: seen.append(grad.clone()))
    out.loss.backward()
    out.loss = out.loss.detach()
    return seen


@use
def changing_hook(model, out):
    out.logits.register_hook(lambda grad: 2 * grad)


@use
def hook_on_a_view(model, out):
    seen = []
    view = out.logits[:, :-1]
    view.register_hook(lambda grad: seen.append(grad.clone()))
    out.loss = F.cross_entropy(view.flatten(0, 1), inputs()[0][:, 1:].flatten())
    out.loss.backward()
    out.loss = out.loss.detach()
    return seen


@use
def hook_before_the_node(model, out):
    seen = []
    out.logits.grad_fn.register_prehook(lambda grads: seen.append(grads[0] + 0))
    out.loss.backward()
    out.loss = out.loss.detach()
    return seen


@use
def changing_hook_before_the_node(model, out):
    out.logits.grad_fn.register_prehook(lambda grads: (2 * grads[0],))


@use
def gradient_of_logits(model, out):
    return torch.autograd.grad(out.loss, out.logits, retain_graph=True)


@use
def gradient_of_logits_that_may_be_unused(model, out):
    return torch.autograd.grad(out.loss, [out.logits], retain_graph=True, allow_unused=True)


@use
def materialized_gradient(model, out):
    return torch.autograd.grad(
        outputs=out.loss, inputs=[out.logits], retain_graph=True, materialize_grads=True
    )


# --- second derivatives ---------------------------------------------------------------------------


@use
def gradient_penalty(model, out):
    grads = torch.autograd.grad(out.loss, list(model.parameters()), create_graph=True)
    out.loss = sum(g.square().sum() for g in grads)


@use
def hessian_vector_product(model, out):
    weight = model.lm_head.weight
    (grad,) = torch.autograd.grad(out.loss, weight, create_graph=True)
    out.loss = (grad * torch.ones_like(grad)).sum()


@use
def hessian_vector_product_of_all_weights(model, out):
    """`torch.autograd.grad` runs only what leads to the weights."""
    weights = list(model.parameters())
    grads = torch.autograd.grad(out.loss, weights, create_graph=True)
    ones = [torch.ones_like(grad) for grad in grads]
    found = torch.autograd.grad(grads, weights, ones)
    out.loss = out.loss.detach()
    return found


@use
def gradient_penalty_of_the_logits(model, out):
    (grad,) = torch.autograd.grad(out.loss, out.logits, create_graph=True)
    out.loss = out.loss + grad.square().sum()


@use
def gradient_of_a_penalty_of_the_logits(model, out):
    """`torch.autograd.grad` leaves out what it sees no way to."""
    (grad,) = torch.autograd.grad(out.loss, out.logits, create_graph=True)
    loss = out.loss + grad.square().sum()
    out.loss = out.loss.detach()
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@use
def gradient_of_a_penalty_of_the_logits_in_what_came_in(model, out):
    seed = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(out.loss, out.logits, seed, create_graph=True)
    out.loss = out.loss.detach()
    return torch.autograd.grad(grad.square().sum(), seed, allow_unused=True)


@use
def gradient_of_a_penalty_of_a_view(model, out):
    view = out.logits[:, :-1]
    loss = F.cross_entropy(view.flatten(0, 1), inputs()[0][:, 1:].flatten())
    (grad,) = torch.autograd.grad(loss, view, create_graph=True)
    out.loss = out.loss.detach()
    found = loss + grad.square().sum()
    return torch.autograd.grad(found, list(model.parameters()), allow_unused=True)


@use
def double_backward_of_a_log_probability(model, out):
    ids = inputs()[0]
    picked = out.logits.log_softmax(-1).gather(-1, ids[..., None]).mean()
    grads = torch.autograd.grad(picked, list(model.parameters()), create_graph=True)
    out.loss = sum(g.square().sum() for g in grads)


@use
def backward_that_is_differentiated(model, out):
    out.loss.backward(create_graph=True)
    total = sum(p.grad.square().sum() for p in model.parameters())
    for p in model.parameters():
        p.grad = None
    out.loss = total


# --- checkpoints ----------------------------------------------------------------------------------


@use
def reentrant_checkpoint_of_the_loss_with_a_term(model, out):
    hidden = model.model(input_ids=inputs()[0]).last_hidden_state

    def both(hidden):
        logits = model.lm_head(hidden)
        return loss_of(logits, inputs()[1]), logits.square().mean()

    out.loss = sum(checkpoint(both, hidden, use_reentrant=True))


def _whole_model(model, with_labels, reentrant):
    embeddings = model.get_input_embeddings()(inputs()[0])

    def whole(embeddings):
        found = forward(model, with_labels, inputs_embeds=embeddings)
        return found.loss, found.logits

    loss, logits = checkpoint(whole, embeddings, use_reentrant=reentrant)
    return loss + logits.square().mean()


@use
def whole_model_in_a_reentrant_checkpoint(model, out):
    out.loss = _whole_model(model, out.with_labels, reentrant=True)


@use
def whole_model_in_a_checkpoint(model, out):
    out.loss = _whole_model(model, out.with_labels, reentrant=False)


@use
def own_function_around_the_logits_in_a_checkpoint(model, out):
    out.loss = out.loss + checkpoint(
        lambda z: z.logsumexp(-1).mean(), out.logits, use_reentrant=True
    )
