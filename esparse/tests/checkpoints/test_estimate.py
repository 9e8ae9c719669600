"""The estimate of a pruning's cost, against independent counts of what a run does."""

import math
import sys
from dataclasses import replace

import pytest
import torch

import esparse
from esparse.checkpoints.estimate import Device, estimated
from esparse.checkpoints.layout import Layout
from esparse.checkpoints.streaming import FileStream
from esparse.measure import scale_cost
from esparse.moe.layers import moe_layers
from esparse.tests.checkpoints.test_streaming import saved, tensors
from esparse.tests.conftest import random_tokens, sampled
from esparse.tests.families import FAMILIES, SAMPLE, family_model
from esparse.tracing.reach import reach

FAST = Device(*[math.inf] * 7)
TOKENS = random_tokens(sequences=6, length=20)


def layout(r: int = 6, **changes) -> Layout:
    return Layout(family_model("mixtral", **changes).config, r)


def test_operations_are_those_of_the_closed_form():
    hidden, inner, n, k, r, layers, heads, length, tokens = 32, 24, 8, 2, 6, 3, 4 * 8, 20, 6 * 20
    m = k + n - r
    weights = 2 * hidden * heads + 2 * hidden * heads + 2 * hidden + n * hidden + m * 3 * hidden * inner
    causal, gram = length * hidden, m * m * hidden
    job = estimated(layout(), r, 6, 20, dtype=torch.float32)
    assert job.flop == 2 * tokens * layers * (weights + causal + gram)
    assert (job.reach, job.gram) == (m, tokens * m * (m + 1) / 2 * 4)


@pytest.mark.parametrize("method", ["enumerate", "progressive", "reap"])
def test_bytes_are_those_that_a_run_reads_and_writes(method, tmp_path, monkeypatch):
    source, write, stored = saved(tmp_path / "source"), FileStream.__setitem__, []

    def counted(self, batch, value):
        stored.append(sum(part.nbytes for part in value if part is not None))
        write(self, batch, value)

    for owner, name in ((FileStream, "__setitem__"), (FileStream, "__getitem__"), (scale_cost.CheckpointReader, "read_stored")):
        monkeypatch.setattr(owner, name, counted if name == "__setitem__" else getattr(owner, name))  # restored afterwards
    read = scale_cost.counted_reading()
    esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS, method=method)
    job = estimated(layout(), 6, *TOKENS.shape, method=method, dtype=torch.float32)
    assert job.states == sum(stored)
    assert job.written - job.states == sum(tensor.nbytes for tensor in tensors(tmp_path / "pruned").values())
    assert job.full == sum(tensor.nbytes for tensor in tensors(source).values())
    assert sum(read) == pytest.approx(job.read, rel=0.25)  # the output layer is not read to trace, nor the last hidden states


@pytest.mark.parametrize("family", sampled(FAMILIES, SAMPLE))
def test_the_reach_is_that_of_the_trace(family):
    """The router is known from the config alone."""
    model = family_model(family)
    layer = moe_layers(model)[0]
    for method, keep in (("greedy", 6), ("reap", 8)):
        found = estimated(Layout(model.config, 6), 6, 1, 8, method=method)
        assert found.reach == reach(8, layer.k, keep, layer.router)


def test_memory_holds_a_layer_its_gram_and_grows_with_each_size():
    held = lambda sequences=64, r=6, dtype=torch.float32, **changes: estimated(  # noqa: E731
        layout(r, **changes), r, sequences, 20, dtype=dtype
    )
    base = held()
    assert base.held > base.layer + 2 * base.gram and base.layer == 4 * (4 * 32 * 32 + 2 * 32 + 8 * 32 + 8 * 3 * 32 * 24)
    for more in (held(sequences=128), held(r=4), held(intermediate_size=48), held(hidden_size=64)):
        assert more.held > base.held
    assert held(num_hidden_layers=6).held <= base.held  # one layer at a time


def test_a_plan_holds_and_computes_no_more_than_the_copy():
    job = estimated(layout(), 6, 0, 0, dtype=torch.float32)
    assert job.flop == job.states == job.searched == job.copied == 0 and job.read == job.full + job.written
    assert job.held < job.layer


def test_each_speed_is_of_its_own_bytes():
    job = estimated(layout(), 6, 64, 20, dtype=torch.float32)
    assert job.seconds(FAST) == job.fixed | {"disk": 0}
    took = lambda **speeds: sum(job.seconds(replace(FAST, **speeds)).values()) - sum(job.fixed.values())  # noqa: E731
    assert took(flop=job.flop) == pytest.approx(1)
    assert took(memory=1.0) == pytest.approx(job.copied + job.searched)
    slow = 1e-3 * job.full  # slower than all else: the weights that fit into memory are read once
    assert took(read=slow) == pytest.approx(job.full / slow)
    assert took(read=slow, host_free=0) == pytest.approx(job.read / slow, rel=1e-3)
    assert took(write=slow) == pytest.approx(job.written / slow, rel=1e-3)


def test_processes_share_the_sequences_but_not_the_weights():
    one, four = (estimated(layout(), 6, 64, 20, ranks=ranks) for ranks in (1, 4))
    assert (four.flop, four.written, four.full) == (one.flop / 4, one.written, one.full) and four.held < one.held


def test_preflight_tells_these_numbers(tmp_path):
    source = saved(tmp_path / "source")
    job, said = estimated(layout(), 6, 4, 20, dtype=torch.float32), esparse.preflight(source, 6, sequences=4, length=20)
    assert said["FLOPs"] == f"{job.flop:.1e} on 80 tokens, 4 of 8 experts each"
    assert f"{job.stream / 1e3:.0f} kB while it works" in said["disk"]
    assert f"a layer has {job.layer / 1e3:.0f} kB, its Gram {job.gram / 1e3:.0f} kB" in said["memory"]
    assert list(said) == ["memory", "disk", "download", "FLOPs", "time", "access"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_benchmark_sets_runs_beside_their_estimates(tmp_path, monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "sequences": 2}
    monkeypatch.setattr(scale_cost, "BASE", scale_cost.BASE | small | {"length": 16})
    printed = scale_cost.bench_scale(tmp_path / "scale.json", runs=("base", "experts x 2"))
    result = esparse.files.read_json(tmp_path / "scale.json", "result")
    base, more = result["rows"]
    for row in (base, more):
        run = row["run"]
        assert run["seconds"] == pytest.approx(run["trace"] + run["search"] + run["write"])
        assert min(value for name, value in run.items() if name != "held") > 0  # so small a run may fit into freed memory
        assert 0.5 < row["estimate"]["read"] / run["read"] < 2
    assert more["run"]["read"] > 1.3 * base["run"]["read"] and more["run"]["written"] > base["run"]["written"]
    assert len(result["on paper"]) == 9 and "on paper, not run" in printed and "experts x 2" in printed
