"""Models of speech and music, of unusual inputs, heads and parts, train as without kernels."""

import copy

import pytest
import torch
from small_configurations import small_values
from transformers import (
    AutoConfig,
    EncodecConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    WhisperForConditionalGeneration,
)

from liger_trainer import inject

pytestmark = pytest.mark.usefixtures("every_size")


def small(model_type, **changes):
    return AutoConfig.for_model(
        model_type, **small_values(AutoConfig.for_model(model_type)) | changes
    )


def whisper():
    sizes = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    model = WhisperForConditionalGeneration(small("whisper", **sizes, **tokens))
    labels = torch.randint(5, 100, (2, 9))
    labels[1, -3:] = -100
    return model, {"input_features": torch.randn(2, 16, 40), "labels": labels}


def musicgen():
    """Of a text encoder and a decoder, with a head for each of two codebooks."""
    text = small("t5", is_encoder_decoder=False).to_dict()
    codebooks = {"num_codebooks": 2, "pad_token_id": 100, "bos_token_id": 100}
    decoder = small("musicgen_decoder", **codebooks).to_dict()
    audio = EncodecConfig(num_filters=4, upsampling_ratios=[2], num_lstm_layers=1, hidden_size=16)
    config = MusicgenConfig(text_encoder=text, audio_encoder=audio.to_dict(), decoder=decoder)
    model = MusicgenForConditionalGeneration(config)
    model.config.pad_token_id = model.config.decoder.decoder_start_token_id = 100
    labels = torch.randint(0, 100, (2, 9, 2))
    labels[0, :3] = -100
    return model, {"input_ids": torch.randint(5, 100, (2, 7)), "labels": labels}


def step(model, inputs):
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("build", [whisper, musicgen])
def test_trains_as_without_kernels(build):
    torch.manual_seed(0)
    plain, inputs = build()
    plain.train()
    fused = copy.deepcopy(plain)
    coverage = inject(fused).coverage
    assert coverage["layer_norm"].swapped == coverage["layer_norm"].eligible
    torch.testing.assert_close(step(fused, inputs), step(plain, inputs), rtol=1e-4, atol=1e-6)
