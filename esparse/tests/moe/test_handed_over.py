"""Models in training mode, offloaded, compiled or in bfloat16: same results, and the model's state is restored."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers

import esparse
from esparse.moe.experts import Scratch
from esparse.moe.layers import moe_layers
from esparse.pruning.plan import PruningPlan
from esparse.tests.conftest import random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tracing.recorder import Recorder, recording

TOKENS = random_tokens()
OTHER = random_tokens(seed=5)
KEPT = [0, 2, 3, 5, 6, 7]
JITTER = {
    "mixtral": {"router_jitter_noise": 0.3},
    "minimax": {"router_jitter_noise": 0.3},
    "minimax_m2": {"router_jitter_noise": 0.3},
    "phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    "olmoe": {},
}


def given_plan(model) -> PruningPlan:
    trace, count = esparse.trace(model, TOKENS), len(moe_layers(model))
    return PruningPlan("given", len(KEPT), [KEPT] * count, [0.0] * count, trace.model, trace.tokens)


def run(model, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False, **options).logits


# --- training mode --------------------------------------------------------------------------------------------------


def measured(model) -> list:
    """What is found out by running a model, as numbers."""
    trace = esparse.trace(model, TOKENS)
    assert not any(layer.gram.requires_grad for layer in trace.layers)
    found = [tensor.tolist() for layer in trace.layers for tensor in (layer.logits, layer.order, layer.gram)]
    plan, chosen = esparse.choose_by_output(model, trace, 6, OTHER, candidates=2)
    walked = esparse.search_experts(trace, 6, method="progressive", model=model, tokens=TOKENS)
    with esparse.skipping(model, [0.5] * len(trace.layers)):
        found.append(esparse.skipped_shares(model, TOKENS))
    pruned = copy.deepcopy(model)
    esparse.prune_weights(pruned, TOKENS, 0.5)
    found.append([layer.experts.down_proj.tolist() for layer in moe_layers(pruned)])
    return [*found, esparse.perplexity(model, OTHER), plan.kept, chosen, walked.kept, walked.losses]


@pytest.mark.parametrize("family", JITTER)
def test_in_training_mode_the_same_is_measured_and_every_module_keeps_its_mode(family):
    model = family_model(family, attention_dropout=0.5, **JITTER[family])
    calm = measured(model)
    model.train()
    model.get_input_embeddings().eval()  # partly
    before, modes = run(model), [module.training for module in model.modules()]
    assert not torch.equal(run(model), before)  # dropout is on
    assert measured(model) == calm
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        moe_layers(model)[-1].experts.down_proj.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        esparse.trace(model, TOKENS)
    assert [module.training for module in model.modules()] == modes


def test_generation_and_scores_are_measured_without_dropout(tiny):
    model = copy.deepcopy(tiny[0]).train()
    seen = []
    hook = moe_layers(model)[0].gate.register_forward_hook(lambda gate, *_: seen.append(gate.training))
    esparse.measure_generation(model, new_tokens=1)
    esparse.evaluate(model, tiny[1], "web_facts", limit=1)
    hook.remove()
    assert len(seen) > 2 and not any(seen) and all(module.training for module in model.modules())


# --- recovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tune", "experts"])
def test_what_is_trained_is_the_cross_entropy_whatever_the_config_adds(method):
    teacher, losses = family_model("mixtral", seed=1, attention_dropout=0.5).train(), []
    modes = [module.training for module in teacher.modules()]
    for added in (False, True):
        model = family_model("mixtral", output_router_logits=added, router_aux_loss_coef=5.0).train()
        model.get_input_embeddings().eval()
        logits = run(model)[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()).item()
        options = {"teacher": teacher if method == "experts" else None, "batch_size": 4, "learning_rate": 1e-3}
        losses.append(esparse.recover(model, TOKENS, method, steps=2, **options)["losses"])
        first = expected if method == "tune" else 2 * expected  # the balance makes both parts equal
        assert losses[-1][0] == pytest.approx(first, rel=1e-3)
        assert model.training and not model.get_input_embeddings().training
    assert losses[0] == losses[1]
    assert [module.training for module in teacher.modules()] == modes


# --- offloaded, compiled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_an_offloaded_model_is_measured_and_what_would_change_it_is_refused(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded", "experts_implementation": "eager"}
    held = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
    assert all(parameter.is_meta for parameter in held.parameters())
    plan, before = given_plan(model), run(model)
    trace, other = (esparse.trace(one, TOKENS, keep=6) for one in (model, held))
    for mine, theirs in zip(other.layers, trace.layers, strict=True):
        assert torch.equal(mine.order, theirs.order) and torch.allclose(mine.gram, theirs.gram, rtol=1e-4)
    assert esparse.perplexity(held, OTHER) == pytest.approx(esparse.perplexity(model, OTHER), rel=1e-5)
    assert esparse.measure_generation(held, new_tokens=1)["tokens_per_second"] > 0
    chosen = [esparse.choose_by_output(one, trace, 6, OTHER, candidates=2) for one in (held, model)]
    assert chosen[0][0].kept == chosen[1][0].kept
    assert chosen[0][1]["single"] == pytest.approx(chosen[1][1]["single"], rel=1e-2, abs=1e-6)
    assert chosen[0][1]["after"] == pytest.approx(chosen[1][1]["after"], rel=1e-2, abs=1e-6)
    with pytest.raises(ValueError, match="offloaded.*prune_checkpoint"):
        esparse.prune(held, plan)
    with pytest.raises(ValueError, match="offloaded.*prune_weights_checkpoint"):
        esparse.prune_weights(held, TOKENS, 0.5)
    with pytest.raises(ValueError, match="offloaded.*accelerate launch"):
        esparse.recover(held, TOKENS, "tune")
    with pytest.raises(ValueError, match="offloaded.*the method 'router'"):
        esparse.recover(copy.deepcopy(model), TOKENS, "experts", teacher=held)
    whole = PruningPlan("given", 8, [list(range(8))] * len(trace.layers), [], trace.model, trace.tokens)
    with pytest.raises(ValueError, match="offloaded.*without offloading"):
        esparse.scale_experts(held, trace, whole)
    assert torch.allclose(run(held), before, rtol=0, atol=1e-5)
    esparse.save_model(held, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "saved")
    assert torch.allclose(run(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), before, atol=1e-4)


@torch.no_grad()
def test_a_compiled_model_is_masked_and_traced_too():
    model = random_model("mixtral", 8, 2, dtype=torch.float32, num_hidden_layers=1)
    plan, whole = given_plan(model), esparse.trace(model, TOKENS)
    with esparse.masked(model, plan):
        expected = run(model)
    moe_layers(model)[0].block.compile(backend="eager")
    run(model)  # from now on compiled code is there, which hears no later hook
    with esparse.masked(model, plan):
        assert torch.equal(run(model), expected)
    assert torch.equal(esparse.trace(model, TOKENS).layers[0].gram, whole.layers[0].gram)


# --- bfloat16 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3"])
@torch.no_grad()
def test_in_bfloat16_what_a_traced_layer_gives_out_is_rounded_as_stock_rounds_it(family, implementation):
    """Experts of whole numbers, whose products are exact on any machine, so that only the weighted sum is rounded."""
    model = family_model(family, k=3, hidden_act="relu").bfloat16()
    layer, generator = moe_layers(model)[0], torch.Generator().manual_seed(0)
    for parameter in layer.experts.parameters():
        parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    states = torch.randint(-1, 2, (1, 64, 32), generator=generator).bfloat16()
    model.set_experts_implementation(implementation)
    expected = layer.block(states)
    with recording([Recorder(layer, 64, 6, None, Scratch())]):
        found = layer.block(states)
    assert torch.equal(found, expected) and layer.experts.config._experts_implementation == implementation


# --- routers that hardly share ------------------------------------------------------------------------------------


def test_where_the_second_expert_carries_next_to_nothing_this_is_said(tmp_path):
    model, said = family_model("mixtral"), "In {} of 3 MoE layers .* cannot be told from top-1"
    assert min(esparse.median_betas(esparse.trace(model, TOKENS))) > 0.01
    model.save_pretrained(tmp_path / "even")
    assert "skipping" not in esparse.prune_checkpoint(tmp_path / "even", tmp_path / "one", 6, calibration=TOKENS)
    with torch.no_grad():
        for layer in moe_layers(model)[1:]:
            layer.gate.weight.mul_(50)
    trace = esparse.trace(model, TOKENS)
    with pytest.warns(UserWarning, match=said.format(2)):
        betas = esparse.median_betas(trace)
    assert max(betas[1:]) < 3e-4 < 0.01 < betas[0]
    model.save_pretrained(tmp_path / "sharp")
    report = esparse.prune_checkpoint(tmp_path / "sharp", tmp_path / "two", 6, calibration=TOKENS)
    assert report["skipping"].startswith("In 2 of 3 MoE layers")


def test_with_more_experts_a_small_median_alone_is_no_top1_routing():
    """Half of the ratios of k = 8 may be tiny while the second expert counts: only all experts after the first tell."""
    model = random_model("mixtral", 8, 8)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.gate.weight.mul_(1.5)
    trace = esparse.trace(model, TOKENS)
    betas = esparse.median_betas(trace)  # no warning: it would be an error here
    for layer, beta in zip(trace.layers, betas, strict=True):
        assert beta < 0.01 < (1 / layer.weights[:, 0] - 1).median()
