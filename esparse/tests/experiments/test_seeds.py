"""The studies' rows, compared with separate computations on few items."""

import copy
import itertools
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import esparse
from esparse import __main__
from esparse.__main__ import STUDIES
from esparse.corpora import documents
from esparse.experiments import domain, recovery, seeds
from esparse.moe.layers import moe_layers
from esparse.pruning import weights
from esparse.tiny_model import build, training
from esparse.tiny_model.training import Recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tasks = ("web_facts", "arithmetic_problems")
    return esparse.Run(sequences=4, length=64, tasks=tasks, limit=4, keep=[6], folder=tmp_path_factory.mktemp("run"))


def test_rows_are_the_quality_of_what_they_say(run, tiny):
    about, plan = {"r": 6, "method": "enumerate", "calibration": "arithmetic"}, run.plan("arithmetic", 6)
    rows = list(domain.skipping_rows(run, plan, about, ("arithmetic",)))
    assert [row["betas"] for row in rows] == [None, "arithmetic"] and all(about.items() <= row.items() for row in rows)
    betas = esparse.median_betas(run.trace("arithmetic"), plan.kept)
    with esparse.masked(tiny[0], plan), esparse.skipping(tiny[0], betas):
        table = esparse.evaluate(*tiny, run.tasks, limit=4)
        expected = [esparse.perplexity(tiny[0], run.held_out(corpus)) for corpus in ("web", "arithmetic")]
    assert rows[-1]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert rows[-1]["average"] == pytest.approx(100 * table.value.mean())
    *_, other = domain.skipping_rows(run, plan, about | {"calibration": "web"}, ("arithmetic",))
    assert other == rows[-1] | {"calibration": "web", "average": None, "stderr": None, "tasks": {}}  # not in Table 8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_shipped_study_is_the_whole_grid(seed):
    """Every method, size and calibration corpus, each without skipping and with the betas of every corpus."""
    rows = [row for row in esparse.measured("domain_specific")["rows"] if row["seed"] == seed]
    corpora = ["web", "arithmetic", "web+arithmetic"]
    pruned = [("enumerate", c) for c in corpora] + [("frequency", c) for c in corpora] + [("random", None)] * 3
    cases = [(8, "none", None)] + [(r, *case) for r in (7, 6, 5, 4) for case in pruned]
    cases += [(8, method, c) for method in ("wanda 2:4", "moe-pruner 2:4") for c in corpora]
    found = sorted(str((row["r"], row["method"], row["calibration"], row["betas"])) for row in rows)
    assert found == sorted(str((*case, betas)) for case in cases for betas in (None, *corpora))
    assert {row["draw"] for row in rows if row["method"] == "random"} == {0, 1, 2}


def test_both_corpora_take_turns(run):
    mixed, (web, arithmetic) = run.tokens("web+arithmetic"), (run.tokens(c, sequences=2) for c in ("web", "arithmetic"))
    assert torch.equal(mixed, torch.stack([web[0], arithmetic[0], web[1], arithmetic[1]]))


def test_a_sparse_run_is_the_model_with_pruned_weights(run, tiny):
    model = copy.deepcopy(tiny[0])
    weights.prune_weights(model, run.tokens("web"), "2:4", method="wanda")
    sparse = run.sparse("web", "2:4", "wanda")
    different = total = 0
    for one, other in zip(model.parameters(), sparse.model.parameters(), strict=True):
        different, total = different + (one != other).sum().item(), total + one.numel()
    assert different < 1e-4 * total  # two scores that rounding cannot tell apart


@pytest.mark.slow
def test_methods_run_once_and_are_reported(run):
    rows = list(recovery.recovery_rows(run, 6, "web", "web+arithmetic", methods=("scales", "output", "tune"), steps=2))
    assert [row["method"] for row in rows] == ["pruned", "scales", "output", "tune"]
    assert rows[-1]["trained"] == sum(p.numel() for p in run.model.parameters()) - 6 * 2 * (3 * 128 * 256 + 128)
    assert rows == list(recovery.recovery_rows(run, 6, "web", "web+arithmetic", methods=("scales", "output", "tune"), steps=2))
    made = [path for path in (run.folder / "recovered").iterdir() if path.is_dir()]
    assert len(made) == 2 and all(moe_layers(esparse.load_model(str(path))[0])[0].n == 6 for path in made)
    tuned = list(itertools.islice(recovery.tuned_rows(run, steps=1), 2))
    assert [(row["r"], row["calibration"]) for row in tuned] == [(8, None), (6, "web")]
    assert tuned[0]["perplexity"] != tuned[0]["before"]["perplexity"]


