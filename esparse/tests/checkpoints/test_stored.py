"""Quantised folders stay quantised: what is written are the source's own bytes, without the removed experts."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import esparse
from esparse.checkpoints import folder, models
from esparse.checkpoints.layout import Checkpoint, Layout
from esparse.checkpoints.reader import CheckpointReader
from esparse.checkpoints.stored import StoredCheckpoint
from esparse.moe.identity import fingerprint
from esparse.tests.checkpoints.test_layouts import TOKENS, masked, published, run, tensors, write
from esparse.tests.conftest import sampled
from esparse.tests.families import CARRIED, FAMILIES, SAMPLE, family_model

KEPT = [[0, 1, 2, 4, 6, 7], [1, 2, 3, 4, 5, 7], [0, 2, 3, 5, 6, 7]]
GENERATOR = torch.Generator().manual_seed(0)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=GENERATOR)


def packed(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=GENERATOR)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=GENERATOR) + 0.5


def block_fp8(weight):
    rows, columns = weight.shape
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scales(-(-rows // 8), -(-columns // 8))}


def tensor_fp8(weight):
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scales()}


def w4a16(weight):
    rows, columns = weight.shape
    small = {"weight_scale": scales(rows, columns // 16).bfloat16(), "weight_shape": torch.tensor([rows, columns])}
    return small | {"weight_packed": words(rows, columns // 8)}


def nvfp4(weight):
    rows, columns = weight.shape
    small = {"weight_scale": scales(rows, columns // 16).to(torch.float8_e4m3fn), "weight_global_scale": scales(1)}
    return small | {"weight_packed": packed(rows, columns // 2), "input_global_scale": scales(1)}


def gptq(weight):
    rows, columns = weight.shape
    small = {"qzeros": words(columns // 16, rows // 8), "scales": scales(columns // 16, rows).half()}
    return small | {"qweight": words(columns // 8, rows), "g_idx": torch.arange(columns, dtype=torch.int32) // 16}


def awq(weight):
    rows, columns = weight.shape
    small = {"qzeros": words(columns // 16, rows // 8), "scales": scales(columns // 16, rows).half()}
    return small | {"qweight": words(columns, rows // 8)}


def listed(first: str, second: str, *more: str) -> list[str]:
    return ["lm_head", first, *more, second]


# By format: the family, a weight's tensors, the config, and the same config when KEPT stay, with experts 3 and 5 of layer 1
# under their new numbers 2 and 4, and no expert 6. Names and shapes are those that compressed-tensors 0.20.1, GPTQModel,
# AutoAWQ and AutoRound write; the blocks of FP8 are smaller.
NAME = "model.layers.1.mlp.experts.{}.down_proj"
FORMATS = {
    "block fp8": (
        "deepseek_v3",
        block_fp8,
        *(
            {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": listed(*map(NAME.format, numbers))}
            for numbers in ((3, 5), (2, 4))
        ),
    ),
    "tensor fp8": ("mixtral", tensor_fp8, *[{"quant_method": "fp8", "weight_block_size": None}] * 2),
    "w4a16": (
        "qwen3_moe",
        w4a16,
        *(
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*gate$", *names]}
            for names in ([NAME.format(6), r"re:.*layers\.1\..*experts\.(3|5)\.down.*"], [NAME.format(2), NAME.format(4)])
        ),
    ),
    "nvfp4": ("mixtral", nvfp4, *[{"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}] * 2),
    "gptq": (
        "qwen3_moe",
        gptq,
        *(
            {"quant_method": "gptq", "bits": 4, "dynamic": {r"-:.*mlp\.gate": {}, **names}}
            for names in (
                {r"+:.*layers\.1\..*\.experts\.5\.up": {"bits": 8}, r"-:.*experts\.6\.nothing": {}},
                {r"+:^model\.layers\.1\.mlp\.experts\.4\.up_proj$": {"bits": 8}, r"-:.*experts\.6\.nothing": {}},
            )
        ),
    ),
    "awq": ("qwen3_moe", awq, *[{"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["gate"]}] * 2),
    "autoround": (
        "qwen3_moe",
        gptq,
        *(
            {"quant_method": "auto-round", "extra_config": {"model.layers.0.mlp.gate": {"bits": 16}, **names}}
            for names in (
                {NAME.format(3): {"bits": 8}, NAME.format(6): {"bits": 2}, NAME.format(0): {"bits": 2}},
                {NAME.format(2): {"bits": 8}},
            )
        ),
    ),
}
MOE = {"intermediate_size": 32, "moe_intermediate_size": 32}


def quantised(folder: Path, family: str, tensors_of, config: dict, stored=torch.bfloat16):
    """The folder of a family's model with its matrices quantised, but for the router and the head; and the model."""
    model = family_model(family, **MOE).to(torch.bfloat16)
    model.to(stored).save_pretrained(folder)
    state = {}
    for name, tensor in tensors(folder).items():
        if re.search(r"(_proj|_mqa|\.w[123])\.weight$", name):
            module = name.removesuffix(".weight")
            tensors_now = {f"{module}.{part}": values for part, values in tensors_of(tensor.float()).items()}
        else:
            tensors_now = {name: tensor}
        state |= {name: values.contiguous() for name, values in tensors_now.items()}
    return write(folder, state, quantization_config=config), model


