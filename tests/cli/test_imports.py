"""What a command imports before it is of use, and what is looked through for garbage meanwhile."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from petals.cli.imports import importing

SERVING = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from petals.models.library import import_models
import_models()
from petals.peer.node import open_peer
"""


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_modules_are_imported(thawed: None) -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        assert gc.get_freeze_count() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() > before  # what was imported is not looked through again


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_table_of_lazy_imports_is_the_one_that_transformers_makes_itself() -> None:
    probe = SERVING + (
        "import transformers.models\n"
        "from petals.models.library import Path, without_prefix\n"
        "from transformers.utils.import_utils import define_import_structure\n"
        "path = transformers.models.__file__\n"
        "ours = without_prefix(define_import_structure(Path(path).parent, prefix='models'))\n"
        "assert ours == define_import_structure(path)\n"
        "assert transformers.models.LlamaConfig is transformers.LlamaConfig\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_the_sources_of_transformers_are_read_once() -> None:
    probe = SERVING + "print(sum(name.endswith('/modeling_xlnet.py') for name in opened))"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1"]


def test_a_serving_peer_imports_nothing_that_only_others_need() -> None:
    unneeded = {
        "bitsandbytes",
        "peft",
        "scipy",
        "sklearn",
        "pandas",
        "matplotlib",
        "torchvision",
        "starlette",
        "hypercorn",
    }
    probe = f"{SERVING}print(*({unneeded} & {{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
