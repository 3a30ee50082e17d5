"""Compiled models attend without masks where nothing has to be masked."""

import copy

import pytest
import torch
from families import tiny_model
from masked import batch, loss_and_gradients
from transformers import TrainingArguments

from liger_trainer import LigerTrainer, inject
from liger_trainer.injection.rules import masks


@pytest.fixture
def recorded():
    """Return a list, and a backend of torch.compile that puts every graph there."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    yield graphs, backend
    torch._dynamo.reset()


def attention_masks(graph) -> list:
    """Of every sdpa call in a graph: (whether it has a mask, is_causal)."""
    return [
        (node.kwargs.get("attn_mask") is not None, node.kwargs.get("is_causal"))
        for node in graph.graph.nodes
        if getattr(node.target, "__name__", "") == "scaled_dot_product_attention"
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_models_attend_without_mask_break_or_recompilation(family, recorded):
    """One graph for the first length and one for all others, sdpa told that it is causal."""
    graphs, backend = recorded
    model = tiny_model(family)
    model.loss_type = "ForCausalLM"  # gpt2 has none, and warns in the middle of the graph
    inject(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (17, 23, 31):
        compiled(**batch(length=length))
    assert len(graphs) == 2
    for graph in graphs:
        assert attention_masks(graph) == [(False, True)] * 2


def test_compiled_models_are_told_that_a_batch_has_no_padding(recorded):
    """What the collator makes, a mask of ones, cannot be read by a graph; `note_full` reads it."""
    graphs, backend = recorded
    model = tiny_model("llama")
    inject(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for padding, expected in [(0, (False, True)), (4, (True, False))]:
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[1, 17 - padding :] = 0
        masks.note_full(mask)
        compiled(**batch(attention_mask=mask))
        assert attention_masks(graphs[-1]) == [expected] * 2


@pytest.mark.parametrize("compiles", [True, False], ids=["torch_compile", "compiled by hand"])
def test_a_trainer_that_compiles_spares_the_mask_of_batches_without_padding(
    tmp_path, compiles, recorded
):
    """A batch with padding still gets its mask; either loss and gradient is the plain model's."""
    graphs, backend = recorded
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    args = TrainingArguments(
        tmp_path, use_liger_kernel=True, use_cpu=True, report_to="none", torch_compile=compiles
    )
    trainer = LigerTrainer(model, args)
    compiled = torch.compile(model, backend=backend)
    for padding, has_mask in [(0, not compiles), (4, True)]:
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[1, 17 - padding :] = 0
        inputs = batch(attention_mask=mask)
        graphs.clear()
        model.zero_grad()
        loss = trainer.compute_loss(compiled, dict(inputs))
        loss.backward()
        if compiles or not padding:
            attended = [call for graph in graphs for call in attention_masks(graph)]
            assert attended == [(has_mask, not has_mask)] * 2
        expected_loss, expected = loss_and_gradients(plain, inputs)
        torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=2e-6)
        for name, parameter in model.named_parameters():
            error = (parameter.grad - expected[name]).norm()
            assert error <= 1e-5 * expected[name].norm(), name
