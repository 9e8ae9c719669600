"""Kept experts read from folders are those that were kept: whatever family, layout, order and dtype, and whoever pruned."""

import json
import re

import pytest
import torch
import transformers

import esparse
from esparse.files import data_folder
from esparse.moe.identity import fingerprint
from esparse.moe.layers import moe_layers
from esparse.tests.checkpoints.test_layouts import EACH, TOKENS, laid_out, masked, published, run, tensors, write
from esparse.tests.conftest import random_model, sampled
from esparse.tests.families import CARRIED, FAMILIES, SAMPLE, family_model

KEPT = [[0, 1, 2, 4, 6, 7], [1, 2, 3, 4, 5, 7], [0, 2, 3, 5, 6, 7]]


def saved(folder, dtype=torch.float32, seed: int = 0):
    """A Mixtral's folder, and the model."""
    model = random_model("mixtral", 8, 2, seed, torch.float32)
    model.to(dtype).save_pretrained(folder)
    return model


@pytest.fixture
def full(tmp_path):
    model = saved(tmp_path / "full")
    return tmp_path / "full", model, esparse.PruningPlan("by hand", 6, KEPT, [0.0] * 3, fingerprint(model), "")


@pytest.fixture
def small(full):
    """The same model pruned, in memory."""
    return esparse.prune(transformers.AutoModelForCausalLM.from_pretrained(full[0]), full[2])


@pytest.mark.parametrize("family", sampled([name for name in FAMILIES if name not in CARRIED], SAMPLE.keys() - CARRIED.keys()))
def test_every_family_gives_its_plan_back(family, tmp_path):
    family_model(family, k=1 if family == "zaya" else 2).save_pretrained(tmp_path / "full")
    esparse.prune_checkpoint(tmp_path / "full", tmp_path / "pruned", 6, calibration=TOKENS, method="random")
    plan, found = (
        esparse.PruningPlan.load(tmp_path / "pruned/plan.json"),
        esparse.kept_experts(tmp_path / "full", tmp_path / "pruned"),
    )
    assert (found.kept, found.r, found.model) == (plan.kept, 6, plan.model) and list(range(6)) not in plan.kept
    assert found.method == "read from pruned" and found.losses == [None] * len(plan.kept)


@pytest.mark.parametrize(
    "how", [how for how in EACH if how["head"] in ("own", "tied", "tied, both stored")], ids=lambda how: how["head"]
)
def test_every_layout_does(how, tmp_path):
    full = laid_out(tmp_path / "full", how)
    esparse.prune_checkpoint(full, tmp_path / "pruned", 6, calibration=TOKENS, method="random")
    found = esparse.kept_experts(full, tmp_path / "pruned")
    assert found.kept == esparse.PruningPlan.load(tmp_path / "pruned/plan.json").kept


def test_the_text_model_of_a_composite_does(tmp_path):
    published("qwen3_vl_moe", tmp_path / "full")
    esparse.prune_checkpoint(tmp_path / "full", tmp_path / "pruned", 6, calibration=TOKENS, method="random")
    found = esparse.kept_experts(tmp_path / "full", tmp_path / "pruned")
    assert found.kept == esparse.PruningPlan.load(tmp_path / "pruned/plan.json").kept


@pytest.mark.parametrize("stacked", [False, True])
def test_another_order_is_the_same_plan_for_mask_and_pruning(stacked, full, small, tmp_path):
    for layer in moe_layers(small):
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        for parameter in (layer.gate.weight, *layer.experts.parameters()):
            parameter.data = parameter.data[order]
    small.save_pretrained(tmp_path / "pruned", save_original_format=not stacked)
    assert any("gate_up_proj" in name for name in tensors(tmp_path / "pruned")) == stacked
    found = esparse.kept_experts(full[0], tmp_path / "pruned")
    assert found.kept == KEPT and torch.allclose(run(small), masked(full[1], found), rtol=0, atol=1e-5)
    esparse.prune_checkpoint(full[0], tmp_path / "again", found)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.allclose(run(again), run(small), rtol=0, atol=1e-5)
    found.save(tmp_path / "plan.json")
    assert esparse.kept_experts(full[0], tmp_path / "plan.json") == found


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")])
def test_another_dtype_is_compared_after_rounding(dtypes, tmp_path):
    before, after = (getattr(torch, name) for name in dtypes)
    model = saved(tmp_path / "full", before)
    plan = esparse.PruningPlan("by hand", 6, KEPT, [0.0] * 3, fingerprint(model), "")
    esparse.prune(model, plan).to(after).save_pretrained(tmp_path / "pruned")
    found = esparse.kept_experts(tmp_path / "full", tmp_path / "pruned")
    assert (found.kept, found.model, found.method) == (KEPT, plan.model, "read from pruned")


