"""What makes importing torch, transformers and libp2p shorter, in a process of our own; programs that import Petals are
left alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import in here: nothing is looked through for garbage meanwhile, nor ever again what is there at the end.

    3,700 modules make a million objects that stay, and the collector goes through all of them again and again while
    they come: a quarter of the time that the imports take (2026-11-28, Python 3.11). Later every full collection would,
    in the middle of somebody's step.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
