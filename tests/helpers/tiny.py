"""A model and tokenizer small enough to train in a test, and a recipe around them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As some reasoning models have it: earlier turns lose their reasoning, the last one gets a block.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% set text = m['content'].split('</think>')[-1].strip() %}"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n</think>\n{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXTS = ["the cat sat on the mat", "what is two plus two ? four .", "user assistant system think"]


def tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of a few hundred tokens, with ChatML's special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaConfig(
        **sizes | {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2} | changes
    )


def model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes))


def saved_model(folder: Path) -> Path:
    """Save a model and its tokenizer in a folder, and return it."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def chat_file(path: Path, count: int = 24) -> Path:
    """Write a JSON Lines file of short conversations, and return its path."""
    numbers = ["one", "two", "three", "four", "five"]
    with path.open("w") as file:
        for i in range(count):
            question = f"what is {numbers[i % 5]} plus {numbers[i % 3]} ?"
            turns = [("user", question), ("assistant", f"the cat sat on {numbers[i % 4]} .")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def pairs_file(path: Path, count: int = 16) -> Path:
    """Write a file of preference pairs: four prompts, whose chosen answers end in the same word."""
    numbers = ["one", "two", "three", "four"]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what is {numbers[i % 4]} plus {i} ?"}],
            "chosen": [{"role": "assistant", "content": f"the cat {i} sat"}],
            "rejected": [{"role": "assistant", "content": f"the cat {i} mat ?"}],
            "group": numbers[i % 4],
        }
        for i in range(count)
    ]
    return json_lines(path, rows)


def problems_file(path: Path, count: int = 8) -> Path:
    """Write a file of prompts, with the columns that the code rewards require."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"add {i} plus two"}],
            "source": f'def add(x):\n    """x plus {i}"""\n',
            "tests": f"def check(add):\n    assert add(1) == {i + 1}\n    assert add(2) == {i + 2}",
            "entry_point": "add",
        }
        for i in range(count)
    ]
    return json_lines(path, rows)


def json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alignment_values(folder: Path, method: str, **training) -> dict:
    """Return a recipe of a TRL method that trains a tiny model for three steps on a CPU."""
    values = recipe_values(folder, max_steps=3, gradient_checkpointing=False, bf16=False)
    values["method"] = method
    values["training"] |= training
    if method in ("grpo", "rloo"):
        values["data"] = {"path": str(problems_file(folder / "problems.jsonl"))}
        values["reward"] = {"functions": ["parses", "passes_tests"]}
        generated = {"num_generations": 2, "max_completion_length": 8}
        values["training"] = {**generated, "per_device_eval_batch_size": 2, **values["training"]}
    elif method == "distillation":
        values["data"] = {"path": str(problems_file(folder / "problems.jsonl"))}
        values["teacher"] = {"name_or_path": str(saved_model(folder / "teacher"))}
        values["training"] = {"max_completion_length": 8, **values["training"]}
    else:
        values["data"] = {"path": str(pairs_file(folder / "pairs.jsonl")), "max_length": 64}
    values["data"] |= {"eval_fraction": 0.25, "samples": 0}
    return values


def recipe_values(folder: Path, **training) -> dict:
    """Return the sections of a recipe that trains a tiny model for six steps on a CPU."""
    return {
        "model": {"name_or_path": str(saved_model(folder / "model"))},
        "data": {
            "path": str(chat_file(folder / "chat.jsonl")),
            "eval_fraction": 0.25,
            "max_length": 64,
            "samples": 0,
        },
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **training,
        },
    }


def write_recipe(folder: Path, values: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
