"""The trainer of a recipe, with its model, its data and its callbacks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import transformers
from torch.nn import Embedding
from transformers import ProgressCallback

from liger_trainer.runs.adapters import base_and_adapter
from liger_trainer.runs.data.collate import Collator
from liger_trainer.runs.data.prepare import Prepared, prepare
from liger_trainer.runs.data.task import Purpose
from liger_trainer.runs.data.vision import VisionCollator
from liger_trainer.runs.engine import is_same_in_all_processes
from liger_trainer.runs.load import load_model, load_processor, load_tokenizer, one_line
from liger_trainer.runs.recipe.methods import trainer_class
from liger_trainer.runs.recipe.recipe import Recipe
from liger_trainer.runs.rewards.rewards import columns_of, guarded, row_check
from liger_trainer.runs.throughput import Progress, Throughput, count_tokens
from liger_trainer.trl.checks import ranks_of_a_row


def build_trainer(recipe: Recipe, args):
    """Return the trainer of a recipe, ready for `.train()`, and its data.

    Raises ValueError for data and models that the method cannot use.
    """
    check_batches(args)
    tokenizer, rewards = load_tokenizer(recipe.model), load_rewards(recipe)
    with args.main_process_first(desc="data"):
        prepared = load_data(recipe, tokenizer, rewards)
    if not is_same_in_all_processes((prepared.digest, prepared.size), args):
        raise ValueError(  # they would do different numbers of steps, and wait for each other
            "data: the processes read different rows; give every machine the same files"
        )
    for note in prepared.notes if args.process_index == 0 else ():
        print(f"data: {note}", flush=True)
    if recipe.data.streaming:
        # Each process reads the whole stream and takes its share. The alternative, in which the
        # first process sends batches to the others, requires batches of equal length.
        args.accelerator_config.dispatch_batches = False
    transformers.set_seed(args.seed)
    if recipe.kind.trainer is None:
        trainer = _sft_trainer(recipe, args, tokenizer, prepared)
    else:
        trainer = _trl_trainer(recipe, args, tokenizer, prepared, rewards)
    if "max_length" not in recipe.kind.unused_data:
        _require_positions(trainer.model, recipe.data.max_length)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    return trainer, prepared


def load_data(recipe: Recipe, tokenizer, rewards: list) -> Prepared:
    """Return the data of a recipe. Raises ValueError for data that its method cannot use."""
    return prepare(recipe.data, tokenizer, purpose_of(recipe, rewards), seed=recipe.data_seed)


def purpose_of(recipe: Recipe, rewards: list) -> Purpose:
    """Return what the method of a recipe requires of its examples."""
    kind = recipe.kind
    processor = functools.partial(load_processor, recipe.model) if kind.images else None
    return Purpose(kind.examples, columns_of(rewards), row_check(rewards), processor, kind.tools)


def load_trained(recipe: Recipe, trained: Path):
    """Return the trainer of a recipe with the weights or adapter in the folder `trained`, and its
    data."""
    trainer, prepared = build_trainer(recipe, recipe.training_arguments())
    with one_line(str(trained)):
        trainer._load_from_checkpoint(str(trained))
    return trainer, prepared


def load_rewards(recipe: Recipe) -> list:
    """Return the reward functions, importable also from the recipe's folder and the working one."""
    if recipe.reward is None:
        return []
    places = [str(recipe.path.resolve().parent), os.getcwd()]
    sys.path[:0] = places
    try:
        return recipe.reward.load()
    finally:
        for place in places:
            sys.path.remove(place)


def _sft_trainer(recipe: Recipe, args, tokenizer, prepared: Prepared):
    model = load_model(recipe.model)
    if recipe.data.packing:
        found = packing_problems(model, use_cache=args.use_cache)
        if found:
            raise ValueError("; ".join(found))
    model = recipe.adapted(model)
    collator = _collator(model, args, tokenizer, prepared)
    trainer = trainer_class(recipe.method)(
        model=model,
        args=args,
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        data_collator=collator,
        processing_class=prepared.processor or tokenizer,
        callbacks=[Throughput()],
        liger_kernel_config=recipe.kernels,
    )
    ranks = ranks_of_a_row(trainer.accelerator)
    if ranks > 1 and recipe.data.packing:
        raise ValueError(
            "data.packing: processes that share a row (context or sequence parallelism) let packed "
            "examples see each other. Set data.packing to false"
        )
    if isinstance(collator, Collator):
        trainer.data_collator = dataclasses.replace(collator, ranks=ranks)
    return trainer


