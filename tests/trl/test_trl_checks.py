"""Input that TRL's trainers would pass over in silence is refused, before training."""

from types import SimpleNamespace

import pytest
import trl_parity
from accelerate import ParallelismConfig
from datasets import Dataset
from peft import get_peft_model

from liger_trainer.trl import ORPOConfig, ORPOTrainer
from liger_trainer.trl.checks import check_examples, check_options, check_ranks

PAIR = {"prompt": "what is two plus two ?", "chosen": " four .", "rejected": " the mat ."}


def build(rows, **more):
    return lambda: {
        "model": trl_parity.policy(),
        "train_dataset": Dataset.from_list(rows),
        **more,
    }


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("DPO", {"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect on loss_type sigmoid"),
        ("DPO", {"loss_type": ["hinge"], "discopop_tau": 0.1}, "discopop_tau"),
        ("DPO", {"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing"),
        ("CPO", {"loss_type": "hinge", "simpo_gamma": 1.0}, "simpo_gamma"),
        ("GRPO", {"loss_type": "cispo", "delta": 2.0}, "delta"),
        ("GRPO", {"loss_type": "grpo", "vespo_k_pos": 1.0}, "vespo_k_pos"),
        ("KTO", {"beta": 0.0}, "beta"),
    ],
)
def test_option_that_the_loss_does_not_use(method, options, message, tmp_path):
    trainer, config = trl_parity.classes(method, flag=True)
    with pytest.raises(ValueError, match=message):
        check_options(trainer, config(output_dir=str(tmp_path), use_cpu=True, **options))


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "ORPO", "CPO", "GMPO"])
def test_defaults_are_accepted(method, tmp_path):
    trainer, config = trl_parity.classes(method, flag=True)
    check_options(trainer, config(output_dir=str(tmp_path), use_cpu=True))


def test_unused_option_at_construction(tmp_path):
    options = {"label_smoothing": 0.1}
    with pytest.raises(ValueError, match="DPOConfig: label_smoothing"):
        trl_parity.trainer("DPO", tmp_path, build([PAIR], ref_model=trl_parity.policy(1)), options)


@pytest.mark.parametrize("side", ["chosen_ids", "rejected_ids"])
@pytest.mark.parametrize("dataset", ["training", "evaluation"])
def test_empty_completion(side, dataset, tmp_path):
    whole = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}
    sets = {"training": [whole, whole], "evaluation": [whole, whole]}
    sets[dataset] = [whole, {**whole, side: []}]
    trainer = SimpleNamespace(
        train_dataset=Dataset.from_list(sets["training"]),
        eval_dataset=Dataset.from_list(sets["evaluation"]),
    )
    with pytest.raises(ValueError, match=rf"1 of 2 {dataset} examples .*row 1\)"):
        check_examples(trainer)


def test_completion_cut_off(tmp_path):
    long = {**PAIR, "prompt": "what is two plus two ? " * 10}
    with pytest.raises(ValueError, match="1 of 2 training examples have a completion without"):
        ORPOTrainer(
            args=ORPOConfig(
                output_dir=str(tmp_path),
                max_length=24,
                max_completion_length=8,
                remove_unused_columns=False,
                use_liger_kernel=True,
                **trl_parity.COMMON,
            ),
            processing_class=trl_parity.tiny.tokenizer(),
            **build([PAIR, long])(),
        )


def test_reference_of_another_vocabulary(tmp_path):
    reference = trl_parity.tiny.model(1, vocab_size=400)
    with pytest.raises(ValueError, match="scores 320 tokens, the reference 400"):
        trl_parity.trainer("DPO", tmp_path, build([PAIR], ref_model=reference))


TOKENS = trl_parity.lora(trainable_token_indices=[3, 40, 50])
LORA = trl_parity.lora(target_modules=["q_proj", "lm_head"])


def tied():
    return trl_parity.policy(tie_word_embeddings=True)


def distillation(folder, student, teacher, adapter=None, **config):
    models = {"model": student, "teacher_model": teacher, "peft_config": adapter}
    prompts = Dataset.from_list([{"prompt": PAIR["prompt"]}] * 2)
    options = {"max_completion_length": 4, "max_steps": 1, **config}
    return trl_parity.trainer(
        "Distillation", folder, lambda: models | {"train_dataset": prompts}, options
    )


def test_distillation_of_trained_tokens_of_a_tied_head(tmp_path):
    message = "plain weight of the student's output head.*trainable_token_indices.*GKDTrainer"
    with pytest.raises(ValueError, match=message):
        distillation(tmp_path, tied(), trl_parity.policy(1), TOKENS)
    distillation(tmp_path, trl_parity.policy(), trl_parity.policy(1), TOKENS).train()  # not tied


OFF = {"liger_kernel_config": {"fused_linear_cross_entropy": False}}


@pytest.mark.parametrize(
    ("make", "adapter", "config"),
    [(tied, TOKENS, {}), (trl_parity.policy, LORA, OFF)],
    ids=["tokens", "lora"],
)
def test_distillation_from_an_adapter_on_the_head(make, adapter, config, tmp_path):
    """TRL's own trainer fails at the first and ignores the second."""
    teacher = get_peft_model(make(), adapter)
    with pytest.raises(ValueError, match=r"the teacher's output head.*merge_and_unload\(\)"):
        distillation(tmp_path, trl_parity.policy(), teacher, **config)
    distillation(tmp_path, trl_parity.policy(), teacher.merge_and_unload(), **config).train()


def test_distillation_from_lora_on_a_deferred_head(tmp_path):
    teacher = get_peft_model(trl_parity.policy(), LORA)
    distillation(tmp_path, trl_parity.policy(), teacher).train()


def test_adapter_on_a_head_that_is_not_fused(tmp_path):
    with pytest.raises(ValueError, match="An adapter on the head needs fused_linear_cross_entropy"):
        trl_parity.trainer("DPO", tmp_path, build([PAIR], peft_config=LORA), OFF)


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "Distillation"])
def test_processes_that_share_a_model_do_not_sample_from_it(method):
    """That the completions differ is seen in two processes: tests/helpers/engine_trainers.py."""
    trainer = without_construction(method)
    trainer.model._tp_size = 2
    with pytest.raises(ValueError, match=f"{method}Trainer samples different completions"):
        check_ranks(trainer)
    trainer.model._tp_size = None
    check_ranks(trainer)


ALL = ["SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward", "Distillation", *trl_parity.EXPERIMENTAL]


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}])
@pytest.mark.parametrize("method", ALL)
def test_of_a_part_of_each_row_sft_alone_makes_its_loss(method, sizes):
    """TRL's own fail in other places: tests/helpers/engine_trainers.py."""
    trainer = without_construction(method)
    check_ranks(trainer)
    trainer.accelerator.parallelism_config = ParallelismConfig(**sizes)
    if method == "SFT":
        check_ranks(trainer)
        return
    with pytest.raises(ValueError, match=f"{method}Trainer needs whole rows.*use FSDP2 or ZeRO-3"):
        check_ranks(trainer)


def without_construction(method: str):
    """A trainer with what `check_ranks` looks at."""
    cls, _ = trl_parity.classes(method, flag=True)
    trainer = cls.__new__(cls)
    trainer.model = SimpleNamespace()
    trainer.accelerator = SimpleNamespace(parallelism_config=None)
    return trainer
