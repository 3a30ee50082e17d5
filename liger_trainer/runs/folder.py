"""Ownership, state and resume point of a run's output folder.

`run.json` holds the recipe as given, the state of the run and the files that it wrote. A run takes
over the folder with its first optimizer step. Until then the folder stays unchanged, so a run that
cannot start destroys and blocks nothing. Only files that runs wrote are ever replaced or removed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, wait_for_everyone
from filelock import FileLock, Timeout

from liger_trainer.runs import checkpoints
from liger_trainer.runs.adapters import MODEL_FILES
from liger_trainer.runs.engine import in_any_process
from liger_trainer.runs.recipe.compare import differences
from liger_trainer.runs.recipe.recipe import Recipe

RUN_FILE = "run.json"
_LOCK, _STAGING = ".lock", ".model"
_STATES = ("running", "interrupted", "diverged", "finished")


@dataclass
class RunFolder:
    """The locked output folder of a run. `checkpoint` is the one to resume from, if any."""

    recipe: Recipe
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    checkpoint: Path | None = None
    earlier: dict[str, Any] | None = None  # run.json of the run that is resumed or replaced
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=lambda: {"files": [], "replaced": []})
    begun: bool = False

    @property
    def path(self) -> Path:
        return self.recipe.output_dir

    @property
    def resumed(self) -> dict[str, Any]:
        """The `run.json` that a resumed run found; empty for a new run."""
        return self.earlier if self.earlier and self.earlier["id"] == self.id else {}

    def begin(self) -> None:
        """Take over the folder, and remove the run that this one replaces; does nothing twice."""
        if self.begun:
            return
        self.begun = True
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.facts["started"] = self.resumed.get("started", now)
        files, replaced = [], []
        if self.earlier is not None:
            files, replaced = self.earlier["files"], list(self.earlier["replaced"])
            if not self.resumed:
                replaced.append(self.earlier["id"])
        # Write both lists before anything is removed, in case this run is killed meanwhile.
        self.write("running", files=files, replaced=replaced)
        for checkpoint in checkpoints.numbered(self.path) if replaced else ():
            if checkpoints.owner(checkpoint) in replaced:
                checkpoints.remove(checkpoint)
        if not self.resumed:
            for name in files:
                (self.path / name).unlink(missing_ok=True)
            files = []
        self.write("running", files=files, replaced=[])

    def write(self, state: str, **facts: Any) -> None:
        """Record the state of the run, and further facts, in `run.json`."""
        assert state in _STATES
        self.facts |= facts
        content = {"state": state, "id": self.id, "recipe": self.recipe.shown, **self.facts}
        checkpoints.write_whole(self.path / RUN_FILE, json.dumps(content, indent=2))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a temporary folder to save a model in, for `publish`."""
        path = self.path / _STAGING
        shutil.rmtree(path, ignore_errors=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, staging: Path) -> None:
        """Move a saved model to its place, and remove files of an earlier save."""
        before = self.facts["files"]
        found = [p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file()]
        new = sorted(name for name in found if name != "README.md")  # PEFT's boilerplate
        self.write("running", files=sorted({*before, *new}))
        for name in new:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, self.path / name)
        for name in set(before) - {*new}:
            (self.path / name).unlink(missing_ok=True)
        self.write("running", files=new)


@contextmanager
def locked(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, processes: int = 1
) -> Iterator[RunFolder]:
    """Yield the output folder, locked within the block; the lock also ends with the process.

    Raises ValueError if `refusal` returns a reason, or if another process has locked the folder. If
    the run does not begin, a folder that was created for it is removed.
    """
    path = recipe.output_dir
    reason = refusal(recipe, resume=resume, overwrite=overwrite, processes=processes)
    if reason:
        raise ValueError(reason)
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"training.output_dir: a run is at work in {path}; wait for it, or choose another "
            "training.output_dir"
        ) from None
    except OSError as error:
        raise ValueError(
            f"training.output_dir: {path} cannot be written to: {error.strerror}; choose another"
        ) from error
    try:
        yield _claimed(recipe, resume=resume)
    finally:
        if {p.name for p in path.iterdir()} <= {_LOCK}:
            (path / _LOCK).unlink(missing_ok=True)
        lock.release()
        checkpoints.remove_if_empty(path)


@dataclass
class Start:
    """Where a run starts: what all processes need to know of the folder, which the first locks."""

    checkpoint: str | None  # the one to resume from
    run: str  # the id of the run
    earlier: dict[str, Any]  # run.json of the run that is resumed; empty for a new one


@contextmanager
def shared(recipe: Recipe, args, **options: bool) -> Iterator[tuple[RunFolder | None, Start]]:
    """Yield the folder, which the first process locks, and None in all others; and the start.

    All processes raise ValueError if it cannot be locked, if a machine lacks the checkpoint, and if
    machines that share the folder were all to save in it.
    """
    with ExitStack() as stack:
        folder = None
        outcome: list[Any] = [None]
        if args.process_index == 0:
            try:
                folder = stack.enter_context(locked(recipe, processes=args.world_size, **options))
                checkpoint = str(folder.checkpoint) if folder.checkpoint else None
                outcome = [Start(checkpoint, folder.id, folder.resumed)]
            except (ValueError, OSError) as error:
                if args.world_size == 1:
                    raise
                outcome = [ValueError(str(error))]
        if args.world_size > 1:
            broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        start = outcome[0]
        _check_machines(recipe.output_dir, start, args)
        yield folder, start


