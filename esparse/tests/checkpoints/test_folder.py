"""A checkpoint's folder: esparse reads the weight files that stock transformers reads, and headers that safetensors reads."""

import json
import os
import random
import shutil
import struct
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import esparse
from esparse import __main__
from esparse.checkpoints import models, reader
from esparse.checkpoints.folder import (
    ADAPTER,
    INDEX,
    OUTDATED,
    PLAN,
    REPORT,
    SINGLE,
    SKIPPING_FILE,
    header,
    side_files,
    weight_files,
)
from esparse.checkpoints.folder import tensors as tensors_of
from esparse.pruning.skipping import skipping_betas
from esparse.tests.conftest import random_tokens
from esparse.tests.families import family_model

TOKENS, EMBEDDINGS = random_tokens(), "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A model in several files with an index."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    family_model("mixtral").save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Another model of the same shape, in one file."""
    folder = tmp_path_factory.mktemp("single") / "model"
    family_model("mixtral", seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sharded, tmp_path) -> Path:
    return shutil.copytree(sharded, tmp_path / "folder")


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


# --- which weights --------------------------------------------------------------------------------------------------------


def single_beside_an_index(folder: Path, single: Path) -> None:
    shutil.copy(single / SINGLE, folder)


def single_beside_an_index_without_shards(folder: Path, single: Path) -> None:
    for path in weight_files(folder):
        path.unlink()
    shutil.copy(single / SINGLE, folder)


def strays(folder: Path, single: Path) -> None:
    for name in ("consolidated.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors"):
        shutil.copy(single / SINGLE, folder / name)


def named_by_the_config(folder: Path, single: Path) -> None:
    (folder / "of_theirs").mkdir()
    shutil.copy(single / SINGLE, folder / "of_theirs/own.safetensors")
    change(folder / "config.json", transformers_weights="of_theirs/own.safetensors")


def index_named_by_the_config(folder: Path, single: Path) -> None:
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    shutil.copy(single / SINGLE, folder)
    change(folder / "config.json", transformers_weights="other.safetensors.index.json")


def an_index_with_wrong_places(folder: Path, single: Path) -> None:
    places = index(folder)
    change(folder / INDEX, weight_map={name: file for name, file in zip(places, reversed(places.values()), strict=True)})


def an_index_without_a_tensor(folder: Path, single: Path) -> None:
    change(folder / INDEX, weight_map={name: file for name, file in index(folder).items() if name != EMBEDDINGS})


STATES = [single_beside_an_index, single_beside_an_index_without_shards, strays, named_by_the_config]
STATES += [index_named_by_the_config, an_index_with_wrong_places, an_index_without_a_tensor]


@pytest.mark.parametrize("state", STATES)
def test_what_stock_reads_is_read(state, folder, single):
    state(folder, single)
    stock, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    opened = reader.CheckpointReader(folder)
    for name, weight in stock.state_dict().items():
        if name in opened.entries:  # under the names of the file: all but experts and gates
            assert torch.equal(opened.read(name), weight)
    assert torch.equal(opened.read("model.layers.1.block_sparse_moe.gate.weight"), stock.model.layers[1].mlp.gate.weight)
    assert {entry.file for entry in opened.entries.values()} == set(weight_files(folder))


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def bin_alone(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


REFUSED = {
    "no weights": (no_weights, "There are no safetensors in .*: no model.safetensors and no model.safetensors.index.json"),
    "bin alone": (bin_alone, "There are no safetensors in"),
    "a shard is missing": (lambda folder: weight_files(folder)[0].unlink(), "names model-00001-of-.*, which is not in it"),
    "an empty index": (lambda folder: change(folder / INDEX, weight_map={}), "no weight_map from tensors to files"),
    "no metadata": (lambda folder: change(folder / INDEX, metadata=None), "has no metadata, without which transformers reads"),
    "no config": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is no model config"),
    "a pickle": (lambda folder: change(folder / "config.json", transformers_weights="x.bin"), "names x.bin as its weights"),
    "not there": (
        lambda folder: change(folder / "config.json", transformers_weights="x.safetensors"),
        "There are no safetensors in .*: no x.safetensors is there",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_stock_cannot_read_is_one_sentence(what, folder):
    spoil, words = REFUSED[what]
    spoil(folder)
    with pytest.raises(Exception):  # noqa: B017 (each its own)
        transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    for read in (reader.CheckpointReader, weight_files, lambda folder: esparse.load_model(str(folder))):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
            read(folder)
        assert len(str(raised.value).splitlines()) == 1


def test_what_nothing_settles_is_refused(folder):
    """Stock takes a tensor that two files have from the last in memory, and from the index's where it stays on disk."""
    name, file = next(iter(index(folder).items()))
    other = next(path for path in weight_files(folder) if path.name != file)
    save_file(load_file(other) | {name: load_file(folder / file)[name] + 1}, other, {"format": "pt"})
    with pytest.raises(ValueError, match=f"both have a tensor {name}: nothing says which of them counts"):
        reader.CheckpointReader(folder)


