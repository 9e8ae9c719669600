"""The benchmarks measure what they claim. Tests assert ratios with wide margins, never absolute times."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import esparse
from esparse.experiments.speed import explanations, roofline
from esparse.machine import flop_per_second
from esparse.measure import decoding, peer_work, peers, scores_cost, search_cost, streaming_cost, timing
from esparse.moe.layers import moe_layers
from esparse.tests.conftest import EXHAUSTIVE, apart, random_model

SHAPE = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = TINY | {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64}


def test_memory_is_the_bytes_of_the_weights():
    model = timing.random_mixtral(TINY, 4, torch.bfloat16, "cpu")
    expert = 3 * 64 * 96
    attention = 64 * 64 * 2 + 64 * 32 * 2
    numbers = 2 * (4 * expert + attention + 4 * 64 + 2 * 64) + 2 * 100 * 64 + 64
    memory = esparse.measure_memory(model)
    assert memory["weights_mib"] * 2**20 == 2 * numbers
    assert memory["experts_mib"] * 2**20 == 2 * 2 * 4 * expert


def test_a_model_made_in_place_is_a_working_mixtral():
    """Its rotary frequencies, which are no parameters, must be right: the logits are those of the same weights loaded."""
    model = timing.random_mixtral(TINY, 4, torch.float32, "cpu")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    assert apart(model(ids).logits, other(ids).logits) < 1e-5
    assert torch.isfinite(model(ids).logits).all()


def test_generation_is_timed_apart_from_prefill():
    model = timing.random_mixtral(TINY, 4, torch.float32, "cpu")
    found = esparse.measure_generation(model, batch_size=2, prompt=8, new_tokens=5)
    assert found["tokens_per_second"] * found["decode_seconds"] == pytest.approx(2 * 5)
    assert found["prefill_tokens_per_second"] * found["prefill_seconds"] == pytest.approx(2 * 8)
    seen = []
    model.register_forward_pre_hook(lambda _, args, named: seen.append(args[0].shape[1]), with_kwargs=True)
    esparse.measure_generation(model, prompt=8, new_tokens=5)
    assert seen == [8, 1, 1, 1, 1, 1]


def test_decoding_compiled_uses_one_static_cache_again(monkeypatch):
    import transformers

    backend = transformers.CompileConfig(backend="aot_eager", mode=None)  # no compiler needed
    monkeypatch.setattr(timing, "CompileConfig", lambda: backend)
    model = timing.random_mixtral(TINY, 4, torch.float32, "cpu")
    torch._dynamo.reset()
    cache, graphs = transformers.StaticCache(model.config, max_cache_len=12), []
    for betas in (None, [0.5, 0.5], [0.5, 0.5]):
        with esparse.skipping(model, betas) if betas else nullcontext():
            esparse.measure_generation(model, prompt=4, new_tokens=8, cache=cache)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert cache.get_seq_length() == 12
    assert graphs[0] < graphs[1] == graphs[2]  # compiled once for each variant, then used again


def test_search_times_compare_like_with_like():
    layer = search_cost.expert_layer(8, 2, hidden=64, inner=96)
    row = search_cost.search_times(layer, 6, tokens=64, repeats=1)
    assert min(row["ours"], row["products"], row["rerun"]) > 0
    assert row["all_outputs_mib"] == 4 * 64 * 4 * 64 * 4 / 2**20  # 4 x tokens x m x hidden x float32
    assert row["over_products"] == pytest.approx(row["ours"] / row["products"])  # one round


@torch.no_grad()
def test_greedy_removal_is_timed_with_and_without_groups():
    """A token then reaches two more experts for each of the two groups that it leaves out."""
    layers = {groups: search_cost.grouped_layer(32, 2, groups, hidden=32, inner=16) for groups in (1, 4)}
    rows = search_cost.greedy_times({str(groups): (layer, 24) for groups, layer in layers.items()}, tokens=64, repeats=1)
    assert [row["reach"] for row in rows] == [2 + 8, 2 + 8 + 2 * 2] and min(row["trace"] + row["search"] for row in rows) > 0
    assert [layer.router.groups for layer in layers.values()] == [1, 4]


def test_expert_outputs_are_never_held_for_all_tokens():
    """The experts are called on a chunk at a time, whatever the calibration set."""
    model, rows = random_model("mixtral", 8, 2), []
    moe_layers(model)[0].experts.act_fn.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    esparse.trace(model, torch.randint(0, 48, (8, 64)), keep=6, chunk_tokens=32)
    assert max(rows) <= 32 * 4 and sum(rows) == 8 * 64 * 4


def test_rounds_take_turns_and_each_begins_with_another():
    calls = []
    found = timing.rounds({name: (lambda name=name: calls.append(name) or len(calls)) for name in "abc"}, 3)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"  # the first warms up
    assert found == {"a": [6, 8, 10], "b": [4, 9, 11], "c": [5, 7, 12]}


@pytest.mark.slow
def test_streaming_is_measured_in_a_process_of_its_own(tmp_path):
    printed = streaming_cost.bench_stream(tmp_path / "stream.json", SMALL)
    result = json.loads((tmp_path / "stream.json").read_text())
    assert "times the least" in printed and result["peak_gb"] > 0.1 and min(result["floor"].values()) > 0
    assert result["over_floor"] == pytest.approx((result["layers"] + result["checking"]) / sum(result["floor"].values()))
    assert result["layers"] == pytest.approx(sum(result["steps"].values()))
    expert, layer = 8 * 3 * 32 * 64, 32 * (32 + 16 + 16 + 32) + 8 * 32 + 2 * 32
    assert result["source_gb"] == pytest.approx(2 * (2 * (expert + layer) + 2 * 1024 * 32 + 32) / 1e9, rel=0.05)


@pytest.mark.slow
def test_pruning_by_a_plan_is_measured_against_cp(tmp_path):
    printed = streaming_cost.bench_copy(tmp_path / "copy.json", SMALL)
    result = json.loads((tmp_path / "copy.json").read_text())
    assert "times cp" in printed
    assert {kind: len(times) for kind, times in result["seconds"].items()} == {"cp": 5, "as stored": 5, "bfloat16": 1}
    assert result["over_cp"] == min(result["seconds"]["as stored"]) / min(result["seconds"]["cp"])
    expert, layer = 6 * 3 * 32 * 64, 32 * (32 + 16 + 16 + 32)  # a byte each; the scales and the rest in four and two
    rest = 4 * (6 * 3 + 4) + 2 * (6 * 32 + 2 * 32)
    assert result["written_gb"] == pytest.approx((2 * (expert + layer + rest) + 2 * (2 * 1024 * 32 + 32)) / 1e9, rel=0.15)


@pytest.mark.slow
def test_calibration_is_measured_against_the_forward_pass(tmp_path):
    printed = scores_cost.bench_scores(tmp_path / "scores.json", SMALL, repeats=1)
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert "score_over_forward" in printed and [row["from"] for row in rows] == ["memory", "disk"] * 2
    for row in rows:  # of one round each
        assert row["score_over_forward"] == pytest.approx(row["score"] / row["forward"])
        assert row["losses_over_forward"] == pytest.approx(row["losses"] / row["forward"])
        assert row["model"] == "random" or row["score_over_forward"] < 1.6 < 1.2 * row["losses_over_forward"]  # 1.1 and 1.8


def test_what_our_side_of_the_peers_answers(tmp_path):
    """Kept experts are those of the search, and the bits those of the masks; the other side needs its own environment."""
    tokens = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    streaming_cost.write_random_checkpoint(tmp_path / "model", SMALL)
    save_file({"tokens": tokens}, tmp_path / "model" / "tokens.safetensors")
    for name in ("reap", "wanda", "wanda, dense"):
        peer_work.work(name, tmp_path / "model")
    answer = json.loads((tmp_path / "reap.json").read_text())
    model = peer_work.load(tmp_path / "model")
    assert answer["kept"] == esparse.search_experts(esparse.trace(model, tokens), 6, method="reap", loss="eq3").kept
    assert answer["seconds"] > 0 and answer["peak_mib"] > 50
    esparse.prune_weights(model, tokens, "2:4", method="wanda", scope="linear", dense=True)
    bits = load_file(tmp_path / "wanda, dense.safetensors")
    up = model.model.layers[1].mlp.experts.gate_up_proj[3, 64:] != 0
    assert len(bits) == 2 * (4 + 3 * 8) and torch.equal(bits["model.layers.1.mlp.experts.3.up_proj.weight"], packed(up))
    assert (
        peers.equal_share(tmp_path, "wanda, dense", "wanda, dense") == 1 > peers.equal_share(tmp_path, "wanda", "wanda, dense")
    )


def packed(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.packbits(mask.numpy()))


# --- the three sizes ------------------------------------------------------------------------------------------------


def hidden_sizes(model, betas, **options):
    """Plain counting of what `routed` says: every decoding step, every layer, by the gates' own output."""
    share, read, steps = [0] * len(betas), 0, 0
    for number, layer in enumerate(moe_layers(model)):

        def hook(_gate, _args, output, number=number):
            nonlocal read, steps
            if len(output[1]) > options["batch_size"]:
                return  # the prefill
            experts = set()
            for weights, chosen in zip(output[1].tolist(), output[2].tolist(), strict=True):
                (first, one), (second, other) = sorted(zip(weights, chosen, strict=True), reverse=True)
                share[number] += second < betas[number] * first
                experts |= {one} if second < betas[number] * first else {one, other}
            read, steps = read + len(experts), steps + 1

        layer.gate.register_forward_hook(hook)
    with esparse.skipping(model, betas):
        timing.measure_generation(model, **options)
    pairs = options["batch_size"] * options["new_tokens"]
    return [count / pairs for count in share], read / steps


