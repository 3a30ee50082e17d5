"""What a swap costs the host where the host is the limit: python benchmarks/host_time.py

Microseconds of host time per call, transformers as it is and injected, forward and forward with
backward, bf16. A call is timed as it is issued; the device is waited for only between batches of
calls, so that its own time shows only where a call waits for it (the head's loss does once).

    norm     the model's last norm
    gated    act_fn(gate) * up, the activation being the MLP's own
    rotary   the function that the attention layer calls on q and k
    masks    what the backbone calls to get its attention mask
    head     lm_head, and the model's loss of its logits
    layer    a whole decoder layer

`--device cpu` runs tiny widths and counts processor time: what is left is Python and the
dispatcher, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from timing import environment, print_table
from training_step import SHAPES, TINY

SIZES = ((1, 128), (1, 512), (4, 512))
CALLS, BATCHES = 20, 15


def build(shape: str, device: str):
    """Return a plain model of one layer and its injected copy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from liger_trainer import inject

    settings = SHAPES[shape] | (TINY if device == "cpu" else {}) | {"num_hidden_layers": 1}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        plain = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).train()
    injected = copy.deepcopy(plain)
    inject(injected, strict=True)
    return plain, injected


def global_of(function: Callable, name: str) -> Callable:
    """Return the global that a forward calls by this name, looking through its decorators."""
    while name not in function.__code__.co_names:
        cells = (c.cell_contents for c in function.__closure__)
        function = next(c for c in cells if callable(c) and hasattr(c, "__code__"))
    return function.__globals__[name]


def operations(model, batch: int, length: int, device: str) -> dict[str, tuple]:
    """Map names to (function, inputs that get gradients); the function returns a tensor or None."""
    config, layer = model.config, model.model.layers[0]

    def leaf(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    hidden = leaf(batch, length, config.hidden_size)
    gate, up = (leaf(batch, length, config.intermediate_size) for _ in range(2))
    q, k = (
        leaf(batch, length, heads, config.head_dim).transpose(1, 2)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    position_ids = torch.arange(length, device=device).unsqueeze(0)
    cos, sin = model.model.rotary_emb(hidden, position_ids)
    labels = torch.randint(config.vocab_size, (batch, length), device=device)
    rotate = global_of(type(layer.self_attn).forward, "apply_rotary_pos_emb")
    make_mask = global_of(_backbone_forward(model), "create_causal_mask")

    def head():
        return model.loss_function(model.lm_head(hidden), labels, config.vocab_size)

    def masks():
        make_mask(
            config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None,
            position_ids=position_ids,
        )  # fmt: skip

    return {
        "norm": (lambda: model.model.norm(hidden), [hidden]),
        "gated": (lambda: layer.mlp.act_fn(gate) * up, [gate, up]),
        "rotary": (lambda: sum(x.sum() for x in rotate(q, k, cos, sin)), [q, k]),
        "masks": (masks, []),
        "head": (head, [hidden]),
        "layer": (
            lambda: layer(hidden, position_embeddings=(cos, sin), position_ids=position_ids),
            [hidden],
        ),
    }


def _backbone_forward(model) -> Callable:
    """Return the forward for plain rows; an injected backbone has another for packed rows."""
    forward = type(model.model).forward
    cells = [c.cell_contents for c in forward.__closure__ or ()]
    return next((c for c in reversed(cells) if callable(c) and hasattr(c, "__code__")), forward)


def microseconds(call: Callable[[], object], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(BATCHES):
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(CALLS):
            call()
        times.append((clock() - start) / CALLS * 1e6)
    return statistics.median(times)


def both(function: Callable, leaves: list[torch.Tensor], device: str) -> list[float]:
    """Return microseconds of forward and, if inputs get gradients, of forward and backward."""

    def with_backward():
        out = function()
        torch.autograd.backward(out, None if out.dim() == 0 else torch.ones_like(out))
        for leaf in leaves:
            leaf.grad = None

    for _ in range(5):
        function()
        if leaves:
            with_backward()
    return [microseconds(f, device) for f in (function, with_backward)[: 1 + bool(leaves)]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", default=["Llama-1B", "Qwen3-0.6B", "SmolLM2-135M"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for shape in options.shape:
        models = build(shape, options.device)
        for batch, length in [(1, 4)] if options.device == "cpu" else SIZES:
            plain, injected = (operations(m, batch, length, options.device) for m in models)
            for name in plain:
                row = [f"{shape}, {batch} x {length}", name]
                times = (both(*case[name], options.device) for case in (plain, injected))
                for before, after in zip(*times, strict=True):
                    row += [f"{before:.0f}", f"{after:.0f}", f"{after - before:+.0f}"]
                rows.append([*row, *[""] * (8 - len(row))])
                print(rows[-1], flush=True)
    columns = ["shape", "call", "plain", "injected", "more", "plain fwd+bwd", "injected", "more"]
    print(environment())
    print_table("Host time per call, microseconds", columns, rows)


if __name__ == "__main__":
    main()
