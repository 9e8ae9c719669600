"""The embedded model is really trained: it reaches the required scores, and everything it needs ships with the package."""

import subprocess
import sys
import zipfile
from collections import Counter

import pytest
import torch

import esparse
from esparse.files import SHIPPED, checkout, data_folder
from esparse.measure.evaluation import TINY_TASKS
from esparse.tests.conftest import apart
from esparse.tiny_model import training
from esparse.tracing.statistics import routing_divergence

CHANCE = {"arithmetic_problems": 0.0}  # others: one in four


@pytest.fixture(scope="module")
def scores(tiny):
    """The scores of each task on all of its items: on a third of them a task near chance cannot be told from it."""
    return esparse.evaluate(*tiny, TINY_TASKS)


@pytest.mark.slow
def test_it_solves_problems_whose_operands_never_occurred_in_training(scores):
    assert scores.value["arithmetic_problems"] >= 0.75
    assert scores.value["web_facts"] >= 0.85
    assert (scores["items"] == 300).all() and (scores.stderr > 0).all()


def test_no_task_is_stuck_at_chance_or_at_the_top(scores):
    for task, row in scores.iterrows():
        chance = CHANCE.get(task, 0.25)
        assert chance + 4 * row.stderr < row.value < 1, task


def test_routing_differs_between_the_corpora(tiny):
    web, arithmetic, again = (
        esparse.trace(tiny[0], esparse.calibration_tokens(corpus, tiny[1], sequences=16, length=256, seed=seed), keep=8)
        for corpus, seed in (("web", 0), ("arithmetic", 0), ("web", 1))
    )
    between = [routing_divergence(a, b) for a, b in zip(web.layers, arithmetic.layers, strict=True)]
    within = [routing_divergence(a, b) for a, b in zip(web.layers, again.layers, strict=True)]
    assert min(between) > 0.1 and min(between) > 2 * max(within)


def test_it_is_a_stock_mixtral_with_every_digit_one_token(tiny):
    model, tokenizer = tiny
    assert type(model).__name__ == "MixtralForCausalLM" and model.dtype == torch.float32
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 2)
    for text in ("1907", "12 + 345 = 357", "#### 42"):
        pieces = [tokenizer.decode([i]).strip() for i in tokenizer(text, add_special_tokens=False).input_ids]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_data_is_small():
    sizes = Counter()
    for path in data_folder().rglob("*"):
        if path.is_file() and "results" not in path.parts:
            part = path.relative_to(data_folder()).parts[0]
            sizes[part if part in SHIPPED else "else"] += path.stat().st_size
    assert {*sizes} == {*SHIPPED, "else"} and sizes.pop("else") < 2e6 and max(sizes.values()) < 11e6
    assert not [path for path in data_folder().rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_matched_calibration_is_better_on_its_own_corpus(tiny):
    """The paper's Table 3 in small: the subset calibrated on arithmetic loses less there than web's does."""
    model, tokenizer = tiny
    held_out = esparse.calibration_tokens("arithmetic/heldout", tokenizer, sequences=32, length=256)
    found = {}
    for corpus in ("web", "arithmetic"):
        traced = esparse.trace(model, esparse.calibration_tokens(corpus, tokenizer, sequences=32, length=256), keep=5)
        with esparse.masked(model, esparse.search_experts(traced, 5)):
            found[corpus] = esparse.perplexity(model, held_out)
    assert found["arithmetic"] < found["web"]


@pytest.mark.slow
def test_the_recipe_makes_the_same_model_twice_and_learns(monkeypatch):
    tokenizer = training.train_tokenizer(documents=300)
    one, two, other = (training.train_model(tokenizer, training.Recipe(steps=3), seed=seed) for seed in (1, 1, 2))
    largest = lambda a, b: max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))  # noqa: E731
    assert largest(one, two) < 1e-3 < 1e-2 < largest(one, other)  # the last bits of threaded products may differ under load
    monkeypatch.setattr(training, "STEP_SEQUENCES", {"web": 1, "arithmetic": 1})
    model = training.train_model(tokenizer, training.Recipe(steps=100, sequences=2))
    unseen = torch.stack([next(training.packed_sequences(corpus, tokenizer, seed=9)) for corpus in ("web", "arithmetic")])
    assert model(unseen, labels=unseen).loss < 5  # ln(1024) = 6.9 at the start