def test_what_decoding_reads_is_counted_and_half_is_dropped():
    model = timing.random_mixtral(TINY, 8, torch.float32, "cpu")
    options = {"batch_size": 3, "prompt": 4, "new_tokens": 8}
    betas = decoding.halving_betas(model, **options)
    found = decoding.routed(model, betas, **options)
    shares, read = hidden_sizes(model, betas, **options)
    assert found["shares"] == pytest.approx(shares) and found["read"] == pytest.approx(read)
    assert all(abs(share - 0.5) <= 1 / 24 for share in shares)


def test_bytes_of_a_step_are_those_of_the_weights_in_use():
    model = timing.random_mixtral(TINY, 4, torch.bfloat16, "cpu")
    expert, attention = 3 * 64 * 96, 64 * 64 * 2 + 64 * 32 * 2
    layer = attention + 4 * 64 + 2 * 64
    cache = 2 * 2 * 10 * 2 * 16  # keys and values, layers, context, heads, their width: of one sequence
    assert decoding.step_bytes(model, 1.5, 10, 5) == 2 * (2 * (layer + 1.5 * expert) + 64 * 100 + 64 + 5 * cache)
    assert decoding.memory(model, decoding.Size(TINY, prompt=6, new_tokens=4))["cache_mib"] * 2**20 == 2 * cache