def test_a_distributed_checkpoint_is_refused(folder, single):
    shutil.copy(single / SINGLE, folder / "shard-00001-model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="is a distributed checkpoint"):
        reader.CheckpointReader(folder)


def test_only_what_is_meant_counts(folder, single, tmp_path, monkeypatch):
    run = lambda: esparse.Run(str(folder), folder=tmp_path / "run")  # noqa: E731
    strays(folder, single)
    key, meant = run().model_key, sum(tensor.nbytes for path in weight_files(folder) for tensor in load_file(path).values())
    for free, streamed in ((meant / 0.8 - 8, True), (meant / 0.8 + 8, False)):
        monkeypatch.setattr(models, "free_memory", lambda device, free=free: free)
        assert run().streamed == streamed
    os.utime(folder / "consolidated.safetensors", (0, 0))
    (folder / "trainer_state.json").write_text("{}")
    assert run().model_key == key
    os.utime(weight_files(folder)[0], (0, 0))
    assert run().model_key != key


# --- names that lead out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["../outside.safetensors", "{}/outside.safetensors", "a_link.safetensors", "d/../../x"])
def test_an_index_names_no_file_outside(named, folder, single, tmp_path):
    shutil.copy(single / SINGLE, tmp_path / "outside.safetensors")
    (folder / "a_link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    named = named.format(tmp_path)
    change(folder / INDEX, weight_map=index(folder) | {EMBEDDINGS: named})
    for read in (reader.CheckpointReader, weight_files, lambda folder: esparse.load_model(str(folder))):
        with pytest.raises(ValueError, match=f"(names the file {named}, which lies outside|{named} is a link to .*outside)"):
            read(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "NOTICE", "additional_chat_templates/x.jinja", "code.py"])
def test_nothing_from_outside_is_copied(name, folder, tmp_path):
    change(folder / "config.json", auto_map={"AutoModel": "code.Model"})
    (folder / "additional_chat_templates").mkdir()
    private = tmp_path / "private"
    private.write_bytes((folder / "config.json").read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(ValueError, match=f"{name} is a link to .*private, outside the folder"):
        esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS)
    assert not list(tmp_path.glob("*pruned*"))


def test_a_folder_of_links_out_is_copied_nowhere(folder, tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/x.jinja").write_text("private")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(ValueError, match="x.jinja is a link to .*templates/x.jinja, outside the folder"):
        side_files(folder, same_experts=False)


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hubs_cache_lead_to_its_blobs(shared, folder, tmp_path):
    """A snapshot's files are links to its repository's blobs, and these, for huggingface_hub from 2 on, to the cache's."""
    (folder / "tokenizer.json").write_text("{}")
    hub = tmp_path / "hub"
    snapshot, blobs = hub / "models--a--b/snapshots/0123", hub / "models--a--b/blobs"
    for made in (snapshot, blobs, hub / "blobs/ab"):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, hub / f"blobs/ab/{number}" if shared else blobs / f"{number}")
        if shared:
            (blobs / f"{number}").symlink_to(f"../../blobs/ab/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "a_name").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "a_name"):
        assert {name: found.shape for name, found in tensors_of(place).items()} == {
            name: found.shape for name, found in tensors_of(folder).items()
        }
        assert side_files(place, same_experts=False) == (["generation_config.json", "tokenizer.json"], {})
    (snapshot / "NOTICE").symlink_to("../../refs")
    (hub / "models--a--b/refs").write_text("private")
    with pytest.raises(ValueError, match="NOTICE is a link to"):
        side_files(snapshot, same_experts=False)


# --- headers --------------------------------------------------------------------------------------------------------------


def about(dtype: str = "F32", shape: object = (1,), since: object = 0, until: object = 4) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [since, until]}


def write(path: Path, head: dict | list | bytes, data: int, length: int | None = None) -> Path:
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + bytes(data))
    return path


