"""Uses that change logits, or the weights that they are made of."""

import torch
import torch.nn.functional as F
from logits_uses import V, inputs, loss_of, use
from torch.nn.utils import parameters_to_vector, vector_to_parameters

# --- writes ---------------------------------------------------------------------------------------


@use
def write_through_two_views(model, out):
    with torch.no_grad():
        out.logits[:, -1][:, 7] = -torch.inf
    return out.logits.softmax(-1)


@use
def write_through_two_views_with_gradient(model, out):
    z = out.logits * 1.0
    z[:, -1][:, 7] = -3.0
    out.loss = out.loss + z.square().mean()


@use
def masked_fill_of_a_view(model, out):
    mask = torch.arange(V) % 3 == 0
    out.logits.view(-1, V).masked_fill_(mask, -5.0)
    out.loss = out.loss + out.logits.logsumexp(-1).mean()
    return out.logits


@use
def fill_of_a_row(model, out):
    out.logits[0].fill_(2.0)
    out.loss = out.loss + out.logits.square().mean()
    return out.logits


@use
def copy_into_logits(model, out):
    out.logits.copy_(torch.linspace(-1, 1, out.logits.numel()).view(out.logits.shape))
    return out.logits


@use
def zero_before_a_view_is_read(model, out):
    row = out.logits[1]
    with torch.no_grad():
        out.logits.zero_()
    return row


@use
def write_through_unsqueeze(model, out):
    with torch.no_grad():
        out.logits.unsqueeze(0).mul_(3.0)
    return out.logits


@use
def write_through_squeeze(model, out):
    with torch.no_grad():
        out.logits[:1].squeeze(0).add_(1.0)
    return out.logits


@use
def write_through_flatten(model, out):
    with torch.no_grad():
        out.logits.flatten(0, 1)[3] = 4.0
    return out.logits


@use
def write_through_detach(model, out):
    out.logits.detach().clamp_(-0.1, 0.1)
    return out.logits


@use
def write_into_a_slice_before_the_own_loss(model, out):
    z = out.logits[:, 1:].clone()
    z[..., :10] = -1e4
    out.loss = F.cross_entropy(z.flatten(0, 1), inputs()[0][:, 1:].flatten())


# --- weights that change before a look ------------------------------------------------------------


@use
def weights_changed_through_data(model, out):
    for p in model.parameters():
        p.data.add_(0.1)
    out.loss = out.loss.detach()
    return out.logits


@use
def weights_exchanged_through_data(model, out):
    for p in model.parameters():
        p.data = p.data + 0.1
    out.loss = out.loss.detach()
    return out.logits.argmax(-1)


@use
def averaged_weights_in_and_out_again(model, out):
    kept = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.copy_(0.5 * p.data)
    for p, own in zip(model.parameters(), kept, strict=True):
        p.data.copy_(own)
    return out.logits


@use
def averaged_weights_while_it_is_read(model, out):
    for p in model.parameters():
        p.data.copy_(0.5 * p.data)
    out.loss = out.loss.detach()
    return out.logits.argmax(-1), loss_of(out.logits, inputs()[1]).detach()


@use
def vector_to_parameters_before_a_look(model, out):
    with torch.no_grad():
        vector_to_parameters(2 * parameters_to_vector(model.parameters()), model.parameters())
    out.loss = out.loss.detach()
    return out.logits


def _step(model, out, optimizer):
    out.loss.backward()
    optimizer.step()
    out.loss = out.loss.detach()


@use
def logits_after_a_fused_step(model, out):
    _step(model, out, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    return out.logits


@use
def accuracy_after_a_step(model, out):
    _step(model, out, torch.optim.SGD(model.parameters(), lr=0.1))
    return out.logits.argmax(-1)


@use
def ratio_of_policies_after_a_step(model, out):
    _step(model, out, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    new = model(input_ids=inputs()[0]).logits
    return (new.log_softmax(-1) - out.logits.log_softmax(-1)).exp().mean().detach()


@use
def snapshot_before_a_step(model, out):
    snapshot = out.logits.detach().clone()
    _step(model, out, torch.optim.SGD(model.parameters(), lr=0.1))
    return snapshot


@use
def logits_after_load_state_dict(model, out):
    state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    out.loss.backward()
    model.load_state_dict(state)
    out.loss = out.loss.detach()
    return out.logits


@use
def logits_after_a_perturbation(model, out):
    """Perturb the weights, as sharpness-aware minimization does between its two passes."""
    out.loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.grad)
    out.loss = out.loss.detach()
    return out.logits