def changed(small, folder, change) -> None:
    """Save a pruned model with other weights of the third expert of the second layer."""
    experts = moe_layers(small)[1].experts
    for name, parameter in experts.named_parameters():
        parameter.data[2] = change(name, parameter.data)
    small.save_pretrained(folder)


def test_an_expert_trained_or_scaled_a_little_is_found(full, small, tmp_path):
    noise = torch.Generator().manual_seed(0)
    changed(small, tmp_path / "trained", lambda name, p: p[2] + 0.03 * torch.randn(p[2].shape, generator=noise))
    found = esparse.kept_experts(full[0], tmp_path / "trained")
    assert found.kept == KEPT
    # Weights have a standard deviation of 0.3: another expert is sqrt(2) x 0.3 away, the trained one 0.03.
    share = float(re.search(r"experts up to ([\d.]+)% as far from their own as from the next", found.method)[1])
    assert share == pytest.approx(100 * 0.03 / (0.3 * (2 + 0.1**2) ** 0.5), rel=0.1)
    changed(small, tmp_path / "scaled", lambda name, p: p[2] * (1.4 if name == "down_proj" else 1))
    assert esparse.kept_experts(full[0], tmp_path / "scaled").kept == KEPT


CHANGES = {
    "the mean of two": lambda name, p: (p[2] + p[3]) / 2,
    "random": lambda name, p: torch.randn(p[2].shape, generator=torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_no_single_expert_is_refused(what, full, small, tmp_path):
    changed(small, tmp_path / "pruned", CHANGES[what])
    with pytest.raises(ValueError, match="Expert 2 of decoder layer 1 is no single expert of the full model") as refused:
        esparse.kept_experts(full[0], tmp_path / "pruned")
    assert "\n" not in str(refused.value)


def test_an_expert_that_is_held_twice_is_refused(full, small, tmp_path):
    changed(small, tmp_path / "pruned", lambda name, p: p[3])
    with pytest.raises(ValueError, match=r"6 different experts of a layer in rising order, got \[1, 2, 4, 4, 5, 7\]"):
        esparse.kept_experts(full[0], tmp_path / "pruned")


def test_equal_experts_cannot_be_told_apart(tmp_path):
    model = random_model("mixtral", 8, 2, dtype=torch.float32)
    for parameter in moe_layers(model)[0].experts.parameters():
        parameter.data[1] = parameter.data[0]
    model.save_pretrained(tmp_path / "full")
    esparse.prune_checkpoint(tmp_path / "full", tmp_path / "pruned", 7, calibration=TOKENS, method="reap")
    with pytest.raises(ValueError, match="Expert . of decoder layer 0 is no single expert"):
        esparse.kept_experts(tmp_path / "full", tmp_path / "pruned")


def test_a_saved_plan_is_held_against_the_full_model(full, tmp_path):
    esparse.PruningPlan("by hand", 6, KEPT, [0.0] * 3, full[2].model, "").save(tmp_path / "own.json")
    assert esparse.kept_experts(full[0], tmp_path / "own.json") == full[2]
    saved(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="made with another model"):
        esparse.kept_experts(tmp_path / "other", tmp_path / "own.json")
    esparse.PruningPlan("by hand", 6, [[*range(5), 8], *KEPT[1:]], [0.0] * 3, full[2].model, "").save(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match=r"must keep 6 different experts .* got \[0, 1, 2, 3, 4, 8\]"):
        esparse.kept_experts(full[0], tmp_path / "wrong.json")


def test_folders_of_other_models_are_refused(full, small, tmp_path):
    small.save_pretrained(tmp_path / "pruned")
    saved(tmp_path / "seed", seed=1)
    random_model("mixtral", 8, 2, dtype=torch.float32, intermediate_size=16).save_pretrained(tmp_path / "narrow")
    random_model("mixtral", 8, 2, dtype=torch.float32, num_hidden_layers=2).save_pretrained(tmp_path / "short")
    random_model("qwen3", 8, 2, dtype=torch.float32).save_pretrained(tmp_path / "qwen3")
    for other in ("seed", "narrow", "short", "qwen3"):
        words = "no single expert" if other == "seed" else "was not pruned from"
        with pytest.raises(ValueError, match=words) as refused:
            esparse.kept_experts(tmp_path / other, tmp_path / "pruned")
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="Cannot keep 8 experts"):
        esparse.kept_experts(tmp_path / "pruned", full[0])


# --- what other tools write -------------------------------------------------------------------------------------------------


def test_a_folder_as_the_reap_authors_write_it(full, tmp_path):
    """CerebrasResearch/reap at 1970473, `prune.py`: the kept modules renumbered, the router's rows, one entry of the config,
    `reap_args.yaml`; no list of experts. Written here as that code does, which was run once, with transformers 4.55."""
    state, source = {}, tensors(full[0])
    for name, tensor in source.items():
        layer, expert = (
            int(part[1]) if part else None for part in (re.search(rf"{word}\.(\d+)", name) for word in ("layers", "experts"))
        )
        if expert is None:
            state[name] = tensor[KEPT[layer]] if name.endswith("gate.weight") else tensor
        elif expert in KEPT[layer]:
            state[name.replace(f"experts.{expert}.", f"experts.{KEPT[layer].index(expert)}.")] = tensor
    folder = tmp_path / "reap-seed_42-0.25"
    full[1].config.save_pretrained(folder)
    write(folder, state, num_local_experts=6)
    (folder / "reap_args.yaml").write_text("prune_args:\n  prune_method: reap\n")
    assert esparse.kept_experts(full[0], folder).kept == KEPT


def test_a_report_as_llm_compressor_writes_it(tmp_path):
    """0.14.0.1, REAPPruningModifier(report_path=...): kept experts by module name, here of 12 layers and out of order."""
    model = random_model("mixtral", 4, 2, dtype=torch.float32, num_hidden_layers=12)
    model.save_pretrained(tmp_path / "full")
    kept = [sorted({number % 4, (number // 4 + number + 1) % 4}) for number in range(12)]
    report = {f"model.layers.{number}.mlp": kept[number] for number in sorted(range(12), key=str)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = esparse.kept_experts(tmp_path / "full", tmp_path / "report.json")
    assert (found.kept, found.r, found.model, found.method) == (kept, 2, fingerprint(model), "read from report.json")
    masked(model, found)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "neither a pruning plan nor a report"),
        (None, "neither a pruning plan nor a report"),
        ({}, "neither a pruning plan nor a report"),
        ({"sparsity": 0.25}, "neither a pruning plan nor a report"),
        ({"layers.0": []}, "neither a pruning plan nor a report"),
        ({"kept": 3}, "no pruning plan of esparse"),
        ({"layers.0": [0, 1]}, "made with another model"),
        ({f"layers.{number}": [0, 8] for number in range(3)}, r"must keep 2 different experts .* got \[0, 8\]"),
        ({"layers.0": [0, 1, 2], "layers.1": [0, 1], "layers.2": [0, 1, 2]}, r"must keep 3 different experts .* got \[0, 1\]"),
    ],
)
def test_a_file_that_is_no_report_of_this_model(content, words, full, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        esparse.kept_experts(full[0], tmp_path / "report.json")


def test_the_command_prices_a_folder(tiny, tmp_path, call):
    tokens = esparse.calibration_tokens("web", tiny[1], sequences=4, length=64)
    trace = esparse.trace(tiny[0], tokens, keep=6)
    esparse.prune_checkpoint(data_folder() / "tiny", tmp_path / "pruned", esparse.search_experts(trace, 6, method="frequency"))
    options = ("--sequences", 4, "--length", 64, "--loss", "output", "--run-dir", tmp_path / "run")
    said = call("price", "tiny", tmp_path / "pruned", *options)
    first, _, *lines = said.stdout.splitlines()
    rows = esparse.price(trace, esparse.PruningPlan.load(tmp_path / "pruned" / "plan.json"), loss="output")
    assert said.returncode == 0 and first == "method: read from pruned, r = 6" and len(lines) == len(rows) == 7
    for line, row in zip(lines, rows, strict=True):
        words = line.split()
        found = [float(word) for word in words[1:3]]
        assert words[0] == row["layer"] and found == pytest.approx([row["loss"], row["optimum"]], rel=1e-4)
        assert words[4:-2] == [str(row["rank"]), "28"] * (row["rank"] is not None)
        assert float(words[-1]) == pytest.approx(row["gain"], abs=1e-5)
    said = call("price", "tiny", tmp_path / "pruned" / "plan.json", *options[:4], *options[6:])
    rows = esparse.price(trace, esparse.PruningPlan.load(tmp_path / "pruned" / "plan.json"), loss="residual")  # the default
    found = [float(line.split()[1]) for line in said.stdout.splitlines()[2:]]
    assert found == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    refused = call("price", "tiny", tmp_path / "pruned", "--loss", "l1")  # said before anything is read
    assert (refused.returncode, refused.stdout) == (2, "") and "Unknown loss 'l1': choose from eq3" in refused.stderr
