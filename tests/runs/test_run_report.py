"""The report is one page that needs nothing else, and shows what the run logged."""

import re
from html.parser import HTMLParser

import pytest
import tiny
from run_folders import state

from liger_trainer.report import InjectionReport, Row, Status
from liger_trainer.runs.report import plots as plots_module
from liger_trainer.runs.report.html import write_report
from liger_trainer.runs.report.plots import plots
from liger_trainer.runs.report.samples import samples_of
from liger_trainer.runs.report.summary import headline_metrics, summarize

LOG = [
    {"step": 0, "eval_loss": 2.0},
    {
        "step": 1,
        "loss": 2.1,
        "learning_rate": 1e-4,
        "tokens_per_second": 100.0,
        "peak_memory_gib": 1.5,
        "tokens": 200,
    },
    {
        "step": 2,
        "loss": 1.1,
        "learning_rate": 5e-5,
        "tokens_per_second": 300.0,
        "peak_memory_gib": 1.25,
        "tokens": 600,
    },
    {"step": 2, "eval_loss": 1.25},
]
INJECTION = InjectionReport(
    (
        Row("model.norm", "rms_norm", Status.SWAPPED, "same function", 1e-7),
        Row("model.layers.0.mlp", "swiglu", Status.REFUSED, "outputs differ <by> 3e-2", 3e-2),
    )
)


class Parsed(HTMLParser):
    """Open tags, addresses and text of a page."""

    VOID = ("meta", "br", "use", "path", "rect")

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.tags.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path):
    path = write_report(
        tmp_path / "report.html",
        title="tiny <run>",
        summary=summarize(LOG) | {"steps": 2, "minutes": 0.5},
        log_history=LOG,
        injection=INJECTION,
        recipe={"training": {"learning_rate": 1e-4}},
        machine={"torch": "2.13.0"},
        notes=["10 rows"],
    )
    return path.read_text()


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("kl", "nats"),
        ("rewards/accuracies", "share"),
        ("rewards/margins", "reward margin"),
        ("completions/mean_length", "tokens"),
        ("peak_memory_gib", "GiB"),
        ("tokens_per_second", "tokens per second"),
        ("loss", "nats per token"),
    ],
)
def test_both_axes_have_a_label(key, label):
    (figure,) = plots([{"step": step, key: 0.1} for step in (1, 2)])[:1]
    texts = re.findall("<!-- (.*?) -->", figure)
    ticks = texts[: texts.index("optimizer step")]
    assert ticks == ["1", "2"]  # no half steps
    assert label in texts


def test_it_is_well_formed_and_loads_nothing_from_elsewhere(page):
    parsed = Parsed(page)
    assert parsed.tags == []
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"url\((?!#)|@import", page)


def test_it_shows_the_numbers_the_table_and_the_recipe(page):
    text = " ".join(Parsed(page).text)
    for expected in ("tiny <run>", "2.000 → 1.250", "200", "1.50 GiB", "10 rows", "torch"):
        assert expected in text
    for expected in ("model.norm", "swiglu 0 of 1", "outputs differ <by> 3e-2", "learning_rate"):
        assert expected in text


def test_four_plots_with_ids_of_their_own(page):
    figures = plots(LOG)
    assert len(figures) == 4
    ids = [set(re.findall(r'clip-path="url\(#(\w+)\)"', figure)) for figure in figures]
    assert all(ids)
    assert len(set.union(*ids)) == sum(len(found) for found in ids)


def test_a_plot_without_data_is_left_out():
    assert len(plots([{"step": 1, "loss": 1.0}])) == 1


def test_speed_is_tokens_over_time_and_not_a_mean_of_speeds():
    summary = summarize(LOG)
    assert summary["tokens"] == 800
    assert summary["tokens_per_second"] == pytest.approx(800 / (200 / 100 + 600 / 300))
    assert (summary["eval_loss_before"], summary["eval_loss_after"]) == (2.0, 1.25)
    assert summary["peak_memory_gib"] >= 1.5


def page_without_kernels(folder, **given) -> str:
    path = write_report(
        folder / "report.html",
        title="t",
        summary=summarize([]) | {"steps": 0, "minutes": 0.0},
        log_history=[],
        injection=None,
        recipe={},
        machine={},
        notes=[],
        **given,
    )
    return path.read_text()


def test_a_run_without_kernels_says_so(tmp_path):
    assert "use_liger_kernel is off" in page_without_kernels(tmp_path)


def test_completions_are_escaped(tmp_path):
    row = {"prompt": "<script>", "before": "<b>", "after": "</table>", "expected": "&"}
    text = page_without_kernels(tmp_path, samples=[row])
    assert "<script>" not in text
    assert "&lt;/table&gt;" in text


