"""Checkpoints from disk to disk: bit for bit, from every format, through crashes, and over several processes."""

import gc
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import esparse
from esparse import __main__, machine
from esparse.checkpoints import folder, jobs, progress, reader, streaming, writer
from esparse.checkpoints.folder import INDEX, SINGLE, SKIPPING_FILE
from esparse.checkpoints.layout import PREDICTING, Checkpoint, Layout
from esparse.files import data_folder
from esparse.moe.identity import fingerprint
from esparse.moe.published import ARCHITECTURES, FACTS, OLD_ROPE
from esparse.pruning.skipping import skipping_betas
from esparse.tests.conftest import random_tokens, sampled
from esparse.tests.families import CARRIED, FAMILIES, SAMPLE, family_model
from esparse.tracing.losses import weighed

TOKENS = random_tokens()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def saved(folder: Path, family: str = "mixtral", dtype: torch.dtype = torch.float32, shards: str = "1GB", **changes) -> Path:
    model = family_model(family, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("source") / "mixtral")


@pytest.mark.parametrize("family", sampled(FAMILIES, SAMPLE))
def test_streamed_is_what_the_whole_model_gives(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path / "source")
    if family in CARRIED:
        with pytest.raises(ValueError, match=CARRIED[family]):
            esparse.prune_checkpoint(tmp_path / "source", tmp_path / "pruned", 6, calibration=TOKENS)
        assert not (tmp_path / "pruned").exists()
        return
    whole = esparse.trace(model, TOKENS, keep=6)
    streamed = esparse.trace_checkpoint(tmp_path / "source", TOKENS, tmp_path / "trace", keep=6)
    assert (streamed.model, streamed.tokens, len(streamed.layers)) == (whole.model, whole.tokens, len(whole.layers))
    for one, other in zip(streamed.layers, whole.layers, strict=True):
        assert one.name == other.name and torch.equal(one.order, other.order)
        assert torch.allclose(one.gram, other.gram, rtol=1e-4, atol=1e-5 * other.gram.abs().max().item())
    plan = esparse.search_experts(whole, 6)
    report = esparse.prune_checkpoint(tmp_path / "source", tmp_path / "pruned", 6, calibration=TOKENS)
    assert [layer["kept"] for layer in report["layers"] if "kept" in layer] == plan.kept
    assert [layer["loss"] for layer in report["layers"] if "kept" in layer] == pytest.approx(plan.losses, rel=1e-5)
    esparse.prune(model, plan).save_pretrained(tmp_path / "expected")
    ours, expected = tensors(tmp_path / "pruned"), tensors(tmp_path / "expected")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("pruned", "source"))
    changed = {key: (other.get(key), one[key]) for key in one if one[key] != other.get(key)}
    assert changed.pop("architectures", (None, [ARCHITECTURES.get(family)]))[1] == [ARCHITECTURES.get(family)]
    added = changed.keys() - other.keys()  # entries of the published config, see test_published
    counts = {(8, one[key]) for key in added & {"num_experts"}}
    assert counts | {changed[key] for key in changed.keys() - added - {*PREDICTING}} == {(8, 6)}
    assert added <= {"num_experts", *OLD_ROPE, *FACTS.get(family, ())}
    assert not any(one.get(key) for key in PREDICTING)  # layers that predict further tokens are never there


FORMATS = itertools.product([torch.float32, torch.bfloat16, torch.float16], [("1GB", False), ("20KB", False), ("60KB", True)])
FORMATS = [(dtype, *how) for dtype, how in FORMATS]


@pytest.mark.parametrize(("dtype", "shards", "tied"), sampled(FORMATS, FORMATS[::4]))  # each dtype, each way of storing
def test_every_format_is_copied_bit_by_bit(dtype, shards, tied, tmp_path):
    folder = saved(tmp_path / "source", dtype=dtype, shards=shards, tie_word_embeddings=tied)
    report = esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS)
    before, after = tensors(folder), tensors(tmp_path / "pruned")
    assert len(after) == len(before) - 3 * 2 * 3  # three layers, two experts fewer, three matrices each
    for number, layer in enumerate(report["layers"]):
        block = f"model.layers.{number}.block_sparse_moe"
        for new, old in enumerate(layer["kept"]):
            for matrix in ("w1", "w2", "w3"):
                name = f"{block}.experts.{new}.{matrix}.weight"
                assert after[name].dtype == dtype and torch.equal(after[name], before[f"{block}.experts.{old}.{matrix}.weight"])
        assert torch.equal(after[f"{block}.gate.weight"], before[f"{block}.gate.weight"][layer["kept"]])
    assert all(torch.equal(after[name], before[name]) for name in before if "block_sparse_moe" not in name)
    index = json.loads((tmp_path / "pruned" / INDEX).read_text())["weight_map"]
    assert index.keys() == after.keys()