ONE = json.dumps(about())
RIGHT = [
    ({"a": about()}, 4),
    ({}, 0),
    ({"__metadata__": {"format": "pt"}, "a": about()}, 4),
    ({"a": about(shape=[]), "b": about("U8", [0, 7], 4, 4)}, 4),
    ({"a": about(since=4, until=8), "b": about()}, 8),
    ({"a": about("U8", [1], 0, 1), "b": about("F64", [1], 1, 9)}, 9),  # not aligned
    ({"a": about("F4", [8]), "b": about("F8_E8M0", [4], 4, 8), "c": about("C64", [1], 8, 16)}, 16),
    (b" " + json.dumps({"a": about()}).encode() + b"   ", 4),
]
WRONG = [
    ({"a": about()}, 3, "tensor a ends at byte"),
    ({"a": about()}, 8, "the last tensor, a, ends at byte"),
    ({"a": about(), "b": about(since=2, until=6)}, 6, "tensor b overlaps a"),
    ({"a": about(), "b": about()}, 4, "tensor b overlaps a"),
    ({"a": about(), "b": about(since=8, until=12)}, 12, "tensor b leaves a gap after a"),
    ({"a": about("Q9")}, 4, "tensor a is of dtype Q9, which is none of safetensors'"),
    ({"a": about(["F32"])}, 4, "tensor a has no dtype, shape and offsets"),
    ({"a": about(shape=[3])}, 4, r"tensor a of F32 \[3\] has 4 bytes"),
    ({"a": about(shape=[2**40, 2**40])}, 4, "tensor a of F32"),
    ({"a": about(since=-4, until=0)}, 4, "tensor a has no"),
    ({"a": about(shape=[-1])}, 4, "tensor a has no"),
    ({"a": about(shape=[True])}, 4, "tensor a has no"),
    ({"a": about(shape=[1.0])}, 4, "tensor a has no"),
    ({"a": about(since=4, until=0)}, 4, "tensor a ends at byte"),
    ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "tensor a has no"),
    ({"a": about() | {"data_offsets": [0, 4, 8]}}, 4, "tensor a has no"),
    ({"a": 1}, 4, "tensor a has no"),
    ([], 0, "its header maps no names"),
    (b"3", 0, "its header is no JSON"),
    ({"__metadata__": []}, 0, "its metadata are no text"),
    ({"__metadata__": {"n": 1}}, 0, "its metadata are no text"),
    (f'{{"a":{ONE},"a":{json.dumps(about(since=4, until=8))}}}'.encode(), 8, "a is given twice"),
    (f'{{"a":{ONE[:-1]},"shape":[1]}}}}'.encode(), 4, "shape is given twice"),
    (f'{{"\xff":{ONE}}}'.encode("latin1"), 4, "its header is no JSON"),
    (f'{{"\\ud800":{ONE}}}'.encode(), 4, "its header is no JSON"),
    (f'\ufeff{{"a":{ONE}}}'.encode(), 4, "its header is no JSON"),
    (f'{{"a":{ONE}}}\0'.encode(), 4, "its header is no JSON"),
    (b"[" * 100_000, 0, "its header is no JSON"),
]
# What safetensors lets pass, and a load would stumble over, or which hides something.
LET_PASS = [
    (f'{{"a":{ONE},"a":{ONE}}}'.encode(), 4, "a is given twice"),
    (b'{"__metadata__":{"x":"1","x":"2"}}', 0, "x is given twice"),
    ({"a": about(shape=[0, 2**63], until=0)}, 0, "tensor a has no"),
]


@pytest.mark.parametrize("head, data", RIGHT)
def test_right_headers_are_read_as_safetensors_reads_them(head, data, tmp_path):
    path = write(tmp_path / "x.safetensors", head, data)
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: (list(entry.shape), entry.stored) for name, entry in header(path).items()} == {
            name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()
        }


@pytest.mark.parametrize("head, data, words", WRONG + LET_PASS)
def test_wrong_headers_are_named(head, data, words, tmp_path):
    path = write(tmp_path / "x.safetensors", head, data)
    with pytest.raises(ValueError, match=rf"^{path}.*{words}"):
        header(path)
    if (head, data, words) not in LET_PASS:
        with pytest.raises(Exception, match="deserializing header"):
            safe_open(path, framework="pt").__enter__()


