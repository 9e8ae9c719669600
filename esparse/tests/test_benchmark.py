"""The benchmarks measure what they say; ratios are theirs to print, never asserted as times here."""

import json

import pytest
import torch

import esparse
from esparse import benchmark
from esparse.models import moe_layers

SHAPE = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def test_memory_is_the_bytes_of_the_weights():
    model = benchmark.random_mixtral(SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}, 4, torch.bfloat16, "cpu")
    expert = 3 * 64 * 96
    attention = 64 * 64 * 2 + 64 * 32 * 2
    numbers = 2 * (4 * expert + attention + 4 * 64 + 2 * 64) + 2 * 100 * 64 + 64
    memory = esparse.measure_memory(model)
    assert memory["weights_mib"] * 2**20 == 2 * numbers
    assert memory["experts_mib"] * 2**20 == 2 * 2 * 4 * expert


def test_a_model_made_in_place_is_a_working_mixtral():
    """Its rotary frequencies, which are no parameters, must be right: the logits are those of the same weights loaded."""
    shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = benchmark.random_mixtral(shape, 4, torch.float32, "cpu")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(ids).logits, other(ids).logits, atol=1e-6)
    assert torch.isfinite(model(ids).logits).all()


def test_generation_is_timed_apart_from_prefill():
    model = benchmark.random_mixtral(SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}, 4, torch.float32, "cpu")
    found = esparse.measure_generation(model, batch_size=2, prompt=8, new_tokens=5)
    assert found["seconds"] > 0 and found["prefill_seconds"] > 0
    assert abs(found["tokens_per_second"] * max(found["seconds"] - found["prefill_seconds"], 1e-9) - 2 * 4) < 1e-6
    betas = benchmark.probed_betas(model)
    assert len(betas) == 2 and all(0 < beta <= 1 for beta in betas)
    speeds = benchmark.generation_speed(model, betas, repeats=1, new_tokens=3, prompt=4)
    assert set(speeds) == {"stock", "nothing skipped", "skipping"} and esparse.skips.skipping_betas(model) is None


def test_size_and_speed_covers_every_size():
    shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
    result = benchmark.size_and_speed(shape, torch.float32, "cpu", new_tokens=3, prompt=4, repeats=1)
    assert [row["r"] for row in result["rows"]] == [8, 6, 4] and result["weights"] == "random"
    sizes = [row["weights_mib"] for row in result["rows"]]
    assert sizes[0] - sizes[1] > 0.9 * 2 * 2 * 3 * 64 * 96 * 4 / 2**20
    assert "tokens/s" in benchmark._table(result)


def test_search_times_compare_like_with_like():
    model = benchmark.benchmark_layer(hidden=64, inner=96)
    row = benchmark.search_times(model, 6, tokens=64, repeats=1)
    assert min(row["ours"], row["products"], row["rerun"]) > 0
    assert row["all_outputs_mib"] == 4 * 64 * 4 * 64 * 4 / 2**20  # 4 x tokens x m x hidden x float32
    assert row["over_products"] == pytest.approx(row["ours"] / row["products"])  # one round


def test_expert_outputs_are_never_held_for_all_tokens():
    """The experts are called on a chunk at a time, whatever the calibration set."""
    model = benchmark.benchmark_layer(hidden=64, inner=96)
    experts, rows = moe_layers(model)[0].experts, []
    experts.act_fn.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    tokens = torch.randint(0, 100, (8, 64))
    esparse.trace(model, tokens, keep=6, chunk_tokens=32)
    assert max(rows) <= 32 * 4 and sum(rows) == 8 * 64 * 4


def test_the_median_is_taken_over_rounds_in_turn():
    calls = []
    variants = {name: (lambda name=name: calls.append(name) or float(len(calls))) for name in "ab"}
    assert benchmark.interleaved(variants, 3) == {"a": 5.0, "b": 6.0}
    assert "".join(calls) == "abababab"


def test_streaming_is_measured_in_a_process_of_its_own(tmp_path):
    shape = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    printed = benchmark.bench_stream(tmp_path / "stream.json", {**shape, "num_key_value_heads": 2})
    result = json.loads((tmp_path / "stream.json").read_text())
    assert "times the least" in printed and result["peak_gb"] > 0.1 and min(result["floor"].values()) > 0
    assert result["over_floor"] == pytest.approx((result["layers"] + result["checking"]) / sum(result["floor"].values()))
    assert result["layers"] == pytest.approx(sum(result["steps"].values()))
    expert, layer = 8 * 3 * 32 * 64, 32 * (32 + 16 + 16 + 32) + 8 * 32 + 2 * 32
    assert result["source_gb"] == pytest.approx(2 * (2 * (expert + layer) + 2 * 1024 * 32 + 32) / 1e9, rel=0.05)


def test_one_layer_is_set_against_its_own_products():
    rows = benchmark.layer_times({**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2}, 5000, torch.float32, "cpu")
    for row, reach in zip(rows, (4, 6), strict=True):
        assert row["floor"] * row["flop_per_second"] == pytest.approx(5000 * reach * 3 * 2 * 64 * 96)
        assert row["all_layers"] == pytest.approx(32 * row["seconds"]) and row["over_floor"] > 1
