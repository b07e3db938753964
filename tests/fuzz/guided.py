"""The same decoders under atheris: libFuzzer keeps the inputs that reach new branches of ours and changes them further.

    python -m pip install atheris
    python tests/fuzz/guided.py NAME [-runs=1000000] [-max_total_time=600] [-max_len=4096] ...

Options after NAME are libFuzzer's. It begins with the committed corpus, and writes what it finds beside itself
(`crash-*`); a crash goes into tests/fuzz/corpus/NAME/ together with the fix.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

sys.path[0] = str(Path(__file__).resolve().parents[2])

with atheris.instrument_imports(include=["petals"]):
    from tests.fuzz.harnesses import CORPUS, HARNESSES, corpus_of
    from tests.fuzz.mutate import mutate


def main() -> None:
    """Fuzz until libFuzzer has had enough."""
    if len(sys.argv) < 2 or sys.argv[1] not in HARNESSES:
        sys.exit(f"name a decoder: {', '.join(HARNESSES)}")
    name = sys.argv.pop(1)
    harness, seeds = HARNESSES[name], corpus_of(name)
    logging.disable(logging.CRITICAL)
    harness.one_input(seeds[0])  # loads models, starts loops

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        dice = Random(seed)
        if dice.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutate(data, seeds, dice, harness.grammar)[:max_size]

    with tempfile.TemporaryDirectory() as grown:  # libFuzzer writes what it keeps into the first directory
        atheris.Setup([*sys.argv, grown, str(CORPUS / name)], harness.one_input, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
