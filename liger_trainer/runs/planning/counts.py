"""Sizes and parameter counts of a model, which may be on the meta device."""

from __future__ import annotations

from torch import nn

from liger_trainer.runs.planning.memory import Shape, Weights


def shape_of(model: nn.Module) -> Shape:
    """Return the sizes that the formulas need, for a model without adapters.

    Raises ValueError unless all layers are alike, with attention and one gated MLP.
    """
    config = model.config.get_text_config()
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", 0)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    query = heads * size
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * size
    expected = hidden * (2 * query + 2 * key_value) + 3 * hidden * inner
    layers = layers_of(model)
    for layer in layers:
        if sum(p.numel() for p in layer.parameters() if p.dim() > 1) != expected:
            raise ValueError(
                f"{type(model).__name__}: the formulas are for decoder layers of attention and one "
                "gated MLP, all alike; these layers hold other weights"
            )
    if not hasattr(layers[0], "input_layernorm"):
        raise ValueError(
            f"{type(model).__name__}: the formulas are for layers that normalize their input"
        )
    norms = [m for m in layers[0].modules() if _is_norm(m)]
    wide = sum(m.weight.numel() == hidden for m in norms)
    return Shape(
        len(layers), hidden, inner, query, key_value, heads, config.vocab_size,
        extra_norms=max(0, wide - 2), head_norms=wide < len(norms),
    )  # fmt: skip


def weights_of(model: nn.Module) -> Weights:
    """Return the parameter counts of a model, with or without adapters; tied ones count once."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    layer = layers_of(model)[0]
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    ranks = [p.shape[0] for name, p in layer.named_parameters() if "lora_A" in name]
    total, total_bytes = _count(parameters)
    count, count_bytes = _count(trained)
    matrices = {
        id(m.weight): m.weight.numel()
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.weight.requires_grad
    }
    return Weights(
        trained=count,
        frozen=total - count,
        trained_bytes=count_bytes,
        frozen_bytes=total_bytes - count_bytes,
        layer=_count(layer.parameters())[0],
        layer_trained=_count(p for p in layer.parameters() if p.requires_grad)[0],
        matrices_trained=sum(matrices.values()),
        head=head_weight.numel(),
        head_trained=head_weight.requires_grad,
        head_dtype_bytes=head_weight.element_size(),
        ranks=sum(ranks),
    )


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's layers: the module list with the most parameters.

    Raises ValueError if there is no such list.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    return max(lists, key=lambda m: _count(m.parameters())[0])


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not isinstance(module, nn.Linear) and bool(own) and own[0].dim() == 1


def _count(parameters) -> tuple[int, int]:
    """Return (elements, bytes)."""
    found = list(parameters)
    return sum(p.numel() for p in found), sum(p.numel() * p.element_size() for p in found)
