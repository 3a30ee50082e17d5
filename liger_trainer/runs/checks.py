"""What would make a run fail, found before anything is loaded or written."""

from __future__ import annotations

import os

from liger_trainer.runs.adapters import located
from liger_trainer.runs.build import generations_conflict, load_rewards, processor_of
from liger_trainer.runs.data.forms import form_of
from liger_trainer.runs.data.prepare import fit, processor_for
from liger_trainer.runs.data.rows import Sieve
from liger_trainer.runs.data.sources import first_rows, is_file_name
from liger_trainer.runs.data.splits import part_of
from liger_trainer.runs.load import load_tokenizer, meta_model
from liger_trainer.runs.packages import missing
from liger_trainer.runs.recipe import Recipe
from liger_trainer.runs.rewards import columns_of, row_check

_ROWS = 100  # that a dry run looks at
_AT_LEAST = {
    "dataloader_num_workers": 0,
    "eval_accumulation_steps": 1,
    "generation_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "max_completion_length": 1,
    "max_grad_norm": 0,
    "num_generations": 2,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "save_total_limit": 1,
    "seed": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}
_ABOVE_ZERO = ("eval_steps", "logging_steps", "num_train_epochs", "save_steps")


def require(recipe: Recipe) -> None:
    """Raise ValueError with all `problems`."""
    found = problems(recipe)
    if found:
        raise ValueError("; ".join(found))


def problems(recipe: Recipe) -> list[str]:
    """Sentences about what the recipe alone shows: packages that are missing, numbers that cannot
    be meant."""
    fields, found = recipe.values["training"], missing(recipe.values)
    for key, least in _AT_LEAST.items():
        if fields.get(key) is not None and fields[key] < least:
            found.append(f"training.{key} is {fields[key]}; it must be at least {least}")
    for key in _ABOVE_ZERO:
        if fields.get(key) is not None and fields[key] <= 0:
            found.append(f"training.{key} is {fields[key]}; it must be above 0")
    if fields.get("max_steps", -1) != -1 and fields["max_steps"] < 1:
        found.append(
            f"training.max_steps is {fields['max_steps']}; it must be at least 1, or -1 for what "
            "training.num_train_epochs comes to"
        )
    if recipe.data.streaming and fields.get("max_steps", -1) < 1:
        found.append(
            "data.streaming: a stream has no known length, so set training.max_steps to the number "
            "of steps"
        )
    try:
        _, adapter = located(recipe.model)
    except ValueError as error:
        return [*found, str(error)]
    if adapter is not None and recipe.values.get("peft") is not None:
        found.append(
            f"peft: the model in {adapter} is an adapter already; remove the section to train it "
            "further, or make one model of it first: `liger-trainer merge`"
        )
    return found


def model_problems(recipe: Recipe) -> list[str]:
    """Return what the model's configuration shows of the section `peft`, without weights."""
    config = recipe.peft_config()
    if config is None:
        return []
    import peft

    try:
        peft.get_peft_model(meta_model(recipe.model, scores=recipe.kind.scores), config)
    except ValueError as error:
        return [f"peft: {' '.join(str(error).split())}"]
    return []


def training_problems(recipe: Recipe) -> list[str]:
    """Return what the installed release says of the section `training`, as ValueError, and of
    batches."""
    args, data = recipe.training_arguments(), recipe.data
    held_out = data.eval_path or data.eval_split or data.eval_fraction
    return generations_conflict(args) if held_out else []


def data_problems(recipe: Recipe) -> list[str]:
    """Return what the first rows of local data show. A hub's data would have to be fetched."""
    data = recipe.data
    sources = [(source, "training") for source in data.sources]
    sources += [(source, "held-out") for source in data.eval_sources]
    if not all(_is_local(path) for source, _ in sources for path in source.paths):
        return []
    rewards = load_rewards(recipe)
    tokenizer = load_tokenizer(recipe.model)
    loaded = [
        (part_of(source, first_rows(source, _ROWS, streaming=data.streaming)), what)
        for source, what in sources
    ]
    processor = processor_for([part for part, _ in loaded], data, processor_of(recipe))
    for part, what in loaded:
        fit(
            part,
            data,
            tokenizer,
            form_of(part.columns, recipe.kind.examples, part.source.form),
            Sieve(f"of the first {len(part.rows)} {what}", invalid=data.invalid),
            seed=0,
            needed=columns_of(rewards),
            check=row_check(rewards),
            processor=processor,
            tools=recipe.kind.tools,
        )
    return []


def _is_local(path: str) -> bool:
    """Whether a path is one of this machine, also where nothing is there."""
    return os.path.exists(path) or path.startswith(("/", ".")) or is_file_name(path)
