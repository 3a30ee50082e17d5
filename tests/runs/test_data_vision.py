"""Examples with images: what the model sees of them, what is refused, and that they train."""

import json

import pytest
import tiny
import tiny_vision
import torch
from datasets import Dataset
from PIL import Image

from liger_trainer import cli
from liger_trainer.runs.build import build_trainer
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.task import Purpose
from liger_trainer.runs.data.tokenize import IGNORE_INDEX
from liger_trainer.runs.data.vision import VisionCollator
from liger_trainer.runs.recipe.recipe import load_recipe
from liger_trainer.runs.report import html

pytest.importorskip("trl")
PROCESSOR = tiny_vision.processor()
COLORS = ["red", "green", "blue", "white"]
IMAGE_TOKENS = "<image>" * tiny_vision.PATCHES


WITH_IMAGES = Purpose(load_processor=lambda: PROCESSOR)


def row_of(image, question="what is two ?", answer="four ."):
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": r, "content": c} for r, c in turns], "images": [image]}


@pytest.fixture
def folder(tmp_path):
    tiny_vision.image_files(tmp_path, COLORS)
    return tmp_path


def prepared(folder, rows, examples="text", processor=PROCESSOR, **fields):
    path = tiny.json_lines(folder / "rows.jsonl", rows)
    data = DataArguments(path=str(path), **{"max_length": 64} | fields)
    load = None if processor is None else lambda: processor
    return prepare(data, PROCESSOR.tokenizer, Purpose(examples, load_processor=load), seed=0)


def seen(found, index=0, **options):
    """The batch of one row, its text and what of it is trained on."""
    batch = VisionCollator(PROCESSOR, **options)([found.train[index]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    decode = PROCESSOR.tokenizer.decode
    return batch, decode(ids), decode(labels[labels != IGNORE_INDEX])


def test_the_model_sees_the_image_and_learns_the_answer(folder):
    found = prepared(folder, [row_of("red.png")])
    batch, text, trained = seen(found)
    assert text == (
        f"<|im_start|>user\n{IMAGE_TOKENS}what is two ?<|im_end|>\n<|im_start|>assistant\n"
        "four .<|im_end|>\n"
    )
    assert trained == "four .<|im_end|>\n"
    expected = PROCESSOR.image_processor(Image.open(folder / "red.png"), return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
    everything = prepared(folder, [row_of("red.png")], assistant_only=False)
    assert seen(everything)[2] == text


def test_images_are_found_in_every_usual_form(folder):
    expected = prepared(folder, [row_of("red.png")]).train[0]
    row = row_of("red.png")
    single = {"messages": row["messages"], "image": "red.png"}
    said = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in row["messages"]]  # fmt: skip # noqa: E501
    split = {"prompt": "what is two ?", "completion": "four .", "images": ["red.png"]}
    for form in (single, {"conversations": said, "images": row["images"]}, split):
        assert prepared(folder, [form]).train[0] == expected
    stored = Dataset.from_list([{**row, "images": [Image.open(folder / "red.png")]}])
    stored.save_to_disk(folder / "saved")
    data = DataArguments(path=str(folder / "saved"), max_length=64)
    found = prepare(data, PROCESSOR.tokenizer, WITH_IMAGES, seed=0)
    assert found.train[0]["images"][0].tobytes() == expected["images"][0].tobytes()
    assert found.train[0]["prompt"] == expected["prompt"]


def test_places_in_the_messages_decide_where_images_stand(folder):
    row = row_of("red.png")
    parts = [{"type": "text", "text": "the cat"}, {"type": "image"}, {"type": "text", "text": "?"}]
    row["messages"][0]["content"] = parts
    assert f"user\nthe cat{IMAGE_TOKENS}?<|im_end|>" in seen(prepared(folder, [row]))[1]


def test_rows_without_images_may_stand_beside_others(folder):
    text = {"prompt": "the cat ?", "completion": " sat"}
    path = str(tiny.json_lines(folder / "text.jsonl", [text]))
    pictured = str(tiny.json_lines(folder / "pictured.jsonl", [row_of("red.png")]))
    data = DataArguments(mix=[{"path": pictured}, {"path": path}], max_length=64)
    found = prepare(data, PROCESSOR.tokenizer, WITH_IMAGES, seed=0)
    assert sorted(len(row["images"]) for row in found.train) == [0, 1]
    batch = VisionCollator(PROCESSOR)([found.train[0], found.train[1]])
    assert batch["pixel_values"].shape[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["missing.png"]}, r"image 1 cannot be read.*missing\.png"),
        ({"images": ["broken.png"]}, "image 1 cannot be read"),
        (
            {"images": ["red.png"] * 20},
            r"it has \d+ tokens with its images.*data\.max_length \(64",
        ),
        ({"tools": [{"name": "f"}]}, "it has tools"),
        ({"messages": row_of("")["messages"] * 2}, "it has 2 turns of the assistant"),
        ({"messages": [{"role": "user", "content": ""}]}, "`messages` is empty"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "the cat"}]},
                ]
            },
            "it has 1 images, but 2 places",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_left_out(folder, change, message):
    (folder / "broken.png").write_bytes(b"no image")
    rows = [row_of("red.png"), row_of("green.png") | change]
    with pytest.raises(
        ValueError, match=rf"1 of 2 training examples, .* row 2 because .*{message}"
    ):
        prepared(folder, rows)
    found = prepared(folder, rows, invalid="drop")
    assert len(found.train) == 1
    assert "left out 1 of 2" in found.notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": True}, r"data\.packing: not for examples with images"),
        ({"streaming": True}, r"data\.streaming: not for examples with images"),
        ({"processor": None}, "has images, which are for sft and dpo"),
    ],
)
def test_what_cannot_have_images_says_so(folder, fields, message):
    with pytest.raises(ValueError, match=message):
        prepared(folder, [row_of("red.png")], **fields)


