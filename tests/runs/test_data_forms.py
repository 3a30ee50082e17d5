"""Forms of rows: ShareGPT, Alpaca, tool calls, reasoning, and data that is tokenized already."""

import json

import pytest
import tiny

from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.forms import form_of
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.task import Purpose
from liger_trainer.runs.data.tokenize import IGNORE_INDEX
from liger_trainer.runs.recipe.methods import METHODS

# As Qwen3 and its like: tools in a system turn, reasoning of the answers to the last user turn.
TOOLS = (
    "{{ opening }}"
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN, TOOL_USER = tiny.tokenizer(), tiny.tokenizer(TOOLS)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "integer"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = [
    {"role": "user", "content": "what is two ?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "the cat"},
    {"role": "tool", "content": "four"},
    {"role": "assistant", "content": "four ."},
]


def prepared(tmp_path, rows, tokenizer=PLAIN, examples="text", **fields):
    path = tiny.json_lines(tmp_path / "rows.jsonl", rows)
    data = DataArguments(path=str(path), **{"max_length": 256} | fields)
    return prepare(data, tokenizer, Purpose(examples), seed=0)


def shown(found, tokenizer=PLAIN):
    """The text of the first row, and the texts of its trained spans."""
    row, spans = found.train[0], [[]]
    for label in row["labels"]:
        if label != IGNORE_INDEX:
            spans[-1].append(label)
        elif spans[-1]:
            spans.append([])
    spans = [tokenizer.decode(span) for span in spans if span]
    return tokenizer.decode(row["input_ids"]), spans


# ShareGPT and Alpaca


def test_sharegpt_is_what_its_messages_are(tmp_path):
    turns = [("system", "think"), ("human", "what is two ?"), ("gpt", "four .")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles.get(who, who), "content": said} for who, said in turns]
    found = prepared(tmp_path, [row])
    assert found.train[0] == prepared(tmp_path, [{"messages": messages}]).train[0]
    assert shown(found)[1] == ["four .<|im_end|>"]
    assert "sharegpt rows, taken as messages" in found.notes[0]
    apart = {"system": "think", "conversations": row["conversations"][1:]}
    assert prepared(tmp_path, [apart]).train[0] == found.train[0]
    assert prepared(tmp_path, [{"conversations": messages}]).train[0] == found.train[0]


def test_sharegpt_may_call_functions(tmp_path):
    call = json.dumps(CALL["function"])
    turns = [("human", "what is two ?"), ("function_call", call), ("observation", "four")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    text, spans = shown(prepared(tmp_path, [row], TOOL_USER), TOOL_USER)
    assert spans == [f"<tool_call>{call}</tool_call><|im_end|>"]
    assert text.endswith("<|im_start|>tool\nfour<|im_end|>\n")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "narrator", "value": "a"}], "turn 2 of `conversations` is from 'narrator'"),
        ([{"from": "gpt", "value": None}], r"turn 2 .* has the value None"),
        ([{"from": "function_call", "value": "{"}], "turn 2 .* is not a call in JSON"),
    ],
)
def test_a_turn_that_cannot_be_used_is_named(tmp_path, turns, message):
    start, end = ({"from": who, "value": "the cat"} for who in ("human", "gpt"))
    rows = [{"conversations": [start, end]}, {"conversations": [start, *turns, end]}]
    with pytest.raises(ValueError, match=rf"1 of 2 training examples, .* row 2 because {message}"):
        prepared(tmp_path, rows)
    assert len(prepared(tmp_path, rows, invalid="drop").train) == 1


