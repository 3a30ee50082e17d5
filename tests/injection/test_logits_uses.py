"""Odd uses of logits: without a loss they are the plain model's own, beside one they are equal.

Where deferred logits cannot give what plain ones would, they raise and name the way out. The uses
are in tests/helpers/logits_*.py, one function each.
"""

import copy

import logits_changed  # noqa: F401  (registers uses)
import logits_differentiated  # noqa: F401
import logits_read  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from logits_uses import RAISED, USES, V, assert_same, compare, forward, inputs, models, run
from torch import nn

from liger_trainer import inject, restore

# --- keywords -------------------------------------------------------------------------------------

KEYWORDS = {
    "input of softmax": lambda z: torch.softmax(input=z, dim=-1),
    "input and other of mul": lambda z: torch.mul(input=z, other=2.0),
    "other of div": lambda z: z.div(other=2.0),
    "rounding of div": lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    "other and alpha of add": lambda z: torch.add(input=z, other=z, alpha=3),
    "axis of argmax": lambda z: z.argmax(axis=-1),
    "keepdim of argmax": lambda z: torch.argmax(input=z, dim=-1, keepdim=True),
    "keepdims of argmax": lambda z: torch.argmax(z, axis=-1, keepdims=True),
    "argmax of all": lambda z: torch.argmax(z),
    "input of tanh": lambda z: torch.tanh(input=z),
    "out of tanh": lambda z: torch.tanh(z.detach(), out=torch.empty(z.shape)),
    "out of mul": lambda z: torch.mul(z.detach(), 2.0, out=torch.empty(z.shape)),
    "shape of reshape": lambda z: torch.reshape(input=z, shape=(-1, V)),
    "size of view": lambda z: z.view(size=(-1, V)),
    "dtype of view": lambda z: z.detach().view(dtype=torch.int32),
    "memory format of clone": lambda z: z.clone(memory_format=torch.contiguous_format),
    "memory format of contiguous": lambda z: z.contiguous(memory_format=torch.contiguous_format),
    "copy and dtype of to": lambda z: z.to(dtype=torch.float32, copy=True),
    "device of to": lambda z: z.to(device="cpu"),
    "other tensor of to": lambda z: z.to(torch.empty(0, dtype=torch.float64)),
    "dims of flatten": lambda z: torch.flatten(input=z, start_dim=0, end_dim=-2),
    "all of flatten": lambda z: z.flatten(),
    "dim of unsqueeze": lambda z: torch.unsqueeze(input=z, dim=0),
    "dim of squeeze": lambda z: z[:1].squeeze(dim=0),
    "dim of log_softmax": lambda z: torch.log_softmax(input=z, dim=-1),
    "axis of log_softmax": lambda z: F.log_softmax(z, dim=2, dtype=torch.float64),
    "other axis of log_softmax": lambda z: z.log_softmax(dim=1),
    "mean over axis": lambda z: z.mean(axis=-1, keepdims=True),
    "mean in another dtype": lambda z: torch.mean(input=z, dtype=torch.float64),
    "input of gather": lambda z: torch.gather(
        input=z.log_softmax(-1), dim=-1, index=inputs()[0][..., None]
    ),
    "sparse gradient of gather": lambda z: torch.gather(
        z.log_softmax(-1), -1, inputs()[0][..., None], sparse_grad=True
    ),
    "indices of take_along_dim": lambda z: torch.take_along_dim(
        input=z.log_softmax(-1), indices=inputs()[0][..., None], dim=-1
    ),
    "everything of cross_entropy": lambda z: F.cross_entropy(
        input=z.flatten(0, 1), target=inputs()[1].flatten(), reduction="sum", ignore_index=-100
    ),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), inputs()[1]),
    "probabilities as target": lambda z: F.cross_entropy(
        z.flatten(0, 1), torch.full((12, V), 1 / V)
    ),
    "everything of nll_loss": lambda z: F.nll_loss(
        input=z.log_softmax(-1).flatten(0, 1), target=inputs()[1].flatten(), reduction="mean"
    ),
    "float with memory format": lambda z: z.float(memory_format=torch.preserve_format),
    "operators": lambda z: (2 * z, z * 2, z / 2, z + z, -z, z - 1, 1 - z, z**2),
    "multiplied by a tensor": lambda z: z * torch.tensor(2.0),
    "index by tensor": lambda z: (z[torch.tensor([1])], z[inputs()[1] != -100], z[..., 3]),
    "index by keyword": lambda z: torch.index_select(input=z, dim=1, index=torch.tensor([0, 2])),
    "einsum, stack, cat": lambda z: (torch.einsum("btv->bt", z), torch.stack([z, z]).sum(0)),
}


