"""What a new user meets: a clean clone, an empty home, and nothing of ours in the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.surroundings import NO_NETWORK, ROOT

sys.path.insert(0, str(ROOT / "scripts"))
try:
    import fresh
    import versions
finally:
    sys.path.pop(0)


@pytest.mark.swarm
@pytest.mark.timeout(600)
def test_the_command_works_in_a_clean_clone_with_an_empty_home() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/fresh.py", "--cheap"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == fresh.NO_NETWORK:
        pytest.skip(f"{NO_NETWORK}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert any(line.startswith(fresh.PROMPT) for line in done.stdout.splitlines())


def test_nothing_is_inherited_but_where_packages_are(tmp_path: Path) -> None:
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    (tmp_path / ".config" / "pip" / "pip.conf").write_text("[global]\n")
    given = {
        "HOME": str(tmp_path), "PATH": f"{ROOT}/.venv/bin:/usr/bin", "PIP_INDEX_URL": "x", "PIP_CACHE_DIR": "y",
        "https_proxy": "p", "SSL_CERT_FILE": "c", "REQUESTS_CA_BUNDLE": "b", "NODE_EXTRA_CA_CERTS": "n",
        "PETALS_SEED": "1", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": "v", "XDG_CACHE_HOME": "z", "HF_TOKEN": "secret",
    }  # fmt: skip
    bare = fresh.bare(given, tmp_path / "new")
    assert bare == {
        "HOME": str(tmp_path / "new"), "PATH": "/usr/bin", "PIP_INDEX_URL": "x", "https_proxy": "p",
        "SSL_CERT_FILE": "c", "REQUESTS_CA_BUNDLE": "b", "NODE_EXTRA_CA_CERTS": "n",
        "PIP_CONFIG_FILE": str(tmp_path / ".config" / "pip" / "pip.conf"),
    }  # fmt: skip


def test_the_ends_are_what_the_ranges_say() -> None:
    installed = {"torch": "2.13.0+cpu"}
    oldest, newest = (versions.requirements(end, installed) for end in versions.ENDS)
    assert len(oldest) == len(newest)
    assert "torch==2.13.0+cpu" in oldest
    assert "torch==2.13.0+cpu" in newest, "other releases of torch come with CUDA only"
    for name in versions.SHOWN:
        (low,) = [each for each in oldest if each.startswith(name)]
        assert "==" in low, "every library that is shown has a lower bound"
    assert any(each.startswith("hypercorn[trio]==") for each in oldest), "extras are kept"


def test_a_run_writes_its_own_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "versions.md"
    page.write_text((ROOT / "docs" / "versions.md").read_text())
    monkeypatch.setattr(versions, "PAGE", page)
    versions.note("oldest", dict.fromkeys(versions.SHOWN, "1.0"), "7 passed, 0 failed, 0 skipped")
    versions.note("newest", dict.fromkeys(versions.SHOWN, "2.0"), "8 passed, 0 failed, 1 skipped")
    text = page.read_text()
    assert "| `transformers` | 1.0 | 2.0 |" in text
    assert "- `scripts/test --oldest`: 7 passed" in text
    versions.note("oldest", dict.fromkeys(versions.SHOWN, "1.1"), "9 passed, 0 failed, 0 skipped")
    assert "| `transformers` | 1.1 | 2.0 |" in page.read_text()
    assert page.read_text().count("\n| `") == len(versions.SHOWN)