def _check_machines(path: Path, start: Start, args) -> None:
    """Raise ValueError, in all processes, if machines lack the checkpoint or would write alike.

    With `save_on_each_node`, the first process of every machine saves, which is meant for disks of
    their own. Whether the disk is shared shows in a file that the first process of all creates.
    """
    first_on_machine = args.local_process_index == 0
    if start.checkpoint is not None:
        flaw = checkpoints.flaw(Path(start.checkpoint), start.run) if first_on_machine else ""
        if in_any_process(bool(flaw), args):
            raise ValueError(
                f"--resume: not every machine has {start.checkpoint}; training.output_dir must be "
                "a folder that they share, or training.save_on_each_node be true from the start"
            )
    if not args.save_on_each_node or args.world_size == 1:
        return
    mark = path / f".{start.run}"
    if args.process_index == 0:
        mark.touch()
    wait_for_everyone()
    is_seen = args.process_index > 0 and first_on_machine and mark.exists()
    is_seen = in_any_process(is_seen, args)
    if args.process_index == 0:
        mark.unlink()
    if is_seen:
        raise ValueError(
            f"training.save_on_each_node: the machines share {path}, so all of them would write "
            "the same files; remove the key"
        )


def refusal(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
) -> str | None:
    """Return why a run of `recipe` must not start in its output folder, and what to do, or None."""
    path = recipe.output_dir
    if path.exists() and not path.is_dir():
        return f"training.output_dir: {path} is a file"
    source = recipe.model.name_or_path if recipe.model.package is None else None
    if source and path.is_dir() and os.path.exists(source) and path.samefile(source):
        return (
            f"training.output_dir: {path} holds the model that is to be trained; choose another "
            "training.output_dir"
        )
    earlier = read(path)
    if resume and earlier is None:
        return f"--resume: there is no run in {path}; leave the option away to start one"
    foreign = _foreign(path, earlier)
    if foreign:
        return (
            f"training.output_dir: {path} holds {foreign}, which no run of this program wrote. "
            "Choose another training.output_dir"
        )
    if resume:
        return _resume_refusal(recipe, earlier, processes)
    if earlier is None or overwrite:
        return None
    changed = differences(earlier["recipe"], recipe)
    other = "another recipe (" + "; ".join(changed) + ")" if changed else "this recipe"
    resumable = not changed and earlier["state"] != "finished"
    return (
        f"training.output_dir: {path} holds a run of {other}, state: {earlier['state']}. "
        + ("Continue it with --resume, replace" if resumable else "Replace")
        + " it with --overwrite, or choose another training.output_dir"
    )


def read(path: Path) -> dict[str, Any] | None:
    """Return the contents of `run.json`, or None if there is none."""
    file = path / RUN_FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): remove the file") from error
    needed = ("state", "id", "recipe", "files", "replaced")
    if not isinstance(found, dict) or not all(key in found for key in needed):
        raise ValueError(
            f"{file} is from another version of liger-trainer: use that one, or train in another "
            "training.output_dir"
        )
    return found


def _claimed(recipe: Recipe, *, resume: bool) -> RunFolder:
    """Return the folder, after it was locked."""
    path, earlier = recipe.output_dir, read(recipe.output_dir)
    if not resume:
        return RunFolder(recipe, earlier=earlier)
    checkpoint, notes = checkpoints.newest(path, earlier["id"])
    if checkpoint is None and earlier["state"] == "finished":
        raise ValueError(
            f"--resume: the run in {path} is finished and left no complete checkpoint to continue "
            "from: set training.save_strategy for runs that are to be extended"
            + "".join(f"; {note}" for note in notes)
        )
    notes.append(
        f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint: starting again"
    )
    return RunFolder(recipe, earlier["id"], checkpoint, earlier, notes)


def _resume_refusal(recipe: Recipe, earlier: dict[str, Any], processes: int | None) -> str | None:
    path = recipe.output_dir
    changed = differences(earlier["recipe"], recipe, resuming=True)
    if changed:
        return (
            f"--resume: the run in {path} had another recipe ({'; '.join(changed)}). "
            "Use the same values, or choose another training.output_dir"
        )
    before = earlier.get("processes")
    if processes is not None and before is not None and before != processes:
        return (
            f"--resume: the run in {path} had {before} processes, this one has {processes}, which "
            f"would see other batches and random numbers; start {before}"
        )
    if earlier["state"] == "finished" and not differences(earlier["recipe"], recipe):
        return (
            f"--resume: the run in {path} is finished; extend it with a larger training.max_steps "
            "or training.num_train_epochs, or replace it with --overwrite"
        )
    return None


def _foreign(path: Path, earlier: dict[str, Any] | None) -> str | None:
    """Return the name of a model file or checkpoint that no run wrote, or None."""
    ours = set() if earlier is None else {earlier["id"], *earlier["replaced"]}
    for name in MODEL_FILES:
        if (path / name).exists() and (earlier is None or name not in earlier["files"]):
            return name
    for checkpoint in checkpoints.numbered(path):
        if checkpoints.foreign(checkpoint, ours):
            return checkpoint.name
    return None