def by_hand(model, kept=KEPT) -> esparse.PruningPlan:
    kept = kept[-len([name for name in model.state_dict() if name.endswith("experts.down_proj")]) :]
    return esparse.PruningPlan("by hand", 6, kept, [0.0] * len(kept), fingerprint(model), "")


def expected(state: dict[str, torch.Tensor], kept: dict[int, list[int]]) -> dict[str, torch.Tensor]:
    """The tensors without the removed experts: numbered ones renumbered, stacked ones and router rows taken."""
    after = {}
    for name, tensor in state.items():
        number = re.search(r"\.(?:layers|blocks)\.(\d+)\.mlp|\.layers\.(\d+)\.block", name)
        experts = number and kept.get(int(number[1] or number[2]))
        numbered = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        if experts and numbered:
            if int(numbered[2]) in experts:
                after[f"{numbered[1]}{experts.index(int(numbered[2]))}{numbered[3]}"] = tensor
        elif experts and re.search(r"\.experts\.|\.(gate|router)\.(weight|bias|e_score_correction_bias)$", name):
            after[name] = tensor[experts]
        else:
            after[name] = tensor
    return after


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    bits = lambda tensor: tensor.contiguous().flatten().view(torch.uint8)  # noqa: E731
    kinds = lambda state: {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}  # noqa: E731
    return kinds(one) == kinds(other) and all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


@pytest.mark.parametrize("how", FORMATS)
def test_kept_experts_keep_every_byte_and_lists_their_new_numbers(how, tmp_path):
    family, tensors_of, config, renumbered = FORMATS[how]
    source, model = quantised(tmp_path / "source", family, tensors_of, config)
    (source / "quantize_config.json").write_text(json.dumps(config))
    plan = by_hand(model)  # made with the model before quantisation
    needs = esparse.preflight(source, plan)["disk"]
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", plan)
    first = 3 - len(plan.kept)
    kept = dict(enumerate(plan.kept, first))
    before, after = tensors(source), tensors(tmp_path / "pruned")
    assert same(after, expected(before, kept)) and len(after) < len(before)
    assert json.loads((tmp_path / "pruned" / folder.INDEX).read_text())["weight_map"].keys() == after.keys()
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert written["quantization_config"] == renumbered
    assert json.loads((tmp_path / "pruned" / "quantize_config.json").read_text()) == renumbered
    assert report["quantised"] == config["quant_method"] and not report["dequantised"] and "unchecked" not in report
    assert "quantization_config" not in report["config"] and "quantize_config.json" not in report["not_copied"]
    size = sum(tensor.nbytes for tensor in after.values())
    assert needs.startswith(f"{size / 1e3:.0f} kB for the result in {config['quant_method']}, as it is stored, and 0 bytes")


