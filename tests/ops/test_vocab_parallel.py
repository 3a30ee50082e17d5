"""Heads whose vocabulary is split over ranks, played by threads, against the whole head."""

import contextvars
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from heads import TOKENS, VOCAB, Products, leaves_of, problem

from liger_trainer.kernels.linear.cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear.log_probs import linear_log_probs
from liger_trainer.kernels.linear.vocab_parallel import VocabShard
from liger_trainer.kernels.logits.loss import LossOptions
from liger_trainer.kernels.logits.scores import EXTRA, ScoreOptions

EVERY_LOSS = LossOptions(label_smoothing=0.1, z_loss=1e-2, scale=0.5, softcap=4.0)
EVERY_SCORE = ScoreOptions(scale=0.5, softcap=4.0, temperature=1.3)


class Ranks:
    """Threads that exchange tensors; counts what travels."""

    def __init__(self, number: int):
        self.number, self.numbers_sent = number, 0
        self.barrier, self.sent = threading.Barrier(number, timeout=300), [None] * number

    def all_reduce(self, rank: int, values, op):
        self.sent[rank] = values.clone()
        self.barrier.wait()
        everything = torch.stack(self.sent)
        self.barrier.wait()
        self.numbers_sent = max(self.numbers_sent, values.numel())
        kinds = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.MAX: "amax", dist.ReduceOp.MIN: "amin"}
        return values.copy_(getattr(everything, kinds[op])(0))

    def run(self, fn):
        """Results of `fn(shard, rows)` on every rank."""
        largest = math.ceil(VOCAB / self.number)

        def on(rank: int):
            shard = Threaded(self, VOCAB, rank * largest, largest)
            return fn(shard, slice(shard.start, shard.start + shard.rows))

        with ThreadPoolExecutor(self.number) as pool:
            contexts = [contextvars.copy_context() for _ in range(self.number)]
            waiting = [pool.submit(c.run, on, rank) for rank, c in enumerate(contexts)]
            return [found.result() for found in waiting]


