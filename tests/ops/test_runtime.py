"""Without Triton everything imports and runs on the torch path, and says so once."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import pytest

from liger_trainer.kernels import runtime

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
from families import batch, tiny_model
from liger_trainer import inject
model = tiny_model("llama")
report = inject(model, strict=True)
loss = model(**batch()).loss
loss.backward()
print(report.coverage["rms_norm"], loss.item() > 0)
"""


def test_everything_runs_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=Path(families.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Coverage(swapped=5, eligible=5) True" in done.stdout, done.stderr[-2000:]


def test_missing_triton_is_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    monkeypatch.setattr(runtime, "_warned_no_triton", False)
    on_gpu = SimpleNamespace(is_cuda=True)
    with caplog.at_level(logging.WARNING):
        assert not runtime.use_triton(on_gpu)
        assert not runtime.use_triton(on_gpu)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "Triton is not installed"
    ]


def test_small_inputs_stay_with_torch_unless_asked():
    class Tensor:
        def numel(self):
            return 10

    assert not runtime.pays(Tensor(), 11)
    assert runtime.pays(Tensor(), 10)
    with runtime.every_size():
        assert runtime.pays(Tensor(), 11)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)])
def test_rows_are_views_where_they_can_be(shape):
    torch = pytest.importorskip("torch")
    x = torch.arange(24.0)[: torch.Size(shape).numel()].reshape(shape)
    rows = runtime.as_rows(x)
    assert rows.shape[-1] == 4
    assert rows.data_ptr() == x.data_ptr()
    packed = torch.arange(48.0).reshape(6, 8)[:, :4]
    assert runtime.as_rows(packed).stride() == (8, 1)
    assert runtime.as_rows(torch.arange(24.0).reshape(4, 6).t()).is_contiguous()
