"""A model under a fixed budget of `activation_memory`, and a layer that runs out of memory."""

import torch
from families import batch, tiny_model
from simulated_device import Simulated
from torch import nn

from liger_trainer import LigerTrainer
from liger_trainer.injection import memory_budget
from liger_trainer.injection.memory_budget import Budget

LAYERS = 4


def fixed_budget(kept):
    """A function that gives every model a budget that keeps so many layers, on any device."""

    class Fixed(Budget):
        def choose(self, tokens):
            self.kept, self.cost = kept, 1.0
            return kept

    def make(model, asked):
        if "_liger_budget" not in vars(model):
            layers = memory_budget.layers_of(model)
            model._liger_budget = Fixed(asked, layers, Simulated(0, 0, 0))
        return model._liger_budget

    return make


def model_with_dropout():
    return tiny_model("llama", num_hidden_layers=LAYERS, attention_dropout=0.2)


def gradients(model, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return [
        loss.detach(),
        torch.rand(3),
        *(p.grad.clone() for p in model.parameters() if p.numel()),
    ]


class OutOnce(nn.Module):
    """A layer of a model that runs out of memory, once, in forward or in backward."""

    def __init__(self, inner, *where):
        super().__init__()
        self.inner, self.where = inner, list(where)

    def forward(self, x):
        y = self.inner(x)
        if self.where and self.training:
            if self.where == ["forward"]:
                self._run_out()
            y.register_hook(self._backward)
        return y

    def _backward(self, grad):
        if self.where:
            self._run_out()

    def _run_out(self):
        self.where.clear()
        raise torch.OutOfMemoryError("CUDA out of memory")


def trained(model, folder, mode, **changes):
    from transformers import TrainingArguments

    args = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        use_liger_kernel=True, liger_kernel_config={"activation_memory": mode},
        disable_tqdm=True, logging_steps=1, save_strategy="no", seed=5, **changes,
    )  # fmt: skip
    inputs = batch(length=9)
    rows = [{name: tensor[i % 2] for name, tensor in inputs.items()} for i in range(4)]
    trainer = LigerTrainer(model, args, train_dataset=rows)
    trainer.train()
    return [p.detach().clone() for p in model.parameters()]