@pytest.mark.parametrize("length", [0, 5, 10**9, 2**40, 2**63])
def test_a_header_longer_than_its_file_is_named(length, tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": about()}, 4, length)
    with pytest.raises(ValueError, match=f"^{path} is truncated or corrupt"):
        header(path)
    path.write_bytes(b"\0" * 7)
    with pytest.raises(ValueError, match=f"^{path} is truncated or corrupt .its header claims 0 bytes, the file has 7"):
        header(path)


def test_a_spoiled_byte_is_found_where_safetensors_finds_it(tmp_path):
    """Any byte of a header changed: both refuse, or both read the same."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 2), "b.c": torch.ones(5, dtype=torch.bfloat16)}, path, {"format": "pt"})
    right, drawn = path.read_bytes(), random.Random(0)
    outcomes = set()
    for place in range(8 + int.from_bytes(right[:8], "little")):
        spoiled = bytearray(right)
        spoiled[place] = drawn.choice(b'0123456789,:"{}[]abF \x80')
        path.write_bytes(spoiled)
        try:
            with safe_open(path, framework="pt") as file:
                stock = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except Exception:
            with pytest.raises(ValueError, match="x.safetensors"):
                header(path)
            outcomes.add("refused")
        else:
            assert {name: list(found.shape) for name, found in header(path).items()} == stock
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_a_wrong_header_is_said_before_anything_is_written(folder, tmp_path):
    last = weight_files(folder)[-1]
    last.write_bytes(last.read_bytes() + b"\0" * 8)
    with pytest.raises(ValueError, match=rf"{last.name} is truncated or corrupt \(the last tensor, .*, ends at byte"):
        esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS)
    assert not list(tmp_path.glob("*pruned*"))


# --- beside the weights ---------------------------------------------------------------------------------------------------

KEPT = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"]
KEPT += ["tekken.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "preprocessor_config.json"]
KEPT += ["LICENSE", "MODEL_LICENSE.txt", "Notice", "USE_POLICY.md", "modeling_own.py", "helpers.py", "tokens_own.py"]
LEFT = {name: "no part of a checkpoint" for name in ("notes.txt", "trainer_state.json", "other.py", "params.json", "evals/")}
LEFT |= {name: "other weights" for name in ("consolidated.safetensors", "pytorch_model.bin", "optimizer.pt")}


@pytest.fixture
def littered(folder) -> Path:
    """A folder with everything that belongs to a checkpoint, and much that does not."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "evals").mkdir()
    for name in {*KEPT, *LEFT} - {"generation_config.json", "evals/"}:
        (folder / name).write_text("{}" if name.endswith(".json") else f"# {name}\n")
    (folder / "modeling_own.py").write_text("import torch\nfrom .helpers import a\n")
    change(folder / "config.json", auto_map={"AutoModel": "modeling_own.Model", "AutoConfig": "a/b--far.Config"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokens_own.Slow", None]})
    (folder / "README.md").write_text("the source's")
    for name in OUTDATED:
        (folder / name).write_text(json.dumps({"betas": [0.25] * 3}))
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_belongs_to_a_checkpoint_is_copied_and_the_rest_named(littered, tmp_path):
    report = esparse.prune_checkpoint(littered, tmp_path / "pruned", 6, calibration=TOKENS)
    assert report["not_copied"] == LEFT | OUTDATED
    written = {path.name for path in weight_files(tmp_path / "pruned")} | {"config.json", INDEX, "README.md", PLAN, REPORT}
    assert names(tmp_path / "pruned") == {*KEPT, *written}
    assert all((tmp_path / "pruned" / name).read_bytes() == (littered / name).read_bytes() for name in KEPT)
    assert esparse.PruningPlan.load(tmp_path / "pruned" / PLAN).r == 6
    assert json.loads((tmp_path / "pruned" / REPORT).read_text()) == report
    assert "the source's" not in (tmp_path / "pruned/README.md").read_text()


def test_pruned_again_it_has_its_own_plan(sharded, tmp_path):
    first = esparse.prune_checkpoint(sharded, tmp_path / "six", 6, calibration=TOKENS)
    again = esparse.prune_checkpoint(tmp_path / "six", tmp_path / "five", 5, calibration=TOKENS)
    assert first["not_copied"] == {} and again["not_copied"].keys() == {PLAN, REPORT}
    plan = esparse.PruningPlan.load(tmp_path / "five" / PLAN)
    assert plan.r == 5 and plan.kept == [layer["kept"] for layer in again["layers"]]
    once_more = esparse.prune_checkpoint(tmp_path / "six", tmp_path / "by_plan", plan)
    assert once_more["not_copied"].keys() == {PLAN, REPORT}
    assert esparse.PruningPlan.load(tmp_path / "by_plan" / PLAN) == plan


def test_betas_go_with_the_experts_they_were_made_for(sharded, tmp_path, tiny):
    """One beta a layer is a threshold on the ratio of routing weights: it holds as long as routers choose among the same."""
    model, betas = family_model("mixtral"), [0.1, 0.2, 0.3]
    with esparse.skipping(model, betas):
        esparse.save_model(model, tiny[1], tmp_path / "skipping")
    report = esparse.prune_checkpoint(tmp_path / "skipping", tmp_path / "fewer", 6, calibration=TOKENS)
    assert report["not_copied"] == {SKIPPING_FILE: "betas of the model before pruning"}
    assert skipping_betas(esparse.load_model(str(tmp_path / "fewer"))[0]) is None
    report = esparse.prune_weights_checkpoint(tmp_path / "skipping", tmp_path / "sparse", 0.5, calibration=TOKENS)
    assert report["not_copied"] == {}
    assert skipping_betas(esparse.load_model(str(tmp_path / "sparse"))[0]) == betas


def test_the_result_means_its_own_files(folder, single, tmp_path):
    """A source whose config names its weights' file: the result's are others."""
    named_by_the_config(folder, single)
    esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS)
    _, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]


@pytest.mark.parametrize("command", ["prune", "weights"])
def test_the_commands_say_what_they_left(command, monkeypatch, capsys):
    report = {"n": 8, "r": 6, "seconds": 1, "peak_gb": 1, "left_out": [], "removed": 1, "weights": 2, "unrouted": {}}
    for name in ("prune_checkpoint", "prune_weights_checkpoint"):
        monkeypatch.setattr(esparse, name, lambda *_, **__: report | {"not_copied": {"a.txt": "why", "b/": "what"}})
    how = ["--experts", "6"] if command == "prune" else ["--sparsity", "0.5"]
    assert __main__.main([command, "data/tiny", "nowhere", *how]) == 0
    assert capsys.readouterr().out.endswith("not copied: a.txt (why), b/ (what)\n")


# --- adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_no_model(alone, folder, tmp_path):
    if alone:
        for path in folder.iterdir():
            path.unlink()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / ADAPTER).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "its/base"}))
    words = "is an adapter of its/base, not a model: merge it first" if alone else "holds an adapter .* beside a model"
    for call in (
        lambda: esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS),
        lambda: esparse.trace_checkpoint(folder, TOKENS, tmp_path / "trace"),
        lambda: esparse.preflight(folder, 6),
        lambda: esparse.load_model(str(folder)),
        lambda: esparse.Run(str(folder), folder=tmp_path / "run").model_key,
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert list(tmp_path.iterdir()) == [folder]