def test_a_recovery_is_taken_again_for_other_text_and_another_calibration_set(run):
    calls = []
    change = lambda model: calls.append(1) or {}  # noqa: E731
    plan = run.plan("web", 6)
    for some, by in ((run, plan), (run, plan), (replace(run, seed=7), plan), (run, replace(plan, tokens="other"))):
        recovery.recovered(some, by, {"method": "x"}, change)
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:Decoder layer .* routes no token:UserWarning")  # four short sequences
def test_another_model_in_the_same_place_is_another_model(run):
    """Weight pruning leaves the routers, and so the fingerprint of traces and plans, as they are."""
    folder, found = run.folder / "place", []
    for sparsity in (0.3, 0.9):
        shutil.rmtree(folder, ignore_errors=True)
        esparse.prune_weights_checkpoint(run.source, folder, sparsity, method="magnitude", calibration=run.tokens("web"))
        found.append(run.on_checkpoint(folder).perplexity("web"))
    model = esparse.load_model(str(folder), dtype="float32")[0]
    assert found[1] == pytest.approx(esparse.perplexity(model, run.held_out("web")), rel=1e-5) and found[1] > 2 * found[0]


def test_presets_without_a_folder_are_refused(run):
    with pytest.raises(ValueError, match="tiny-16 is in no folder: write it with save_model"):
        replace(run, model_name="tiny-16").sparse("web", 0.5, "wanda")


def test_a_study_goes_seed_by_seed_and_is_written_after_each(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "seed_run", lambda seed, recipe: seed)
    out = tmp_path / "study.json"

    def rows(seed):
        assert seed == 0 or json.loads(out.read_text())["seeds"] == [0]
        yield {"r": 6, "perplexity": [2.0, 3.0], "average": 50.0}
        yield {"r": 5, "draw": 1, "perplexity": [2.5, 3.5], "average": 40.0}

    monkeypatch.setitem(seeds.STUDIES, "some", {"rows": rows})
    said = seeds.bench_study("some", out, (0, 1))
    result = json.loads(out.read_text())
    assert [(row["seed"], row["r"]) for row in result["rows"]] == [(0, 6), (0, 5), (1, 6), (1, 5)] and "2.5" in said


@pytest.fixture
def files(tmp_path):
    """Two files of text that is alike."""
    for name, part in (("one", range(0, 12000, 2)), ("other", range(1, 12000, 2))):
        text = [f"Item {i} of the list is number {i * 7 % 100} and costs {i % 30} coins. " * 3 for i in part]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(text))
    return str(tmp_path / "one.txt"), str(tmp_path / "other.txt")


