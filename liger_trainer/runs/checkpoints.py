"""Checkpoints that are complete or do not count.

A checkpoint is complete when `complete.json` is in it: the run that wrote it and, of every file,
size and a digest of both ends. It is written last, after the files are on the disk, and older
checkpoints are removed only then. Whatever interrupts a save (a signal, a full disk, a power cut)
leaves a folder without it, and the checkpoint before is the newest.
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

from liger_trainer.runs.errors import RunError

MANIFEST = "complete.json"
_BEGUN = "incomplete.json"  # whose run the folder is, while it is being filled
_NAME = re.compile(r"checkpoint-(\d+)")
_END = 1 << 16  # bytes
# What the writers of checkpoints raise when a disk is full: torch, safetensors, Python.
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)


def begin(checkpoint: Path, run: str) -> None:
    """Mark a folder as that of `run`, not complete."""
    remove(checkpoint)  # what an earlier save has left
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_whole(checkpoint / _BEGUN, json.dumps({"run": run}))


def complete(checkpoint: Path, run: str, **facts: Any) -> None:
    """Declare everything in a folder to be the complete checkpoint of `run`."""
    files = {}
    for path in _files(checkpoint):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = _fingerprint(path)
    content = json.dumps({"run": run, **facts, "files": files}, indent=2)
    write_whole(checkpoint / MANIFEST, content)
    (checkpoint / _BEGUN).unlink(missing_ok=True)


def write_whole(path: Path, content: str) -> None:
    """Write a file that has, at any time, its old content or its new one."""
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
    """Why a folder is no complete checkpoint of `run`; empty if it is."""
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
    """Return the newest complete checkpoint of `run`, and a sentence about each that was passed
    over."""
    passed = []
    for checkpoint in reversed(numbered(folder)):
        reason = flaw(checkpoint, run)
        if not reason:
            return checkpoint, passed
        passed.append(f"{checkpoint.name} is left aside: {reason}")
    return None, passed


def what_is_left(folder: Path, run: str) -> str:
    """Return a sentence about where a run that failed can go on."""
    checkpoint, _ = newest(folder, run)
    if checkpoint is None:
        return "There is no complete checkpoint"
    return f"{checkpoint.name} is complete: continue with --resume"


def numbered(folder: Path) -> list[Path]:
    """Return the folders `checkpoint-<step>`, by step."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step)


def step(checkpoint: Path) -> int:
    """Return the optimizer steps that were done."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def owner(checkpoint: Path) -> str | None:
    """Return the run that wrote a checkpoint, complete or not; None if none did."""
    for name in (MANIFEST, _BEGUN):
        try:
            return json.loads((checkpoint / name).read_text())["run"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def foreign(checkpoint: Path, runs: set[str]) -> bool:
    """Whether a folder is none of `runs`'. One whose manifest is damaged is taken for theirs."""
    found = owner(checkpoint)
    return found not in runs and not (found is None and (checkpoint / MANIFEST).exists())


def remove(checkpoint: Path) -> None:
    """Remove what a run wrote to a checkpoint. Other files stay, and with them the folder."""
    if (checkpoint / MANIFEST).is_file():  # from now on it is not complete, and still ours
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
    """Remove a folder that holds nothing."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def guard_saves(trainer, run: str, *, saving: Callable[[bool], None], healthy) -> None:
    """Make a trainer's checkpoints complete ones of `run`, and its rotation remove only those.

    Args:
        saving: is told before and after a save.
        healthy: called before a save, in every process; nothing is saved where it returns False.

    Saving raises RunError where the disk is full, with the incomplete checkpoint removed.
    """
    args, save = trainer.args, trainer._save_checkpoint
    limit, args.save_total_limit = args.save_total_limit, None  # its rotation knows no owners

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
            left = what_is_left(folder, run)
            raise RunError(f"{checkpoint} could not be saved: {error}. {left}") from error
        finally:
            saving(False)

    trainer._save_checkpoint = save_checkpoint


def rotate(folder: Path, run: str, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints of `run` over `limit`, never the newest or `keep`."""
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
    """Size, and a digest of the first and the last 64 KiB: a whole one would cost as much time as
    the save, and what fails is a file that ends early or was never written."""
    size = path.stat().st_size
    found = xxhash.xxh3_64()
    with path.open("rb") as file:
        found.update(file.read(_END))
        file.seek(max(size - _END, 0))
        found.update(file.read(_END))
    return [size, found.hexdigest()]