def test_alpaca_is_a_question_and_its_answer(tmp_path):
    row = {"instruction": "the cat ?", "input": "the mat", "output": "sat"}
    rows = [row, row | {"input": ""}, row | {"output": ""}]
    with pytest.raises(ValueError, match="row 3 because `output` is empty"):
        prepared(tmp_path, rows)
    with pytest.raises(ValueError, match="row 1 because `output` is 5, no text"):
        prepared(tmp_path, [row | {"output": 5}])
    found = prepared(tmp_path, rows[:1])
    assert shown(found)[0] == (
        "<|im_start|>user\nthe cat ?\n\nthe mat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    )
    assert shown(found)[1] == ["sat<|im_end|>"]
    assert "alpaca rows, taken as prompt_completion" in found.notes[0]
    assert "the cat ?<|im_end|>" in shown(prepared(tmp_path, rows[1:2]))[0]
    before = {"history": [["what ?", "four ."]], "system": "think"}
    text, spans = shown(prepared(tmp_path, [row | before]))
    assert text.startswith(
        "<|im_start|>system\nthink<|im_end|>\n<|im_start|>user\nwhat ?<|im_end|>"
    )
    assert spans == ["sat<|im_end|>"]


def test_columns_of_more_than_one_form_are_refused_until_one_is_chosen(tmp_path):
    row = {"instruction": "the cat ?", "output": "sat", "text": "the mat"}
    with pytest.raises(ValueError, match=r"more than one form: text .*; alpaca .*data\.form"):
        prepared(tmp_path, [row])
    assert shown(prepared(tmp_path, [row], form="alpaca"))[1] == ["sat<|im_end|>"]
    assert shown(prepared(tmp_path, [row], form="text"))[0] == "the mat<|im_end|>"
    with pytest.raises(ValueError, match=r"data\.form: sharegpt needs the columns conversations"):
        prepared(tmp_path, [row], form="sharegpt")
    with pytest.raises(ValueError, match=r"data\.form: 'gpt' is none of messages"):
        DataArguments(path="a", form="gpt")
    with pytest.raises(ValueError, match=r"data\.form: text cannot become pairs"):
        form_of(["text"], "pairs", "text")


def test_other_methods_take_these_forms_too(tmp_path):
    said = {"conversations": [{"from": "human", "value": "the cat ?"}]}
    sides = {"chosen": {"from": "gpt", "value": "sat"}, "rejected": {"from": "gpt", "value": "mat"}}
    expected = {
        "prompt": [{"role": "user", "content": "the cat ?"}],
        "chosen": [{"role": "assistant", "content": "sat"}],
        "rejected": [{"role": "assistant", "content": "mat"}],
    }
    assert prepared(tmp_path, [said | sides], examples="pairs").train[0] == expected
    row = {"instruction": "the cat ?", "chosen": "sat", "rejected": "mat"}
    assert prepared(tmp_path, [row], examples="pairs").train[0] == expected
    asked = prepared(tmp_path, [{"instruction": "the cat ?", "answer": "sat"}], examples="prompts")
    assert asked.train[0] == {"answer": "sat", "prompt": expected["prompt"]}
    rows = [{"instruction": "the ?", "output": "sat", "label": label} for label in (True, False)]
    assert set(prepared(tmp_path, rows, examples="labeled").train["label"]) == {True, False}
    with pytest.raises(ValueError, match="row 1 because `rejected` is empty"):
        prepared(tmp_path, [row | {"rejected": " "}], examples="pairs")


# Tools and reasoning


def test_tools_calls_and_reasoning_reach_the_template(tmp_path):
    row = {"messages": CALLING, "tools": [ADD]}
    text, spans = shown(prepared(tmp_path, [row], TOOL_USER), TOOL_USER)
    call = json.dumps(CALL["function"])
    assert text.startswith(f"<|im_start|>system\n{json.dumps(ADD)}\n<|im_end|>\n<|im_start|>user\n")
    assert spans == [
        f"<think>\nthe cat\n</think>\n<tool_call>{call}</tool_call><|im_end|>",
        "four .<|im_end|>",
    ]
    as_json = prepared(tmp_path, [{"messages": CALLING, "tools": json.dumps([ADD])}], TOOL_USER)
    assert shown(as_json, TOOL_USER) == (text, spans)


def test_calls_are_trained_on_where_the_template_edits_their_turn(tmp_path):
    """Reasoning is shown only after the last question: the first call's turn differs from what it
    was when it was the last."""
    messages = [*CALLING, {"role": "user", "content": "the ?"}, *CALLING[3:]]
    text, spans = shown(prepared(tmp_path, [{"messages": messages}], TOOL_USER), TOOL_USER)
    assert "<think>" not in text
    call = f"<tool_call>{json.dumps(CALL['function'])}</tool_call><|im_end|>"
    assert spans == [call, "four .<|im_end|>", "four .<|im_end|>"]


def test_tools_of_rows_that_differ_keep_to_their_own_keys(tmp_path):
    other = {"type": "function", "function": {"name": "cat", "parameters": {"b": "string"}}}
    rows = [{"messages": CALLING, "tools": [tool]} for tool in (ADD, other)]
    texts = [TOOL_USER.decode(r["input_ids"]) for r in prepared(tmp_path, rows, TOOL_USER).train]
    assert not any("null" in text for text in texts)
    assert sorted('"a": "integer"' in text for text in texts) == [False, True]


def test_arguments_of_the_template_are_passed_on(tmp_path):
    extra = {"chat_template_kwargs": {"opening": "the mat"}}
    other = [{"role": "assistant", "content": "the cat"}]
    pair = {"prompt": CALLING[:1], "chosen": CALLING[3:], "rejected": other}
    found = prepared(tmp_path, [pair | extra], TOOL_USER, examples="pairs")
    assert found.train[0]["chat_template_kwargs"] == {"opening": "the mat"}
    for row in ({"messages": CALLING[:1] + CALLING[3:]}, pair | {"completion": pair["chosen"]}):
        text, spans = shown(prepared(tmp_path, [row | extra], TOOL_USER), TOOL_USER)
        assert text.startswith("the mat<|im_start|>user")
        assert spans == ["four .<|im_end|>"]


def test_trl_gets_a_row_s_own_arguments_of_the_template(tmp_path):
    data_utils = pytest.importorskip("trl.data_utils")
    answers = [[{"role": "assistant", "content": said}] for said in ("sat", "the cat")]
    pair = {"prompt": CALLING[:1], "chosen": answers[0], "rejected": answers[1]}
    other = {"type": "function", "function": {"name": "cat", "parameters": {"b": "string"}}}
    rows = [
        pair | {"chat_template_kwargs": {"opening": "the mat"}, "tools": [ADD]},
        pair | {"chat_template_kwargs": {"enable_thinking": False}, "tools": [other]},
        pair,
    ]
    paths = [str(tiny.json_lines(tmp_path / f"{i}.jsonl", rows[i:])) for i in (0, 2)]
    data = DataArguments(mix=[{"path": path} for path in paths], max_length=256)
    found = prepare(data, TOOL_USER, Purpose("pairs"), seed=0).train
    rendered = [
        data_utils.apply_chat_template(row, TOOL_USER, tools=row["tools"])["prompt"]
        for row in found
    ]
    assert sorted(text.startswith("the mat") for text in rendered) == [False] * 3 + [True]
    assert sorted('"a": "integer"' in text for text in rendered) == [False] * 3 + [True]
    assert not any("null" in text or "None" in text for text in rendered)
    options = [row["chat_template_kwargs"] for row in found]
    assert sorted(map(len, options)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": CALLING[3:], "tools": [ADD]}, "tools"),
        ({"messages": [*CALLING[:1], {**CALLING[1], "content": "the cat"}]}, "tool_calls"),
    ],
)
def test_tools_that_the_template_cannot_show_are_refused(tmp_path, row, field):
    good = {"messages": CALLING[:1] + CALLING[3:]}
    with pytest.raises(
        ValueError, match=rf"row 2 because .* not show its `{field}`.*chat_template"
    ):
        prepared(tmp_path, [good, row])
    assert len(prepared(tmp_path, [good, row], invalid="drop").train) == 1