def test_recipes_divide_a_step_and_refuse_what_cannot_be(files, tmp_path):
    assert Recipe().rows == {"web": 5, "arithmetic": 3} and str(training.TINY) == "the tiny model's"
    assert str(Recipe("tiny-scratch")) == "the tiny-scratch model's" and str(Recipe()).startswith("tiny, trained for 3600 ")
    recipe = Recipe("small-16", 20_000, 64, files)
    assert list(recipe.rows.values()) == [20, 12, 20, 12] and sum(recipe.rows.values()) == 64
    assert str(recipe).endswith("64 sequences of web, arithmetic, one.txt, other.txt")  # no path of a machine
    plus = tmp_path / "c++.txt"
    plus.write_text("text")
    for wrong, sentence in (
        ({"preset": "big"}, "no preset 'big': choose from tiny, "),
        ({"steps": 0}, "at least one step, got 0"),
        ({"sequences": 12}, "a multiple of 8 sequences, got 12"),
        ({"sequences": 0}, "a multiple of 8 sequences, got 0"),
        ({"text": files}, "a multiple of 16 sequences, got 8"),
        ({"sequences": 16, "text": files[:1]}, "Text is two files"),
        ({"sequences": 16, "text": files[:1] * 2}, "Text is two files"),
        ({"sequences": 16, "text": ("web", "arithmetic")}, "web is no file"),
        ({"sequences": 16, "text": (files[0], str(plus))}, "has a plus sign in its path"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Recipe(**wrong)


def test_models_of_a_recipe_are_kept_by_what_its_files_hold(files, tmp_path):
    key = Recipe(sequences=16, text=files).key
    copy = shutil.copy(files[0], tmp_path / "copy.txt")
    assert Recipe(sequences=16, text=(str(copy), files[1])).key == key != Recipe(sequences=16).key
    (tmp_path / "one.txt").write_text("other text")
    assert Recipe(sequences=16, text=files).key != key
    assert (training.TINY.key, Recipe("tiny-scratch").key) == ("tiny", "tiny-scratch") and Recipe().key.startswith("tiny-")


def test_a_model_of_a_recipe_is_trained_once_and_kept(tmp_path, tiny, monkeypatch):
    asked = []

    def train(tokenizer, recipe, **options):
        asked.append({"recipe": recipe, **options})
        return training.preset_model(recipe.preset)

    monkeypatch.setattr(build, "checkout", lambda: tmp_path)
    monkeypatch.setattr(build, "train_model", train)
    one, other = (build.trained_folder(Recipe("tiny-16", 7), 1, tiny[1]) for _ in range(2))
    assert one == other and asked == [{"recipe": Recipe("tiny-16", 7), "seed": 1, "device": "cpu"}]
    assert (asked[0]["recipe"].steps, asked[0]["recipe"].rows) == (7, {"web": 5, "arithmetic": 3})
    model, tokenizer = esparse.load_model(str(one))
    assert moe_layers(model)[0].n == 16 and model.dtype == torch.bfloat16
    assert tokenizer("Ada has 42 nails.").input_ids == tiny[1]("Ada has 42 nails.").input_ids


def test_text_that_is_too_short_is_refused_before_a_model_is_trained(files, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "checkout", lambda: tmp_path)
    monkeypatch.setattr(build, "train_model", None)
    (tmp_path / "one.txt").write_text("Much too short.")
    with pytest.raises(ValueError, match="no document|too short|is empty"):
        seeds.seed_run(0, Recipe(sequences=16, text=files))


def test_without_lm_eval_the_shipped_seed_is_asked_no_tasks_either(monkeypatch):
    assert seeds.seed_run(0) == esparse.Run()
    monkeypatch.setattr(seeds, "find_spec", lambda name: None)
    run = seeds.seed_run(0)
    assert run.tasks == () and run.embedded
    with pytest.raises(ValueError, match="No tasks are asked: give at least one as TASKS"):
        run.scores()


def test_a_file_is_trained_on_again_and_again_but_for_what_is_held_out(tmp_path, tiny):
    texts = [f"Entry {i}." for i in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    rest = documents(f"{tmp_path / 'text.txt'}/rest")
    drawn = [next(stream) for stream in [training.packed_sequences(str(tmp_path / "text.txt"), tiny[1], 0)] for _ in range(8)]
    seen = re.findall(r"Entry \d+\.", tiny[1].decode(torch.cat(drawn)))
    assert set(rest) == set(seen) < set(texts) and len(seen) > 2 * len(rest)
    assert set(seen[: len(rest)]) == set(rest) and seen[: len(rest)] != seen[len(rest) : 2 * len(rest)]


@pytest.mark.slow
def test_the_larger_sibling_is_trained_and_studied_on_text_without_lm_eval(files, tmp_path, monkeypatch):
    """The command for a GPU machine, which may lack lm-eval, at one step: every seed trained, its own corpora, no tasks."""
    smaller = training.PRESETS["small-16"] | {"num_hidden_layers": 3, "hidden_size": 96}  # its width proves nothing here
    monkeypatch.setitem(training.PRESETS, "small-16", smaller)
    monkeypatch.setattr(build, "checkout", lambda: tmp_path)
    monkeypatch.setattr(seeds, "find_spec", lambda name: None)
    monkeypatch.setattr(seeds.Run, "scores", None)

    def rows(run):
        run = replace(run, sequences=2, length=32)
        about = {"r": 12, "method": run.method, "calibration": run.domain}
        yield from domain.skipping_rows(run, run.plan(run.domain, 12), about, (run.general,))

    monkeypatch.setitem(seeds.STUDIES, "domain_specific", {"rows": rows})
    words = ["bench", "domain_specific", "--preset", "small-16", "--steps", "1", "--sequences", "16", "--out"]
    assert __main__.main([*words, str(tmp_path / "out.json"), "--text", *files]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["seeds"] == [0, 1, 2] and "small-16, trained for 1 steps" in result["weights"]
    assert [(row["seed"], row["betas"]) for row in result["rows"]] == [(s, b) for s in (0, 1, 2) for b in (None, files[0])]
    assert all(row["tasks"] == {} and row["average"] is None for row in result["rows"])
    (folder,) = (tmp_path / ".runs" / "trained").glob("small-16-*-seed-2")
    model = esparse.load_model(str(folder), dtype="float32")[0]
    tokens = replace(esparse.Run(general=files[0]), model_name=str(folder), sequences=2, length=32).held_out(files[0])
    plan, expected = result["rows"][-2], esparse.perplexity(model, tokens)
    assert plan["perplexity"][0] == pytest.approx(expected, rel=0.2)  # barely trained: four experts fewer change little


def test_only_studies_take_a_recipe(capsys):
    assert __main__.main(["bench", "search", "--preset", "small-16"]) == 2
    assert "Only studies train models" in capsys.readouterr().err
    assert __main__.main(["bench", "recovery", "--preset", "small"]) == 2
    assert "There is no preset 'small': choose from tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ((), training.TINY),
        (("--steps", "7"), replace(training.TINY, steps=7)),
        (("--preset", "tiny-scratch"), Recipe("tiny-scratch")),
        (("--preset", "tiny-16", "--dense", "0.25"), Recipe("tiny-16", dense=0.25)),
        (("--preset", "tiny-16", "--steps", "7"), Recipe("tiny-16", 7)),  # from nothing, as every model that does not ship
    ],
)
def test_the_command_takes_a_models_own_recipe(words, recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(seeds, "bench_study", lambda name, out, recipe: asked.append(recipe) or "")
    assert __main__.main(["bench", "criteria", *words]) == 0 and asked == [recipe]


def test_the_second_model_that_ships_has_its_own_run():
    assert seeds.seed_run(0, Recipe("tiny-scratch")).model_name == "tiny-scratch"
    assert not replace(esparse.Run(), model_name="tiny-scratch").embedded  # notebooks' text is about the tiny model's numbers


def test_shipped_sizes_follow_from_the_shapes():
    """An expert in 8 bits is a byte for each weight and a float32 scale for each row; its router row stays float32."""
    hidden, inner, layers, rows = 128, 256, 6, esparse.measured("quantised")["rows"]
    mib = {(row["r"], row["weights"]): row["mib"] for row in rows}
    weights, scales = 3 * hidden * inner, 2 * inner + hidden
    for r in (7, 6, 5, 4):
        stored, int8 = (mib[r + 1, kind] - mib[r, kind] for kind in ("float32", "int8"))
        assert stored * 2**20 == pytest.approx(layers * 4 * (weights + hidden))
        assert int8 * 2**20 == pytest.approx(layers * (weights + 4 * (scales + hidden)))


def test_a_study_of_another_model_is_its_own_rows(run, monkeypatch):
    assert not run.embedded and esparse.Run().embedded  # four sequences are not what the shipped rows were measured with
    monkeypatch.setitem(seeds.STUDIES, "domain_specific", {"rows": lambda run: [{"r": 6}]})
    assert seeds.study(run, "domain_specific") == {"seeds": [0], "rows": [{"seed": 0, "r": 6}]}


def test_recovery_takes_the_second_and_third_size(run, monkeypatch):
    asked = []
    monkeypatch.setattr(recovery, "recovery_rows", lambda run, r, corpus, text: asked.append((r, corpus, text)) or [])
    monkeypatch.setattr(esparse.Run, "quality", lambda run: {})
    eight = esparse.Run()
    monkeypatch.setattr(recovery, "recovered", lambda run, plan, what, change: (run, {"method": "tune", "seconds": 1.0}))
    assert [row["method"] for row in recovery.study_rows(eight)] == ["full", "full, tuned"] and list(recovery.study_rows(run))
    both = "web+arithmetic"
    assert asked == [(r, "web", both) for r in (6, 5, 6)]


def test_without_torchao_eight_bits_end_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="needs torchao beside transformers: pip install torchao"):
        esparse.load_model(dtype="int8")


def test_the_command_line_knows_every_study():
    assert tuple(seeds.STUDIES) == STUDIES
