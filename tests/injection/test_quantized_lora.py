"""LoRA on real quantized base layers (QLoRA): the base's own product, this package's adapters."""

import copy

import peft
import pytest
import torch
from families import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from liger_trainer import inject, restore

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("every_size")

KINDS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits, twice": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}


def rounding(model, step):
    """Return a step of the plain model whose embeddings are off by a rounding of fp32. On a GPU,
    8-bit layers round their inputs to 8 bits, too: a change of the last digit can be a whole step
    of those."""
    embeddings = model.get_input_embeddings().weight.data
    before = embeddings.clone()
    embeddings.mul_(1 + 1e-6)
    try:
        return step()
    finally:
        embeddings.copy_(before)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_as_on_pefts_layers(kind, checkpointed, device, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(**KINDS[kind])  # computes in fp32 by default
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map=device
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointed)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        return {"loss": loss.detach(), **{n: copy.copy(p.grad) for n, p in trained}}

    plain = step()
    nearly = rounding(model, step)
    report = inject(model)
    swapped, eligible = report.coverage["lora"]
    assert swapped == eligible == 14, report
    for name, found in step().items():
        own_error = (nearly[name] - plain[name]).abs().max().item()
        torch.testing.assert_close(found, plain[name], rtol=1e-4, atol=1e-5 + 4 * own_error)
    restore(model)
    torch.testing.assert_close(step(), plain, rtol=0, atol=0)
