"""Tests that need torchao: `pip install torchao`, then `pytest esparse/tests/with_torchao.py`.

They are separate because transformers imports torchao wherever it is installed, which is slow and prints lines at every
start.
"""

import pytest
import torch

import esparse
from esparse.checkpoints.models import weight_bytes
from esparse.experiments import weights
from esparse.moe.layers import moe_layers


def test_eight_bits_round_each_row_to_its_own_scale():
    (stored, _), (quantised, _) = esparse.load_model(), esparse.load_model(dtype="int8")
    for name in ("gate_up_proj", "down_proj"):
        weight, held = (getattr(moe_layers(model)[2].experts, name) for model in (stored, quantised))
        scale = weight.detach().abs().amax(-1, keepdim=True) / 127
        assert ((held.dequantize() - weight).abs() <= 0.501 * scale).all()
    assert 3.5 < weight_bytes(stored) / weight_bytes(quantised) < 4


def test_what_torchao_holds_is_neither_traced_nor_pruned_nor_saved(tmp_path):
    (model, tokenizer), tokens = esparse.load_model(dtype="int8"), torch.randint(3, 60, (2, 16))
    plan = esparse.search_experts(esparse.trace(esparse.load_model()[0], tokens), 6, method="reap")
    before = {name: (p.qdata if hasattr(p, "qdata") else p).clone() for name, p in model.named_parameters()}
    for call in (
        lambda: esparse.trace(model, tokens),
        lambda: esparse.prune(model, plan),
        lambda: esparse.prune_weights(model, tokens, 0.5),
    ):
        with pytest.raises(ValueError, match="held quantised: load it without quantisation to trace, prune or train it"):
            call()
    with pytest.raises(ValueError, match="torchao holds weights of this model: save it as it was before that"):
        esparse.save_model(model, tokenizer, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[name], p.qdata if hasattr(p, "qdata") else p) for name, p in model.named_parameters())


def test_rows_of_pruned_and_quantised_models(tmp_path):
    run = esparse.Run(sequences=4, length=64, tasks=["web_facts"], limit=4, keep=[6], folder=tmp_path)
    rows = list(weights.quantised_rows(run))
    assert [(row["r"], row["weights"]) for row in rows] == [(r, kind) for r in (8, 6) for kind in ("float32", "int8")]
    assert rows[0]["mib"] > rows[2]["mib"] > rows[1]["mib"] > rows[3]["mib"]
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.01)