def logged(**held_out):
    """A log of two steps with metrics in training and, before and after, held out."""
    first = {f"eval_{key}": values[0] for key, values in held_out.items()}
    last = {f"eval_{key}": values[1] for key, values in held_out.items()}
    timing = {"eval_runtime": 1.0, "eval_samples_per_second": 2.0, "eval_num_tokens": 0}
    train = [
        {"step": step, "loss": 1.0, **{key: values[0] for key, values in held_out.items()}}
        for step in (1, 2)
    ]
    return [{"step": 0, **first, **timing}, *train, {"step": 2, **last, **timing}]


PREFERENCE = {
    "loss": (0.69, 0.5),
    "rewards/chosen": (0.0, 0.1),
    "rewards/rejected": (0.0, -0.4),
    "rewards/margins": (0.0, 0.5),
    "rewards/accuracies": (0.0, 0.75),
    "kl": (0.0, 0.02),
    "entropy": (1.5, 1.25),
}
GROUPS = {"loss": (0.0, 0.01), "reward": (0.25, 0.5), "rewards/parses/mean": (0.5, 0.75)}


def test_held_out_metrics_are_kept_first_and_last_without_timing():
    held_out = summarize(logged(**PREFERENCE))["held_out"]
    assert held_out == {key: list(values) for key, values in PREFERENCE.items()}


def test_an_evaluation_that_did_not_happen_has_no_value():
    log = logged(loss=(2.0, 1.0))
    before, after = summarize(log[:-1]), summarize(log[1:])
    assert headline_metrics(before["held_out"]) == [("loss", "2.000", "-")]
    assert headline_metrics(after["held_out"]) == [("loss", "-", "1.000")]


def test_what_tells_most_of_a_preference_run():
    assert headline_metrics(summarize(logged(**PREFERENCE))["held_out"]) == [
        ("loss", "0.690", "0.500"),
        ("reward margin", "0.000", "0.500"),
        ("reward accuracy", "0%", "75%"),
        ("KL", "0.0000", "0.0200"),
    ]


def test_where_there_is_a_reward_the_loss_tells_nothing():
    assert headline_metrics(summarize(logged(**GROUPS))["held_out"]) == [
        ("reward", "0.250", "0.500")
    ]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (
            PREFERENCE,
            [
                "Loss",
                "Reward margin (chosen - rejected)",
                "Share of pairs with the higher reward on chosen",
                "Rewards",
                "KL to the reference (nats)",
                "Entropy (nats per token)",
            ],
        ),
        (GROUPS, ["Loss", "Reward", "Reward: parses"]),
        ({"loss": (2.0, 1.0)}, ["Loss (nats per token)"]),
    ],
)
def test_there_is_a_plot_for_what_was_logged(monkeypatch, metrics, expected):
    drawn = []
    monkeypatch.setattr(plots_module, "_plot", lambda chart, lines: drawn.append((chart, lines)))
    plots(logged(**metrics))
    assert [chart.name for chart, _ in drawn] == expected
    for chart, lines in drawn:
        assert len(lines) == 2 * len(chart.keys)  # in training and held out
        for points, label, _, style in lines:
            assert len(points) == 2
            assert ("held out" in label) == (points[0][0] == 0) == (style == plots_module.DASHED)


def test_every_key_of_a_chart_has_a_line():
    keys = ("max_reward", "mean_reward", "min_reward")
    (figure,) = plots([{"step": step, **dict.fromkeys(keys, 1.0)} for step in (1, 2)])
    assert {"most", "mean", "least"} <= set(re.findall("<!-- (.*?) -->", figure))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_plot_from_zero_is_drawn_of_any_number(value):
    assert len(plots([{"step": step, "grad_norm": value} for step in (1, 2)])) == 1


def test_the_report_tells_when_and_how(original):
    page = (original / "out" / "report.html").read_text()
    assert f"Begun {state(original / 'out')['started']}" in page
    assert "<code>liger-trainer train" in page
    assert " trained parameters." in page


def test_places_are_counted_and_each_tells_its_status(tmp_path):
    rows = [Row(f"layers.{status.name}", "rope", status, "") for status in Status]
    path = write_report(
        tmp_path / "report.html",
        title="t",
        summary=summarize([]) | {"steps": 0, "minutes": 0.0},
        log_history=[],
        injection=InjectionReport(tuple(rows)),
        recipe={},
        machine={},
        notes=[],
    )
    page = path.read_text()
    assert "<b>1 of 2</b>" in page
    sites = page.partition("All 4 sites")[2]
    assert re.findall("<td>(yes|no|n/a|off)</td>", sites) == ["yes", "no", "n/a", "off"]


def test_a_sample_of_chat_messages_has_their_content():
    """Content is text, or a list of parts."""
    parts = [{"type": "text", "text": "four ."}]
    rows = [
        {"prompt": "two plus two ?", "chosen": [{"role": "assistant", "content": content}]}
        for content in ("four .", parts, None)
    ]
    found = [sample.expected for sample in samples_of(rows, tiny.tokenizer(), 3)]
    assert found == ["four .", str(parts), ""]
