"""Text, and text with images, for a model of any kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

PIXELS = {"pixel_values", "flattened_patches"}
_IMAGES, _SIDE = 2, 4  # an image for each text; patches per side where a model takes patches


def text() -> dict[str, torch.Tensor]:
    """Two sequences of ordinary tokens, the first five positions without label."""
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def images(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield an image for each text, in the forms that `model` may take."""
    accepted = inspect.signature(model.forward).parameters
    return (form for form in _images(model.config) if form.keys() <= accepted.keys())


def around(model: PreTrainedModel, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `model` takes: text with `images` (none if empty), and whatever else it names."""
    inputs = (_prefixed(text(), model, images) if images else text()) | images
    if getattr(model.config, "num_codebooks", 0) == 1:  # labels for every codebook
        inputs["labels"] = inputs["labels"].unsqueeze(-1)
    accepted = inspect.signature(model.forward).parameters
    more = _beside(inputs["input_ids"], model.config)
    return {name: value for name, value in (more | inputs).items() if name in accepted}


def _images(config: PretrainedConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yield an image for each text in the forms that models take, with what they may need beside.

    The forms with more beside come first: what a model names, it mostly needs.
    """
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    patch = _first(getattr(vision, "patch_size", 8))
    frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
    pixels = channels * patch**2
    area = torch.tensor([[_SIDE, _SIDE]] * _IMAGES)
    grid = {"image_grid_thw": torch.tensor([[1, _SIDE, _SIDE]] * _IMAGES)}
    merged = {"image_merge_sizes": torch.tensor([2] * _IMAGES)}
    forms = [
        _noise(_IMAGES * _SIDE**2, pixels * frames),
        _noise(_IMAGES * _SIDE**2, channels, patch, patch),
        _noise(_IMAGES * _SIDE**2, 2 * patch, 2 * patch, channels),
        _noise(_IMAGES * _SIDE**2, frames, patch, patch, channels),
    ]
    for form in forms:
        patches = {"pixel_values": form}
        yield patches | grid | merged
        yield patches | grid
        yield patches | {"image_grid_hw": area}
        yield patches
    patches = _noise(_IMAGES, _SIDE**2, pixels)
    mask = torch.ones(patches.shape[:2], dtype=torch.bool)
    places = torch.cartesian_prod(torch.arange(_SIDE), torch.arange(_SIDE)).repeat(_IMAGES, 1, 1)
    pooled = _noise(_IMAGES, _SIDE**2, pixels * getattr(vision, "pooling_kernel_size", 1) ** 2)
    yield {"pixel_values": pooled, "image_position_ids": places}
    yield {"pixel_values": patches, "image_position_ids": places}
    yield {"pixel_values": patches, "spatial_shapes": area, "pixel_attention_mask": mask}
    yield {"flattened_patches": torch.cat([torch.ones(*patches.shape[:2], 2), patches], -1)}

    side = _first(getattr(vision, "image_size", 32))
    size = {"image_sizes": torch.tensor([[side, side]] * _IMAGES)}
    for leading in [(_IMAGES,), (_IMAGES, 1), (_IMAGES, 2)]:
        whole = {"pixel_values": _noise(*leading, channels, side, side)}
        yield whole | {"high_res_pixel_values": whole["pixel_values"]}
        yield whole | {"qformer_input_ids": text()["input_ids"]}
        yield whole | {"pixel_attention_mask": torch.ones(leading, dtype=torch.bool)}
        yield whole | size
        yield whole
    tiles = (_IMAGES, 1, getattr(vision, "max_num_tiles", 1))
    aspects = {"aspect_ratio_ids": torch.ones(tiles[:2], dtype=torch.long)}
    aspects["aspect_ratio_mask"] = torch.ones(tiles, dtype=torch.long)
    yield {"pixel_values": _noise(*tiles, channels, side, side)} | aspects


def _first(value: int | list[int]) -> int:
    return value if isinstance(value, int) else value[0]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _prefixed(inputs: dict, model: PreTrainedModel, images: dict) -> dict[str, torch.Tensor]:
    """Return `inputs` with as many image tokens before the text as `model` makes of an image."""
    config = model.config
    tokens = _tokens_per_image(model, images)
    start = getattr(config, "vision_start_token_id", None) if tokens else None
    prefix = [*([] if start is None else [start]), *[_image_token(config)] * tokens]
    ids = torch.tensor([prefix] * _IMAGES, dtype=torch.long)
    return {
        "input_ids": torch.cat([ids, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), inputs["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(ids, -100), inputs["labels"]], 1),
    }


def _tokens_per_image(model: PreTrainedModel, images: dict) -> int:
    """Return how many features `model` makes of an image; 0 if it does not put them in the text."""
    found = [
        (module, getattr(module, name))
        for name in ("get_video_features", "get_image_features")
        for module in model.modules()
        if hasattr(module, name)
    ]
    if not found:
        return getattr(model.config, "latent_query_num", 0)
    owner, features_of = found[-1]  # the innermost: those around it pass images on
    names = inspect.signature(features_of).parameters
    images = {name: value for name, value in images.items() if name in names}
    whole_model = owner.config is not model.config  # within this one, which takes single images
    if whole_model and images["pixel_values"].dim() == 5:
        images["pixel_values"] = images["pixel_values"].flatten(0, 1)
    with torch.no_grad():
        return _rows(features_of(**images)) // _IMAGES


def _rows(features: object) -> int:
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, ModelOutput):
        pooled = features.pooler_output
        return _rows(features.last_hidden_state if pooled is None else pooled)
    return sum(map(_rows, features))


def _image_token(config: PretrainedConfig) -> int:
    config = getattr(config, "vlm_config", config)
    names = ("image_token_id", "image_token_index", "video_token_id")
    return next((getattr(config, name) for name in names if hasattr(config, name)), 64)


def _beside(ids: torch.Tensor, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Return what some models want to know of the tokens, and what others predict."""
    kinds = (ids == _image_token(config)).long()
    more = {
        "bbox": torch.zeros(*ids.shape, 4, dtype=torch.long),
        "mm_token_type_ids": kinds,
        "token_type_ids": kinds,
        "image_embeds_position_mask": kinds,
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
    }
    if hasattr(config, "backbone_hidden_size"):  # it drafts from the states of another model
        more |= _of_another_model(ids, config)
    if hasattr(config, "max_action_dim"):
        more["state"] = _noise(len(ids), config.max_state_dim)
        more["actions"] = _noise(len(ids), config.chunk_size, config.max_action_dim)
    return more


def _of_another_model(ids: torch.Tensor, config: PretrainedConfig) -> dict[str, object]:
    """Return hidden states, and keys and values of a layer of each type, as small as `config`'s."""
    rows, length = ids.shape
    heads, size = 2, 16  # of a small configuration
    layer = _noise(rows, heads, length, size), _noise(rows, heads, length, size)
    return {
        "inputs_embeds": _noise(rows, length, 2 * config.backbone_hidden_size),
        "shared_kv_states": {"sliding_attention": layer, "full_attention": layer},
        "position_ids": torch.arange(length).expand(rows, -1),
    }
