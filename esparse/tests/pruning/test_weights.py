"""Weight pruning in memory, compared with scores in plain Python and with pruning from disk."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import esparse
from esparse.moe.layers import decoder_layers, find_moe, moe_layers
from esparse.pruning import weights
from esparse.pruning.weights import InputSquares, Sparsity, capture_inputs, keep_mask, score
from esparse.tests.conftest import block_input, random_model, random_tokens, sampled
from esparse.tests.families import CARRIED, FAMILIES, SAMPLE, family_model

TOKENS = random_tokens()


def captured(model, number: int, method: str, scope: str = "experts") -> InputSquares:
    """The squared inputs of one decoder layer's weights."""
    decoder, inputs = decoder_layers(model)[number], InputSquares(method == "moe-pruner")
    with torch.no_grad(), capture_inputs(decoder, find_moe(decoder), inputs, scope):
        model(TOKENS)
    return inputs


def plain_scores(model, number: int, expert: int, gated: bool) -> tuple[list[list[float]], list[list[float]]]:
    """Both matrices' scores of one expert of a Mixtral layer, number by number."""
    layer = moe_layers(model)[number]
    up_weight, down_weight = layer.experts.gate_up_proj[expert].tolist(), layer.experts.down_proj[expert].tolist()
    inner, d = len(down_weight[0]), len(down_weight)
    up_norm, down_norm = [0.0] * d, [0.0] * inner
    for x in block_input(model, number, TOKENS).flatten(0, 1).tolist():
        logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in layer.gate.weight.tolist()]
        chosen = sorted(range(layer.n), key=lambda e: -logits[e])[: layer.k]
        if expert not in chosen:
            continue
        exps = [math.exp(logits[e] - logits[chosen[0]]) for e in chosen]
        gate = exps[chosen.index(expert)] / sum(exps) if gated else 1.0
        both = [sum(w * v for w, v in zip(row, x, strict=True)) for row in up_weight]
        hidden = [a / (1 + math.exp(-a)) * b for a, b in zip(both[:inner], both[inner:], strict=True)]
        up_norm = [total + (gate * v) ** 2 for total, v in zip(up_norm, x, strict=True)]
        down_norm = [total + (gate * v) ** 2 for total, v in zip(down_norm, hidden, strict=True)]
    return tuple(
        [[abs(w) * math.sqrt(s) for w, s in zip(row, norm, strict=True)] for row in matrix]
        for matrix, norm in ((up_weight, up_norm), (down_weight, down_norm))
    )


@pytest.mark.parametrize("method", ["wanda", "moe-pruner"])
def test_scores_are_those_of_plain_python(method):
    model = random_model("mixtral", 4, 2)
    inputs, experts = captured(model, 1, method), moe_layers(model)[1].experts
    for expert in range(4):
        expected = plain_scores(model, 1, expert, method == "moe-pruner")
        for name, plain in zip(("gate_up_proj", "down_proj"), expected, strict=True):
            found = score(getattr(experts, name)[expert], inputs.experts[name][expert])
            torch.testing.assert_close(found, torch.tensor(plain, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_linear_maps_are_scored_on_all_their_inputs():
    model, seen = random_model("mixtral", 4, 2), []
    projection = decoder_layers(model)[1].self_attn.o_proj
    hook = projection.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    inputs = captured(model, 1, "moe-pruner", "linear")
    hook.remove()
    expected = projection.weight.abs() * seen[0].flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(score(projection.weight, inputs.linear["self_attn.o_proj"]), expected)
    assert inputs.linear.keys() == {f"self_attn.{name}_proj" for name in "qkvo"}


def test_gates_of_one_make_moe_pruner_wanda():
    model = random_model("mixtral", 4, 1)  # one expert of renormalised weight 1 a token
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    esparse.prune_weights(one, TOKENS, 0.5, method="wanda")
    esparse.prune_weights(other, TOKENS, 0.5, method="moe-pruner")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.3, 0.5, 0.77, "1:4", "2:4", "4:8", "7:8"]), st.booleans())
def test_masks_have_exactly_the_asked_sparsity_and_keep_the_largest(seed, asked, ties):
    scores = torch.rand(5, 3, 24, generator=torch.Generator().manual_seed(seed))
    scores = (scores * 4).round() if ties else scores
    sparsity = Sparsity.read(asked)
    size = sparsity.group or 24
    mask = keep_mask(scores, sparsity).unflatten(-1, (-1, size))
    goes = size - int(asked[0]) if sparsity.group else round(asked * size)
    assert ((~mask).sum(-1) == goes).all()
    groups = scores.unflatten(-1, (-1, size))
    assert (groups.masked_fill(mask, -1).amax(-1) <= groups.masked_fill(~mask, 9).amin(-1)).all()