@pytest.mark.parametrize("bfloat16, chosen", [((0.8, 3.8, 14.0), torch.float32), ((0.8, 1.1, 2.0), torch.bfloat16)])
def test_a_cpu_decodes_in_bfloat16_only_where_it_also_multiplies_in_it(monkeypatch, bfloat16, chosen):
    """Milliseconds as measured with 1, 8 and 32 rows: on a CPU without instructions for bfloat16, and as on one with them."""
    milliseconds = {torch.bfloat16: bfloat16, torch.float32: (1.5, 2.7, 4.2)}

    def seconds(call):
        product = call()
        return milliseconds[product.dtype][(1, 8, 32).index(len(product))] / 1000

    monkeypatch.setattr(decoding, "seconds_of", seconds)
    assert decoding.decoding_dtype("cpu") is chosen


@pytest.mark.parametrize("rate, sides", [(1e12, [256, 512, 1024]), (1e9, [256, 512]), (1e8, [256])])
def test_the_speed_of_products_is_known_soon_where_they_are_slow(monkeypatch, rate, sides):
    taken = []

    def seconds(call):
        taken.append(len(call()))
        return 2 * taken[-1] ** 3 / rate

    monkeypatch.setattr(sys.modules["esparse.machine"], "seconds_of", seconds)
    assert flop_per_second(torch.float32) == pytest.approx(rate) and taken == [side for side in sides for _ in range(3)]


