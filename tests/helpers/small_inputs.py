"""Text, and text with images, for a model of any kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

_IMAGES, _SIDE = 2, 4  # an image for each text; patches per side where a model takes patches
_IMAGE_TOKEN = 64  # where a configuration names none


def text() -> dict[str, torch.Tensor]:
    """Two sequences of ordinary tokens, the first five positions without label."""
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def candidates(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs that `model` may take: with images in one form after another, then text alone."""
    accepted = inspect.signature(model.forward).parameters
    for images in _images(model.config):
        if images.keys() <= accepted.keys():
            with_tokens = _prefixed(text(), model, images)
            yield _completed(with_tokens | images, model.config, accepted)
    yield _completed(text(), model.config, accepted)


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
    for shape in [(pixels * frames,), (channels, patch, patch)]:
        patches = {"pixel_values": _noise(_IMAGES * _SIDE**2, *shape)}
        yield patches | grid | merged
        yield patches | grid
        yield patches | {"image_grid_hw": area}
    patches = _noise(_IMAGES, _SIDE**2, pixels)
    mask = torch.ones(patches.shape[:2], dtype=torch.bool)
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
    owner = next((m for m in model.modules() if hasattr(m, "get_image_features")), None)
    if owner is None:
        return getattr(model.config, "latent_query_num", 0)
    names = inspect.signature(owner.get_image_features).parameters
    with torch.no_grad():
        features = owner.get_image_features(**{k: v for k, v in images.items() if k in names})
    return _rows(features) // _IMAGES


def _rows(features: object) -> int:
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, ModelOutput):
        return _rows(features.pooler_output)
    return sum(map(_rows, features))


def _image_token(config: PretrainedConfig) -> int:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return next((token for token in found if token is not None), _IMAGE_TOKEN)


def _completed(
    inputs: dict, config: PretrainedConfig, accepted: Mapping
) -> dict[str, torch.Tensor]:
    """Return `inputs` with what else a model names, without what it does not."""
    ids = inputs["input_ids"]
    images = (ids == _image_token(config)).long()
    more = {
        "bbox": torch.zeros(*ids.shape, 4, dtype=torch.long),
        "mm_token_type_ids": images,
        "token_type_ids": images,
        "image_embeds_position_mask": images,
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
        "state": _noise(len(ids), getattr(config, "max_state_dim", 1)),
        "actions": _noise(len(ids), getattr(config, "chunk_size", 1), getattr(config, "max_action_dim", 1)),
    }
    return {name: value for name, value in (more | inputs).items() if name in accepted}
