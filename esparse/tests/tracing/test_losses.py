"""Losses relative to the residual stream and to the layer's output, recomputed by running pruned blocks again."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import esparse
from esparse.measure.search_cost import expert_layer, normal
from esparse.moe.layers import decoder_layers, moe_layers
from esparse.pruning.scores import expert_scores
from esparse.tests.conftest import apart, block_input, random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tests.tracing.test_exactness import pruned_block
from esparse.tracing import losses
from esparse.tracing.losses import LOSSES, expert_scales, losses_of, skip_curve, weighed
from esparse.tracing.recorder import recording_stream, trace_block

TOKENS = random_tokens(3, 16)
RELATIVE = [loss for loss in LOSSES if loss != "eq3"]


def norms(model, number: int, loss: str) -> torch.Tensor:
    """||h + z|| of the residual stream behind a layer, or ||z|| of its block's output, [tokens]."""
    module = decoder_layers(model)[number] if loss == "residual" else moe_layers(model)[number].block
    seen = []
    with module.register_forward_hook(lambda _module, _inputs, output: seen.append(output)), torch.no_grad():
        model(TOKENS)
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).flatten(0, 1).norm(dim=1)


@torch.no_grad()
@pytest.mark.parametrize("loss", RELATIVE)
@pytest.mark.parametrize(("family", "k"), [("mixtral", 2), ("qwen3", 3), ("olmoe", 1)])
def test_every_subsets_loss_is_that_of_the_pruned_block(family, k, loss):
    model = random_model(family, 5, k)
    traced, layer, x = esparse.trace(model, TOKENS, batch_size=2), moe_layers(model)[1], block_input(model, 1, TOKENS)
    found, divisor = {}, norms(model, 1, loss)
    for kept in itertools.combinations(range(5), 3):
        change = (pruned_block(layer, kept)(x) - layer.block(x)).flatten(0, 1).norm(dim=1)
        found[kept] = (change / divisor).norm().item()
        assert esparse.reconstruction_loss(weighed(traced.layers[1], loss), kept) == pytest.approx(found[kept], rel=1e-9)
    best = min(found, key=found.get)
    for method in ("enumerate", "greedy"):
        plan = esparse.search_experts(traced, 3, method=method, loss=loss)
        assert plan.losses[1] == pytest.approx(found[tuple(plan.kept[1])], rel=1e-9) and plan.loss == loss
    assert plan.kept[1] == esparse.search_experts(traced, 3, loss=loss).kept[1] == [*best]


@torch.no_grad()
@pytest.mark.parametrize("loss", RELATIVE)
def test_skipping_scales_and_scores_take_the_same_norms(loss):
    model = random_model("mixtral", 6, 2)
    layer, x, divisor = moe_layers(model)[1], block_input(model, 1, TOKENS).flatten(0, 1), norms(model, 1, loss)
    traced = weighed(esparse.trace(model, TOKENS, keep=4).layers[1], loss)
    _, weights, chosen = layer.gate(x)
    one = lambda number: layer.experts(x, torch.full((len(x), 1), number), torch.ones(len(x), 1).double())  # noqa: E731
    outputs = torch.stack([one(number) for number in range(6)], 1)  # [tokens, n, d]
    mixed = torch.zeros(len(x), 6).double().scatter(1, chosen, weights.double())
    target = torch.einsum("tn,tnd->td", mixed, outputs)

    top = torch.zeros_like(mixed).scatter(1, chosen[:, :1], 1.0)
    dropped = torch.einsum("tn,tnd->td", top, outputs) - target
    expected = (dropped.norm(dim=1) / divisor).square().sum().item()
    assert skip_curve(traced)[1][-1].item() == pytest.approx(expected, rel=1e-6)  # Mixtral's routing weights are float32

    kept = [0, 2, 3, 5]
    positions, inside = traced.routing(kept)
    remixed = torch.zeros_like(mixed).scatter(1, traced.order.gather(1, positions), inside.double())
    parts = remixed[:, kept, None] * outputs[:, kept]
    system = (parts / divisor[:, None, None]).mT.flatten(0, 1)  # [tokens d, r]
    scales = torch.linalg.lstsq(system, (target / divisor[:, None]).flatten()).solution
    assert apart(expert_scales(traced, kept), scales) < 1e-9

    sizes = mixed * outputs.norm(dim=2) / divisor[:, None]
    assert apart(expert_scores(traced, "reap"), sizes.sum(0) / (mixed > 0).sum(0)) < 1e-9


