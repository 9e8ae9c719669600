"""A folder is checked before it is published: a whole one passes, and every fault in its files is found and named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import esparse
from esparse.checkpoints.check import EIGHT, inspect_folder, row_lengths
from esparse.tests.conftest import random_model
from esparse.tests.families import family_model


def change(path, **entries):
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    """A small Mixtral of 8 experts, as one would publish it: [folder of the full model, of 6 experts]."""
    folders = [tmp_path_factory.mktemp("check") / name for name in ("full", "pruned")]
    shape = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    for folder, kept in zip(folders, (8, 6), strict=True):
        model = random_model("mixtral", 8, 2, dtype=torch.float32, **shape)
        plan = esparse.PruningPlan("given", kept, [[*range(kept)]] * 2, [None] * 2, "", "")
        plan.model = esparse.trace(model, torch.zeros(1, 4, dtype=torch.long)).model
        esparse.save_model(esparse.prune(model, plan), tiny[1], folder, plan)
    return folders


@pytest.fixture
def folder(published, tmp_path):
    """A copy of the pruned folder, to be damaged."""
    return shutil.copytree(published[1], tmp_path / "copy")


def status(found) -> dict[str, str]:
    return {finding.name: finding.status for finding in found}


def note(found, name: str) -> str:
    return next(finding.note for finding in found if finding.name == name)


def test_a_whole_folder_passes_and_tells_what_pruning_cost_it(published):
    full, pruned = published
    assert set(status(inspect_folder(full)).values()) == {"ok"}
    found = inspect_folder(pruned, against=full)
    assert {name for name, state in status(found).items() if state != "ok"} == {"expert parallel", "8 experts"}
    assert EIGHT in note(found, "8 experts")
    values = {finding.name: finding.value for finding in found}
    assert values["expert count"] == 6 and values["head size"] == 64
    assert values["tensor parallel"] == [1, 2, 4] and values["expert parallel"] == [1, 2]


def weights(folder, edit) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
FAULTS = {  # what is done to the folder; the finding, its status, and words of its note
    "missing": (lambda f: weights(f, lambda s: s.pop(EXPERT)), "tensors", "fail", EXPERT),
    "renamed": (
        lambda f: weights(f, lambda s: s.update({"model.layers.1.own": s.pop(GATE)})),
        *("tensors", "fail", "block_sparse_moe.gate.weight"),
    ),
    "unused": (lambda f: weights(f, lambda s: s.update(extra=torch.zeros(2))), "tensors", "warn", "extra"),
    "nan": (lambda f: weights(f, lambda s: s[EXPERT][0].fill_(torch.nan)), "finite", "fail", EXPERT),
    "infinite": (lambda f: weights(f, lambda s: s["lm_head.weight"][3].fill_(torch.inf)), "finite", "fail", "lm_head"),
    "count": (lambda f: change(f / "config.json", num_local_experts=5), "tensors", "fail", "5"),
    "alias": (lambda f: change(f / "config.json", num_experts=8), "expert count", "fail", "num_experts 8"),
    "plan": (lambda f: change(f / "plan.json", r=5), "expert count", "fail", "plan.json 5"),
    "no config": (lambda f: change(f / "config.json", model_type="unheard"), "config", "fail", "unheard"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer", "fail", "tokenizer.json"),
    "theta": (lambda f: change(f / "config.json", rope_theta=None), "rope_theta", "warn", "mlx-lm"),
    "architecture": (lambda f: change(f / "config.json", architectures=["OwnForCausalLM"]), "vLLM", "warn", "OwnForCausalLM"),
    "config": (lambda f: change(f / "config.json", rms_norm_eps=1e-3), "config", "warn", "rms_norm_eps"),
    "template": (
        lambda f: change(f / "tokenizer_config.json", chat_template="{{ raise_exception('roles') }}"),
        *("chat template", "fail", "roles"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault, folder, published):
    damage, name, state, words = FAULTS[fault]
    damage(folder)
    found = inspect_folder(folder, against=published[0])
    assert status(found)[name] == state, found
    assert words in note(found, name)


def test_what_esparse_adds_to_a_config_is_no_difference(published, tmp_path):
    full = shutil.copytree(published[0], tmp_path / "full")
    told = json.loads((full / "config.json").read_text())
    del told["rope_theta"]  # so transformers 5 writes it
    (full / "config.json").write_text(json.dumps(told))
    assert status(inspect_folder(published[1], against=full))["config"] == "ok"


def test_tokens_without_embeddings_are_found(tiny, tmp_path):
    esparse.save_model(random_model("mixtral", 6, 2, vocab_size=1000), tiny[1], tmp_path / "few")
    found = inspect_folder(tmp_path / "few")
    assert status(found)["tokenizer"] == "fail" and "1000 rows" in note(found, "tokenizer")


def test_sizes_that_engines_do_not_take(tiny, tmp_path):
    esparse.save_model(random_model("mixtral", 6, 2, vocab_size=1024), tiny[1], tmp_path / "small")
    found = {finding.name: finding for finding in inspect_folder(tmp_path / "small")}
    assert found["head size"].status == "warn" and found["head size"].value == 8
    assert found["K-quants"].status == "warn" and "F16" in found["K-quants"].note  # the experts' 24 is no multiple of 32
    assert found["8 experts"].status == "warn"  # nothing says how many there were
    assert found["tensor parallel"].value == [1, 2, 4]


def test_the_report_tells_the_count_before_pruning(folder):
    (folder / "pruning_report.json").write_text(json.dumps({"n": 16, "r": 6}))
    found = status(inspect_folder(folder))
    assert found["8 experts"] == "ok" and found["expert parallel"] == "warn"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_what_engines_want_of_other_families(family, tiny, tmp_path):
    model = family_model(family, 4, 2)
    model.resize_token_embeddings(1024)
    esparse.save_model(model, tiny[1], tmp_path / "model")
    remove = {"qwen3_moe": "num_experts", "deepseek_v3": "topk_method", "gpt_oss": "num_local_experts"}[family]
    entries = {"qwen3_moe": {"num_experts": 4}, "gpt_oss": {}}.get(
        family, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    )
    name = "DeepSeek routing" if family == "deepseek_v3" else "mlx-lm"
    change(tmp_path / "model/config.json", **entries)
    assert status(inspect_folder(tmp_path / "model"))[name] == "ok"
    change(tmp_path / "model/config.json", **{remove: None})
    found = inspect_folder(tmp_path / "model")
    assert status(found)[name] == "warn" and remove in note(found, name)


@pytest.mark.parametrize("truncate, expected", [(False, "warn"), (True, "ok")])
def test_bounds_that_engines_round_are_told(truncate, expected, tiny, tmp_path):
    model = family_model("gpt_oss", 4, 2)
    model.resize_token_embeddings(1024)
    esparse.save_model(model, tiny[1], tmp_path / "model")
    yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": truncate}
    change(tmp_path / "model/config.json", rope_parameters=None, rope_scaling=yarn, rope_theta=150000.0)
    assert status(inspect_folder(tmp_path / "model"))["YaRN"] == expected


def test_a_router_bias_that_engines_leave_out_is_told(tiny, tmp_path):
    model = family_model("ernie4_5_moe", 4, 2)
    model.resize_token_embeddings(1024)
    esparse.save_model(model, tiny[1], tmp_path / "model")
    assert status(inspect_folder(tmp_path / "model"))["router bias"] == "warn"


@pytest.mark.parametrize(
    "held, expected, said",
    [
        ({"layers": [0, 1, 2], "betas": [0.5, 0.25, 0]}, "ok", "skip with these betas"),
        ([0.5, 0.25, 0], "warn", "does not name the layers"),
        ({"layers": [1, 2, 3], "betas": [0.5, 0.25, 0]}, "warn", "does not name the layers"),
        ({"betas": [0.5]}, "fail", "each of the 3 MoE layers"),
        ({"beta": 1}, "fail", "holds no betas"),
    ],
)
def test_betas_that_fit_no_layers_are_found(held, expected, said, tiny, tmp_path):
    esparse.save_model(random_model("mixtral", 4, 2, vocab_size=1024), tiny[1], tmp_path / "model")
    assert "skipping" not in status(inspect_folder(tmp_path / "model"))
    (tmp_path / "model" / "esparse.json").write_text(json.dumps(held))
    found = inspect_folder(tmp_path / "model")
    assert status(found)["skipping"] == expected and said in note(found, "skipping")


def test_rows_are_those_of_the_stored_matrices():
    model = random_model("mixtral", 4, 2)
    stored = {t.shape[-1] for name, t in model.state_dict().items() if t.ndim > 1 and "gate.weight" not in name}
    assert set(row_lengths(model)) == stored == {32, 24}
