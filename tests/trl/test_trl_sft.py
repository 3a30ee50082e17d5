"""SFT with the drop-in is SFT with TRL's own trainer: losses, metrics, gradients, weights."""

import copy
import functools

import pytest
import tiny
import torch
import torch.nn.functional as F
import trl_parity
from datasets import Dataset
from families import tiny_model
from peft import get_peft_model
from transformers import set_seed

pytestmark = pytest.mark.usefixtures("every_size")

ASSISTANT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
QUESTIONS = ["what is two plus two ?", "cat ?", "what sat on the mat ? tell the user ."]
ANSWERS = ["four .", "the cat sat on the mat .", "the cat .", "two plus two is four , user ."]
PAIRS = [(QUESTIONS[i % 3], ANSWERS[i % 4]) for i in range(12)]


def rows(kind: str) -> list[dict]:
    if kind == "text":
        return [{"text": f"{question} {answer}"} for question, answer in PAIRS]
    if kind == "prompt and completion":
        return [{"prompt": question, "completion": f" {answer}"} for question, answer in PAIRS]
    if kind == "chat":
        return [{"messages": chat(question, answer)} for question, answer in PAIRS]
    assert kind == "tokens"
    ids = [tiny.tokenizer()(" ".join(pair))["input_ids"] for pair in PAIRS]
    return [{"input_ids": x, "labels": [-100] * (i % 3) + x[i % 3 :]} for i, x in enumerate(ids)]


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def arguments(kind="text", model=trl_parity.policy, **more):
    """A function that makes the trainer's arguments afresh."""

    def build():
        data = Dataset.from_list(rows(kind))
        template = ASSISTANT if kind == "chat" else tiny.CHATML
        made = {
            "model": model(),
            "train_dataset": data,
            "eval_dataset": data.select(range(5)),
            "processing_class": tiny.tokenizer(template),
        }
        return made | more

    return build


def moe(family="mixtral"):
    return trl_parity.sharpen(tiny_model(family, vocab_size=320))


def top_token_share(prediction) -> dict[str, float]:
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    right = (logits.argmax(-1) == labels)[labels != -100].mean()
    return {"right": float(right), "mean logit": float(logits[labels != -100].mean())}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """TRL's own trainer without any option, for each kind of data."""
    folder, made = tmp_path_factory.mktemp("plain"), {}

    def get(kind: str) -> trl_parity.Run:
        if kind not in made:
            made[kind] = trl_parity.run("SFT", folder, arguments(kind), flag=False)
        return made[kind]

    return get


OPTIONS = {
    "dft": ("text", {"loss_type": "dft"}),
    "label smoothing": ("text", {"label_smoothing_factor": 0.1}),
    "truncation": ("text", {"max_length": 9}),
    "wrapped packing": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    # sdpa keeps the sequences apart by their positions, so this needs no FlashAttention.
    "bfd packing": ("text", {"packing": True, "packing_strategy": "bfd", "max_length": 48}),
    "full sequence": ("prompt and completion", {"completion_only_loss": False}),
    "assistant only": ("chat", {"assistant_only_loss": True}),
    "accumulation of uneven lengths": (
        "tokens",
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "dft and accumulation": (
        "tokens",
        {"loss_type": "dft", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "neftune": ("text", {"neftune_noise_alpha": 5.0}),
}


@pytest.mark.parametrize("kind", ["text", "prompt and completion", "chat", "tokens"])
def test_data(kind, tmp_path):
    trl_parity.parity("SFT", tmp_path, arguments(kind))


@pytest.mark.parametrize(("kind", "config"), OPTIONS.values(), ids=OPTIONS.keys())
def test_option(kind, config, plain, tmp_path):
    _, expected = trl_parity.parity("SFT", tmp_path, arguments(kind), config)
    trl_parity.assert_far(expected, plain(kind))


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"pad_to_multiple_of": 16},
        {"padding_free": True, "max_length": None},
    ],
    ids=["checkpointing", "reentrant checkpointing", "padding", "no padding"],
)
def test_option_that_changes_no_number(config, plain, tmp_path):
    got, expected = trl_parity.parity("SFT", tmp_path, arguments(), config)
    for run in (got, expected):
        run.log[2]["total_flos"] = plain("text").log[2]["total_flos"]  # counts padding
        trl_parity.assert_same(run, plain("text"))


def test_runs_of_other_options_are_told_apart(plain, tmp_path):
    """The comparison is not satisfied by anything."""
    slightly = trl_parity.run("SFT", tmp_path, arguments(), {"label_smoothing_factor": 0.001})
    with pytest.raises(AssertionError, match="tolerances away"):
        trl_parity.assert_same(slightly, plain("text"))


def test_evaluation_with_compute_metrics(tmp_path):
    build = arguments(compute_metrics=top_token_share)
    _, expected = trl_parity.parity("SFT", tmp_path, build)
    assert {"eval_right", "eval_mean logit", "eval_entropy"} <= expected.log[-1].keys()


