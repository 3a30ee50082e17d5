"""What TRL sends to vLLM, by its own walk over the model, is what it sends of the plain model."""

import copy
import types

import pytest
import torch
from families import batch, tiny_model

from liger_trainer import inject

accelerate = pytest.importorskip("accelerate")
vllm_generation = pytest.importorskip("trl.generation.vllm_generation")
pytestmark = pytest.mark.usefixtures("every_size")


class Sync(vllm_generation.VLLMGeneration):
    """TRL's, with a list in the place of vLLM's engine."""

    def _init_vllm(self):
        self.received = {}
        model = types.SimpleNamespace(load_weights=self._load)
        runner = types.SimpleNamespace(model=model)
        executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        self.llm = types.SimpleNamespace(
            llm_engine=types.SimpleNamespace(model_executor=executor),
            reset_prefix_cache=lambda: None,
        )

    def _load(self, weights):
        for name, tensor in weights:
            assert name not in self.received
            self.received[name] = tensor.clone()


def received_from(model) -> dict[str, torch.Tensor]:
    sync = Sync(model, accelerate.Accelerator(cpu=True), processing_class=None)
    sync.sync_weights()
    return sync.received


def full(model):
    return model


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=["embed_tokens"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def lora_on_the_head(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("adapted", [full, lora, lora_on_the_head])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_plain_model(adapted, tied):
    if tied and adapted is not full:
        pytest.skip("PEFT warns of adapters on tied weights; merging them is its own matter")
    torch.manual_seed(0)
    base = tiny_model("llama", tie_word_embeddings=tied)
    names = set(dict(base.named_parameters()))
    plain = adapted(base)
    model = copy.deepcopy(plain)
    report = inject(model, strict=True)
    for step in range(2):  # a step between two generations
        got, expected = received_from(model), received_from(plain)
        assert got.keys() == expected.keys() == names
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, msg=f"{name} after step {step}")
        losses = [each(**batch()).loss for each in (model, plain)]
        torch.testing.assert_close(*losses)
        for each, loss in zip((model, plain), losses, strict=True):
            loss.backward()
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()
            each.zero_grad()
    assert not report.refused  # merging and taking it back has left the sites fused