@torch.no_grad()
def test_copied_experts_compute_what_the_dense_one_does():
    dense = training.preset_model("tiny", 3, num_local_experts=1, num_experts_per_tok=1)
    model, tokens = training.upcycled(dense, "tiny", 4), torch.arange(3, 103)[None]
    assert apart(model(tokens).logits, dense(tokens).logits) < 1e-5
    gates = [layer.gate.weight for layer in esparse.moe_layers(model)]
    fresh = [layer.gate.weight for layer in esparse.moe_layers(training.preset_model("tiny", 4))]
    assert all(map(torch.equal, gates, fresh))


def test_the_dense_share_leaves_a_step_for_the_routers():
    assert training.TINY.dense_steps == 600 and training.RECIPES["tiny-scratch"].dense_steps == 0
    assert training.Recipe(steps=3, dense=0.9).dense_steps == 2
    assert str(training.Recipe(steps=600, dense=0.5)).startswith("tiny, trained for 600 steps, 300 of them dense, of 8 seq")
    with pytest.raises(ValueError, match="The share of dense steps must be from 0 to below 1, got 1.0"):
        training.Recipe(dense=1.0)


def test_its_experts_are_alike_and_those_of_the_model_from_nothing_are_not(tiny):
    """The cosines of the weights of any two experts of a layer: near a half where both were copied from one."""
    scratch, tokenizer = esparse.load_model("tiny-scratch")

    def cosines(model) -> torch.Tensor:
        weights = [layer.experts.down_proj.flatten(1) for layer in esparse.moe_layers(model)]
        pairs = torch.triu_indices(8, 8, 1)
        return torch.stack([torch.nn.functional.cosine_similarity(w[pairs[0]], w[pairs[1]], dim=1) for w in weights])

    assert cosines(scratch).abs().max() < 0.1 < 0.3 < cosines(tiny[0]).min()
    assert tokenizer.get_vocab() == tiny[1].get_vocab() and scratch.config.to_dict().keys() == tiny[0].config.to_dict().keys()
    tokens = esparse.calibration_tokens("web/heldout", tokenizer, sequences=8, length=128)
    assert esparse.perplexity(scratch, tokens) < 4  # it is trained: 1024 words are in the vocabulary


def test_presets_come_with_random_weights():
    for name, n, k in (("tiny-16", 16, 2), ("tiny-32", 32, 8)):
        model, tokenizer = esparse.load_model(name)
        layer = esparse.moe_layers(model)[0]
        assert (layer.n, layer.k) == (n, k) and len(tokenizer) == model.config.vocab_size


@pytest.mark.slow
def test_the_tiny_model_loads_from_an_installed_wheel(tmp_path):
    """A wheel built from the checkout, unpacked elsewhere, with only that on the path."""
    pip = [sys.executable, "-m", "pip"]
    build = subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(checkout())], capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import esparse; "
        "assert esparse.__file__.startswith(sys.path[0]), esparse.__file__; "
        "model, tokenizer = esparse.load_model(); "
        "tokens = esparse.calibration_tokens('web', tokenizer, sequences=2, length=32); "
        "print(esparse.perplexity(model, tokens)); print(esparse.evaluate(model, tokenizer, ['web_facts'], limit=2)); "
        "from esparse.experiments.notebooks import find\n"
        "try: find()\nexcept FileNotFoundError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "web_facts" in result.stdout and "clone the repository" in result.stdout