@pytest.mark.alone
@pytest.mark.parametrize(("batches", "protocol"), [((1, 8), 8), pytest.param((1, 8, 32), 24, marks=EXHAUSTIVE)])
@pytest.mark.slow
def test_the_small_benchmark_guards_against_getting_slower(batches, protocol, tmp_path):
    """Ratios of what ran side by side, with margins for a busy machine; never times."""
    size = replace(decoding.SIZES["small"], batches=batches, protocol=protocol)
    result = decoding.measure(size, sizes=(8, 4), out=tmp_path / "speed.json")
    assert json.loads((tmp_path / "speed.json").read_text()) == json.loads(json.dumps(result)) and not result["left_out"]
    full, pruned = result["rows"]
    assert [*full["decoding"]] == [*map(str, batches)]
    for found in (*full["decoding"].values(), *pruned["decoding"].values()):
        assert abs(found["dropped"] - found["planned"]) < 0.06 and min(found["tokens_per_second"].values()) > 0
    one = full["decoding"]["1"]
    assert 1.2 < one["limit_gain"] < 1.3 and one["experts_read"] == {
        "nothing skipped": 2,
        "skipping": pytest.approx(1.5, abs=0.05),
    }
    assert one["gain"] > 0.9 and one["plain"] > 0.8  # measured alone: 1.1 and 0.95 at this size
    for row in result["calibration"]:
        assert row["over_floor"] < 2 and row["faster"] > 5  # 1.2 and 17 to 28
    assert full["memory"]["weights_mib"] / pruned["memory"]["weights_mib"] == pytest.approx(88.5 / 46.5, rel=0.01)
    text = "\n".join(timing.aligned(rows(result)) for rows in decoding.TABLES.values())
    assert "nothing skipped" in text and "times faster" in text
    assert {
        row["explanation"]
        for row in explanations(result | {"rows": [*result["rows"], {**pruned, "r": 6}]}, esparse.paper("table5"))
    }
    points = roofline(result)["points"]
    assert all(0 < point["flop_per_second"] < 2 * max(roofline(result)["peaks"].values()) for point in points)


def test_what_time_does_not_suffice_for_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "decoding_dtype", lambda _device: torch.float32)  # found out by large products
    size = decoding.Size(TINY, batches=(1,), new_tokens=4, repeats=4, calibration=64, protocol=4, minutes=0)
    result = decoding.measure(size, sizes=(8,), out=tmp_path / "speed.json")
    names = ["calibration", "the host's share", "r = 8, protocol", "r = 8, memory", "r = 8, batch 1"]
    parts = [f"{name}: no time" for name in names]
    assert (
        not decoding.complete(result)
        and result["left_out"] == parts
        and json.loads((tmp_path / "speed.json").read_text())["left_out"] == parts
    )
    assert timing.aligned(decoding.decoding_rows(result)) == ""


def test_what_fails_for_memory_is_said_and_the_rest_measured(tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more")

    monkeypatch.setattr(decoding, "protocol", fails)
    monkeypatch.setattr(decoding, "decoding_dtype", lambda _device: torch.float32)
    size = decoding.Size(TINY, batches=(1,), new_tokens=4, repeats=4, calibration=64)
    result = decoding.measure(size, sizes=(8,), out=tmp_path / "speed.json")
    assert result["left_out"] == ["r = 8, protocol: CUDA out of memory."] and not decoding.complete(result)
    assert result["calibration"] and result["rows"][0]["decoding"]["1"]["gain"] > 0


def test_where_time_is_short_what_matters_most_comes_first():
    stages = decoding._stages(decoding.SIZES["full"], (8, 6, 4), "cuda")
    assert [(r, name) for r, parts in stages for name in parts] == [
        *((r, name) for r in (8, 6, 4) for name in ("protocol", "memory", "1")),
        (8, "1, compiled"),
        *((r, name) for r in (8, 6, 4) for name in ("8", "32")),
        (6, "1, compiled"),
        (4, "1, compiled"),
    ]


def test_a_gpu_machine_needs_neither_pandas_nor_what_evaluates():
    absent = ("pandas", "datasets", "lm_eval", "ipywidgets", "seaborn", "IPython")
    script = f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
    script += "import esparse, esparse.measure.decoding, esparse.__main__ as main; main.main(['bench', 'full'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip().endswith("run `bench small` or `bench medium` here."), done.stderr


def test_the_full_size_says_what_it_needs():
    with pytest.raises(RuntimeError, match="needs one GPU with 120 GB of free memory"):
        decoding.bench("full")
