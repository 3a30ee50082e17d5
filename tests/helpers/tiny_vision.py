"""A vision-language model and its processor, small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

SIDE, PATCH = 28, 14  # of an image and a patch, in pixels
PATCHES = (SIDE // PATCH) ** 2  # tokens of an image
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def processor() -> LlavaProcessor:
    """Return a processor: the tiny tokenizer with an image token, and CLIP's preprocessing."""
    tokenizer = tiny.tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def saved_model(folder: Path) -> Path:
    """Save a model and its processor in a folder, and return it."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    tools = processor()
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny.config(),
        image_token_index=tools.tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tools.save_pretrained(folder)
    return folder


def image_files(folder: Path, colors: list[str]) -> list[str]:
    """Write image files of one color each to `folder`, and return their names."""
    for color in colors:
        Image.new("RGB", (SIDE, SIDE), color).save(folder / f"{color}.png")
    return [f"{color}.png" for color in colors]