class Threaded(VocabShard):
    def all_reduce(self, values, op):
        return self.group.all_reduce(self.start // self.largest, values, op)


def both(tensors, loss_of, ranks):
    """(results, gradients) of the whole head, and of the ranks' parts put together."""
    leaves = leaves_of(tensors)
    whole = loss_of(**leaves)
    expected = whole, dict(zip(leaves, torch.autograd.grad(whole[0], leaves.values()), strict=True))

    def on_rank(shard, rows):
        own = leaves_of(tensors | {name: tensors[name][rows] for name in ("weight", "bias")})
        results = loss_of(**own, shard=shard)
        return results, torch.autograd.grad(results[0], own.values())

    results, grads = zip(*ranks.run(on_rank), strict=True)
    dhidden, dweight, dbias = zip(*grads, strict=True)
    found = {"hidden": sum(dhidden), "weight": torch.cat(dweight), "bias": torch.cat(dbias)}
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)
    return expected, (results[0], found)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("rows", [16, 5], ids=["one workspace", "several workspaces"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [LossOptions(), EVERY_LOSS], ids=["plain", "everything"])
def test_cross_entropy_is_that_of_the_whole_head(number, rows, reduction, weighted, options):
    tensors, labels = problem("cpu", torch.float64)
    class_weight = torch.rand(VOCAB) if weighted else None
    seeds = torch.rand(TOKENS, dtype=torch.float64)

    def loss_of(hidden, weight, bias, shard=None):
        loss = linear_cross_entropy(
            hidden, weight, labels, bias, class_weight=class_weight, reduction=reduction,
            options=options, max_rows=rows, shard=shard,
        )  # fmt: skip
        return (loss.double() @ seeds if loss.dim() else loss, loss.detach())

    expected, found = both(tensors, loss_of, Ranks(number))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("weighting", [None, "uniform"])
@pytest.mark.parametrize("options", [ScoreOptions(), EVERY_SCORE], ids=["plain", "everything"])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_scores_are_those_of_the_whole_head(number, weighting, options, ignore_index):
    tensors, labels = problem("cpu", torch.float64)
    labels = labels.where(labels != -100, ignore_index)
    options = ScoreOptions(ignore_index, options.scale, options.softcap, options.temperature)

    def loss_of(hidden, weight, bias, shard=None):
        scores = linear_log_probs(
            hidden, weight, labels, bias, outputs=EXTRA, options=options, weighting=weighting,
            max_rows=5, shard=shard,
        )  # fmt: skip
        total = scores.log_probs.sum()
        if weighting is None:
            total = scores.log_probs.sin().sum() + 2 * scores.entropy.sin().sum()
            total = total + 3 * scores.log_sum_exp.sin().sum()
        return (total, *(score.detach() for score in scores))

    expected, found = both(tensors, loss_of, Ranks(number))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top", [1.0, -8192.0])
def test_a_tie_goes_to_the_smallest_index_and_one_rank_may_be_at_minus_infinity(top):
    labels = torch.tensor([0, VOCAB - 1])
    tensors = {"hidden": torch.ones(2, 1), "weight": torch.zeros(VOCAB, 1)}
    tensors["bias"] = torch.full((VOCAB,), -math.inf)
    tensors["bias"][[0, 3, VOCAB - 1]] = top

    def scores_of(hidden, weight, bias, shard=None):
        scores = linear_log_probs(
            hidden, weight, labels, bias, outputs=("argmax", "entropy"), shard=shard
        )
        loss = linear_cross_entropy(hidden, weight, labels, bias, shard=shard)
        return (loss, scores.argmax, scores.log_probs, scores.entropy.detach())

    def on_rank(shard, rows):
        return scores_of(
            tensors["hidden"], tensors["weight"][rows], tensors["bias"][rows], shard=shard
        )

    for loss, argmax, log_probs, entropy in Ranks(3).run(on_rank):
        assert argmax.tolist() == [0, 0]
        torch.testing.assert_close(log_probs, torch.full((2,), -math.log(3)))
        torch.testing.assert_close(loss, torch.tensor(math.log(3)))
        torch.testing.assert_close(entropy, torch.full((2,), math.log(3)))


@pytest.mark.parametrize("masked", [0, 1, 2, None])
@pytest.mark.parametrize("top", [1.0, -8192.0])
def test_all_logits_of_a_rank_may_be_minus_infinity(masked, top):
    """So that labels of that rank have the probability 0; None stands for all ranks."""
    tensors, _ = problem("cpu", torch.float64, tokens=4)
    labels = torch.tensor([0, 11, 22, VOCAB - 1])
    tensors["bias"] += top
    tensors["bias"].view(3, 11)[slice(None) if masked is None else masked] = -math.inf

    def loss_of(hidden, weight, bias, shard=None):
        scores = linear_log_probs(hidden, weight, labels, bias, outputs=EXTRA, shard=shard)
        losses = linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias,
            reduction="none",
            shard=shard,
            options=LossOptions(z_loss=1),
        )
        total = scores.log_probs.sum() + scores.entropy.sin().sum() + losses.sum()
        return (total, losses.detach(), *(score.detach() for score in scores))

    expected, found = both(tensors, loss_of, Ranks(3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(("broken", "at"), [("hidden", 1), ("bias", 15)])
def test_the_argmax_of_a_row_with_nan_lies_in_the_vocabulary(broken, at):
    """As in torch NaN is the largest, although it equals the largest logit of no rank."""
    tensors, labels = problem("cpu", torch.float64)
    tensors[broken][at] = math.nan

    def argmax_of(hidden, weight, bias, shard=None):
        scores = linear_log_probs(hidden, weight, labels, bias, outputs=("argmax",), shard=shard)
        return scores.argmax.tolist()

    def on_rank(shard, rows):
        own = tensors | {name: tensors[name][rows] for name in ("weight", "bias")}
        return argmax_of(**own, shard=shard)

    assert Ranks(3).run(on_rank) == [argmax_of(**tensors)] * 3


@pytest.mark.parametrize("call", [linear_cross_entropy, linear_log_probs])
def test_a_label_outside_of_the_whole_vocabulary_is_refused_on_every_rank(call):
    tensors, labels = problem("cpu")
    labels[1] = VOCAB

    def on_rank(shard, rows):
        with pytest.raises(ValueError, match=rf"outside \[0, {VOCAB}\)"):
            call(tensors["hidden"], tensors["weight"][rows], labels, shard=shard)
        return True

    assert Ranks(2).run(on_rank) == [True, True]


def test_three_products_of_the_own_columns_and_a_few_numbers_per_token():
    tensors, labels = problem("cpu", ignored=0)
    ranks = Ranks(3)

    def on_rank(shard, rows):
        own = leaves_of(tensors | {name: tensors[name][rows] for name in ("weight", "bias")})
        with Products(VOCAB // 3) as products:
            linear_cross_entropy(labels=labels, **own, shard=shard).backward()
        return products.of(TOKENS, tensors["hidden"].shape[1])

    assert ranks.run(on_rank) == [3.0] * 3
    assert ranks.numbers_sent == 3 * TOKENS


def test_the_wrong_rows_are_refused():
    tensors, labels = problem("cpu")
    shard = VocabShard(None, VOCAB, 0, 20)
    with pytest.raises(ValueError, match="is not the shard of 20 rows"):
        linear_cross_entropy(tensors["hidden"], tensors["weight"], labels, shard=shard)
