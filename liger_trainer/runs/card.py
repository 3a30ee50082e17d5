"""The model card of a run: what it is, how to use it, how it was trained, what it reached."""

from __future__ import annotations

import yaml

from liger_trainer.runs.finished import FinishedRun
from liger_trainer.runs.report.summary import headline_metrics

_CHAT = '[{"role": "user", "content": "Hello"}]'
_USE = {
    "text-generation": """from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
prompt = {prompt}
print(generate(prompt, max_new_tokens=128, return_full_text=False)[0]["generated_text"])""",
    "image-text-to-text": """from transformers import pipeline

answer = pipeline("image-text-to-text", model="{name}")
print(answer(text="What is this?", images="photo.jpg", max_new_tokens=128))""",
    "text-classification": """from transformers import pipeline

score = pipeline("text-classification", model="{name}", function_to_apply="none")
print(score("The answer to judge"))""",
}
_USE_ADAPTER = """from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}"{options})
model = PeftModel.from_pretrained(base, "{name}")"""
_AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "text-classification": "AutoModelForSequenceClassification",
}


def model_card(run: FinishedRun, name: str, license: str | None = None) -> str:
    """Return the model card in Markdown, with the metadata that a hub reads.

    `name` is that of the repository, and `license` what the hub calls the model's license.
    """
    summary, origin = run.record["summary"], run.record.get("origin") or {}
    task, method, base = _task(run), run.recipe.method, origin.get("base_model")
    front = {
        "base_model": base,
        "datasets": origin.get("datasets"),
        "library_name": "peft" if run.is_adapter else "transformers",
        "license": license,
        "pipeline_tag": task,
        "tags": ["liger-trainer", method, *(["lora"] if run.is_lora else [])],
    }
    front = {key: value for key, value in front.items() if value}
    rows = "\n".join(f"| {n} | {b} | {a} |" for n, b, a in headline_metrics(summary["held_out"]))
    results = f"| held-out examples | before training | after |\n|---|---|---|\n{rows}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        f"{_about(run, base)}, trained with method `{method}` of liger-trainer.",
        f"## Use\n\n{_use(run, task, name, base)}",
        f"## Results\n\n{results}" if rows else "",
        f"## Training\n\n{_training(run)}",
        "## Limitations\n\n"
        "The table of results, if there is one, is all that was measured. What the base model gets "
        "wrong, this model may get wrong too: try it on your own task before you rely on it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _task(run: FinishedRun) -> str:
    """Return the hub's name of what the model does."""
    if run.recipe.method == "reward":
        return "text-classification"
    has_images = {"processor_config.json", "preprocessor_config.json"} & set(run.record["files"])
    return "image-text-to-text" if has_images else "text-generation"


def _about(run: FinishedRun, base: str | None) -> str:
    kind = "An adapter for" if run.is_adapter else "A model that began as"
    if base is not None:
        return f"{kind} [{base}](https://huggingface.co/{base})"
    found = run.record["base"]
    place = found.get("package") or found.get("name_or_path")
    return f"{kind} `{found.get('gguf_file') or place}`, a local model"


def _use(run: FinishedRun, task: str, name: str, base: str | None) -> str:
    if run.is_adapter and base is None:
        return (
            "Load the base model, then the adapter with "
            f'`peft.PeftModel.from_pretrained(base, "{name}")`.'
        )
    if run.is_adapter:
        options = ", num_labels=1" if task == "text-classification" else ""
        code = _USE_ADAPTER.format(auto=_AUTO[task], base=base, options=options, name=name)
    else:
        prompt = _CHAT if "chat_template.jinja" in run.record["files"] else '"Once upon a time"'
        code = _USE[task].format(name=name, prompt=prompt)
    return f"```python\n{code}\n```"


def _training(run: FinishedRun) -> str:
    summary = run.record["summary"]
    facts = [
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['minutes']:.1f} min",
        *_if(summary, "trained_parameters", "{:,} trained parameters"),
        *_if(summary, "tokens_per_second", "{:,.0f} tokens per second"),
        f"{summary['peak_memory_gib']:.2f} GiB of memory at the peak",
        f"begun {run.record['started']}",
        ", ".join(f"{what} {value}" for what, value in run.record.get("machine", {}).items()),
    ]
    recipe = yaml.safe_dump(run.record["recipe"], sort_keys=False).rstrip()
    return "\n\n".join(
        [
            "\n".join(f"- {fact}" for fact in facts if fact),
            f"```bash\n{run.record['command']}\n```",
            f"```yaml\n{recipe}\n```",
        ]
    )


def _if(summary: dict, key: str, text: str) -> list[str]:
    return [] if summary.get(key) is None else [text.format(summary[key])]