def mxfp4(path: Path):
    """A gpt-oss whose experts are in MXFP4, stacked as on the hub."""
    model = family_model("gpt_oss", intermediate_size=32, hidden_size=32).bfloat16()
    model.save_pretrained(path)
    state = tensors(path)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        n, inner, outer = state.pop(name).shape
        state[f"{name}_blocks"] = packed(n, outer, inner // 32, 16)
        state[f"{name}_scales"] = packed(n, outer, inner // 32, low=118, high=123)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    return write(path, state, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped}), model


def test_mxfp4_takes_the_share_of_the_bytes_that_is_kept(tmp_path):
    source, model = mxfp4(tmp_path / "source")
    esparse.prune_checkpoint(source, tmp_path / "pruned", by_hand(model))
    before, after = tensors(source), tensors(tmp_path / "pruned")
    assert same(after, expected(before, dict(enumerate(KEPT))))
    size = lambda state: sum(tensor.nbytes for name, tensor in state.items() if ".experts." in name)  # noqa: E731
    assert size(after) / size(before) == 6 / 8
    told = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (source, tmp_path / "pruned")]
    assert told[0] == told[1]


DEQUANTISE = {
    "block fp8": transformers.FineGrainedFP8Config(dequantize=True),
    "tensor fp8": transformers.FineGrainedFP8Config(dequantize=True),
    "mxfp4": transformers.Mxfp4Config(dequantize=True),
}


@pytest.mark.parametrize("how", DEQUANTISE)
def test_what_transformers_loads_is_the_masked_original(how, tmp_path):
    if how == "mxfp4":
        source, model = mxfp4(tmp_path / "source")
    else:
        family, tensors_of, config, _ = FORMATS[how]
        source, model = quantised(tmp_path / "source", family, tensors_of, config)
    esparse.prune_checkpoint(source, tmp_path / "pruned", plan := by_hand(model))
    options = {"quantization_config": DEQUANTISE[how], "output_loading_info": True, "dtype": torch.bfloat16}
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(path, **options) for path in (source, tmp_path / "pruned")]
    (full, _), (small, found) = loaded
    assert not any(found.values())
    logits = masked(full.float(), plan)
    assert torch.allclose(run(small.float()), logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    kept = esparse.prune(full, plan).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize("how", [*DEQUANTISE, "float32"])
def test_a_checkpoint_is_as_large_as_what_is_loaded(how, tmp_path, monkeypatch):
    if how == "float32":
        source, options = tmp_path / "source", {"dtype": torch.float32}
        family_model("mixtral").bfloat16().save_pretrained(source)
    else:
        source = mxfp4(tmp_path / "source")[0] if how == "mxfp4" else quantised(tmp_path / "source", *FORMATS[how][:3])[0]
        options = {"quantization_config": DEQUANTISE[how]}
    state = transformers.AutoModelForCausalLM.from_pretrained(source, **options).state_dict()
    size = sum(tensor.nbytes for tensor in state.values())
    for share, larger in ((0.99, True), (1.01, False)):  # transformers keeps some biases in float32
        monkeypatch.setattr(models, "free_memory", lambda device, share=share: share * 2 * size / 0.8)
        assert models.larger_than_memory(source, source, dtype=options.get("dtype"), device="cpu") is larger


@pytest.mark.parametrize("how", ["block fp8", "mxfp4"])
def test_what_is_decoded_for_calibration_is_written_as_it_is_stored(how, tmp_path):
    source = mxfp4(tmp_path / "source")[0] if how == "mxfp4" else quantised(tmp_path / "source", *FORMATS[how][:3])[0]
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    kept = {number: layer["kept"] for number, layer in enumerate(report["layers"]) if "kept" in layer}
    assert kept and same(tensors(tmp_path / "pruned"), expected(tensors(source), kept))
    again = esparse.kept_experts(source, tmp_path / "pruned")
    assert again.kept == [*kept.values()]
    decoded = esparse.prune_checkpoint(source, tmp_path / "decoded", again, dtype="bfloat16")
    assert decoded["dequantised"] and "quantization_config" not in (tmp_path / "decoded" / "config.json").read_text()
    assert {tensor.dtype for tensor in tensors(tmp_path / "decoded").values()} <= {torch.bfloat16, torch.float32}
    pruned, options = CheckpointReader(tmp_path / "pruned"), {"rtol": 0, "atol": 0}
    for name, tensor in tensors(tmp_path / "decoded").items():
        torch.testing.assert_close(pruned.read(name), tensor, **options)


@pytest.mark.parametrize("family", sampled([f for f in FAMILIES if f not in CARRIED], SAMPLE.keys() - CARRIED.keys()))
def test_every_family_is_the_same_whether_decoded_before_or_after_pruning(family, tmp_path):
    model = family_model(family, k=1 if family == "zaya" else 2).bfloat16()
    model.save_pretrained(tmp_path / "source")
    state = tensors(tmp_path / "source")
    experts = [name for name in state if re.search(r"\.experts\.|moe\.(input|output)_linear", name) and state[name].ndim > 1]
    for name in [name for name in experts if not name.endswith("bias")]:
        scale, small = scales(*state[name].shape[:-2], 1, 1), state.pop(name).to(torch.float8_e4m3fn)
        state |= {name: small, f"{name}_scale_inv": scale}
    told = {"quant_method": "fp8", "weight_block_size": None}
    source = write(tmp_path / "source", state, quantization_config=told)
    report = esparse.prune_checkpoint(source, tmp_path / "stored", 6, calibration=TOKENS, method="random")
    plan = esparse.PruningPlan.load(tmp_path / "stored" / "plan.json")
    esparse.prune_checkpoint(source, tmp_path / "decoded", plan, dtype="bfloat16")
    assert {"F8_E4M3"} <= {entry.stored for entry in CheckpointReader(tmp_path / "stored").stored.values()}
    one, other = (Checkpoint(reader, Layout(reader.config, report["r"])) for reader in
                  (CheckpointReader(tmp_path / name) for name in ("stored", "decoded")))  # fmt: skip
    for name in one.of:
        assert torch.equal(one.read(name), other.read(name)), name


def test_what_lies_beside_the_model_stays_or_goes_as_in_any_folder(tmp_path):
    """Scales of keys belong to a layer; a layer that predicts further tokens goes, since transformers ignores it."""
    source, model = quantised(tmp_path / "source", *FORMATS["block fp8"][:3])
    more = {f"model.layers.3.mlp.experts.{e}.up_proj.weight_scale_inv": scales(4, 4) for e in range(8)}
    scale = {"model.layers.1.self_attn.k_scale": scales()}
    write(source, tensors(source) | more | scale)
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", by_hand(model))
    assert set(report["left_out"]) == more.keys()
    after = tensors(tmp_path / "pruned")
    assert not more.keys() & after.keys() and all(torch.equal(after[name], value) for name, value in scale.items())


def test_a_composite_is_carried_as_it_is_stored(tmp_path):
    source = published("kimi_k25", tmp_path / "source")
    state = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    for name in [name for name in state if name.startswith("language_model") and name.endswith("proj.weight")]:
        state |= {f"{name.removesuffix('weight')}{part}": values for part, values in block_fp8(state[name]).items()}
    entries = json.loads((source / "config.json").read_text())["text_config"]
    told = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    write(source, state, text_config=entries | {"quantization_config": told})
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS, method="reap")
    kept = {number: layer["kept"] for number, layer in enumerate(report["layers"]) if "kept" in layer}
    assert report["carried"] > 3 and same(tensors(tmp_path / "pruned"), expected(tensors(source), kept))
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["text_config"]["quantization_config"] == told