def test_every_keyword_is_understood():
    for name, function in KEYWORDS.items():

        def on_logits(model, out, function=function):
            found = function(out.logits)
            found = found if isinstance(found, tuple) else (found,)
            for one in found:
                if one.is_floating_point() and one.requires_grad:
                    out.loss = out.loss + one.double().square().mean().to(out.loss.dtype)
            return found

        try:
            compare(on_logits, with_labels=True)
        except BaseException as error:
            error.add_note(name)
            raise
    assert "on_logits" not in RAISED


# --- the table ------------------------------------------------------------------------------------

# Where deferred logits raise, beside a loss. What is not here must be equal.
RAISES = {
    "weights_changed_through_data", "weights_exchanged_through_data",
    "averaged_weights_while_it_is_read", "vector_to_parameters_before_a_look",
    "logits_after_a_fused_step", "accuracy_after_a_step", "ratio_of_policies_after_a_step",
    "logits_after_a_functional_call", "logits_after_load_state_dict", "logits_after_a_perturbation",
    "changing_hook", "changing_hook_before_the_node",
    "gradient_penalty", "hessian_vector_product", "hessian_vector_product_of_all_weights",
    "gradient_penalty_of_the_logits", "gradient_of_a_penalty_of_the_logits",
    "gradient_of_a_penalty_of_the_logits_in_what_came_in", "gradient_of_a_penalty_of_a_view",
    "double_backward_of_a_log_probability", "backward_that_is_differentiated",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USES)
def test_beside_a_loss_the_use_is_equal_or_raises(name):
    RAISED.discard(name)
    compare(USES[name], with_labels=True)
    assert (name in RAISED) == (name in RAISES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USES)
def test_without_a_loss_the_logits_are_the_plain_models(name):
    compare(USES[name], with_labels=False)


# --- heads ----------------------------------------------------------------------------------------


class DroppedConnections(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.3)


PARAMETRIZATIONS = {
    "spectral norm": torch.nn.utils.parametrizations.spectral_norm,
    "dropped connections": lambda layer: torch.nn.utils.parametrize.register_parametrization(
        layer, "weight", DroppedConnections()
    ),
    "former spectral norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("when", ["before", "after", "and again"])
def test_a_head_with_a_state_is_evaluated_when_the_plain_one_is(name, when):
    injected, plain = (copy.deepcopy(m) for m in models())
    restore(injected)
    if when != "before":
        inject(injected)
    for each in (injected, plain):
        torch.manual_seed(4)
        PARAMETRIZATIONS[name](each.lm_head)
    if when == "before":
        inject(injected)
    elif when == "and again":
        inject(injected)
        restore(injected)
        inject(injected)

    def look(model, out):
        out.loss = out.loss + out.logits.square().mean()
        return out.logits, forward(model, out.with_labels).logits

    for with_labels in (True, False):
        RAISED.clear()
        compare_in_place(look, with_labels, injected, plain)
    assert not RAISED


def compare_in_place(function, with_labels, injected, plain):
    expected = run(plain, function, with_labels)
    assert_same(run(injected, function, with_labels), expected)


# --- what differs on purpose ----------------------------------------------------------------------


def test_a_batch_without_labels_has_the_loss_zero():
    """Plain torch has NaN there, which would destroy the weights."""
    injected, _ = (copy.deepcopy(m) for m in models())
    ids, labels = inputs()
    loss = injected(input_ids=ids, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert not any(p.grad.any() for p in injected.parameters() if p.grad is not None)


def test_code_that_asks_for_memory_gets_an_error_and_no_null_pointer():
    injected, _ = (copy.deepcopy(m) for m in models())
    ids, labels = inputs()
    with torch.no_grad():
        logits = injected(input_ids=ids, labels=labels).logits
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(logits)
