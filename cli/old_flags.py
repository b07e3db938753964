"""The flags of Petals' `run_server` and `run_dht` (1.0 and later) in the spelling of `petals peer`.

Every old flag is in exactly one of the tables below: it has another name, its value is translated, it is not needed, or
it is refused with the new way in the message. docs/migrating.md lists them, and a test compares the two. What is in no
table goes to `petals peer` as it is, so that old and new flags mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petals.cli.main import underscored
from petals.protocols.errors import UserError

RENAMED: Mapping[str, str] = {
    "--block_indices": "--serve",
    "--host_maddrs": "--listen",
    "--identity_path": "--identity",
    "--announce_maddrs": "--announce",
}
"""Old name -> ours; the values stay as they are."""

UNCHANGED = (
    "--identity",
    "--initial_peers",
    "--new_swarm",
    "--num_blocks",
    "--torch_dtype",
    "--device",
    "--quant_type",
    "--adapters",
    "--balance_quality",
    "--mean_balance_check_period",
    "--public_name",
    "--revision",
    "--token",
)
"""The same here."""

_ONE_PROCESS = "one process without a daemon answers everybody"
_REACH = "peers find out by themselves whether others can reach them, and use relays where not"
NOT_NEEDED: Mapping[str, str] = {
    "--num_handlers": _ONE_PROCESS,
    "--prefetch_batches": _ONE_PROCESS,
    "--sender_threads": _ONE_PROCESS,
    "--increase_file_limit": _ONE_PROCESS,
    "--daemon_startup_timeout": _ONE_PROCESS,
    "--no_auto_relay": _REACH,
    "--use_auto_relay": _REACH,
    "--no_relay": _REACH,
    "--use_relay": _REACH,
    "--skip_reachability_check": "no outside service is asked",
    "--stats_report_interval": "--verbose logs, and petals status asks",
    "--refresh_period": "the directory refreshes itself",
    "--min_batch_size": "requests are not held back to be gathered",
    "--inference_max_length": "the cache budget bounds sessions",
    "--max_chunk_size_bytes": "prompts are computed in short pieces anyway",
    "--dht_prefix": "a swarm is named by the digest of its checkpoint",
    "--prefix": "a swarm is named by the digest of its checkpoint",
}
"""Accepted with a note: what the flag was for needs nothing here."""

REFUSED: Mapping[str, str] = {
    "--use_ipfs": "give the address of a peer with --initial_peers",
    "--custom_module_path": "see docs/custom-model.md: a model class of your own is registered with transformers",
    "--max_disk_space": "nothing is ever deleted here; only the files of the blocks that are served are fetched, and "
    "`hf cache rm` makes room",
}
"""Refused, with what to do instead."""

_SECONDS: Mapping[str, tuple[str, float]] = {
    "--update_period": ("announce_s", 1.0),
    "--expiration": ("announce_s", 1 / 3),  # a record expires after three times this
    "--max_alloc_timeout": ("max_wait_s", 1.0),
    "--alloc_timeout": ("max_wait_s", 1.0),
    "--session_timeout": ("session_idle_s", 1.0),
    "--step_timeout": ("session_idle_s", 1.0),
    "--request_timeout": ("payload_s", 1.0),
}
_TOKENS: Mapping[str, str] = {"--attn_cache_tokens": "cache_tokens", "--max_batch_size": "max_batch_tokens"}
COMPRESSIONS: Mapping[str, str] = {"NONE": "none", "FLOAT16": "float16", "BLOCKWISE_8BIT": "int8"}
SIZES: Mapping[str, float] = {
    "": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30,
}  # fmt: skip


@dataclass
class NewCommand:
    """An old command line in the new spelling."""

    words: list[str] = field(default_factory=list)
    """For `petals peer`, without the verb."""
    model: str | None = None
    serve: dict[str, Any] = field(default_factory=dict)
    """Fields of `ServeConfig` that have no flag of their own."""
    environment: dict[str, str] = field(default_factory=dict)
    """To set before anything is imported."""
    notes: list[str] = field(default_factory=list)
    """For stderr, one line each."""
    measure_only: bool = False
    """`--throughput dry_run`: measure, print, exit."""
    port: str | None = None
    public_ip: str | None = None

    def peer_words(self) -> list[str]:
        """The words for `petals peer`, model in front."""
        return ([] if self.model is None else [self.model]) + self.words

    def bench_words(self) -> list[str]:
        """The words for `petals bench`, which measures what the server would announce."""
        kept = [] if self.model is None else [self.model]
        taken = {"--torch_dtype": "--dtype", "--quant_type": "--quant_type", "--revision": "--revision"}
        for word, value in zip(self.words, self.words[1:], strict=False):
            if word in taken and value != "auto":
                kept += [taken[word], value]
        return kept


def new_command(argv: Sequence[str]) -> NewCommand:
    """Translate the words after `run_server` or `run_dht`.

    Raises:
        UserError: a flag, or a value of one, that has no meaning here; says what to do instead.
    """
    command = NewCommand()
    for flag, values in _flags([underscored(word) for word in argv]):
        _translate(command, flag, values)
    _addresses(command)
    return command


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words up to the next one; what stands before the first has the flag ""."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word.startswith("--") or word in ("-c", "-h", "-v"):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        else:
            found[-1][1].append(word)
    return found


def _translate(command: NewCommand, flag: str, values: list[str]) -> None:
    if not flag:
        command.model, command.words = next(iter(values), None), values[1:]
    elif flag in REFUSED:
        raise UserError(f"{flag} is not taken: {REFUSED[flag]}")
    elif flag in NOT_NEEDED:
        command.notes.append(f"{flag} is not needed: {NOT_NEEDED[flag]}")
    elif flag in _SECONDS:
        name, factor = _SECONDS[flag]
        command.serve[name] = _positive(flag, values) * factor
    elif flag in _TOKENS:
        command.serve[_TOKENS[flag]] = round(_positive(flag, values))
    elif flag in CONVERTED:
        CONVERTED[flag](command, flag, values)
    elif flag in ("--adapters", "--initial_peers") and not values:
        pass  # empty lists, which scripts pass when there is nothing to name
    else:
        command.words += [RENAMED.get(flag, flag), *values]


def _one(flag: str, values: list[str]) -> str:
    if len(values) != 1:
        raise UserError(f"{flag} takes one value, not {len(values)}")
    return values[0]


def _positive(flag: str, values: list[str]) -> float:
    text = _one(flag, values)
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"{flag} takes a number above 0, not {text!r}")
    return number


def _model(command: NewCommand, flag: str, values: list[str]) -> None:
    command.model = _one(flag, values)


def _port(command: NewCommand, flag: str, values: list[str]) -> None:
    text = _one(flag, values)
    if not text.isdecimal() or not 0 <= int(text) < 1 << 16:
        raise UserError(f"{flag} takes a number from 0 to 65535, not {text!r}")
    command.port = text


def _public_ip(command: NewCommand, flag: str, values: list[str]) -> None:
    command.public_ip = _one(flag, values)


def _addresses(command: NewCommand) -> None:
    """--port and --public_ip, once all words are known."""
    if command.public_ip is not None and command.port is None:
        raise UserError("--public_ip needs --port, which the router must forward to this machine")
    if command.port is None:
        return
    if "--listen" in command.words or (command.public_ip is not None and "--announce" in command.words):
        raise UserError("--port and --public_ip stand for --host_maddrs and --announce_maddrs: give one kind of them")
    command.words += ["--listen", f"/ip4/0.0.0.0/tcp/{command.port}"]
    if command.public_ip is not None:
        command.words += ["--announce", f"/ip4/{command.public_ip}/tcp/{command.port}"]


def _cache_size(command: NewCommand, flag: str, values: list[str]) -> None:
    size = re.fullmatch(r"([0-9.]+)\s*([A-Z]*)", _one(flag, values).upper())
    if size is None or size[2] not in SIZES:
        raise UserError(f"{flag} takes a size such as 16GB, not {values[0]!r}")
    command.words += ["--cache_mb", f"{_positive(flag, [size[1]]) * SIZES[size[2]] / 1e6:g}"]


def _throughput(command: NewCommand, flag: str, values: list[str]) -> None:
    said = _one(flag, values)
    if said == "dry_run":
        command.measure_only = True
    elif said not in ("auto", "eval"):  # every server measures itself when it starts
        command.words += ["--throughput", said]


def _compression(command: NewCommand, flag: str, values: list[str]) -> None:
    said = _one(flag, values)
    if said.upper() not in COMPRESSIONS and said not in COMPRESSIONS.values():
        raise UserError(f"{flag} {said} is not taken: choose {', '.join(COMPRESSIONS)}")
    command.words += ["--compression", COMPRESSIONS.get(said.upper(), said)]


def _load_in_8bit(command: NewCommand, flag: str, values: list[str]) -> None:
    said = (values or ["true"])[0].lower()
    if len(values) > 1 or said not in ("true", "1", "yes", "false", "0", "no"):
        raise UserError(f"{flag} takes true or false, not {' '.join(values)!r}; here it is --quant_type int8")
    if said in ("true", "1", "yes"):
        command.words += ["--quant_type", "int8"]


def _tensor_parallel(command: NewCommand, flag: str, values: list[str]) -> None:
    if len(set(values)) != 1:
        raise UserError(f"{flag} is not taken: start one peer for each device, each with --device")
    if "--device" not in command.words:
        command.words += ["--device", values[0]]
    if len(values) > 1:
        command.notes.append(f"{flag}: all of them are {values[0]}, which computes the blocks whole")


def _auth_token(command: NewCommand, flag: str, values: list[str]) -> None:
    if values:  # without a value: the token that `hf auth login` has saved, which is used anyway
        command.words += ["--token", _one(flag, values)]


def _cache_dir(command: NewCommand, flag: str, values: list[str]) -> None:
    command.environment["HF_HUB_CACHE"] = _one(flag, values)


def _config(command: NewCommand, flag: str, values: list[str]) -> None:
    file = _one(flag, values)
    if Path(file).suffix not in (".yml", ".yaml"):
        command.words += ["--config", file]
        return
    for name, those in read_yaml(Path(file)):
        _translate(command, name, those)


CONVERTED: Mapping[str, Callable[[NewCommand, str, list[str]], None]] = {
    "--converted_model_name_or_path": _model,
    "--port": _port,
    "--public_ip": _public_ip,
    "--attn_cache_size": _cache_size,
    "--throughput": _throughput,
    "--compression": _compression,
    "--load_in_8bit": _load_in_8bit,
    "--tensor_parallel_devices": _tensor_parallel,
    "--use_auth_token": _auth_token,
    "--cache_dir": _cache_dir,
    "-c": _config,
    "--config": _config,
}
"""Whose values are translated."""

TRANSLATED = (*CONVERTED, *_SECONDS, *_TOKENS)
OLD_FLAGS = (*UNCHANGED, *RENAMED, *TRANSLATED, *NOT_NEEDED, *REFUSED)
"""All of 1.0 and head."""


def read_yaml(path: Path) -> list[tuple[str, list[str]]]:
    """A file of Petals' `-c`: flag -> values, in its order.

    Raises:
        UserError: it cannot be read, or is no table of flags.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"-c {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"-c {path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"-c {path}: expected lines such as num_blocks: 12")
    found = []
    for name, value in content.items():
        flag = underscored("--" + str(name).lstrip("-"))
        if flag in ("--model", "--model_name_or_path"):
            flag = "--converted_model_name_or_path"
        if value is False or value is None:
            continue  # a switch that is off, or nothing said
        values = [] if value is True else [str(each) for each in (value if isinstance(value, list) else [value])]
        found.append((flag, values))
    return found