@torch.no_grad()
def test_parallel_residual_streams_of_a_token_count_together():
    """DeepSeek-V4 has four, [sequences, length, 4, d]."""
    model, seen = family_model("deepseek_v4"), []
    traced = esparse.trace(model, TOKENS).layers[1]
    with decoder_layers(model)[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output)):
        model(TOKENS)
    tokens = [seen[0][s, t] for s in range(TOKENS.shape[0]) for t in range(TOKENS.shape[1])]
    assert tokens[0].shape == (4, 32)
    assert apart(traced.stream_norm, torch.stack([streams.square().sum() for streams in tokens])) < 1e-5


class TakesTheStream(torch.nn.Module):
    """A decoder layer whose gate takes the stream itself, as Gemma 4's, at the address of its norm's output, if free."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate = torch.nn.Tanh(), torch.nn.Linear(32, 4)

    def forward(self, x):
        address, held = self.norm(x).data_ptr(), []
        while len(held) < 100 and address not in [tensor.data_ptr() for tensor in held]:
            held.append(torch.empty_like(x))
        self.gate(held[-1].copy_(x))
        return x


@torch.no_grad()
def test_a_gate_that_takes_the_stream_itself_has_no_stream_before_its_norm():
    decoder, found = TakesTheStream(), []
    passed = SimpleNamespace(layer=decoder, pass_stream=lambda before, _after: found.append(before))
    with recording_stream(passed, decoder):
        for sequences, length in ((3, 100), (8, 512), (64, 512)):
            decoder(torch.ones(sequences, length, 32))
    assert found == [None] * 3


@torch.no_grad()
def test_a_progressive_search_divides_by_the_original_stream():
    """Its first layer sees the original hidden states, its second layer pruned ones."""
    model = random_model("mixtral", 5, 2)
    plan = esparse.search_experts(
        esparse.trace(model, TOKENS), 4, method="progressive", loss="residual", model=model, tokens=TOKENS
    )
    layer, target = moe_layers(model)[1], moe_layers(model)[1].block(block_input(model, 1, TOKENS))
    with esparse.masked(model, plan):
        x = block_input(model, 1, TOKENS)
    changes = {
        kept: ((pruned_block(layer, kept)(x) - target).flatten(0, 1).norm(dim=1) / norms(model, 1, "residual")).norm().item()
        for kept in itertools.combinations(range(5), 4)
    }
    assert plan.losses[1] == pytest.approx(min(changes.values()), rel=1e-9)
    assert plan.kept[1] == [*min(changes, key=changes.get)] and plan.loss == "residual"


def test_from_disk_as_in_memory(tmp_path):
    model = random_model("mixtral", 6, 2, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    traced = esparse.trace(model, TOKENS)
    walked = esparse.trace_checkpoint(tmp_path / "model", TOKENS, tmp_path / "trace")
    for one, other in zip(walked.layers, traced.layers, strict=True):
        assert apart(one.stream_norm, other.stream_norm) < 1e-5
    for method in ("enumerate", "progressive", "reap"):
        options = {"method": method, "loss": "residual"}
        esparse.prune_checkpoint(tmp_path / "model", tmp_path / method, 4, calibration=TOKENS, **options)
        plan = esparse.PruningPlan.load(tmp_path / method / "plan.json")
        expected = esparse.search_experts(traced, 4, model=model, tokens=TOKENS, **options)
        assert (plan.kept, plan.loss) == (expected.kept, "residual")
        assert plan.losses == ([None] * 3 if method == "reap" else pytest.approx(expected.losses, rel=1e-4))
        assert json.loads((tmp_path / method / "pruning_report.json").read_text())["loss"] == "residual"
        assert f"(method: {method}, loss: residual, r = 4" in (tmp_path / method / "README.md").read_text()


@torch.no_grad()
def test_the_loss_relative_to_the_residual_stream_is_the_default(tmp_path):
    """Of every function that takes a loss, by brute force over the subsets of one layer."""
    model = random_model("mixtral", 6, 2, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    traced, layer, x = esparse.trace(model, TOKENS), moe_layers(model)[1], block_input(model, 1, TOKENS)
    found, eq3, divisor = {}, {}, norms(model, 1, "residual")
    for kept in itertools.combinations(range(6), 4):
        change = (pruned_block(layer, kept)(x) - layer.block(x)).flatten(0, 1).norm(dim=1)
        found[kept], eq3[kept] = (change / divisor).norm().item(), change.norm().item()
    best, second = sorted(found, key=found.get)[:2]
    assert min(eq3, key=eq3.get) != best  # the case is one where the losses choose differently

    plan, runner_up = esparse.search_experts(traced, 4), pytest.approx(found[second], rel=1e-4)
    esparse.prune_checkpoint(tmp_path / "model", tmp_path / "pruned", 4, calibration=TOKENS)
    mixed = esparse.mixtures(traced, traced, 4)
    for one in (plan, esparse.PruningPlan.load(tmp_path / "pruned" / "plan.json"), mixed.plan(0.5)):
        assert (one.kept[1], one.loss) == ([*best], "residual") and one.losses[1] == pytest.approx(found[best], rel=1e-4)
        assert one.runner_up is None or one.runner_up[1] == runner_up
    assert mixed.minimax().kept[1] == [*best]
    plan.kept[1] = [*second]
    priced = esparse.price(traced, plan)[1]
    assert (priced["loss"], priced["optimum"]) == (runner_up, pytest.approx(found[best], rel=1e-4)) and priced["rank"] == 2
    sure = esparse.certainty(traced, 4, draws=2)
    assert sure[1]["kept"] == [*best] and sure == esparse.certainty(traced, 4, draws=2, loss="residual")


def test_a_token_without_a_norm_counts_nothing_and_what_cannot_be_is_said():
    model = random_model("mixtral", 4, 2)
    layer = esparse.trace(model, TOKENS).layers[0]
    layer.stream_norm[:5] = 0
    rest = esparse.tracing.trace.part(layer, slice(5, None))
    assert esparse.reconstruction_loss(weighed(layer, "residual"), [0, 1, 2]) == pytest.approx(
        esparse.reconstruction_loss(weighed(rest, "residual"), [0, 1, 2]), rel=1e-9
    )
    alone = trace_block(moe_layers(model)[0], torch.randn(8, 32).double(), 3)
    assert esparse.reconstruction_loss(weighed(alone, "output"), [0, 1, 2]) > 0
    alone = esparse.Trace([alone], "", "")
    remedy = "this trace lacks the norms of the residual stream: trace the whole model, or take loss='eq3'"
    for call in (esparse.search_experts, esparse.certainty, lambda trace, r: esparse.mixtures(trace, trace, r)):
        with pytest.raises(ValueError, match=remedy):
            call(alone, 3)
    assert esparse.search_experts(alone, 3, loss="eq3").losses[0] > 0  # as the sentence says
    with pytest.raises(ValueError, match="Unknown loss 'mse': choose from eq3, residual, output"):
        esparse.search_experts(esparse.trace(model, TOKENS), 3, loss="mse")


@pytest.mark.slow
def test_on_the_tiny_model_the_relative_loss_keeps_better_experts(tiny):
    """Held-out perplexity over that with Eq. 3's experts, on the corpus of the calibration: no worse at any size within 0.5%,
    and better where half of the experts go."""
    model, tokenizer = tiny
    for corpus in ("web", "arithmetic"):
        traced = esparse.trace(model, esparse.calibration_tokens(corpus, tokenizer, sequences=64, length=256), keep=4)
        held_out, ratios = esparse.calibration_tokens(f"{corpus}/heldout", tokenizer, sequences=16, length=256), []
        for r in (6, 5, 4):
            found = []
            for loss in ("residual", "eq3"):
                with esparse.masked(model, esparse.search_experts(traced, r, loss=loss)):
                    found.append(esparse.perplexity(model, held_out))
            ratios.append(found[0] / found[1])
        assert max(ratios) < 1.005 and ratios[-1] < 0.995, ratios


@torch.no_grad()
def test_of_many_experts_few_grams_are_unpacked_at_once(monkeypatch):
    """Of a single subset none: its loss reads the entries of the experts that a token uses before and after."""
    layer, sizes, stock = trace_block(expert_layer(64, 2, hidden=8, inner=8), normal(8192, 8), 2), [], losses.full_gram
    monkeypatch.setattr(losses, "full_gram", lambda *given: sizes.append((found := stock(*given)).numel()) or found)
    subsets = [list(range(32)), list(range(16, 48))]
    alone = [esparse.reconstruction_loss(layer, kept) for kept in subsets]
    assert not sizes
    assert losses_of(layer, subsets).tolist() == pytest.approx(alone, rel=1e-5)
    assert sum(sizes) == 8192 * 64**2 and max(sizes) <= losses.ROUTINGS * losses.SUBSETS