@pytest.mark.parametrize("scope", weights.SCOPES)
@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
@pytest.mark.parametrize("method", weights.WEIGHT_SCORES)
def test_nothing_outside_the_mask_is_touched(method, sparsity, scope):
    model = family_model("mixtral")
    before = copy.deepcopy(model.state_dict())
    report = esparse.prune_weights(model, TOKENS, sparsity, method=method, scope=scope)
    inside = [name for name in before if ".experts." in name or (scope == "linear" and "self_attn" in name)]
    assert report["weights"] == sum(before[name].numel() for name in inside)
    for name, weight in model.state_dict().items():
        if name not in inside:
            assert torch.equal(weight, before[name])
            continue
        gone = weight == 0
        assert torch.equal(weight[~gone], before[name][~gone])
        size = int(sparsity[-1]) if isinstance(sparsity, str) else weight.shape[-1]
        assert (gone.unflatten(-1, (-1, size)).sum(-1) == size // 2).all()
    assert report["removed"] == report["weights"] // 2


@pytest.mark.parametrize("dense", [False, True])
def test_later_layers_are_scored_on_what_comes_out_of_earlier_ones(dense):
    model = random_model("mixtral", 4, 2)
    pruned, reference = copy.deepcopy(model), copy.deepcopy(model)
    esparse.prune_weights(pruned, TOKENS, 0.5, method="moe-pruner", dense=dense)
    for number, layer in enumerate(moe_layers(reference)):
        inputs = captured(model if dense else reference, number, "moe-pruner")
        for name, squares in inputs.experts.items():
            weight = getattr(layer.experts, name)
            keep = keep_mask(score(weight, squares), Sparsity.read(0.5))
            with torch.no_grad():
                weight.mul_(keep)
        for name, parameter in layer.experts.named_parameters():
            assert torch.equal(parameter, dict(moe_layers(pruned)[number].experts.named_parameters())[name])


def test_experts_run_as_ever_while_their_inputs_are_captured():
    model = random_model("mixtral", 4, 2)
    with torch.no_grad():
        expected = model(TOKENS).logits
        decoder, inputs = decoder_layers(model)[1], InputSquares(True)
        with capture_inputs(decoder, find_moe(decoder), inputs, "experts"):
            torch.testing.assert_close(model(TOKENS).logits, expected)
    assert inputs.tokens.sum() == TOKENS.numel() * 2


def test_an_expert_without_tokens_is_named_and_pruned_by_magnitude():
    model = family_model("mixtral")
    few = TOKENS[:1, :3]  # cannot reach all eight experts
    reached = []
    hooks = [layer.gate.register_forward_hook(lambda m, i, out: reached.append(set(out[2].flatten().tolist())))
             for layer in moe_layers(model)]  # fmt: skip
    with torch.no_grad():
        model(few)
    for hook in hooks:
        hook.remove()
    before = moe_layers(model)[0].experts.down_proj.clone()
    missing = sorted(set(range(8)) - reached[0])
    with pytest.warns(UserWarning) as told:
        report = esparse.prune_weights(model, few, 0.5, method="wanda")
    assert report["unrouted"]["0"] == missing
    assert f"Decoder layer 0: the calibration set routes no token to the experts {missing}" in str(told[0].message)
    for expert in missing:
        expected = before[expert] * keep_mask(before[expert].abs(), Sparsity.read(0.5))
        assert torch.equal(moe_layers(model)[0].experts.down_proj[expert], expected) and expected.count_nonzero() > 0


@pytest.mark.filterwarnings("ignore:Decoder layer .* routes no token:UserWarning")  # of families that bias their choice
@pytest.mark.parametrize("family", sampled(FAMILIES, SAMPLE))
def test_every_family_from_disk_is_what_it_is_in_memory(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path / "source")
    options = {"method": "moe-pruner", "scope": "linear" if family in ("mixtral", "deepseek_v3") else "experts"}
    if family in CARRIED:
        with pytest.raises(ValueError, match=CARRIED[family]):
            esparse.prune_weights_checkpoint(tmp_path / "source", tmp_path / "pruned", 0.5, calibration=TOKENS, **options)
        assert not (tmp_path / "pruned").exists()
        return
    report = esparse.prune_weights_checkpoint(tmp_path / "source", tmp_path / "pruned", 0.5, calibration=TOKENS, **options)
    in_memory = esparse.prune_weights(model, TOKENS, 0.5, **options)
    assert {key: report[key] for key in in_memory} == in_memory
    model.save_pretrained(tmp_path / "expected")
    ours, expected = ({k: v for p in sorted((tmp_path / f).glob("*.safetensors")) for k, v in load_file(p).items()}
                      for f in ("pruned", "expected"))  # fmt: skip
    assert ours.keys() == expected.keys()
    different = sum((ours[name] != expected[name]).sum().item() for name in ours)
    assert different <= 1e-3 * report["weights"]  # rounding may decide between two scores that are nearly equal
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    assert torch.isfinite(stock(TOKENS).logits).all()


def test_killed_work_goes_on(tmp_path, monkeypatch):
    family_model("mixtral").save_pretrained(tmp_path / "source")
    arguments = (tmp_path / "source", tmp_path / "pruned", "2:4")
    real = weights.WeightPruner.prune_layer

    def dies(self, walk, number):
        if number == 2:
            raise KeyboardInterrupt
        return real(self, walk, number)

    monkeypatch.setattr(weights.WeightPruner, "prune_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        esparse.prune_weights_checkpoint(*arguments, calibration=TOKENS)
    assert not (tmp_path / "pruned").exists()
    seen = []
    monkeypatch.setattr(weights.WeightPruner, "prune_layer", lambda *given: seen.append(given[-1]) or real(*given))
    esparse.prune_weights_checkpoint(*arguments, calibration=TOKENS)
    assert seen == [2]
    monkeypatch.undo()
    esparse.prune_weights_checkpoint(tmp_path / "source", tmp_path / "whole", "2:4", calibration=TOKENS)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "pruned" / path.name)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_zeros_stay_through_steps_of_an_optimiser():
    model = family_model("mixtral").train()
    esparse.prune_weights(model, TOKENS, 0.5)
    present = weights.zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        weights.restore_zeros(model, present)
    assert present.keys() == {parameter for name, parameter in model.named_parameters() if ".experts." in name}
    for parameter, mask in present.items():
        assert (parameter[~mask] == 0).all() and parameter[mask].count_nonzero() == mask.sum()


def test_masks_of_another_model_of_the_same_shapes_are_refused_before_any_weight_changes():
    model, other = family_model("mixtral"), family_model("mixtral")
    esparse.prune_weights(model, TOKENS, 0.5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"masks belong to another model: take those of the model that is trained, zeros"):
        weights.restore_zeros(other, weights.zeros(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_equal_bytes_count_the_places_too():
    """2:4 in bf16 takes 9 of 16 bits a weight, as in the paper's Table 9: 51,214 of 89,926 MiB, with little that stays."""
    assert 1 - weights.equal_share(8, 4) + 1 / 16 == 0.5
    assert math.isclose(1 - 0.5 + 1 / 16, 51214 / 89926, abs_tol=0.01)


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (1.0, {}, "must lie between 0 and 1, got 1.0"),
        (0, {}, "must lie between 0 and 1"),
        ("4:2", {}, "keeps 4 of 2 weights"),
        ("4:4", {}, "N from 1 to M - 1"),
        ("half", {}, "Cannot read the sparsity 'half'"),
        ("2:5", {}, "do not divide into groups of 5"),
        (0.001, {}, "0.001 of a row of 32 weights removes none, or all"),
        (0.999, {}, "0.999 of a row of 32 weights removes none, or all"),
        (0.5, {"method": "sparsegpt"}, "Unknown score 'sparsegpt': choose from magnitude, wanda, moe-pruner"),
        (0.5, {"scope": "router"}, "Unknown scope 'router'"),
    ],
)
def test_bad_options_get_one_sentence_and_change_nothing(sparsity, options, message, tmp_path):
    model = family_model("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        esparse.prune_weights(model, TOKENS, sparsity, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        esparse.prune_weights_checkpoint(tmp_path / "source", tmp_path / "pruned", sparsity, calibration=TOKENS, **options)
    assert not (tmp_path / "pruned").exists()


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        esparse.prune_weights(family_model("mixtral"), TOKENS + 60, 0.5)


def test_what_is_stored_more_precisely_than_it_is_computed_keeps_every_bit(tmp_path):
    """A float32 source computed in bfloat16: zeros aside, the output is the source."""
    family_model("mixtral").save_pretrained(tmp_path / "source")
    esparse.prune_weights_checkpoint(
        tmp_path / "source", tmp_path / "sparse", 0.5, method="wanda", calibration=TOKENS, dtype=torch.bfloat16
    )
    before = load_file(next((tmp_path / "source").glob("*.safetensors")))
    after = {k: v for path in (tmp_path / "sparse").glob("*.safetensors") for k, v in load_file(path).items()}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        gone = after[name] == 0
        assert torch.equal(after[name], tensor.masked_fill(gone, 0)), name
        row = gone.float().mean(-1)
        expected = 0.5 if ".experts." in name else (tensor == 0).float().mean(-1)
        assert torch.allclose(row, torch.as_tensor(expected).expand_as(row)), name


def test_maps_that_are_not_called_stay_and_are_named():
    model = family_model("jamba")
    with pytest.warns(UserWarning, match="mamba.dt_proj is not called"):
        report = esparse.prune_weights(model, TOKENS, 0.5, scope="linear", method="wanda")
    assert report["unheard"] and all(names == ["mamba.dt_proj"] for names in report["unheard"].values())
    state = model.state_dict()
    assert all((state[name] != 0).all() for name in state if "dt_proj.weight" in name)


def test_the_gate_of_a_shared_expert_is_no_linear_map():
    model = family_model("qwen2_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "shared_expert_gate" in name}
    esparse.prune_weights(model, TOKENS, 0.5, scope="linear", method="magnitude")
    assert before and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