def test_columns_of_another_kind_are_refused(folder):
    with pytest.raises(ValueError, match=r"column 'images' is .*int64.*; it must hold images"):
        prepared(folder, [{**row_of(""), "images": [1]}])
    with pytest.raises(ValueError, match="text rows cannot have images"):
        prepared(folder, [{"text": "the cat", "images": ["red.png"]}])


@pytest.fixture
def recipe(folder, monkeypatch):
    monkeypatch.setattr(html, "plots", lambda log: [])
    values = tiny.recipe_values(folder, max_steps=8, learning_rate=1e-3, use_liger_kernel=True)
    values["model"] = {"name_or_path": str(tiny_vision.saved_model(folder / "vision"))}
    rows = [row_of(f"{COLORS[i % 4]}.png", answer="the cat") for i in range(8)]
    values["data"]["path"] = str(tiny.json_lines(folder / "rows.jsonl", rows))
    return tiny.write_recipe(folder, values)


def losses(folder, name="out"):
    return json.loads((folder / name / "run.json").read_text())["summary"]


def test_a_recipe_trains_on_images(folder, recipe, capsys):
    assert cli.main(["train", str(recipe), "--dry-run"]) == 0
    assert cli.main(["train", str(recipe), "data.samples=2"]) == 0
    summary = losses(folder)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert (folder / "out" / "processor_config.json").is_file()
    plain = f"training.output_dir={folder / 'plain'}"
    assert cli.main(["train", str(recipe), plain, "training.use_liger_kernel=false"]) == 0
    for split in ("training", "held_out"):
        expected = losses(folder, "plain")[split]["loss"]
        assert summary[split]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_loss_depends_on_the_image(recipe):
    trainer, _ = build_trainer(load_recipe(recipe), load_recipe(recipe).training_arguments())
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    with torch.no_grad():
        one = model(**batch).loss
        other = model(**batch | {"pixel_values": -batch["pixel_values"]}).loss
    assert one != other


def test_the_command_shows_images_as_their_tokens(recipe, capsys):
    assert cli.main(["data", str(recipe), "--rows", "1", "--json"]) == 0
    ((sequence,),) = json.loads(capsys.readouterr().out)["rows"]
    assert sum(t["text"] == "<image>" for t in sequence["tokens"]) == tiny_vision.PATCHES
    trained = "".join(t["text"] for t in sequence["tokens"] if t["trained"])
    assert trained.endswith("cat<|im_end|>\n")


def test_dpo_trains_on_images(folder, monkeypatch, capsys):
    monkeypatch.setattr(html, "plots", lambda log: [])
    values = tiny.alignment_values(folder, "dpo", use_liger_kernel=True)
    values["model"] = {"name_or_path": str(tiny_vision.saved_model(folder / "vision"))}
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what is {i} ?"}],
            "chosen": [{"role": "assistant", "content": "the cat sat"}],
            "rejected": [{"role": "assistant", "content": "the mat"}],
            "images": [f"{COLORS[i % 4]}.png"],
        }
        for i in range(8)
    ]
    values["data"]["path"] = str(tiny.json_lines(folder / "pairs.jsonl", rows))
    recipe = tiny.write_recipe(folder, values)
    assert cli.main(["data", str(recipe), "--rows", "1", "--json"]) == 0
    chosen, rejected = json.loads(capsys.readouterr().out)["rows"][0]
    for sequence, answer in ((chosen, "the cat sat"), (rejected, "the mat")):
        assert sum(t["text"] == "<image>" for t in sequence["tokens"]) == tiny_vision.PATCHES
        trained = "".join(t["text"] for t in sequence["tokens"] if t["trained"])
        assert trained == f"{answer}<|im_end|>\n"
    assert cli.main(["train", str(recipe)]) == 0
    summary = losses(folder)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_a_model_of_text_alone_refuses_images(folder, recipe, capsys):
    text_model = tiny.saved_model(folder / "text")
    assert cli.main(["train", str(recipe), f"model.name_or_path={text_model}"]) == 2
    assert "has no processor of images; use a vision-language model" in capsys.readouterr().err
