"""Every name that a program written for Petals imports is found, or refused with the new way."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from petals.compat.moved import TABLES, Gone
from petals.compat.names import TOP_LEVEL

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text()

FAMILIES = ("Bloom", "Llama", "Falcon", "Mixtral")
CLASSES = ("Config", "Model", "ForCausalLM", "ForSequenceClassification")
AUTO = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedSpeculativeModel",
]
FOUND = {
    "petals": [
        *AUTO,
        *(f"Distributed{family}{suffix}" for family in FAMILIES for suffix in CLASSES),
        "DistributedLlamaForSpeculativeGeneration",
        "ClientConfig",
        "InferenceSession",
        "RemoteSequential",
        "RemoteSequenceManager",
        "RemoteTransformerBlock",
        "SequenceManagerConfig",
        "NoSpendingPolicy",
        "SpendingPolicyBase",
        "get_remote_module_infos",
        "initialize_logs",
    ],
    "petals.client": [
        "ClientConfig",
        "InferenceSession",
        "RemoteSequential",
        "RemoteSequenceManager",
        "NoSpendingPolicy",
        "SpendingPolicyBase",
    ],
    "petals.client.config": ["ClientConfig"],
    "petals.client.inference_session": ["InferenceSession"],
    "petals.client.remote_sequential": ["RemoteSequential", "RemoteTransformerBlock"],
    "petals.client.remote_generation": ["RemoteGenerationMixin", "RemotePastKeyValues"],
    "petals.client.remote_model": [f"DistributedBloom{suffix}" for suffix in CLASSES],
    "petals.client.routing": ["RemoteSequenceManager", "NoSpendingPolicy", "SpendingPolicyBase", "MissingBlocksError"],
    "petals.client.routing.sequence_manager": ["RemoteSequenceManager", "SequenceManagerConfig", "MissingBlocksError"],
    "petals.client.routing.spending_policy": ["NoSpendingPolicy", "SpendingPolicyBase"],
    "petals.utils": [*AUTO, "get_remote_module_infos"],
    "petals.utils.auto_config": AUTO,
    "petals.utils.dht": ["get_remote_module_infos"],
    "petals.utils.convert_block": ["QuantType"],
    "petals.utils.logging": ["initialize_logs"],
    "petals.utils.version": ["get_compatible_model_repo"],
    "petals.utils.peft": ["load_peft"],
    "petals.constants": ["PUBLIC_INITIAL_PEERS", "DTYPE_MAP"],
    "petals.data_structures": [
        "UID_DELIMITER",
        "CHAIN_DELIMITER",
        "ModelInfo",
        "ServerInfo",
        "ServerState",
        "RemoteModuleInfo",
        "RemoteSpanInfo",
        "parse_uid",
    ],
    "petals.dht_utils": ["get_remote_module_infos", "get_remote_sequence", "get_remote_module"],
    "petals.server.from_pretrained": ["load_pretrained_block"],
    "petals.server.handler": ["CACHE_TOKENS_AVAILABLE"],
    "petals.bloom.from_pretrained": ["load_pretrained_block"],
    **{
        f"petals.models.{family.lower()}{part}": [f"Distributed{family}{suffix}" for suffix in suffixes]
        for family in FAMILIES
        for part, suffixes in (("", CLASSES), (".config", CLASSES[:1]), (".model", CLASSES[1:]))
    },
    "petals.models.llama.speculative_model": ["DistributedLlamaForSpeculativeGeneration"],
}
REFUSED = [
    ("petals.utils.auto_config", "register_model_classes", "docs/custom-model.md"),
    ("petals.server.server", "Server", "petals peer --serve"),
    ("petals.utils.generation_algorithms", "NucleusAlgorithm", "top_p"),
    ("petals.utils.generation_constraints", "ABCBloomConstraint", "logits_processor="),
    ("petals.client.ptune", "PTuneConfig", "tuning_mode="),
    ("petals.models.bloom.block", "WrappedBloomBlock", "load_span"),
    ("petals", "declare_active_modules", "announces its blocks by itself"),
    ("petals", "WrappedMixtralBlock", "load_span"),
]
NAMES = [(module, name) for module, names in FOUND.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_a_name_is_found(module: str, name: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = getattr(importlib.import_module(module), name)
    assert value is not None
    moved = module != "petals" or name in TOP_LEVEL
    notes = [text for each in said if (text := str(each.message)).startswith(f"{module}.{name} ")]
    assert len(notes) == moved


@pytest.mark.parametrize(("module", "name", "hint"), REFUSED, ids=[name for _, name, _ in REFUSED])
def test_a_name_without_a_counterpart_says_the_new_way(module: str, name: str, hint: str) -> None:
    with pytest.raises(ImportError, match=re.escape(hint)):
        getattr(importlib.import_module(module), name)


def test_every_old_module_is_listed() -> None:
    """In the table above and on the page."""
    folder = ROOT / "petals" / "compat"
    for path in sorted(folder.rglob("*.py")):
        importlib.import_module(
            ".".join(("petals", *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        )
    tables = {name for name in TABLES if name.startswith("petals.") and not name.startswith("petals.compat.")}
    for module in tables:
        assert f"`{module}`" in PAGE or module.startswith("petals.models."), f"docs/migrating.md lacks {module}"
    told = {*FOUND, *(module for module, _, _ in REFUSED)}
    silent = {module for module in tables - told if not all(isinstance(each, Gone) for each in TABLES[module].values())}
    assert not silent, "names that no test looks for"


def test_the_note_points_at_the_program(tmp_path: Path) -> None:
    program = tmp_path / "old.py"
    program.write_text("from petals.constants import PUBLIC_INITIAL_PEERS\nfrom petals.client import ClientConfig\n")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, cwd=ROOT, check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=120,
    )  # fmt: skip
    assert f"{program}:1: DeprecationWarning: petals.constants.PUBLIC_INITIAL_PEERS is kept for programs" in done.stderr
    assert f"{program}:2: DeprecationWarning: petals.client.ClientConfig has moved: from petals import" in done.stderr


def test_names_that_nobody_has() -> None:
    for module in ("petals", "petals.client", "petals.data_structures"):
        assert not hasattr(importlib.import_module(module), "Nothing")
    assert "ClientConfig" in dir(importlib.import_module("petals.client.config"))


def test_nobody_in_the_house_uses_the_old_names() -> None:
    for path in ROOT.glob("*/**/*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("cli", "dht", "gateway", "models", "peer", "protocols"):
            assert "petals.compat" not in path.read_text(), path


def test_the_facts_that_petals_checks_are_checked_here() -> None:
    """Every test that the page names is there."""
    section = PAGE.split("## What Petals' own tests check")[1].split("\n## ")[0]
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", section)
    assert len(named) + section.count("cannot apply: ") == section.count("\n| ") - section.count("\n| **") - 1 >= 71
    for file, test in named:
        assert re.search(rf"^(async )?def {test}\(", (ROOT / file).read_text(), re.M), f"{file}::{test}"
