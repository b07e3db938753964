"""`petals seal`: a digest that vouches for every byte of a model, whoever it is fetched from."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "seal",
        help="make a model's digest out of all its bytes",
        description="Read a directory once, write into its petals.json that the digest is made of all its bytes "
        "(tensors, configuration, tokenizer), and print that digest. Peers that name it as swarm:DIGEST need to trust "
        "nobody they fetch it from. All who serve it from copies of their own must have sealed the same bytes.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory with config.json and safetensors")
    parser.set_defaults(run=run, synchronous=True, verbose=False)


def run(options: argparse.Namespace) -> None:
    """Seal the directory and print its digest."""
    from petals.models.errors import CheckpointError
    from petals.models.source.checkpoint import open_checkpoint
    from petals.models.source.weights import seal

    if not options.directory.is_dir():
        raise CheckpointError(f"there is no directory {options.directory}; only a model in a directory can be sealed")
    try:
        print(seal(open_checkpoint(options.directory)))
    except OSError as error:
        raise CheckpointError(f"cannot write to {options.directory}: {error.strerror or error}") from error
