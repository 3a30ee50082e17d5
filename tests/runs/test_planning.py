"""The formulas of `liger-trainer plan`, against measured steps and real tensors."""

import dataclasses

import pytest
import tiny
import torch
from census import kept_bytes_per_token_and_layer
from families import batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from liger_trainer import inject
from liger_trainer.kernels.linear import workspace as kernel_workspace
from liger_trainer.runs.planning.counts import shape_of, weights_of
from liger_trainer.runs.planning.memory import GIB, Run, head_memory, kept_per_token, peak, states
from liger_trainer.runs.planning.shapes import config_of
from liger_trainer.runs.planning.traffic import flops, traffic

bf16, fp32 = torch.bfloat16, torch.float32
KEEP, CHECKPOINTED = {"lean": False}, {"checkpointing": True}


def adapted(model, r=16):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def run_for(model, r=0, **given):
    shape = shape_of(model)
    model = adapted(model, r) if r else model
    return Run(shape, weights_of(model), **{"tokens": 8192, "length": 4096} | given)


def named(name, r=0, dtype=bf16, changes=None, **given):
    settings = config_of(name) | (changes or {})
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return run_for(model, r, **given)


# The formulas, against steps that were measured on H200s (141 GiB), in GiB


@pytest.mark.parametrize(
    ("measured", "name", "tokens", "settings"),
    [
        (35.4, "llama-1b", 8 * 4096, {}),
        (47.4, "llama-1b", 8 * 4096, KEEP),
        (10.8, "llama-1b", 4 * 512, KEEP),
        (12.8, "llama-1b", 32768, CHECKPOINTED),
        (95.0, "llama-8b", 4 * 4096, {}),
        (39.6, "llama-8b", 2 * 4096, {"r": 16}),
        (50.4, "llama-8b", 2 * 4096, {"r": 16, **KEEP}),
        (39.5, "llama-8b", 2 * 4096, {"r": 16, "mixed": True}),
        (63.5, "llama-8b", 4 * 4096, {"r": 16}),
    ],
)
def test_peak_is_within_a_tenth_of_what_was_measured(measured, name, tokens, settings):
    run = named(name, tokens=tokens, memory=141, **settings)
    assert peak(run).total / GIB == pytest.approx(measured, rel=0.1)


def test_peak_under_fsdp2_and_with_a_reference_model():
    untied = {"tie_word_embeddings": False}
    given = {"tokens": 4 * 4096, "memory": 141, "lean": False}
    two = named("llama-1b", changes=untied, mixed=True, engine="fsdp2", gpus=2, **given)
    assert peak(two).total / GIB == pytest.approx(30.6, rel=0.1)
    alone = named("llama-1b", **given)
    dpo = dataclasses.replace(alone, reference_bytes=alone.weights.trained_bytes)
    assert peak(dpo).total / GIB == pytest.approx(30.9, rel=0.1)


@pytest.mark.parametrize(("gpus", "measured"), [(1, 61.4), (2, 32.3), (4, 17.8)])
def test_peak_of_an_8b_model_over_gpus(gpus, measured):
    given = {"engine": "fsdp2", "gpus": gpus, "memory": 141, **CHECKPOINTED}
    run = named("llama-8b", tokens=4096, **given)
    assert peak(run).total / GIB == pytest.approx(measured, rel=0.05)


def test_kib_kept_per_token_and_layer():
    """STEP's census of Llama-8B: 138 measured with everything kept, 92 that kernels need."""
    run = named("llama-8b")
    keep, lean = (sum(kept_per_token(run, lean=lean).values()) / 1024 for lean in (False, True))
    assert keep == pytest.approx(138, rel=0.02)
    assert lean == pytest.approx(92, rel=0.01)
    assert keep - lean == 44
    lora = named("llama-8b", r=16)
    assert kept_per_token(lora, lean=True)["adapters"] / 1024 == pytest.approx(0.4, abs=0.05)


# The formulas, against tensors


