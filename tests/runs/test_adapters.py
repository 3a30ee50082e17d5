"""Which base a folder with an adapter names."""

import json

import pytest

from liger_trainer.runs.adapters import base_and_adapter
from liger_trainer.runs.load import ModelArguments


def adapter(folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def test_the_base_and_the_adapter_on_it(tmp_path):
    path = adapter(tmp_path / "outer", "org/model")
    base, folder = base_and_adapter(ModelArguments(path))
    assert (base.name_or_path, str(folder)) == ("org/model", path)


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    """PEFT would load it with the inner one, which loading it on the innermost base would drop."""
    inner = adapter(tmp_path / "inner", "org/model")
    outer = adapter(tmp_path / "outer", inner)
    with pytest.raises(ValueError, match=r"is itself an adapter, .*/inner: merge that one first"):
        base_and_adapter(ModelArguments(outer))