@pytest.mark.parametrize("examples", ["text", "pairs"])
def test_tools_are_refused_for_every_method(tmp_path, examples):
    other = [{"role": "assistant", "content": "the cat"}]
    pair = {"prompt": CALLING[:1], "chosen": CALLING[3:], "rejected": other, "tools": [ADD]}
    row = {"messages": CALLING[3:], "tools": [ADD]} if examples == "text" else pair
    with pytest.raises(ValueError, match=r"row 1 because .* does not show its `tools`"):
        prepared(tmp_path, [row], examples=examples)


def test_tools_that_a_trainer_does_not_pass_on_are_refused_or_told(tmp_path):
    pair = {"prompt": CALLING[:1], "chosen": CALLING[3:], "tools": [ADD]}
    pair["rejected"] = [{"role": "assistant", "content": "the cat"}]
    path = tiny.json_lines(tmp_path / "rows.jsonl", [pair])
    data = DataArguments(path=str(path), max_length=256)
    assert METHODS["dpo"].tools
    assert not METHODS["orpo"].tools
    with pytest.raises(ValueError, match=r"has a column `tools`.*remove the column, or use dpo"):
        prepare(data, TOOL_USER, Purpose("pairs", tools=False), seed=0)
    found = prepare(data, TOOL_USER, Purpose("prompts", tools=False), seed=0)
    assert "`tools` go to reward functions, not to the chat template" in found.notes[0]
    assert found.train[0]["tools"] == [ADD]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_reasoning_that_the_template_leaves_out_is_told(tmp_path, name):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "the ?"},
                {"role": "assistant", "content": "cat"},
            ]
        }
        for _ in range(3)
    ]
    for row in rows[:2]:
        row["messages"][1][name] = "two"
    found = prepared(tmp_path, rows)
    assert found.notes == (
        f"the chat template does not show the `{name}` of 2 training examples; it is not "
        "trained on",
    )
    if name == "reasoning_content":
        assert prepared(tmp_path, rows, TOOL_USER).notes == ()