@pytest.mark.parametrize(
    ("family", "dtype", "r", "autocast"),
    [
        ("llama", bf16, 0, False),
        ("llama", fp32, 2, False),
        ("llama", fp32, 2, True),
        ("qwen3", bf16, 0, False),
    ],
)
def test_bytes_kept_by_a_real_model(every_size, family, dtype, r, autocast):
    def build(layers):
        model = tiny_model(family, num_hidden_layers=layers).to(dtype)
        model = adapted(model, r) if r else model
        inject(model)
        forward = model.forward
        model.forward = lambda **inputs: cast(forward, inputs)
        return model

    def cast(forward, inputs):
        with torch.autocast("cpu", bf16, enabled=autocast):
            return forward(**inputs)

    inputs = batch(length=33)
    del inputs["attention_mask"]
    run = run_for(
        tiny_model(family).to(dtype),
        r,
        compute=2 if autocast else dtype.itemsize,
        mixed=autocast,
    )
    found = kept_bytes_per_token_and_layer(build, inputs)
    assert found == pytest.approx(sum(kept_per_token(run, lean=True).values()), rel=0.01)


@pytest.mark.parametrize(("dtype", "r"), [(bf16, 0), (fp32, 0), (bf16, 4)])
def test_weights_gradients_and_optimizer_are_counted_exactly(dtype, r):
    model = tiny.model().to(dtype)
    shape = shape_of(model)
    model = adapted(model, r) if r else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(
        input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3).long()
    ).loss.backward()
    optimizer.step()
    found = states(Run(shape, weights_of(model), tokens=3, length=3))
    kept = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert found == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(t.nbytes for t in kept),
    }


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tokens", [100, 2048, 3000, 20000])
def test_the_workspace_is_the_kernels_own(tokens, trained):
    run = named("llama-1b", r=0 if trained else 8, tokens=tokens, memory=16)  # 256 MiB, as on CPUs
    vocab, hidden = run.shape.vocab, run.shape.hidden
    like = torch.empty(0, hidden, dtype=bf16)
    most = kernel_workspace.workspace_rows(tokens, vocab, hidden * trained, like)
    logits, d_weight = head_memory(run)
    assert logits == kernel_workspace.workspace(tokens, most) * vocab * 2
    width = kernel_workspace.sum_dtype(bf16, tokens <= 2 * most).itemsize
    assert d_weight == width * vocab * hidden * trained


def test_a_layer_that_is_no_dense_decoder_is_refused():
    with pytest.raises(ValueError, match="gated MLP"):
        shape_of(tiny_model("mixtral"))
    with pytest.raises(ValueError, match="normalize their input"):
        shape_of(tiny_model("olmo2"))


# Engines


def test_sharding_divides_states_and_ddp_does_not():
    full = named("llama-8b", dtype=fp32, mixed=True, gpus=8)
    whole, ddp = states(dataclasses.replace(full, gpus=1)), states(full)
    assert ddp.pop("gradient buckets") == whole["gradients"]
    assert ddp == whole
    fsdp2 = states(dataclasses.replace(full, engine="fsdp2"))
    assert fsdp2 == {name: size / 8 for name, size in whole.items()}
    # DeepSpeed: bf16 weights and gradients, fp32 master weights and moments: 16 bytes.
    zero3 = states(dataclasses.replace(full, engine="zero3"))
    assert sum(zero3.values()) == 16 * full.weights.trained / 8


def test_fsdp2_keeps_whole_gradients_while_it_accumulates():
    run = named("llama-8b", engine="fsdp2", mixed=True, gpus=64, accumulation=2)
    assert peak(run).parts["gradients"] == 2 * run.weights.trained
    reduced = dataclasses.replace(run, reduce_each=True)
    assert peak(reduced).parts["gradients"] < run.weights.trained


def test_bytes_on_the_wire():
    run = named("llama-8b", engine="ddp", gpus=4)
    parameters = run.weights.trained
    assert sum(traffic(run).values()) == 2 * 2 * parameters * 3 / 4
    fsdp2 = dataclasses.replace(run, engine="fsdp2", accumulation=3)
    found = traffic(fsdp2)
    assert found["all-gather of weights, forward"] == 3 * 2 * parameters * 3 / 4
    reduced = [size for name, size in found.items() if "reduce" in name]
    assert sum(reduced) == 2 * parameters * 3 / 4
    assert sum(traffic(named("llama-8b", r=16, gpus=4)).values()) == 2 * 4 * 41943040 * 3 / 4
    assert not any(traffic(dataclasses.replace(fsdp2, gpus=1)).values())


def test_operations_are_six_per_weight_and_token():
    run = named("llama-8b", length=1)
    matrices = run.weights.trained - run.weights.head  # without the embedding
    assert flops(run) == pytest.approx(6 * matrices * run.tokens, rel=1e-3)
    assert flops(named("llama-8b", r=16, length=1)) == pytest.approx(flops(run) * 2 / 3, rel=0.01)
