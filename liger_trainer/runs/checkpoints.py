"""Checkpoints that are complete or do not count.

A checkpoint is complete when it contains `complete.json`, which names the run that wrote it, and
the size and a digest of every file. It is written last, after the files are on the disk, and older
checkpoints are removed only then. Whatever interrupts a save (a signal, a full disk, a power cut)
leaves a folder without it, and the previous checkpoint remains the newest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from liger_trainer.runs.errors import RunError, reason

MANIFEST = "complete.json"
_BEGUN = "incomplete.json"  # names the run of a folder while it is being filled
_NAME = re.compile(r"checkpoint-(\d+)")
_END = 1 << 16  # bytes
# Errors of writers (Python, torch, safetensors) when a disk is full.
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)


def begin(checkpoint: Path, run: str) -> None:
    """Mark a folder as an incomplete checkpoint of `run`."""
    remove(checkpoint)  # whatever an earlier save has left
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_whole(checkpoint / _BEGUN, json.dumps({"run": run}))


def complete(checkpoint: Path, run: str, **facts: Any) -> None:
    """Mark a folder, with all files in it, as a complete checkpoint of `run`."""
    files = {}
    for path in _files(checkpoint):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = _fingerprint(path)
    content = json.dumps({"run": run, **facts, "files": files}, indent=2)
    write_whole(checkpoint / MANIFEST, content)
    (checkpoint / _BEGUN).unlink(missing_ok=True)


def write_whole(path: Path, content: str) -> None:
    """Write a file atomically: at any time it has its old or its new content."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(content + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def flaw(checkpoint: Path, run: str) -> str:
    """Return why a folder is not a complete checkpoint of `run`, or an empty string."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return "it was not saved to the end"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    if owner(checkpoint) != run:
        return "another run wrote it"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != expected:
            return f"{name} is not as it was saved"
    return ""


def newest(folder: Path, run: str) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of `run`, and a sentence about each skipped one."""
    skipped = []
    for checkpoint in reversed(numbered(folder)):
        wrong = flaw(checkpoint, run)
        if not wrong:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} is left aside: {wrong}")
    return None, skipped


def resume_hint(folder: Path, run: str) -> str:
    """Return a sentence that states where a run that failed can continue."""
    checkpoint, _ = newest(folder, run)
    if checkpoint is None:
        return "There is no complete checkpoint"
    return f"{checkpoint.name} is complete: continue with --resume"


def numbered(folder: Path) -> list[Path]:
    """Return the folders `checkpoint-<step>`, by step."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step)


def step(checkpoint: Path) -> int:
    """Return the number of optimizer steps before the checkpoint."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def owner(checkpoint: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint, complete or not, or None."""
    for name in (MANIFEST, _BEGUN):
        try:
            return json.loads((checkpoint / name).read_text())["run"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def foreign(checkpoint: Path, runs: set[str]) -> bool:
    """Return whether none of `runs` wrote a checkpoint. A damaged manifest counts as theirs."""
    found = owner(checkpoint)
    return found not in runs and not (found is None and (checkpoint / MANIFEST).exists())


def remove(checkpoint: Path) -> None:
    """Remove the files that a run wrote to a checkpoint; other files, and their folder, stay."""
    if (checkpoint / MANIFEST).is_file():  # first make it incomplete, but still owned by the run
        os.replace(checkpoint / MANIFEST, checkpoint / _BEGUN)
    if (checkpoint / _BEGUN).is_file():
        every = [p.relative_to(checkpoint).as_posix() for p in _files(checkpoint)]
        for name in json.loads((checkpoint / _BEGUN).read_text()).get("files", every):
            (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / _BEGUN).unlink()
    for path in sorted((p for p in checkpoint.rglob("*") if p.is_dir()), reverse=True):
        remove_if_empty(path)
    remove_if_empty(checkpoint)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def guard_saves(trainer, run: str, *, saving: Callable[[bool], None], healthy) -> None:
    """Make a trainer save complete checkpoints of `run`, and remove old ones of this run only.

    Args:
        saving: called with True before a save, and with False after it.
        healthy: called before a save, in every process; nothing is saved if it returns False.

    If the disk is full, saving removes the incomplete checkpoint and raises RunError.
    """
    args, save = trainer.args, trainer._save_checkpoint
    limit, args.save_total_limit = args.save_total_limit, None  # Trainer's rotation ignores owners

    def save_checkpoint(model, trial):
        if not healthy():
            return
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{trainer.state.global_step}"
        saving(True)
        try:
            if args.should_save:
                begin(checkpoint, run)
            trainer.accelerator.wait_for_everyone()
            save(model, trial)
            trainer.accelerator.wait_for_everyone()
            if args.should_save:
                complete(checkpoint, run, processes=args.world_size)
                rotate(folder, run, limit, keep=trainer.state.best_model_checkpoint)
        except SAVE_ERRORS as error:
            remove(checkpoint)
            hint = resume_hint(folder, run)
            raise RunError(f"{checkpoint} could not be saved: {reason(error)}. {hint}") from error
        finally:
            saving(False)

    trainer._save_checkpoint = save_checkpoint


def rotate(folder: Path, run: str, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints of `run` beyond `limit`, but never the newest or `keep`."""
    if not limit or limit < 1:
        return
    ours = [c for c in numbered(folder) if not flaw(c, run)]
    kept = {ours[-1], *(c for c in ours if keep is not None and c.name == Path(keep).name)}
    surplus = len(ours) - max(limit, len(kept))
    for checkpoint in [c for c in ours if c not in kept][: max(surplus, 0)]:
        remove(checkpoint)


def _files(checkpoint: Path) -> list[Path]:
    ours = (MANIFEST, _BEGUN, MANIFEST + ".partial", _BEGUN + ".partial")
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name not in ours)


def _fingerprint(path: Path) -> list:
    """Return the size, and a digest of the first and last 64 KiB.

    A digest of the whole file would take as long as the save. Actual failures are files that end
    early or were never written.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        digest.update(file.read(_END))
        file.seek(max(size - _END, 0))
        digest.update(file.read(_END))
    return [size, digest.hexdigest()]