# Tokenized data


def test_tokenized_rows_are_taken_as_they_are(tmp_path):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    assert prepared(tmp_path, [row]).train[0] == row
    masked = {name: [0, *values, 0] for name, values in row.items()}
    masked["attention_mask"] = [0, 1, 1, 1, 1, 0]
    assert prepared(tmp_path, [masked]).train[0] == row
    bare = prepared(tmp_path, [{"input_ids": [5, 6, 7]}]).train[0]
    assert bare == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    cut = prepared(tmp_path, [row, {n: v[:3] for n, v in row.items()}], max_length=3)
    assert cut.train["input_ids"][:] == [[5, 6, 7]] * 2
    assert "cut 1 of 2 training examples at data.max_length (3 tokens)" in cut.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [5, 6, 320]}, "`input_ids` holds 320, outside the .* vocabulary of"),
        ({"input_ids": [5, -1, 7]}, "`input_ids` holds -1"),
        ({"labels": [-100, 6, 400]}, "`labels` holds 400"),
        ({"labels": [-100, 6]}, "`labels` has 2 entries, `input_ids` has 3"),
        ({"attention_mask": [1]}, "`attention_mask` has 1 entries"),
        ({"attention_mask": [1, 0, 1]}, "`attention_mask` hides tokens between others"),
        ({"labels": [-100] * 3}, "there is nothing to train on"),
        ({"input_ids": [], "labels": [], "attention_mask": []}, "`input_ids` is empty"),
    ],
)
def test_tokenized_rows_are_checked(tmp_path, change, message):
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}
    with pytest.raises(ValueError, match=rf"1 of 2 training .* row 2 because {message}"):
        prepared(tmp_path, [good, good | change])
    assert len(prepared(tmp_path, [good, good | change], invalid="drop").train) == 1


def test_tokenized_rows_that_are_no_numbers_are_named(tmp_path):
    with pytest.raises(ValueError, match="`input_ids` is not a list of integers"):
        prepared(tmp_path, [{"input_ids": ["a", "b"]}])
