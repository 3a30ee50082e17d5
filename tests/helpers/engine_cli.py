"""`liger-trainer train` on two processes: under FSDP2, and on two machines.

Under FSDP2, one process is killed in the middle of the fourth step. The run is to go on from its
checkpoint to the model that an uninterrupted run leaves, and to be refused where it could not.
Another run shares every row among both. `{rank}` in an option becomes that of each process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import accelerated
import ring_on_cpu
import tiny
from processes import start
from transformers import Trainer

from liger_trainer import cli
from liger_trainer.runs.report import html

ENVIRONMENT = {  # what `accelerate launch` sets
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
SHARDED, FULL = ({"FSDP_STATE_DICT_TYPE": f"{kind}_STATE_DICT"} for kind in ("SHARDED", "FULL"))
SHARED_ROWS = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}


def train(environment: dict, kill: bool, words: list[str], out: str) -> None:
    """What each process runs under FSDP2."""
    accelerated.over_gloo()
    ring_on_cpu.install()
    os.environ |= ENVIRONMENT | environment
    step = Trainer.training_step

    def deadly(self, *args, **kwargs):
        if kill and self.state.global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    Trainer.training_step = deadly
    run(words, out)


def train_on_machine(folders: list[Path], words: list[str], out: str) -> None:
    """What the one process of each machine runs, in a folder of the machine."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.chdir(folders[rank])
    run(words, out)


def run(words: list[str], out: str) -> None:
    """Train, and end this process with the exit code; it says what it says in a file of its own."""
    html.plots = lambda log: []  # they would take as long as the run
    with (
        Path(f"{out}.{os.environ['RANK']}").open("w", buffering=1) as told,
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(told),
    ):
        code = cli.main(["train", *(word.format(rank=os.environ["RANK"]) for word in words)])
    raise SystemExit(code)


def launch(folder: Path, words: list[str], errors: Path) -> None:
    """Launch from this process, in a folder; its processes write their errors where it does."""
    os.chdir(folder)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    raise SystemExit(cli.main(["launch", *words]))


def attempt(folder: Path, name: str, *options: str, world=2, kill=False, more=SHARDED):
    """Return how it ended, and the last lines of both processes' output."""
    out = folder / f"{name}.told"
    words = [str(folder / "recipe.yaml"), f"training.output_dir={folder / 'out'}", *options]
    try:
        start(world, train, more, kill, words, str(out))
        code = "finished"
    except SystemExit as ended:
        code = str(ended)
    lines = [Path(f"{out}.{rank}").read_text().strip().splitlines() for rank in range(world)]
    return code, "".join(said[-1] for said in lines if said)


def attempts(folder: Path) -> dict:
    """Return what each attempt came to."""
    values = tiny.recipe_values(
        folder, save_strategy="steps", save_steps=2, max_steps=4, use_cpu=False,
        use_liger_kernel=True, per_device_train_batch_size=2,
    )  # fmt: skip
    values["data"]["eval_fraction"] = 0
    tiny.write_recipe(folder, values)
    for rank in range(2):
        tiny.chat_file(folder / f"chat{rank}.jsonl", count=24 + rank)
    found = {"whole": attempt(folder, "whole")}
    (folder / "out").rename(folder / "whole")
    found["killed"] = attempt(folder, "killed", kill=True)
    found["one process"] = attempt(folder, "one", "--resume", world=1)
    found["full state"] = attempt(folder, "full", "--resume", more=FULL)
    found["resumed"] = attempt(folder, "resumed", "--resume")
    (folder / "out").rename(folder / "resumed")
    shared = FULL | SHARED_ROWS
    found["packed"] = attempt(folder, "packed", "data.packing=true", more=shared)
    found["shared"] = attempt(folder, "shared", more=shared)
    other = (f"data.path={folder}/chat{{rank}}.jsonl", f"training.output_dir={folder}/never")
    found["other rows"] = attempt(folder, "other", *other)
    return found
