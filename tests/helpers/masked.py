"""Batches with and without masks, and what a model makes of them."""

import torch


def batch(length=17, **more):
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False, **more}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