def test_a_pruned_folder_has_the_names_that_engines_load(source, tmp_path):
    """vLLM's Mixtral loader asks for `block_sparse_moe.experts.E.w1|w2|w3`, E up to num_local_experts, and the gate."""
    esparse.prune_checkpoint(source, tmp_path / "pruned", 5, calibration=TOKENS)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"] and config["num_local_experts"] == 5
    experts = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w{w}.weight" for i in range(3) for e in range(5) for w in (1, 2, 3)
    }
    names = set(tensors(tmp_path / "pruned"))
    assert {name for name in names if ".experts." in name} == experts
    assert {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(3)} <= names


def test_progressive_streams_too(source, tmp_path):
    model = family_model("mixtral")
    plan = esparse.search_experts(esparse.trace(model, TOKENS), 5, method="progressive", model=model, tokens=TOKENS)
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", 5, calibration=TOKENS, method="progressive")
    assert [layer["kept"] for layer in report["layers"]] == plan.kept
    assert [layer["loss"] for layer in report["layers"]] == pytest.approx(plan.losses, rel=1e-5)


def test_report_and_card_say_what_was_done(source, tmp_path):
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    assert report == json.loads((tmp_path / "pruned" / folder.REPORT).read_text())
    trace = esparse.trace(family_model("mixtral"), TOKENS)
    plan = esparse.search_experts(trace, 6)
    assert [layer["runner_up"] for layer in report["layers"]] == pytest.approx(plan.runner_up, rel=1e-5)
    assert [layer["beta"] for layer in report["layers"]] == pytest.approx(esparse.median_betas(trace), rel=1e-5)
    assert [layer["beta_pruned"] for layer in report["layers"]] == pytest.approx(
        esparse.median_betas(trace, plan.kept), rel=1e-5
    )
    assert report["calibration set"] == trace.tokens and torch.__version__.startswith(report["versions"]["torch"])
    assert "method: enumerate, loss: residual, r = 6" in (tmp_path / "pruned" / "README.md").read_text()
    assert esparse.PruningPlan.load(tmp_path / "pruned" / "plan.json").kept == plan.kept


@pytest.mark.parametrize("method", ["enumerate", "progressive"])
def test_one_layer_is_in_memory_at_a_time(method, source, tmp_path, monkeypatch):
    """When a layer is read, the experts of all earlier ones are gone, without the help of the garbage collector."""
    read, experts = streaming.Streamed.layer, []

    @contextmanager
    def layer(self, number):
        assert not [one for one in experts if one()]
        with read(self, number) as decoder:
            experts.append(weakref.ref(decoder.mlp.experts))
            yield decoder
            del decoder

    monkeypatch.setattr(streaming.Streamed, "layer", layer)
    gc.disable()
    try:
        esparse.prune_checkpoint(source, tmp_path / "pruned", 5, calibration=TOKENS, method=method)
    finally:
        gc.enable()
    assert len(experts) == 3


# --- quantised sources, and layers that are no part of the model ----------------------------------------------------------


