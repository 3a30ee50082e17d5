"""Whole models under torch.compile."""

import pytest
import torch
from families import tiny_model
from torch._dynamo import utils as dynamo
from trainers import assert_same_run, train

from liger_trainer import LigerTrainer, inject


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_dynamo_is_done_after_the_first_steps():
    """Later steps compile nothing and do not try to, nor do those of a second model."""
    ids = torch.randint(0, 64, (2, 12))
    models = [tiny_model("llama", num_hidden_layers=1) for _ in range(2)]
    for model in models:
        inject(model)
    compiled = [torch.compile(model, backend="eager") for model in models]

    def steps():
        before = dynamo.curr_frame
        for model in compiled:
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
        return dynamo.curr_frame - before

    assert steps() > 0
    assert steps() == 0


class Counting(LigerTrainer):
    """Counts the bytes that its forwards keep for backward, apart from parameters."""

    kept = 0

    def compute_loss(self, model, *args, **kwargs):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                self.kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return super().compute_loss(model, *args, **kwargs)


def test_compiled_trainers_keep_less_and_compute_the_same(tmp_path):
    """What takes no matrix product is computed again, unless asked otherwise."""

    def run(mode):
        torch._dynamo.reset()
        return train(
            Counting, tmp_path, model=tiny_model("llama", num_hidden_layers=1), torch_compile=True,
            torch_compile_backend="aot_eager", liger_kernel_config={"activation_memory": mode},
        )  # fmt: skip

    lean, keep = run("lean"), run("keep")
    assert lean.kept < 0.9 * keep.kept
    assert_same_run(lean, keep)
    assert torch._functorch.config.activation_memory_budget == 1.0