def test_loss_function_of_ones_own(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / (1.5 * (num_items_in_batch or 10))  # evaluation gives no number

    trl_parity.parity("SFT", tmp_path, arguments(compute_loss_func=loss))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.5])
def test_mixture_of_experts(family, coefficient, tmp_path):
    """The router's loss, with the model's coefficient, none, and the config's."""
    build = arguments(model=lambda: moe(family))
    config = {"gradient_accumulation_steps": 2, "router_aux_loss_coef": coefficient}
    _, expected = trl_parity.parity("SFT", tmp_path, build, config)
    assert ("aux_loss" in expected.log[0]) == (coefficient != 0.0)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(loss_type, checkpointing, tmp_path):
    config = {"loss_type": loss_type, "gradient_checkpointing": checkpointing}
    got, _ = trl_parity.parity("SFT", tmp_path, arguments(peft_config=trl_parity.lora()), config)
    assert all("lora" in name for name in got.gradients)


def test_lora_with_trained_head(tmp_path):
    build = arguments(peft_config=trl_parity.lora(modules_to_save=["lm_head"]))
    got, _ = trl_parity.parity("SFT", tmp_path, build)
    assert any("lm_head" in name for name in got.gradients)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_lora_on_the_head(settings, tmp_path):
    """TRL's own head ignores an adapter, and TRL refuses it."""
    got = assert_as_by_hand(tmp_path, trl_parity.policy, head_lora(**settings), fused=not settings)
    assert any("lm_head.lora_A" in name for name in got.gradients)


def test_trained_tokens_of_a_tied_head(tmp_path):
    """TRL's own head reads a bias that PEFT's module of the head does not have."""
    tied = functools.partial(trl_parity.policy, tie_word_embeddings=True)
    adapter = trl_parity.lora(trainable_token_indices=[3, 40, 50])
    got = assert_as_by_hand(tmp_path, tied, adapter, fused=False)
    assert any("trainable_tokens" in name for name in got.gradients)


def assert_as_by_hand(tmp_path, make, adapter, fused: bool):
    """Compare one step with PEFT's model and cross entropy, by hand; return the drop-in's run."""
    config = {"max_steps": 1, "per_device_train_batch_size": len(PAIRS)}  # all, in any order
    build = arguments("tokens", model=make, peft_config=copy.deepcopy(adapter))
    got = trl_parity.run("SFT", tmp_path, build, config)
    (row,) = [r for r in got.trainer.injection_report.rows if r.site == "add_fused_lm_head"]
    assert row.swapped == fused, row
    plain = make()
    set_seed(got.trainer.args.seed)  # as TRL does before it makes the adapter
    model = get_peft_model(plain, adapter).train()
    batch = next(iter(got.trainer.get_train_dataloader()))
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    assert got.losses == pytest.approx([loss.item()], rel=1e-5)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.gradients.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert got.log[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, gradient in expected.items():
        clipped = gradient / max(1.0, norm)
        assert (got.gradients[name] - clipped).norm() <= 1e-5 * clipped.norm(), name
    return got


def head_lora(**settings):
    return trl_parity.lora(target_modules=["q_proj", "lm_head"], **settings)


def unsupervised_rows(supervised: list[bool]) -> Dataset:
    kept = [row for row in rows("tokens") if len(row["input_ids"]) > 4][: len(supervised)]
    masked = [[-100] * len(row["labels"]) for row in kept]
    labels = [r["labels"] if s else m for r, s, m in zip(kept, supervised, masked, strict=True)]
    return Dataset.from_list(
        [{"input_ids": r["input_ids"], "labels": x} for r, x in zip(kept, labels, strict=True)]
    )


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("supervised", [[True, False] * 2, [False] * 4], ids=["some", "none"])
def test_batch_without_any_supervised_token(supervised, loss_type, tmp_path):
    data = unsupervised_rows(supervised)
    build = arguments(train_dataset=data, eval_dataset=data)
    config = {
        "loss_type": loss_type,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # else TRL drops such rows
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    got, _ = trl_parity.parity("SFT", tmp_path, build, config)
    assert all(torch.isfinite(gradient).all() for gradient in got.gradients.values())
    assert 0.0 in got.losses


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_bf16_autocast_is_as_near_to_fp32(loss_type, tmp_path):
    config = {"loss_type": loss_type, "max_steps": 1}
    truth = trl_parity.run("SFT", tmp_path, arguments(), config, flag=False)
    config["bf16"] = True
    expected = trl_parity.run("SFT", tmp_path, arguments(), config, flag=False)
    got = trl_parity.run("SFT", tmp_path, arguments(), config)
    trl_parity.assert_same(got, expected, trl_parity.Tolerance(0.05, 0.02, 0.02))

    got, expected = (trl_parity.typical_error(run, truth) for run in (got, expected))
    assert 0 < got <= 1.3 * expected
