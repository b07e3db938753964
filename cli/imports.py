"""What makes importing torch, transformers and libp2p shorter, in a process of our own; programs that import Petals are
left alone."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType


@contextmanager
def importing() -> Iterator[None]:
    """Import in here: nothing is looked through for garbage meanwhile, nor ever again what is there at the end.

    3,700 modules make a million objects that stay, and the collector goes through all of them again and again while
    they come: a quarter of the time that the imports take (2026-11-28, Python 3.11). Later every full collection would,
    in the middle of somebody's step.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _frames_tell_their_modules():
            yield
        if collecting:
            gc.freeze()
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _frames_tell_their_modules() -> Iterator[None]:
    """In here `inspect.getmodule` takes a frame's own word for the module that it runs in.

    Symptom (torch 2.13, Python 3.11): torch asks it where each of 135 operators is defined, and to find a frame by the
    name of its file Python asks for the real path of every module that is loaded: 31,000 `lstat`, 0.11 s.
    """
    original = inspect.getmodule

    def getmodule(object: object, _filename: str | None = None) -> ModuleType | None:
        if isinstance(object, FrameType) and (module := sys.modules.get(object.f_globals.get("__name__", ""))):
            return module
        return original(object, _filename)

    inspect.getmodule = getmodule
    try:
        yield
    finally:
        inspect.getmodule = original