@pytest.mark.parametrize(
    ("texts", "now"),
    [
        (["experts", "re:.*experts.*", r"re:.*experts\.\d+\.up_proj", "Linear"], None),
        (["model.layers.0.mlp.experts.4", "model.layers.0.mlp.experts.40"], ["model.layers.0.mlp.experts.3"]),
        (["layers.2.mlp.experts.7.up_proj"], ["layers.2.mlp.experts.5.up_proj"]),
        (["model.layers.0.mlp.experts.5", "model.layers.0.mlp.gate_proj"], ["model.layers.0.mlp.gate_proj"]),
        (["experts.1.up_proj"], ["model.layers.0.mlp.experts.1.up_proj", "model.layers.1.mlp.experts.0.up_proj"]),
        ([r"re:.*layers\.[01]\.mlp\.experts\.[0-2]\.up_proj"], [
            *(f"model.layers.0.mlp.experts.{e}.up_proj" for e in (0, 1, 2)),
            *(f"model.layers.1.mlp.experts.{e}.up_proj" for e in (0, 1)),
        ]),
        ([r"-:.*layers\.0\.mlp\.experts\.[67]\.down"], [rf"-:^model\.layers\.0\.mlp\.experts\.{e}\.down_proj$" for e in "45"]),
    ],
)  # fmt: skip
def test_a_list_names_the_same_modules_after_pruning(texts, now, tmp_path):
    """Layers 0, 1 and 2 keep 0 1 2 4 6 7, 1 2 3 4 5 7, and 0 2 3 5 6 7."""
    source, _ = quantised(tmp_path / "source", *FORMATS["gptq"][:3])
    reader = CheckpointReader(source)
    stored, kept = StoredCheckpoint(reader, Layout(reader.config, 6)), dict(enumerate(KEPT))
    assert stored.renumbered({"ignore": texts, "bits": 4}, kept) == {"ignore": now or texts, "bits": 4}
    keys = stored.renumbered({"dynamic": {text: {"bits": number} for number, text in enumerate(texts)}}, kept)["dynamic"]
    assert [*keys] == (now or texts)