# --- from the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(littered, tmp_path, monkeypatch):
    """A hub that has one repository, whose files come in as huggingface_hub selects them."""
    cache = tmp_path / "cache" / "0123"

    def download(source, *, revision, allow_patterns):
        cache.mkdir(parents=True, exist_ok=True)
        assert source == "a/b" and revision in (None, "0123")
        for name in names(littered):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(exist_ok=True)
                shutil.copy(littered / name, cache / name)
        return str(cache)

    def info(*_):
        siblings = [SimpleNamespace(rfilename=name, size=(littered / name).stat().st_size) for name in names(littered)]
        return SimpleNamespace(safetensors=None, siblings=siblings, gated=False)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(sys.modules["esparse.checkpoints.estimate"], "_info", info)
    return littered


@pytest.mark.parametrize("both", [False, True])
def test_of_a_hub_id_only_what_it_means_is_downloaded(both, hub, single):
    if both:
        shutil.copy(single / SINGLE, hub)
    meant = {path.name for path in weight_files(hub)}
    size = sum((hub / name).stat().st_size for name in meant)
    assert esparse.preflight("a/b", 6)["download"].startswith(f"{size / 1e3:.0f} kB in {len(meant)} files")
    folder = reader.fetch("a/b")
    assert {name for name in names(folder) if name.endswith(".safetensors")} == meant
    assert names(folder) - meant == {*KEPT, "config.json", INDEX, "other.py"}
    assert {name: place.shape for name, place in tensors_of(folder).items()} == {
        name: place.shape for name, place in tensors_of(hub).items()
    }


def test_of_an_adapter_on_the_hub_no_weights_are_downloaded(hub, tmp_path):
    (hub / ADAPTER).write_text("{}")
    for ask in (reader.fetch, esparse.preflight):
        with pytest.raises(ValueError, match="holds an adapter"):
            ask("a/b")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
