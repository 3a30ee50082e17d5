"""`liger-trainer push`: upload the model of a run to a hub, with a model card."""

from __future__ import annotations

import argparse

HELP = "upload the model of a run to a hub"
EXAMPLES = """examples:
  liger-trainer push runs/smollm2-135m --to me/smollm2-humaneval --private --license apache-2.0
  liger-trainer push runs/smollm2-135m --to me/smollm2-humaneval --dry-run

The access token comes from `hf auth login` or HF_TOKEN. Checkpoints are not uploaded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--to", required=True, metavar="NAME", help="the repository: user/model")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="license of the model, by its name on the hub, such as apache-2.0 (default: none)",
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the card and the names of the files, and upload nothing",
    )


def main(options: argparse.Namespace) -> int:
    """Upload the files of a run's model, with a model card, in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from liger_trainer.runs.card import model_card
    from liger_trainer.runs.finished import open_run

    run = open_run(options.run)
    try:
        validate_repo_id(options.to)
    except HFValidationError as error:
        raise ValueError(f"--to: {error}") from error
    card = model_card(run, options.to, options.license)
    # training_args.bin is a pickle, which nobody should have to trust.
    names = [n for n in run.record["files"] if n not in ("training_args.bin", "report.html")]
    if options.dry_run:
        print(card)
        print("\n".join(["files:", *(f"  {name}" for name in [*names, "README.md"])]))
        return 0
    operations = [CommitOperationAdd(name, str(run.path / name)) for name in names]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi()
    # The errors of a connection have the base of the hub's own, in its client's HTTP library.
    connection_errors: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        api.create_repo(options.to, private=options.private, exist_ok=True)
        done = api.create_commit(
            options.to, operations, commit_message=f"Model of {run.recipe.path.parent.name}"
        )
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"push: {error}") from error
    except connection_errors as error:
        raise ValueError(f"push: the hub cannot be reached: {error}") from error
    print(f"pushed to {done.commit_url}")
    return 0