def _collator(model, args, tokenizer, prepared: Prepared) -> Callable[[list], dict]:
    if prepared.processor is not None:
        args.remove_unused_columns = False  # the collator needs columns that are not model inputs
        return VisionCollator(prepared.processor)
    flash = "flash" in (model.config._attn_implementation or "")
    return Collator(tokenizer.pad_token_id, flatten=flash)


def _trl_trainer(recipe: Recipe, args, tokenizer, prepared: Prepared, rewards: list):
    """Return a TRL trainer, which tokenizes and collates itself.

    TRL would load the reference model by the policy's name alone. That fails for a GGUF file in a
    package, and silently loads another model if the recipe names a revision or changes the
    configuration. So the reference is loaded like the policy, unless none is needed: with a new
    adapter the reference is the model without it, with an adapter that is trained further TRL keeps
    a copy of it, and precomputed log-probabilities come from the policy before its first step.
    """
    if prepared.eval is not None:
        check_generations(args)
    given = {"reward_funcs": [guarded(reward) for reward in rewards]} if rewards else {}
    if recipe.teacher is not None:
        given["teacher_model"] = load_model(recipe.teacher)
    model = load_model(recipe.model, scores=recipe.kind.scores)
    peft_config = recipe.adapter_for(model)
    precomputed = getattr(args, "precompute_ref_log_probs", False)
    # Under FSDP the policy is not sharded yet when the log-probabilities are computed, so TRL then
    # requires a separate model for them.
    adapted = peft_config is not None or base_and_adapter(recipe.model)[1] is not None
    if recipe.kind.reference and not adapted and not (precomputed and not _sharded(args)):
        given["ref_model"] = load_model(recipe.model)
    try:
        trainer = trainer_class(recipe.method)(
            model=model,
            args=args,
            train_dataset=prepared.train,
            eval_dataset=prepared.eval,
            processing_class=prepared.processor or tokenizer,
            peft_config=peft_config,
            callbacks=[Throughput()],
            liger_kernel_config=recipe.kernels,
            **given,
        )
    except NotImplementedError as error:  # raised by TRL for options that exclude each other
        raise ValueError(f"training: {error}") from error
    if precomputed:
        trainer.ref_model = None  # no longer needed
    if not recipe.kind.counts_tokens:
        count_tokens(trainer)
    return trainer


def _sharded(args) -> bool:
    """Return whether FSDP is on, by the recipe or by `accelerate launch`."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def packing_problems(model, *, use_cache: bool) -> list[str]:
    """Return why the model would mix packed examples: position ids keep them apart, no cache."""
    found = []
    if "position_ids" not in inspect.signature(model.forward).parameters:
        found.append(
            f"data.packing: {type(model).__name__} takes no position_ids, so packed examples would "
            "see each other. Set data.packing to false"
        )
    if use_cache:
        found.append(
            "data.packing: with training.use_cache packed examples would see each other. "
            "Set one of the two to false"
        )
    return found


def _require_positions(model, length: int) -> None:
    """Raise ValueError if the model learned an embedding for fewer positions than `length`.

    Rotary positions are computed, so a model that has those goes on past the number in its
    configuration.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    tokens = model.get_input_embeddings()
    others = (m for m in model.modules() if isinstance(m, Embedding) and m is not tokens)
    tables = {m.num_embeddings for m in others}
    if most < length and tables & {most, most + 2}:  # OPT and BART leave two rows unused
        raise ValueError(
            f"data.max_length is {length}, and the model has embeddings of {most} positions only: "
            f"set data.max_length to {most} or less"
        )


def check_batches(args) -> None:
    """Raise ValueError if each process would choose its own batch size."""
    if args.world_size > 1 and args.auto_find_batch_size:
        raise ValueError(
            "training.auto_find_batch_size: a process that runs out of memory would take smaller "
            "batches than the others, and they would wait for each other; set "
            "training.per_device_train_batch_size"
        )


def check_generations(args) -> None:
    """Raise ValueError if completions cannot be evaluated in groups.

    TRL checks this only if a recipe evaluates during training, but every run evaluates before and
    after it.
    """
    count = getattr(args, "num_generations_eval", None) or getattr(args, "num_generations", None)
    batch = args.per_device_eval_batch_size * args.world_size
    if count and batch % count:
        raise ValueError(
            f"training.per_device_eval_batch_size: the {batch} completions of a batch are not a "
            f"multiple of the {count} that each held-out prompt gets; change it, or "
            "training.num_generations_eval"
        )
