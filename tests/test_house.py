"""The house itself: imports point down, the packaging tables tell the truth, the wheel holds what it should."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import petals

ROOT = Path(__file__).parent.parent
ROOMS = ("cli", "dht", "gateway", "models", "peer", "protocols")
MAY_IMPORT = {
    "cli": {"cli", "gateway", "peer", "dht", "models", "protocols", "errors"},
    "gateway": {"gateway", "peer", "dht", "models", "protocols", "errors"},
    "peer": {"peer", "dht", "models", "protocols", "errors"},
    "dht": {"dht", "protocols", "errors"},
    "models": {"models", "errors"},
    "protocols": {"protocols", "errors"},
}
"""`petals/errors.py` is the root of all errors, and imports nothing."""
LIBP2P_LIVES_IN = (
    "dht/directory.py",
    "peer/base/identity.py",
    "peer/base/public_key.py",
    "peer/net/",
)
TRIO_LIVES_IN = (
    "cli/bench.py",
    "cli/chat.py",
    "cli/doctor/checks.py",
    "cli/main.py",
    "cli/peer.py",
    "cli/run_dht.py",
    "cli/status/client.py",
    "cli/status/status.py",
    "dht/",
    "gateway/",
    "peer/",
    "protocols/stream.py",
)
TORCH_LIVES_IN = (
    "models/",
    "peer/client/",
    "peer/engine/",
    "peer/pretrained.py",
    "peer/server/",
    "protocols/tensors.py",
)


def sources() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if not path.name.endswith("_pb2.py"):
                yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield node.module or ""


@pytest.mark.parametrize(("path", "tree"), [pytest.param(*each, id=each[0]) for each in sources()])
def test_imports_point_down(path: str, tree: ast.Module) -> None:
    room = path.split("/")[0]
    for name in imported(tree):
        top, _, rest = name.partition(".")
        assert top not in ROOMS, f"{path} imports {name}: say petals.{name}"
        if top == "petals" and rest:
            assert rest.split(".")[0] in MAY_IMPORT[room], f"{path} imports {name}"
        for library, homes in (("libp2p", LIBP2P_LIVES_IN), ("trio", TRIO_LIVES_IN), ("torch", TORCH_LIVES_IN)):
            if top == library:
                assert path.startswith(homes), f"{path} imports {library}"


RUNS_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "runpy"}
"""Modules whose way of reading is running."""


def runs_strangers_code(tree: ast.Module) -> Iterator[str]:
    """Whatever could run what a file or a peer brings, line by line."""
    for name in imported(tree):
        if name.split(".")[0] in RUNS_CODE:
            yield f"imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {word.arg: word.value for word in node.keywords}
        constants = {name: value.value for name, value in words.items() if isinstance(value, ast.Constant)}
        if called in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "torch.hub.load"):
            yield f"line {node.lineno} calls {called}"
        if called.endswith("torch.load") and constants.get("weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if "trust_remote_code" in words and constants.get("trust_remote_code") is not False:
            yield f"line {node.lineno}: trust_remote_code that is not False"
        is_auto = re.match(r"Auto(Config|Tokenizer|Model\w*|Processor)\.from_(pretrained|config)$", called)
        if is_auto and "trust_remote_code" not in words:  # unset, the library asks the user in a prompt
            yield f"line {node.lineno}: {called} without trust_remote_code=False"
        if constants.get("shell") is True or constants.get("allow_pickle") is True:
            yield f"line {node.lineno}: {called} with shell or allow_pickle"


@pytest.mark.parametrize(("path", "tree"), [pytest.param(*each, id=each[0]) for each in sources()])
def test_nothing_runs_what_strangers_send(path: str, tree: ast.Module) -> None:
    assert not list(runs_strangers_code(tree))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoConfig.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)",
        "load(path, trust_remote_code=asked)",
        "eval(text)",
        "subprocess.run(words, shell=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_what_would_run_it_is_seen(code: str) -> None:
    assert list(runs_strangers_code(ast.parse(code)))
    assert not list(runs_strangers_code(ast.parse("torch.load(path, weights_only=True); re.compile('x')")))


def tables() -> tuple[set[str], dict[str, str]]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return set(tool["packages"]), tool["package-dir"]


def test_every_folder_with_code_stands_in_both_tables() -> None:
    folders = {"petals"}
    for room in ROOMS:
        folders |= {
            "petals." + str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / room).rglob("*.py")
        }
    folders |= {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "petals" / "compat").rglob("*.py")
    }
    packages, directories = tables()
    assert packages == folders
    assert set(directories) == folders
    for package, directory in directories.items():
        assert (ROOT / directory / "__init__.py").is_file(), f"{package} is not a package"


def test_the_links_lead_to_the_rooms() -> None:
    for room in ROOMS:
        assert (ROOT / "petals" / room).resolve() == ROOT / room


def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names} == {"petals", f"petals_libp2p-{petals.__version__}.dist-info"}
    for expected in (
        "petals/py.typed",
        "petals/protocols/SPEC.md",
        "petals/peer/net/__init__.py",
        "petals/gateway/static/chat.html",
    ):
        assert expected in names
    assert not [name for name in names if name.endswith(".key") or "/tests/" in name]


def test_the_help_and_the_directory_start_without_torch() -> None:
    probe = (
        "import sys; import petals.cli.main, petals.cli.run_dht, petals.cli.run_server, petals.cli.healthcheck; "
        "import petals.gateway.keys, petals.peer.bootstrap; "
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=ROOT)