def write_index(folder: Path, state: dict[str, torch.Tensor], quantisation: dict | None = None) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(state, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": quantisation} if quantisation else {})))


def test_block_fp8_is_dequantised_where_a_dtype_is_asked_for(tmp_path):
    folder = saved(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    state, expected = tensors(folder), {}
    for name in [name for name in state if name.endswith(("_proj.weight", "_proj_with_mqa.weight"))]:
        rows, columns = state[name].shape
        scale = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.5
        small = state[name].to(torch.float8_e4m3fn)
        state |= {name: small, f"{name}_scale_inv": scale}
        each = [[small[i, j].float() * scale[i // 16, j // 16] for j in range(columns)] for i in range(rows)]
        expected[name] = torch.tensor(each).bfloat16()
    write_index(folder, state, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    needs = esparse.preflight(folder, 6, sequences=1, length=16, dtype="bfloat16")["disk"]
    report = esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS, dtype="bfloat16")
    after, kept = tensors(tmp_path / "pruned"), report["layers"][1]["kept"]
    size = sum(tensor.nbytes for tensor in after.values())
    assert needs.startswith(f"{size / 1e3:.0f} kB for the result in bfloat16, dequantised from fp8,")
    assert report["quantised"] == "fp8" and not any("scale" in name for name in after)
    for new, old in enumerate(kept):
        name = "model.layers.1.mlp.experts.{}.down_proj.weight"
        assert torch.equal(after[name.format(new)], expected[name.format(old)])
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale_a_tensor_is_what_stock_transformers_makes_of_it(shape, tmp_path):
    folder = saved(tmp_path / "source", "mixtral", torch.bfloat16)
    state = tensors(folder)
    for name in [name for name in state if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))]:
        small = state[name].to(torch.float8_e4m3fn)
        state |= {name: small, f"{name}_scale_inv": torch.rand(shape) + 0.5}
    quantisation = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "dynamic"}
    write_index(folder, state, quantisation)
    source = reader.CheckpointReader(folder)
    for name in [name for name in state if f"{name}_scale_inv" in state]:  # the closed form
        product = state[name].double() * state[f"{name}_scale_inv"].double().reshape(())
        assert torch.equal(source.read(name), product.float().bfloat16())
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # on a CPU it dequantises
    plain = saved(tmp_path / "plain", "mixtral", torch.bfloat16)
    write_index(plain, {name: source.read(name) for name in source.entries})
    ours = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize(
    ("weight", "scale", "block"),
    [((6, 8), (6, 1), None), ((6, 8), (3, 2), (128, 128)), ((6, 8), (2, 2), (4, 6)), ((3, 4, 8), (3, 1, 1), None)],
)
def test_fp8_scales_belong_to_the_blocks_that_they_divide_a_weight_into(weight, scale, block):
    """Of a row, of what the grid says where the config says otherwise, of blocks cut off at the edge, of each expert."""
    values = torch.randn(weight, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.rand(scale, generator=torch.Generator().manual_seed(1)) + 0.5
    rows, columns = block if block == (4, 6) else (weight[-2] // scale[-2], weight[-1] // scale[-1])
    expected = torch.empty(weight)
    for i in itertools.product(*map(range, weight)):
        expected[i] = values[i].float() * scales[(*i[:-2], i[-2] // rows, i[-1] // columns)]
    assert torch.equal(reader._from_fp8(values, scales, block), expected.bfloat16())
    with pytest.raises(ValueError, match=r"FP8 scales of shape \[4, 3\] do not divide a weight of \[6, 8\]"):
        reader._from_fp8(torch.zeros(6, 8), torch.ones(4, 3), block)


def test_mxfp4_is_dequantised_where_a_dtype_is_asked_for(tmp_path):
    bits = [(code >> 3, code >> 1 & 3, code & 1) for code in range(16)]  # sign, exponent, mantissa
    sizes = [mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1) for _, exponent, mantissa in bits]
    values = torch.tensor([(-1) ** sign * size for (sign, _, _), size in zip(bits, sizes, strict=True)])
    folder = saved(tmp_path / "source", "gpt_oss", torch.bfloat16, intermediate_size=32)
    state, expected, generator = tensors(folder), {}, torch.Generator().manual_seed(0)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        n, inner, outer = state.pop(name).shape
        blocks = torch.randint(0, 256, (n, outer, inner // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, (n, outer, inner // 32), dtype=torch.uint8, generator=generator)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = torch.stack([blocks % 16, blocks // 16], -1).flatten(-2).long()  # [n, outer, groups, 32]
        expected[name] = (values[codes] * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).mT.bfloat16()
    write_index(folder, state, {"quant_method": "mxfp4"})
    report = esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS, dtype="bfloat16")
    after = tensors(tmp_path / "pruned")
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor[report["layers"][int(name.split(".")[2])]["kept"]])


def test_what_transformers_ignores_is_left_out_and_reported(tmp_path):
    folder = saved(tmp_path / "source")
    more = {"model.layers.3.eh_proj.weight": torch.ones(2, 2), "model.layers.3.shared_head.norm.weight": torch.ones(2)}
    write_index(folder, tensors(folder) | more)
    report = esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS)
    assert sorted(report["left_out"]) == sorted(more)
    assert not more.keys() & tensors(tmp_path / "pruned").keys()


# --- what is wrong with a source is said before hours are spent -----------------------------------------------------------


def broken(folder: Path, how: str) -> Path:
    state = tensors(saved(folder, shards="20KB"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"][name]
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "corrupt":
        file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])
    elif how == "missing file":
        file.unlink()
    elif how == "missing in file":
        held = load_file(file)
        del held[name]
        save_file(held, file, metadata={"format": "pt"})
    elif how == "missing":
        del state[name]
        write_index(folder, state)
    else:
        change = {"dtype": lambda t: t.to(torch.int8), "shape": lambda t: t[:-1].contiguous(), "nan": lambda t: t * torch.nan}
        state[name] = change[how](state[name])
        write_index(folder, state)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", r"model-\d+-of-\d+.safetensors is truncated or corrupt"),
        ("corrupt", r"model-\d+-of-\d+.safetensors is truncated or corrupt"),
        ("missing file", r"names model-\d+-of-\d+.safetensors, which is not in"),
        ("missing in file", r"has no tensor model.layers.1.block_sparse_moe.experts.3.w2.weight, which the index says"),
        ("missing", "has no tensor model.layers.1.block_sparse_moe.experts.3.w2.weight, which its config asks for"),
        ("dtype", "model.safetensors: tensor model.layers.1.block_sparse_moe.experts.3.w2.weight is of dtype I8"),
        ("nan", "model.safetensors: tensor model.layers.1.block_sparse_moe.experts.3.w2.weight holds NaN"),
        ("shape", r"experts.3.w2.weight is of shape \[31, 24\], but its config asks for \[32, 24\]"),
    ],
)
def test_a_broken_source_is_named_before_any_layer_runs(how, words, tmp_path, monkeypatch):
    monkeypatch.setattr(progress.ResumableJob, "run", lambda *_: pytest.fail("a layer ran"))
    with pytest.raises(ValueError, match=words):
        esparse.prune_checkpoint(broken(tmp_path / "source", how), tmp_path / "pruned", 6, calibration=TOKENS)
    with pytest.raises(ValueError, match=words):
        esparse.prune_weights_checkpoint(tmp_path / "source", tmp_path / "pruned", 0.5, calibration=TOKENS)
    assert not list(tmp_path.glob("*pruned*"))  # no unfinished work either, which another source could not take up


@pytest.mark.usefixtures("impatient")
def test_sources_and_requests_that_cannot_be(source, tmp_path):
    with pytest.raises(ValueError, match="Cannot keep 1 experts"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", 1, calibration=TOKENS)
    with pytest.raises(ValueError, match="Unknown method 'best'"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS, method="best")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        esparse.prune_checkpoint(tmp_path / "nowhere", tmp_path / "pruned", 6, calibration=TOKENS)
    with pytest.raises(
        ConnectionError, match="Could not get the model 'nobody/nothing' from the hub .*'tiny-scratch' and local folders"
    ):
        esparse.prune_checkpoint("nobody/nothing", tmp_path / "pruned", 6, calibration=TOKENS)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        esparse.prune_checkpoint(source, tmp_path / "there", 6, calibration=TOKENS)
    other = shutil.copytree(source, tmp_path / "quantised")
    config = json.loads((other / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised with gptq"):
        esparse.prune_checkpoint(other, tmp_path / "pruned", 6, calibration=TOKENS)
    (other / "config.json").write_text(json.dumps({"model_type": "mystery", "auto_map": {"AutoConfig": "mystery.Config"}}))
    with pytest.raises(ValueError, match="code that comes with a checkpoint is never run"):
        esparse.prune_checkpoint(other, tmp_path / "pruned", 6, calibration=TOKENS)
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_local_experts=8)).save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no MoE layers behind transformers' experts interface"):
        esparse.prune_checkpoint(tmp_path / "elsewhere", tmp_path / "pruned", 6, calibration=TOKENS)
    dense = shutil.copytree(source, tmp_path / "empty")
    for path in dense.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        esparse.prune_checkpoint(dense, tmp_path / "pruned", 6, calibration=TOKENS)


def test_the_next_layer_is_announced_while_one_is_computed(source, tmp_path, monkeypatch):
    """What the system is asked to read ahead, in small pieces, are the bytes of just those tensors."""
    opened, asked = reader.CheckpointReader(source), []

    def advise(file, offset, length, _advice):
        assert length <= 1000
        asked.append(os.pread(file, length, offset))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(reader, "AHEAD", 1000)
    monkeypatch.setattr(reader, "Thread", lambda target, args, daemon: SimpleNamespace(start=lambda: target(*args)))
    whole = Checkpoint(opened, Layout(opened.config, 8))
    names = whole.stored(1)
    opened.announce(names)
    stored = [opened.read(name).contiguous().view(torch.uint8).numpy().tobytes() for name in names]
    assert b"".join(asked) == b"".join(stored) and len(asked) > len(stored)
    asked.clear()
    esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    layers = [name for number in (1, 2) for name in whole.stored(number)]  # of three; the first has nothing before it
    assert sum(map(len, asked)) == sum(opened.entries[name].nbytes for name in layers)


# --- nothing lost ---------------------------------------------------------------------------------------------------------


def same_weights(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir() if p.suffix == ".safetensors" or p.name in ("config.json", INDEX))
    return names and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import esparse
from esparse.pruning.skipping import skipping_betas
from esparse.tests.conftest import random_tokens
from esparse.tests.checkpoints.test_streaming import same_weights
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
tokens = random_tokens()

def child(destination):
    pid = os.fork()
    if pid == 0:
        esparse.prune_checkpoint(source, destination, 5, calibration=tokens, method=sys.argv[3], batch_size=2)
        os._exit(0)
    return pid

started = time.time()
assert os.waitpid(child(folder / "whole"), 0)[1] == 0
whole = time.time() - started
rng, kills, resumed, destination = random.Random(0), 0, 0, folder / "pruned"
wanted, again = int(sys.argv[4]), int(sys.argv[5])
while kills < wanted or resumed < again or not destination.exists():
    if destination.exists():
        destination.rename(folder / f"done_{len(list(folder.glob('done_*')))}")
    fresh = not list(folder.glob(".pruned.partial/layer_*.json"))
    resumed += not fresh
    pid, started = child(destination), time.time()
    deadline = started + (rng.uniform(0, whole) if kills < wanted or resumed < again else 60)
    while time.time() < deadline and not os.waitpid(pid, os.WNOHANG)[0]:
        time.sleep(0.001)
    else:
        if time.time() >= deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        elif fresh:  # so that kills fall within the run on a quiet machine too; what goes on near its end tells nothing
            whole = min(whole, time.time() - started)
    assert not destination.exists() or same_weights(folder / "whole", destination), "neither absent nor complete"
assert all(same_weights(folder / "whole", done) for done in folder.glob("done_*"))
print("kills", kills)
"""


KILLS = [(method, *count) for method in ("enumerate", "progressive") for count in ((5, 1), (20, 3))]


@pytest.mark.parametrize(("method", "kills", "resumed"), sampled(KILLS, KILLS[::2]))
@pytest.mark.slow
def test_killed_at_random_points_it_goes_on_and_ends_the_same(source, tmp_path, method, kills, resumed):
    words = [sys.executable, "-c", _KILLER, str(source), str(tmp_path), method, str(kills), str(resumed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) >= kills, done.stderr[-2000:]


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import esparse
from esparse.pruning.skipping import skipping_betas
from esparse.tests.conftest import random_tokens
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        esparse.prune_checkpoint(sys.argv[1], f"{sys.argv[2]}/{limit}", 6, calibration=random_tokens())
    except OSError as error:
        print(error, flush=True)
"""


def test_out_of_disk_leaves_no_destination_and_goes_on(source, tmp_path):
    """A limit on the size of files stands for a full disk: shards fail first, then the hidden states."""
    expected, words = tmp_path / "expected", {30_000: "make room", 5_000: "File too large"}
    esparse.prune_checkpoint(source, expected, 6, calibration=TOKENS)
    script = [sys.executable, "-c", _FULL_DISK, str(source), str(tmp_path), *map(str, words)]
    done = subprocess.run(script, capture_output=True, text=True)
    for limit, line in zip(words, done.stdout.splitlines(), strict=True):
        assert words[limit] in line, done.stdout + done.stderr[-2000:]
        assert not (tmp_path / str(limit)).exists()
        esparse.prune_checkpoint(source, tmp_path / str(limit), 6, calibration=TOKENS)
        assert same_weights(expected, tmp_path / str(limit))


def test_out_of_memory_leaves_no_destination_and_goes_on(source, tmp_path, monkeypatch):
    calls, stock = [], jobs.search_layer

    def hungry(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise MemoryError
        return stock(*arguments)

    monkeypatch.setattr(jobs, "search_layer", hungry)
    with pytest.raises(MemoryError):
        esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    assert not (tmp_path / "pruned").exists()
    esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    assert len(calls) == 4  # one layer was done, one failed, two were left
    assert not list(tmp_path.glob(".pruned*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "greedy"}, "another method"),
        ({"calibration": random_tokens(seed=1)}, "another calibration set"),
        ({"dtype": torch.bfloat16}, "another dtype"),
        ({"batch_size": 1}, "another batch_size"),
        ({"until_stable": True}, "another until_stable"),
    ],
)
def test_going_on_with_other_inputs_is_refused(source, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(writer.CheckpointWriter, "finish", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    with pytest.raises(ValueError, match=words):
        esparse.prune_checkpoint(source, tmp_path / "pruned", 6, **{"calibration": TOKENS, **change})
    other = shutil.copytree(source, tmp_path / "touched")
    os.utime(next(other.glob("*.safetensors")))
    with pytest.raises(ValueError, match="another source"):
        esparse.prune_checkpoint(other, tmp_path / "pruned", 6, calibration=TOKENS)
    monkeypatch.setattr(jobs, "FORMAT", jobs.FORMAT + 1)
    with pytest.raises(ValueError, match="another format"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)


def test_a_stream_gives_back_what_a_layer_returned(tmp_path):
    hidden = torch.randn(2, 3, 4)
    stream = streaming.FileStream(tmp_path / "original_00000.0")
    several = (hidden, hidden, None, torch.arange(6).view(2, 3).T, hidden[1:])
    for batch, state in enumerate([(hidden,), (hidden, None), several]):
        stream[batch] = state
        assert all(a is b or (torch.equal(a, b) and a.dtype == b.dtype) for a, b in zip(stream[batch], state, strict=True))


def test_a_killed_trace_goes_on(source, tmp_path, monkeypatch):
    stock = jobs.save_layer
    monkeypatch.setattr(jobs, "save_layer", lambda layer, path: stock(layer, path) if path.stem.endswith("0") else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        esparse.trace_checkpoint(source, TOKENS, tmp_path / "trace")
    assert not (tmp_path / "trace").exists()
    monkeypatch.setattr(jobs, "save_layer", stock)
    streamed, whole = (
        esparse.trace_checkpoint(source, TOKENS, tmp_path / "trace"),
        esparse.trace(family_model("mixtral"), TOKENS),
    )
    assert all(torch.equal(a.order, b.order) for a, b in zip(streamed.layers, whole.layers, strict=True))


# --- several processes, and the command line ------------------------------------------------------------------------------


TOGETHER = [(2, "enumerate"), (4, "greedy"), (2, "progressive"), (2, "reap")]


@pytest.mark.parametrize(("processes", "method"), sampled(TOGETHER, TOGETHER[::2]))  # each layer by itself, and in turn
@pytest.mark.slow
def test_processes_together_choose_as_one(processes, method, tmp_path):
    words = ["prune", "data/tiny", "{}", "--experts", "6", "--calibration", "web", "--sequences", "10", "--length", "64"]
    words += ["--method", method, "--dtype", "float32"]
    assert __main__.main([str(tmp_path / "one") if word == "{}" else word for word in words]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "esparse"]
    words = [str(tmp_path / "many") if word == "{}" else word for word in words]
    subprocess.run(launch + words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    one, many = (json.loads((tmp_path / name / folder.REPORT).read_text())["layers"] for name in ("one", "many"))
    assert [layer["kept"] for layer in many] == [layer["kept"] for layer in one]
    for key in ("loss", "beta", "beta_pruned"):
        assert [layer[key] for layer in many] == pytest.approx([layer[key] for layer in one], rel=1e-6)
    for layer, whole in zip(many, one, strict=True) if method == "enumerate" else ():
        margin = pytest.approx(whole["certainty"]["margin"], rel=1e-3)
        assert layer["certainty"] == whole["certainty"] | {"margin": margin}
    assert all(torch.equal(tensors(tmp_path / "one")[name], tensor) for name, tensor in tensors(tmp_path / "many").items())


def test_a_command_ends_the_group_of_processes_unless_it_failed(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        words = ["prune", "data/tiny", str(tmp_path / "pruned"), "--dry-run", "--experts"]
        assert __main__.main([*words, "9"]) == 2 and torch.distributed.is_initialized()
        assert __main__.main([*words, "6"]) == 0 and not torch.distributed.is_initialized()
    finally:
        machine.leave_ranks()


@pytest.mark.parametrize("r", [0, 1, 9])
def test_a_number_that_cannot_be_kept_is_refused_before_a_weight_is_read(r, tmp_path, monkeypatch):
    monkeypatch.setattr(reader.CheckpointReader, "read", lambda *_: pytest.fail("a tensor was read"))
    plan = esparse.PruningPlan("enumerate", r, [[*range(r)]] * 6, [0.0] * 6, "", "")
    for call in (
        lambda: esparse.preflight("data/tiny", r),
        lambda: esparse.prune_checkpoint("data/tiny", tmp_path / "pruned", r, calibration="web"),
        lambda: esparse.prune_checkpoint("data/tiny", tmp_path / "pruned", plan),
    ):
        with pytest.raises(ValueError, match=f"^Cannot keep {r} experts: a token is routed to 2 of 8"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_it_would_take_and_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reader.CheckpointReader, "read", lambda *_: pytest.fail("a tensor was read"))
    assert __main__.main(["prune", "data/tiny", str(tmp_path / "pruned"), "--experts", "6", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for what in ("memory:", "disk:", "download: nothing", "FLOPs:", "time:", "access:   a local folder"):
        assert what in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_names_the_dtypes_and_bytes_that_are_written(tmp_path):
    """Those of the tensors, whatever the config says."""
    folder = saved(tmp_path / "source")
    state = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in tensors(folder).items()}
    write_index(folder, state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    said = esparse.preflight(folder, 6, sequences=1, length=16)["disk"]
    esparse.prune_checkpoint(folder, tmp_path / "pruned", 6, calibration=TOKENS)
    written = tensors(tmp_path / "pruned")
    sizes = {dtype: sum(t.nbytes for t in written.values() if t.dtype == dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert sum(sizes.values()) == sum(tensor.nbytes for tensor in written.values())
    each = f"float32 ({sizes[torch.float32] / 1e3:.0f} kB) and bfloat16 ({sizes[torch.bfloat16]:.0f} bytes)"
    assert said.startswith(f"{sum(sizes.values()) / 1e3:.0f} kB for the result in {each} and ")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"F32": 100}, "in float32 and"),
        ({"F8_E4M3": 90, "F32": 10}, "in bfloat16 ("),
        (None, "in float16 (as its config says) and"),
    ],
)
def test_of_a_hub_id_the_hub_names_the_dtypes(parameters, said, monkeypatch):
    module = import_module("esparse.checkpoints.estimate")
    config = transformers.AutoConfig.from_pretrained("data/tiny")
    config.dtype = torch.float16
    stored = SimpleNamespace(parameters=parameters) if parameters else None
    files = [SimpleNamespace(rfilename="model.safetensors", size=100)]
    monkeypatch.setattr(module, "described", lambda source, revision: data_folder() / "tiny")
    monkeypatch.setattr(module, "read_config", lambda folder: config)
    monkeypatch.setattr(module, "_info", lambda *_: SimpleNamespace(safetensors=stored, siblings=files, gated=False))
    needs = esparse.preflight("org/model", 6, sequences=1, length=16)
    count = sum(torch.Size(shape).numel() for shape in Layout(config, 6).small.values())
    size = count * {"F32": 4, None: 2}.get(next(iter(parameters or {None: 0})), 2 + 2 * 0.1)
    assert needs["disk"].startswith(f"{size / 1e6:.0f} MB for the result {said}")


def test_with_a_plan_the_command_takes_nothing_that_only_a_choice_needs(tiny, tmp_path, call):
    file, out = tmp_path / "plan.json", tmp_path / "pruned"
    esparse.PruningPlan("by hand", 6, [[*range(6)]] * 6, [0.0] * 6, fingerprint(tiny[0]), "").save(file)
    for words, said in (
        (["--until-stable"], "--until-stable"),
        (["--skip"], "--skip"),
        (["--loss", "residual"], "--loss"),  # also where it is the default
        (["--seed", 1, "--calibration", "web", "--batch-size", 8], "--calibration, --seed, --batch-size"),
    ):
        refused = call("prune", "data/tiny", out, "--plan", file, *words)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.endswith(f"nothing is calibrated or computed: leave out {said}.\n")
    assert "Say either how many" in call("prune", "data/tiny", out, "--plan", file, "--experts", 6).stderr
    said = call("prune", "data/tiny", out, "--plan", file, "--dry-run").stdout
    assert "on 0 tokens" in said and " and 0 bytes while it works" in said and not out.exists()
    assert call("prune", "data/tiny", out, "--plan", file).returncode == 0
    assert esparse.PruningPlan.load(out / "plan.json") == esparse.PruningPlan.load(file)


def test_a_folder_made_for_skipping_skips_with_the_betas_of_the_pruned_model(tiny, tmp_path):
    """Against `median_betas` of the pruned folder without betas. DeepSeek's first layer is dense."""
    model = family_model("deepseek_v3")
    model.save_pretrained(tmp_path / "source")
    tiny[1].save_pretrained(tmp_path / "source")
    options = {"calibration": TOKENS, "skip": True}
    esparse.prune_checkpoint(tmp_path / "source", tmp_path / "skips", 6, **options)
    plan = esparse.PruningPlan.load(tmp_path / "skips" / "plan.json")
    betas = esparse.median_betas(esparse.trace(model, TOKENS), plan.kept)
    held = json.loads((tmp_path / "skips" / SKIPPING_FILE).read_text())
    assert held["betas"] == pytest.approx(betas, rel=1e-5) and len(betas) == len(held["layers"])
    numbers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert held["layers"] == numbers and 0 not in numbers
    assert skipping_betas(esparse.load_model(str(tmp_path / "skips"))[0]) == held["betas"]
    with pytest.raises(ValueError, match="prune without a plan"):
        esparse.prune_checkpoint(tmp_path / "source", tmp_path / "other", plan, skip=True)


def test_the_command_tells_the_defaults_of_the_function():
    (commands,) = __main__._parser()._subparsers._group_actions
    defaults, told = inspect.signature(esparse.prune_checkpoint).parameters, commands.choices["prune"].format_help()
    for name in ("calibration", "sequences", "length", "seed", "method", "loss", "batch_size"):
        assert re.search(rf"--{name.replace('_', '-')} .*?\({defaults[name].default}\)", told, flags=re.DOTALL)


@pytest.mark.parametrize("rate", [1e9, 4e11])
def test_a_cpu_slow_in_half_precision_is_taken_to_multiply_in_float32(monkeypatch, rate, tmp_path):
    module, rates = import_module("esparse.checkpoints.estimate"), {torch.bfloat16: rate, torch.float32: 1e11}
    monkeypatch.setattr(module, "flop_per_second", lambda dtype, **_: rates[dtype])
    assert module.measured_device(torch.bfloat16, tmp_path).flop == max(rate, 1e11)
    assert module.measured_device(torch.float32, tmp_path).flop == 1e11


def test_the_time_told_is_that_of_the_products_where_they_are_slow(monkeypatch):
    module = import_module("esparse.checkpoints.estimate")
    monkeypatch.setattr(module, "measured_device", lambda *_: module.Device(1e9, *[math.inf] * 6))  # fast in all else
    needs = esparse.preflight("data/tiny", 6, sequences=10**4)
    (hours,) = (float(word) for word in needs["time"].split() if word.replace(".", "").isdecimal())
    assert "hours" in needs["time"] and hours == pytest.approx(float(needs["FLOPs"].split()[0]) / 1e9 / 3600, rel=0.05)


def test_the_command_prunes_and_what_comes_out_loads(tiny, tmp_path, capsys):
    words = ["prune", "data/tiny", str(tmp_path / "pruned"), "--experts", "6", "--calibration", "web", "--sequences", "8"]
    words += ["--dtype", "float32"]
    assert __main__.main([*words, "--length", "64"]) == 0
    assert "8 to 6 experts" in capsys.readouterr().out
    made = esparse.PruningPlan.load(tmp_path / "pruned" / "plan.json")
    trace = esparse.trace(tiny[0], esparse.calibration_tokens("web", tiny[1], sequences=8, length=64), keep=6)
    pairs = zip(trace.layers, made.kept, strict=True)
    losses = [esparse.reconstruction_loss(weighed(layer, "residual"), kept) for layer, kept in pairs]
    assert made.loss == "residual" and made.losses == pytest.approx(losses, rel=1e-4)  # without --loss
    model, tokenizer = esparse.load_model(str(tmp_path / "pruned"))
    assert model.config.num_local_experts == 6 and tokenizer("one").input_ids
    with safe_open(next((tmp_path / "pruned").glob("model-00001*")), framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert __main__.main([*words, "--length", "64"]) == 2
    assert "already exists" in capsys.readouterr().err
