"""What people do to a whole model: each loss, each gradient and each value is the plain model's."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from families import tiny_model
from lives import adapted
from logits_uses import V, assert_same, inputs
from torch import nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from liger_trainer import inject, loss_scope, restore

pytestmark = [pytest.mark.usefixtures("every_size"), pytest.mark.filterwarnings("ignore")]
IDS, LABELS = inputs()


def step(model, **more):
    out = model(**({"input_ids": IDS, "labels": LABELS} | more))
    out.loss.backward()
    return [out.loss.detach(), *(p.grad for p in model.parameters())]


def of_family(family="llama", **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48} if family == "llama" else {}
    model = tiny_model(family, num_hidden_layers=2, **sizes, **changes)
    model.set_attn_implementation("eager")
    return model


def of_config(kind, config):
    torch.manual_seed(0)
    return kind(config).train()


_TOKENS = {"vocab_size": V, "pad_token_id": 0, "decoder_start_token_id": 2}
OTHERS = {
    "T5": lambda: of_config(
        T5ForConditionalGeneration,
        T5Config(
            **_TOKENS, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0.0
        ),
    ),
    "BART": lambda: of_config(
        BartForConditionalGeneration,
        BartConfig(
            **_TOKENS, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
        ),
    ),
    "BERT": lambda: of_config(
        BertForMaskedLM,
        BertConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
    ),
}  # fmt: skip
USES = {}


def use(function):
    USES[function.__name__] = function
    return function


def compare(function, build=of_family):
    results = []
    for injected in (False, True):
        model = build()
        if injected:
            inject(model)
        torch.manual_seed(0)
        results.append(function(model))
    expected, got = results
    assert_same(got, expected)


# --- modules that are changed -----------------------------------------------------------------


@use
def weights_that_are_normed(model):
    parametrizations.weight_norm(model.model.layers[0].mlp.gate_proj)
    parametrizations.spectral_norm(model.model.layers[1].mlp.up_proj)
    return step(model)


@use
def parametrization_of_the_head_that_goes_again(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    with parametrize.cached():
        seen = step(model)[:1]
    parametrize.remove_parametrizations(model.lm_head, "weight")
    model.zero_grad()
    return seen + step(model)


@use
def pruned_head(model):
    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    seen = step(model)
    prune.remove(model.lm_head, "weight")
    return seen + step(model)


@use
def tied_in_the_middle_of_a_run(model):
    seen = step(model)[:1]
    model.lm_head.weight = model.model.embed_tokens.weight
    return seen + step(model)


@use
def head_of_odd_strides(model):
    model.lm_head.weight = nn.Parameter(torch.randn(2 * V, 64)[::2, ::2])
    return step(model)


@use
def bias_of_minus_infinity(model):
    model.lm_head.bias = nn.Parameter(torch.where(torch.arange(V) % 2 == 0, -torch.inf, 0.0))
    return step(model, labels=LABELS.where(LABELS < 0, LABELS | 1))


@use
def frozen_and_unfrozen(model):
    seen = step(model)
    model.lm_head.requires_grad_(False)
    seen += step(model)
    model.lm_head.requires_grad_(True)
    model.model.requires_grad_(False)
    return seen + step(model)


@use
def frozen_before_backward(model):
    loss = model(input_ids=IDS, labels=LABELS).loss
    model.lm_head.requires_grad_(False)
    loss.backward()
    return [p.grad for p in model.parameters()]


# --- functions and hooks of the whole process -------------------------------------------------


@use
def patched_linear_layers(model):
    original = nn.Linear.forward
    nn.Linear.forward = lambda self, x: 1.5 * original(self, x)
    try:
        return step(model)
    finally:
        nn.Linear.forward = original


def _under(register, hook):
    def function(model):
        handle = getattr(every_module, f"register_module_{register}_hook")(
            lambda module, *args: hook(*args) if isinstance(module, nn.Linear) else None
        )
        try:
            return step(model)
        finally:
            handle.remove()

    return function


def doubled(grads):
    return tuple(None if g is None else 2 * g for g in grads)


HOOKS = {
    "forward": lambda args, output: 1.1 * output,
    "forward_pre": lambda args: (1.1 * args[0],),
    "full_backward": lambda grad_input, grad_output: doubled(grad_input),
    "full_backward_pre": lambda grad_output: doubled(grad_output),
}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_on_every_module(register, adapter):
    def with_adapter():
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        settings = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 4}
        return peft.get_peft_model(
            of_family(), peft.LoraConfig(target_modules="all-linear", **settings)
        )

    compare(_under(register, HOOKS[register]), with_adapter if adapter else of_family)


# --- lives of a model -------------------------------------------------------------------------


@use
def averaged_model(model):
    averaged = AveragedModel(model)
    seen = step(model)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    averaged.update_parameters(model)
    model.zero_grad()
    return seen + step(averaged) + step(model)


@use
def saved_whole_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return step(torch.load(file, weights_only=False)) + step(copy.deepcopy(model))


@use
def step_inside_backward(model):
    def update(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    losses = [step(model)[0] for _ in range(3)]
    return [*losses, *(p.detach() for p in model.parameters())]


@use
def half_precision_there_and_back(model):
    return step(model.bfloat16().float())


@use
def restored_under_torch_compile(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    first = compiled(input_ids=IDS, labels=LABELS).loss.detach()
    restore(model)
    return [first, *step(compiled)]


# --- losses and inputs ------------------------------------------------------------------------


@use
def packed_smoothed_and_accumulated(model):
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    seen = []
    for ids in (IDS.view(1, 12), IDS.flip(1).reshape(1, 12)):
        with loss_scope():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            rows = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(rows, ids[0, 1:], label_smoothing=0.1, reduction="sum") / 22
        loss.backward()
        seen.append(loss.detach())
    return seen + [p.grad for p in model.parameters()]


@use
def teacher_in_the_scope_of_the_student(model):
    teacher = copy.deepcopy(model)
    with loss_scope():
        logits = model(input_ids=IDS).logits
        with torch.no_grad():
            wanted = teacher(input_ids=IDS).logits.mul(1.3).log_softmax(-1)
        loss = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        loss = loss + F.cross_entropy(logits.flatten(0, 1), IDS.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@use
def kept_positions(model):
    out = model(input_ids=IDS, labels=IDS[:, [1, 3]], logits_to_keep=torch.tensor([1, 3]))
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach() + 0, *(p.grad for p in model.parameters())]


@use
def part_of_the_gradients(model):
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward(inputs=[model.lm_head.weight, model.model.norm.weight], retain_graph=True)
    seen = [model.lm_head.weight.grad, model.model.norm.weight.grad]
    return [*seen, *torch.autograd.grad(loss, list(model.parameters()), torch.tensor(3.0))]


@use
def generated(model):
    model.eval()
    options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    beams = model.generate(IDS, num_beams=3, **options)
    assistant = copy.deepcopy(model)
    return [beams, model.generate(IDS[:1], assistant_model=assistant, **options)]


@use
def double_precision_by_default(model):
    torch.set_default_dtype(torch.float64)
    try:
        return step(model)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", USES)
def test_the_use_is_the_plain_models(name):
    compare(USES[name])


@pytest.mark.parametrize("vocab", [1, 2, 70_001])
def test_vocabularies_of_any_size(vocab):
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    ids, labels = IDS % vocab, LABELS.where(LABELS < 0, LABELS % vocab)
    compare(
        lambda model: step(model, input_ids=ids, labels=labels),
        lambda: of_family(vocab_size=vocab, **tokens),
    )


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS.keys())
def test_models_that_are_no_decoders(build):
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([5]), 0)
    compare(lambda model: step(model, attention_mask=mask), build)


def test_torch_func_and_forward_mode_look_into_every_swapped_module():
    def derivatives(model):
        params = {name: p.detach() for name, p in model.named_parameters()}
        ones = {name: torch.ones_like(p) for name, p in params.items()}

        def loss(params, ids=IDS, labels=LABELS):
            batch = {"input_ids": ids, "labels": labels}
            return torch.func.functional_call(model, params, (), batch).loss

        def of_one(params, ids, labels):
            return loss(params, ids[None], labels[None])

        each = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(params, IDS, LABELS)
        found, tangents = torch.func.jvp(torch.func.grad(loss), (params,), (ones,))
        return [*each.values(), *found.values(), *tangents.values()]

    compare(derivatives, lambda: adapted(of_family(), target_modules=["q_proj", "down_proj"]))


def test_the_loss_under_autocast_is_not_rounded_to_16_bits():
    """T5 does not call `.float()`, and 16-bit losses move in steps of 1/32."""
    losses = {}
    for injected in (False, True):
        model = OTHERS["T5"]()
        if injected:
            inject(model)
        with torch.autocast("cpu", torch.bfloat16):
            losses[injected] = model(input_ids=IDS, labels=LABELS).loss
    assert losses[True].dtype is losses[False].dtype is torch.float32
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=0)
    assert losses[True] != losses[True].bfloat16()
