"""The plug-in for vLLM: its rule is that of `skip_pairs`, it reads the betas that esparse writes, and it leaves other models
alone. Here vLLM's classes are stand-ins; `.ci/engines vllm-cpu` runs the plug-in in vLLM itself."""

import importlib.metadata
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import esparse
from esparse import vllm_plugin
from esparse.moe.routers import skip_pairs
from esparse.tests.families import family_model

LAYERS = "model.layers.{}.block_sparse_moe.experts"


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("beta", [1e-9, 0.4, 5.0])
def test_the_rule_is_that_of_the_package(k, renormalise, beta):
    generator = torch.Generator().manual_seed(k)
    weights = torch.rand(200, k, generator=generator)
    experts = torch.rand(200, 16, generator=generator).topk(k).indices.int()
    order = weights.sort(dim=1, descending=True).indices
    keep, expected = skip_pairs(weights.gather(1, order), beta, renormalise)
    found, numbers = vllm_plugin.skip(weights, experts, beta, renormalise)
    assert torch.equal(found, expected)
    assert torch.equal(numbers[keep], experts.gather(1, order)[keep])
    assert torch.equal(numbers == numbers[:, :1], ~keep | (torch.arange(k) == 0))
    assert bool((~keep).any()) == (beta > 0.1)


def test_a_row_without_weights_stays_as_it_is():
    weights, experts = vllm_plugin.skip(torch.zeros(1, 2), torch.full((1, 2), -1), 0.5, True)
    assert weights.tolist() == [[0, 0]] and experts.tolist() == [[-1, -1]]


class Runner:
    """What the plug-in needs of vLLM's MoERunner."""

    def __init__(self, layer_name: str, weights: torch.Tensor):
        self.layer_name = layer_name
        experts = torch.arange(weights.shape[1]).expand_as(weights)
        self.router = SimpleNamespace(top_k=2, renormalize=True, select_experts=lambda hidden_states: (weights, experts))
        self.routed_experts = SimpleNamespace(forward_monolithic=lambda: "stock")


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A class of runners with the plug-in, and the folder of the model that they read."""

    def stand_in(name: str, **entries) -> None:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(entries)

    read = lambda name, model, revision: json.loads(path.read_text()) if (path := model / name).exists() else None  # noqa: E731
    log = SimpleNamespace(info=lambda *words: None, warning=lambda *words: None)
    place = "vllm.model_executor.layers.fused_moe.runner.moe_runner"
    for parent in (place[:at] for at, letter in enumerate(place) if letter == "."):
        stand_in(parent)
    runners = type("MoERunner", (Runner,), {"__init__": Runner.__init__})
    stand_in(place, MoERunner=runners)
    stand_in("vllm.logger", init_logger=lambda name: log)
    model = SimpleNamespace(model=tmp_path, revision=None)
    stand_in("vllm.config", get_current_vllm_config=lambda: SimpleNamespace(model_config=model))
    stand_in("vllm.transformers_utils")
    stand_in("vllm.transformers_utils.repo_utils", get_hf_file_to_dict=read)
    vllm_plugin._betas.cache_clear()
    yield runners, tmp_path
    vllm_plugin._betas.cache_clear()


WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5]])


def test_a_layer_with_a_beta_skips_and_others_run_as_before(engine):
    runners, folder = engine
    vllm_plugin.register()
    (folder / vllm_plugin.FILE).write_text(json.dumps({"layers": [1, 3], "betas": [0.5, 0.0]}))
    dense, skips, zero = (runners(LAYERS.format(number), WEIGHTS) for number in (0, 1, 3))
    for runner in (dense, zero):
        assert runner.router.select_experts(hidden_states=None)[0] is WEIGHTS
        assert runner.routed_experts.forward_monolithic() == "stock"
    weights, experts = skips.router.select_experts(hidden_states=None)
    assert weights.tolist() == [[1, 0], [0.5, 0.5]] and experts.tolist() == [[0, 0], [0, 1]]
    with pytest.raises(ValueError, match="this kernel chooses the experts itself"):
        skips.routed_experts.forward_monolithic()


def test_a_model_without_betas_is_left_alone(engine):
    vllm_plugin.register()
    assert engine[0](LAYERS.format(1), WEIGHTS).router.select_experts(hidden_states=None)[0] is WEIGHTS


NO_PAIRS = ({"betas": [0.5]}, {"layers": [0, 1], "betas": [0.5]}, {"layers": [], "betas": []}, {"layers": None, "betas": 1})


@pytest.mark.parametrize("held", [[0.5], *NO_PAIRS])
def test_a_file_that_names_no_layers_is_refused(held, engine):
    vllm_plugin.register()
    (engine[1] / vllm_plugin.FILE).write_text(json.dumps(held))
    with pytest.raises(ValueError, match="needs one beta for each of its 'layers'"):
        engine[0](LAYERS.format(0), WEIGHTS)


def test_shared_experts_among_the_chosen_are_refused(engine):
    vllm_plugin.register()
    (engine[1] / vllm_plugin.FILE).write_text(json.dumps({"layers": [0], "betas": [0.5]}))
    with pytest.raises(ValueError, match="turn their fusion off"):
        engine[0](LAYERS.format(0), torch.ones(1, 3)).router.select_experts(hidden_states=None)


def test_another_routing_is_left_as_it_is(engine, monkeypatch):
    stock = engine[0].__init__
    monkeypatch.delattr(sys.modules["vllm.model_executor.layers.fused_moe.runner.moe_runner"], "MoERunner")
    vllm_plugin.register()
    assert engine[0].__init__ is stock


def test_the_betas_that_esparse_writes_are_those_that_the_plug_in_reads(engine, tiny):
    model = family_model("deepseek_v3")  # its first layer is dense
    numbers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    betas = [0.25 + number / 8 for number in numbers]
    esparse.enable_skipping(model, betas)
    esparse.save_model(model, tiny[1], engine[1] / "saved")
    assert 0 not in numbers and vllm_plugin._betas(engine[1] / "saved", None) == dict(zip(numbers, betas, strict=True))


def test_vllm_finds_the_plug_in():
    [point] = importlib.metadata.entry_points(group="vllm.general_plugins", name="esparse")
    assert point.load() is vllm_plugin.register
