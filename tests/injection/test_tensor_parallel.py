"""Two ranks that hold half of a head each; tests/helpers/tensor_parallel.py is what they run."""

import json

import processes
import pytest
import tensor_parallel
import torch

pytestmark = pytest.mark.skipif(
    not tensor_parallel.IS_SUPPORTED, reason="transformers splits models in another way"
)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def answers(request, tmp_path_factory):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    out = tmp_path_factory.mktemp("split") / "answers.json"
    processes.start(2, tensor_parallel.worker, str(out), request.param)
    return json.loads(out.read_text())


def test_shards_of_different_size_give_the_gradients_of_the_whole(answers):
    assert answers["uneven"]["error"] < 3e-6
    assert answers["uneven"]["plain calls"] == 0


def test_neither_logits_nor_weight_are_gathered(answers):
    assert answers["traffic"]["plain"] >= 1
    assert answers["traffic"]["injected"] == 0


def test_evaluation_without_gradients(answers):
    found = answers["evaluation"]
    assert found["loss"] < 3e-6
    assert found["plain calls"] == 0
    assert found["argmax"]
    assert found["mean"] < 1e-6
    assert found["plain calls of a mean"] == 0
    assert found["logits"] < 1e-5


def test_norms_of_a_part_of_the_tokens_are_left_alone(answers):
    assert not answers["norms"]["swapped"]
    assert "forward is replaced" in answers["norms"]["reason"]
    assert answers["norms"]["error"] < 3e-6


def test_a_wrapper_that_changes_the_logits_is_refused(answers):
    assert not answers["altered"]["swapped"]
    assert "forward is replaced" in answers["altered"]["reason"]
    assert answers["altered"]["error"] < 3e-6


def test_a_head_with_fewer_rows_than_ranks_is_no_shard(answers):
    assert not answers["rankless"]["shard"]


def test_a_head_that_is_not_gathered_from_data_ranks_raises(answers):
    found = answers["scattered"]
    assert found.pop("error") < 3e-6  # in the forward it is gathered
    assert len(found) == 4
    assert all("lies in shards of several kinds" in message for message in found.values())