def test_a_plan_is_checked_by_the_routers_alone(tmp_path):
    source, model = quantised(tmp_path / "source", *FORMATS["w4a16"][:3])
    other = by_hand(family_model("qwen3_moe", seed=1, **MOE).bfloat16())
    with pytest.raises(ValueError, match="made with another model"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", other)
    with pytest.raises(ValueError, match="quantised with compressed-tensors: only FP8 and MXFP4 .*--plan"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    with pytest.raises(ValueError, match="quantised with compressed-tensors: only FP8 and MXFP4 .*--plan"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", by_hand(model), dtype="bfloat16")
    with pytest.raises(ValueError, match="quantised with compressed-tensors: only FP8 and MXFP4 .*--plan"):
        esparse.preflight(source, 6)
    assert not list(tmp_path.glob("*pruned*"))


def test_routers_stored_anew_in_float16_cannot_be_checked(tmp_path):
    """AutoAWQ and older tools store what they do not quantise in float16, which rounds small weights of bfloat16."""
    source, model = quantised(tmp_path / "source", *FORMATS["awq"][:3], stored=torch.float16)
    state = tensors(source)
    state["model.layers.0.mlp.gate.weight"][0, 0] = 0.0
    write(source, state)
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", by_hand(model))
    assert "routers were stored anew in float16" in report["unchecked"]
    assert same(tensors(tmp_path / "pruned"), expected(state, dict(enumerate(KEPT))))


def nan_scale(state):
    state["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"][0, 0] = torch.nan


def nan_weight(state):
    state["model.layers.1.mlp.experts.3.up_proj.weight"].view(torch.uint8)[0, 0] = 0xFF


def no_scale(state):
    del state["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]


def no_weight(state):
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]


def quantised_router(state):
    router = "model.layers.1.mlp.gate.weight"
    state |= {router: state[router].to(torch.float8_e4m3fn), f"{router}_scale_inv": scales(1, 4)}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (nan_scale, "experts.3.up_proj.weight_scale_inv holds NaN"),
        (nan_weight, "experts.3.up_proj.weight holds NaN"),
        (no_scale, "has no tensor model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"),
        (no_weight, "has no tensor model.layers.1.mlp.experts.3.up_proj.weight, which its config asks for"),
        (quantised_router, r"gate.weight_scale_inv of shape \[1, 4\] cannot be cut .* only experts may be quantised"),
    ],
)
def test_a_fault_of_a_quantised_source_is_named_and_nothing_stays(fault, words, tmp_path):
    source, model = quantised(tmp_path / "source", *FORMATS["block fp8"][:3])
    state = tensors(source)
    fault(state)
    write(source, state)
    with pytest.raises(ValueError, match=words):
        esparse.prune_checkpoint(source, tmp_path / "pruned", by_hand(model))
    assert not list(tmp_path.glob("*pruned*"))


def test_another_copy_is_not_mixed_into_unfinished_work(tmp_path, monkeypatch):
    source, model = mxfp4(tmp_path / "source")
    monkeypatch.setattr(StoredCheckpoint, "carry", lambda *_: (_ for _ in ()).throw(OSError("full")))
    monkeypatch.setattr(StoredCheckpoint, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", by_hand(model))
    with pytest.raises(ValueError, match="unfinished work with another dequantised"):
        esparse.prune_checkpoint(source, tmp_path / "pruned", by_hand(model), dtype="bfloat16")


def test_a_file_that_is_written_is_what_safetensors_writes(tmp_path):
    source, _ = quantised(tmp_path / "source", *FORMATS["nvfp4"][:3])
    reader = CheckpointReader(source)
    stored = StoredCheckpoint(reader, Layout(reader.config, 8))
    stored.write(tmp_path / "ours", stored.pruned(0, range(8)))
    state = tensors(source)
    theirs = {name: state[name] for name in stored.names[0]}
    save_file(theirs, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = folder.header(tmp_path / "ours"), folder.header(tmp_path / "theirs")
    assert {name: entry[1:4] for name, entry in ours.items()} == {name: entry[1:4] for name, entry in theirs.items()}
    assert all(entry.start % (folder.BITS[entry.stored] // 8) == 0 for entry in ours.values())
