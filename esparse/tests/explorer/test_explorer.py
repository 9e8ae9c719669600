"""The explorer's numbers against the trace's, its pictures against each other, and its controls over their full range."""

import asyncio
import html
import io
import itertools
import json
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import esparse
from esparse.experiments.figures import draw
from esparse.explorer import cost, grid, views, widgets
from esparse.explorer.grid import BETAS, SHARES, Choice, Explorer
from esparse.explorer.views import VIEWS
from esparse.files import data_folder
from esparse.measure import timing
from esparse.pruning.scores import EXPERT_SCORES
from esparse.tests.conftest import random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tiny_model.training import preset_model
from esparse.tracing.losses import output_norm, weighed


@pytest.fixture(scope="module")
def traces(tiny, tiny_tokens):
    other = esparse.calibration_tokens("arithmetic", tiny[1], sequences=8, length=64)
    return {"web": esparse.trace(tiny[0], tiny_tokens[:8], keep=4), "arithmetic": esparse.trace(tiny[0], other, keep=4)}


@pytest.fixture(scope="module")
def shown(traces, tmp_path_factory):
    return Explorer(traces, tmp_path_factory.mktemp("grid"))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_skipping_at_every_beta_is_the_reconstruction_loss(family):
    """Every router kind, whatever k: the running sum against Eq. 3 by itself at each beta."""
    model = family_model(family)
    layer = esparse.trace(model, random_tokens(), keep=6).layers[0]
    for kept in (None, [0, 1, 2, 4, 6, 7]):
        ratios, squares = grid.skip_curve(layer, kept)
        for beta in (0.0, 0.2, 0.5, 0.8, 1.0, 2.0):
            at = int((ratios < beta).sum())
            assert at / len(ratios) == pytest.approx(esparse.dropped_share(layer, beta, kept))
            expected = esparse.reconstruction_loss(layer, kept, beta)
            assert squares[at].sqrt().item() == pytest.approx(expected, rel=1e-4, abs=1e-3 * output_norm(layer))


def test_more_than_two_experts_a_token(tmp_path):
    trace = esparse.trace(random_model("olmoe", 6, 3), random_tokens(), keep=4)
    shown = Explorer({"some": trace}, tmp_path)
    for place in (Choice(5, "enumerate", 1, ("betas", (0.3,) * 3)), Choice(6, "enumerate", 1, ("betas", (0.3,) * 3))):
        found = shown.skipping("some", place)
        for i, layer in enumerate(trace.layers):
            kept = shown.kept("some", place)[i]
            loss = esparse.reconstruction_loss(layer, kept, 0.3) / output_norm(layer)
            assert (found["dropped"][i], found["loss"][i]) == pytest.approx(
                (esparse.dropped_share(layer, 0.3, kept), loss), rel=1e-6
            )


def test_the_grid_is_the_trace(traces, shown):
    for corpus, trace in traces.items():
        for method in shown.methods:
            plan = esparse.search_experts(trace, 6, method=method)
            place = Choice(6, method, 2, ("share", 0.5))
            if method != "random":  # drawn layer by layer, or for each size: another order of draws
                assert shown.kept(corpus, place) == plan.kept
                medians = esparse.median_betas(trace, plan.kept)
                assert shown.skipping(corpus, place)["beta"] == pytest.approx(medians, abs=0.01)
            assert shown.skipping(corpus, place)["dropped"] == pytest.approx([0.5] * 6, abs=0.01)
        table = shown.view("co_selection", place)["tables"][corpus]
        assert torch.allclose(
            torch.tensor(table), esparse.co_selection(trace.layers[2]).fill_diagonal_(0).double().to(torch.float32)
        )
        _, losses = esparse.subset_losses(trace.layers[2], 6)
        drawn = shown.view("landscape", Choice(6, "enumerate", 2, residual=0.0))["corpora"][corpus]
        assert drawn["losses"] == pytest.approx((losses.sort().values / output_norm(trace.layers[2])).tolist())
        assert drawn["better"] == 0 and drawn["loss"] == pytest.approx(drawn["losses"][0])


@pytest.mark.parametrize("loss", ["eq3", "residual"])
def test_mixtures_on_the_grid_are_those_searched(traces, shown, loss):
    """At either end of the other slider; shown are the losses of Eq. 3 on each corpus."""
    pairs = {"web": [*traces.values()], "arithmetic": [*traces.values()][::-1]}
    for corpus, (mix, r) in itertools.product(traces, ((0.0, 6), (0.35, 5), (0.5, 6), (0.9, 4), (1.0, 7))):
        plan = esparse.search_experts(pairs[corpus], r, weights=[1 - mix, mix], loss=loss)
        place = Choice(r, "enumerate", 0, ("share", 0.0), mix, float(loss == "residual"))
        assert shown.kept(corpus, place) == plan.kept
        layers = zip(traces[corpus].layers, plan.kept, strict=True)
        losses = [esparse.reconstruction_loss(layer, kept) / output_norm(layer) for layer, kept in layers]
        assert shown.skipping(corpus, place)["loss"] == pytest.approx(losses, rel=1e-4)
        assert shown.landscape(corpus, place)["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert shown.kept("web", Choice(6, "enumerate", mix=0.5)) == shown.kept("arithmetic", Choice(6, "enumerate", mix=0.5))


def test_between_both_losses_the_sum_of_shares_of_the_output_decides(traces, shown):
    """Brute force over every subset of a layer, with squared losses and norms per token."""
    subsets = list(itertools.combinations(range(8), 6))
    for number, (mix, residual) in itertools.product((0, 3, 5), ((0.0, 0.5), (0.25, 0.4), (0.8, 0.95))):
        sums = np.zeros(len(subsets))
        for name, share in (("eq3", 1 - residual), ("residual", residual)):
            layers = [weighed(trace.layers[number], name) for trace in traces.values()]
            per_token = lambda values: np.square(values) / [len(layer.order) for layer in layers] @ [1 - mix, mix]  # noqa: B023, E731
            losses = [[esparse.reconstruction_loss(layer, subset) for layer in layers] for subset in subsets]
            sums += share * per_token(losses) / per_token([output_norm(layer) for layer in layers])
        kept = shown.kept("web", Choice(6, "enumerate", mix=mix, residual=residual))[number]
        assert sums[subsets.index(tuple(kept))] == pytest.approx(sums.min(), rel=1e-6)


def test_sliders_of_mixtures_act_where_subsets_are_enumerated(shown, traces, tmp_path):
    board = widgets.Dashboard(shown)
    alone = figures(board)
    assert "other corpus" not in alone["kept"]
    board.mix.value, board.residual.value = 25, 40
    assert board.choice == Choice(6, "enumerate", 0, ("share", 0.5), 0.25, 0.4)
    assert "r = 6, enumerate (25% other corpus, 60% Eq. 3)<" in figures(board)["trade_off"]
    assert shown.plan("web", board.choice).label == "method: enumerate (25% other corpus, 60% Eq. 3), r = 6"
    assert shown.plan("web", board.choice).kept == shown.kept("web", board.choice)
    assert "6 of 8 experts by enumerate (25% other corpus, 60% Eq. 3)" in board.readout.value
    board.method.value = "frequency"
    fields = (*board.mix.children, *board.residual.children)
    assert all(field.disabled for field in fields) and "r = 6, frequency<" in figures(board)["kept"]
    frequent = figures(board)
    board.mix.value = 50
    assert figures(board) == frequent and board.message.value == ""
    assert shown.neighbours(board.choice, [0])["mix"] == shown.neighbours(board.choice, [0])["residual"] == []
    board.method.value, board.mix.value, board.residual.value = "enumerate", 0, 100
    assert not any(field.disabled for field in fields) and figures(board) == alone
    for slider in (board.mix, board.residual):
        seen = set()
        for percent in slider.values:
            slider.value = percent
            seen.add(figures(board)["trade_off"])
            for told in shown.describe(board.choice).values():
                assert all(html.escape(words) in board.readout.value for words in told.values())
        assert len(seen) == 21 and board.message.value == ""
    single = widgets.Dashboard(Explorer({"web": traces["web"]}, tmp_path))
    assert "mix" not in single.controls and "residual" in single.controls
    found = {loss: esparse.search_experts(traces["web"], 6, loss=loss).kept for loss in ("residual", "eq3")}
    assert single.residual.value == 100 and single.explorer.kept("web", single.choice) == found["residual"] != found["eq3"]
    single.residual.value = 0
    assert single.message.value == "" and single.explorer.kept("web", single.choice) == found["eq3"]
    assert "6 of 8 experts by enumerate (100% Eq. 3)" in single.readout.value


def test_no_subset_beats_the_optimum_whatever_rounding_does(traces, tmp_path, monkeypatch):
    """The losses of all subsets by a route that rounds otherwise than the one that the plans' losses come by."""
    generator = torch.Generator().manual_seed(0)

    def otherwise(layer, r):
        subsets, losses = esparse.subset_losses(layer, r)
        return subsets, losses * (1 + 1e-7 * torch.rand(len(losses), generator=generator, dtype=torch.float64) - 1e-7)

    monkeypatch.setattr(grid, "subset_losses", otherwise)
    shown = Explorer({"web": traces["web"]}, tmp_path)
    for r, (i, layer) in itertools.product(shown.sizes[:-1], enumerate(traces["web"].layers)):
        subsets, losses = esparse.subset_losses(layer, r)
        for method in ("enumerate", "frequency"):
            place = Choice(r, method, i, residual=0.0)
            drawn = shown.view("landscape", place)["corpora"]["web"]
            at = subsets.index(tuple(shown.kept("web", place)[i]))
            assert drawn["better"] == (losses < losses[at]).sum() and drawn["others"] == len(subsets) - 1
            assert method == "frequency" or drawn["better"] == 0


def test_shares_from_none_to_all(traces, shown):
    for share in SHARES:
        place = Choice(6, "enumerate", 0, ("share", share))
        found, kept = shown.skipping("web", place), shown.kept("web", place)
        assert found["dropped"] == pytest.approx([share] * 6, abs=0.005)
        for i, layer in enumerate(traces["web"].layers):
            assert esparse.dropped_share(layer, found["beta"][i], kept[i]) == found["dropped"][i]
    assert found["dropped"] == [1.0] * 6
    whole = shown.skipping("web", Choice(8, "enumerate", 0, ("share", 0.0)))
    assert whole == {"beta": [0.0] * 6, "dropped": [0.0] * 6, "loss": pytest.approx([0.0] * 6, abs=1e-3)}


def test_what_is_computed_is_kept(traces, shown, tmp_path, monkeypatch):
    first = Explorer(traces, tmp_path)
    monkeypatch.setattr(grid.Grid, "fill", None)
    assert Explorer(traces, tmp_path).frame == first.frame == shown.frame


def test_sizes_of_a_real_model_are_counted_right(shown):
    for experts, skipped in ((8, None), (6, None), (6, 0.25)):
        config = transformers.MixtralConfig(**timing.MIXTRAL_8X7B, num_local_experts=experts, num_experts_per_tok=2)
        with torch.device("meta"):
            model = transformers.MixtralForCausalLM(config)
        expected = sum(p.numel() for p in model.parameters())
        if skipped is not None:  # no row of the embeddings, and of the experts 1 + (1 - skipped)
            expected -= model.model.embed_tokens.weight.numel() + 32 * (experts - 1.75) * 3 * 4096 * 14336
        assert grid.mixtral_parameters(grid.MIXTRAL, experts, skipped) == expected
    own = preset_model("small-16", head_dim=32)  # tied embeddings, and heads narrower than their share
    shape = {key: own.config.to_dict().get(key) for key in (*grid.MIXTRAL, "head_dim")}
    assert grid.mixtral_parameters(shape, 16) == sum(p.numel() for p in own.parameters())
    words = shown.estimate(Choice(6, "enumerate", 0, ("share", 0.5)))
    assert words["Mixtral 8x7B with 6 experts"].startswith("67,574 MiB in bf16; 35.4 B parameters")
    row = next(r for r in esparse.measured("speed_medium")["rows"] if r["r"] == 6)["decoding"]["1"]
    assert f"{row['gain']:.2f} times" in words["as measured"] and "random weights" in words["as measured"]


def test_what_a_choice_means_is_told_for_another_shape_too(traces, tmp_path):
    """Mixtral 8x22B has 141 B parameters, 39 B for a token (mistral.ai); the page keeps the shape with another trace."""
    large = {"name": "8x22B", "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56}
    large |= {"num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
    page = widgets.Page(Explorer({"web": traces["web"]}, tmp_path / "grid", shape=grid.MIXTRAL | large), tmp_path / "grid")
    page.dashboard.r.value, page.dashboard.share.value = 8, 0
    assert "140.6 B parameters, 39.0 B for a token" in page.dashboard.readout.value
    traces["arithmetic"].save(tmp_path / "other")
    page.path.value = str(tmp_path / "other")
    assert "8x22B with 6 experts" in page.dashboard.readout.value and "Mixtral 8x7B with" not in page.dashboard.readout.value


def test_two_traces_side_by_side_are_typed_with_a_semicolon(traces, shown, tmp_path):
    for name, trace in traces.items():
        trace.save(tmp_path / name)
    page = widgets.Page({"web": traces["web"]}, tmp_path / "grid")
    assert list(page.dashboard.explorer.grids) == ["web"]
    page.path.value = f"{tmp_path / 'web'}; {tmp_path / 'arithmetic'}"
    assert page.message.value == "" and page.dashboard.explorer.grids == shown.grids
    traces["arithmetic"].save(tmp_path / "other" / "web")  # a folder of the same name
    page.path.value = f"{tmp_path / 'web'}; {tmp_path / 'other' / 'web'};"
    assert page.message.value == ""
    assert list(page.dashboard.explorer.grids) == ["web (1)", "web (2)"]
    assert page.dashboard.explorer.grids["web (2)"] == shown.grids["arithmetic"]
    page.path.value = f"{tmp_path / 'web'};{tmp_path / 'arithmetic'};{tmp_path / 'third'}"
    assert "one trace, or two side by side, got 3" in page.message.value


def test_a_mixtral_of_ones_own_is_told_of_in_its_own_shape(tmp_path):
    shutil.copytree(data_folder() / "tiny", tmp_path / "own")
    run = esparse.Run(str(tmp_path / "own"), general="web", domain="arithmetic", sequences=2, length=32, folder=tmp_path)
    shape, config = run.explorer().shape, run.model.config.to_dict()
    assert shape == {key: config.get(key) for key in shape} | {"name": str(tmp_path / "own")}
    assert esparse.Run(sequences=2, length=32, folder=tmp_path).explorer().shape == grid.MIXTRAL


def test_frames_leave_nothing_of_the_frame_before(shown):
    places = [Choice(6, "enumerate", 0, ("share", 0.5)), Choice(4, "frequency", 5, ("betas", (0.9,) * 6))]
    for name in VIEWS:
        stage = views.Stage(name, shown.frame)
        one, other, again = (stage.png(shown.view(name, place)) for place in (*places, places[0]))
        assert one == again != other
        picture = Image.open(io.BytesIO(one))
        assert picture.size == tuple(round(views.DPI * side) for side in VIEWS[name].size)
        assert (np.asarray(picture) == np.asarray(stage.canvas.buffer_rgba())[:, :, :3]).all()


def test_the_figure_of_all_views_says_where_the_controls_stand(shown):
    """Each view has above it what of the choice it depends on, as a reader of the figure alone has no controls."""
    data = json.loads(json.dumps(shown.snapshot(Choice(4, "frequency", 5, ("betas", (0.9,) * 6)))))
    above = [place.get_suptitle() for place in draw("11_explorer", data).subfigs]
    at = "r = 4, frequency"
    assert above == [
        f"experts kept, {at}",
        "experts chosen together, layer 5",
        f"loss of all subsets, layer 5, {at}",
        f"layer by layer, beta 0.90, {at}",
        f"mean loss, beta 0.90, {at}",
        "",  # five views leave one place empty
    ]
    assert shown.title("trade_off", Choice(4, "random", 0, ("share", 0.35))) == "mean loss, 35% skipped, r = 4, random"
    each = Choice(8, "random", 0, ("betas", (0.5,) * 5 + (0.6,)))
    assert shown.title("skipping", each) == "layer by layer, a beta for each layer, r = 8, random"


def figures(board: widgets.Dashboard) -> dict[str, str]:
    """What the page shows of each view: its title and its picture."""
    found = re.findall("<figure.*?</figure>", "".join(picture.value for picture in board.pictures.values()))
    groups = list(board.pictures)
    return dict(zip(sorted(board.stages, key=lambda name: groups.index(VIEWS[name].parts)), found, strict=True))


def test_neighbours_are_one_step_away(shown):
    def places(choice: Choice) -> list[float]:  # where the controls stand, in steps
        skip = choice.skip[1] if choice.skip[0] == "betas" else [20 * choice.skip[1]]
        scale = 100 if choice.skip[0] == "betas" else 1
        shares = [round(20 * share) for share in (choice.mix, choice.residual)]
        return [choice.r, choice.layer, *shares, *(round(scale * value) for value in skip)]

    for skip, layers, count in (
        (("share", 0.0), range(6), 1),
        (("share", 0.35), [2], 2),
        (("betas", (0.2, 0.3, 0.4, 1.0, 0.5, 0.6)), [2], 2),
        (("betas", (0.2, 0.3, 0.4, 1.0, 0.5, 0.6)), [3], 1),
        (("betas", (0.4,) * 6), range(6), 2),
        (("betas", (1.0,) * 6), range(6), 1),
    ):
        choice = Choice(6, "enumerate", 2, skip, 0.0, 0.65)
        near = list(itertools.chain(*shown.neighbours(choice, layers).values()))
        for other in near:
            if other.skip != skip and skip[0] == "betas":
                assert {i for i in range(6) if other.skip[1][i] != skip[1][i]} == set(layers)
        assert len(set(near)) == len(near) == 2 + len(shown.methods[1:]) + 1 + 2 + 2 + count
        assert {other.method for other in near if other.method != "enumerate"} == set(shown.methods[1:])
        for other in near:
            moved = {after - before for before, after in zip(places(choice), places(other), strict=True)} - {0}
            assert moved in ({-1}, {1}) if other.method == "enumerate" else moved == set()
    ends = shown.neighbours(Choice(8, "enumerate", 0, ("share", 1.0)), range(6))
    assert [other.r for other in ends["r"]] == [7] and [other.layer for other in ends["layer"]] == [1]


# Pictures at first, for r = 5, and ahead for r = 4; if there are such controls for other methods and two mixtures; the next
# layer; if there are such controls for another share twice.
@pytest.mark.parametrize(
    ("controls", "drawn"),
    [(widgets.CONTROLS, 5 + 4 + 4 + (len(EXPERT_SCORES) + 1) * 4 + 2 * 4 + 2 + 2 * 2), (("r", "layer"), 5 + 4 + 4 + 2)],
)
def test_the_next_step_is_drawn_ahead(shown, monkeypatch, controls, drawn):
    """While nothing happens, one picture at a time, and first what the control that moved last would show."""
    monkeypatch.setattr(widgets, "AHEAD", 0.01)
    order = []  # the pictures' choices, and what else had its turn between them
    draw = widgets.Dashboard._draw
    monkeypatch.setattr(widgets.Dashboard, "_draw", lambda *some: order.append(some[2]) or draw(*some))

    async def steps() -> None:
        board = widgets.Dashboard(shown, controls=controls)
        board.r.value = 5
        assert len(order) == 9
        end = time.monotonic() + 20
        while board._image.cache_info().misses < drawn and time.monotonic() < end:
            order.append("else")
            await asyncio.sleep(0)  # a turn for all that is due
        await asyncio.sleep(0.1)  # and nothing more
        assert board._image.cache_info().misses == drawn
        board.r.value = 4
        assert board._image.cache_info().misses == drawn and board.message.value == ""
        assert "r = 4, enumerate" in figures(board)["kept"]

    asyncio.run(steps())
    pictures = [place for place in range(9, len(order)) if order[place] != "else"]
    assert [order[place].r for place in pictures[:4]] == [4] * 4 and len(pictures) == drawn - 9
    assert all(after - before > 1 for before, after in itertools.pairwise(pictures))


def test_a_step_ends_what_is_drawn_ahead_and_what_fails_is_told_when_it_is_taken(shown, monkeypatch):
    monkeypatch.setattr(widgets, "AHEAD", 0.01)
    failed, told = [], []

    def breaks(*_):
        failed.append(1)
        raise ZeroDivisionError("division by zero")

    async def steps() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
        board = widgets.Dashboard(shown)
        board.r.value = 5
        turn = board.turn
        board.r.value = 4
        drawn = board._image.cache_info().misses
        board._draw_next(iter([("kept", Choice(3, "random", 5, ("share", 0.5)))]), turn)  # of the step before
        assert board._image.cache_info().misses == drawn
        monkeypatch.setattr(views.Stage, "png", breaks)
        await asyncio.sleep(0.5)
        assert failed and board._image.cache_info().misses > drawn and told == [] and board.message.value == ""
        board.method.value = "random"
        assert "ZeroDivisionError" in board.message.value

    asyncio.run(steps())


def test_two_threads_that_step_draw_no_wrong_picture(shown, monkeypatch):
    """As JupyterLab does with kernels that have subshells: while one thread draws ahead, the other takes steps."""
    monkeypatch.setattr(widgets, "AHEAD", 0.0)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    board = widgets.Dashboard(shown)
    try:
        for i in range(24):

            async def step(r=shown.sizes[i % 4]) -> None:
                board.r.value = r

            asyncio.run_coroutine_threadsafe(step(), loop).result()
            time.sleep(0.004 * (i % 5))  # the loop draws ahead
            board.method.value = shown.methods[i % len(shown.methods)]
            board.layer.value = i % 6
        pictures = {parts: picture.value for parts, picture in board.pictures.items()}
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert "Error" not in board.message.value
    alone = widgets.Dashboard(shown)
    alone.r.value, alone.method.value, alone.layer.value = board.r.value, board.method.value, board.layer.value
    assert pictures == {parts: picture.value for parts, picture in alone.pictures.items()}
    for r in shown.sizes[:4]:  # what is kept of them is right, too
        for method in shown.methods:
            for one in (board, alone):
                one.r.value, one.method.value = r, method
            assert figures(board) == figures(alone)


def test_a_pair_of_many_experts_is_seen(shown):
    """One bright cell of 256 x 256, which is below a pixel, changes the picture wherever it is."""
    frame = shown.frame | {"n": 256, "pairs": 0.2}
    stage = views.Stage("co_selection", frame)
    empty = np.zeros((256, 256))
    ground = stage.png({"tables": {name: empty for name in frame["corpora"]}})
    generator = np.random.default_rng(0)
    for place in generator.integers(256, size=(12, 2)):
        table = empty.copy()
        table[tuple(place)] = 0.2
        assert stage.png({"tables": {name: table for name in frame["corpora"]}}) != ground


def test_every_control_through_its_range(shown):
    board = widgets.Dashboard(shown)
    seen = {name: set() for name in VIEWS}
    for control in (board.r, board.layer, board.share):
        for value in control.values:
            control.value = value
            assert "Error" not in board.message.value
            for name, figure in figures(board).items():
                seen[name].add(figure)
            for told in (*shown.describe(board.choice).values(), shown.estimate(board.choice)):
                assert all(html.escape(words) in board.readout.value for words in told.values())
    assert len(seen["co_selection"]) == 6 and len(seen["kept"]) == 5 and len(seen["trade_off"]) == 5 - 1 + 21
    for method in shown.methods:
        board.method.value = method
        assert board.choice.method == method and f">experts kept, r = 8, {method}</figcaption>" in figures(board)["kept"]
    assert ">experts chosen together, layer 5</figcaption>" in figures(board)["co_selection"]
    for figure in figures(board).values():
        image = r'<img decoding="sync" width="\d+" height="\d+" alt="[^"]+\." src="data:image/png;base64,[^"]+">'
        assert re.fullmatch(f"<figure [^>]+><figcaption [^>]+>[^<]+</figcaption>{image}</figure>", figure)


def test_betas_for_all_and_for_each_layer(shown):
    board = widgets.Dashboard(shown)
    board.mode.value = widgets.SKIPPING[1]
    board.beta.value = 0.3
    assert board.choice.skip == ("betas", (0.3,) * 6) and board.share.layout.display == "none"
    board.mode.value = widgets.SKIPPING[2]
    board.layer.value = 4
    board.beta.value = 0.9
    assert board.choice.skip == ("betas", (0.3, 0.3, 0.3, 0.3, 0.9, 0.3))
    board.layer.value = 0
    assert board.beta.value == 0.3 and board.choice.skip[1][4] == 0.9
    assert "0.30, 0.30, 0.30, 0.30, 0.90, 0.30" in board.readout.value
    board.mode.value = widgets.SKIPPING[0]
    assert board.choice.skip == ("share", 0.5)
    assert BETAS.index(0.9) == 90


def test_a_broken_callback_is_seen(shown, monkeypatch):
    board = widgets.Dashboard(shown)
    before = figures(board)
    monkeypatch.setattr(shown, "view", lambda *_: 1 / 0)
    board.r.value = 5
    assert board.message.value == '<p role="alert"><b>ZeroDivisionError: division by zero</b></p>'
    assert figures(board) == before
    monkeypatch.undo()
    board.r.value = 4
    assert board.message.value == ""


def test_notebooks_get_a_panel_or_the_dashboard_of_an_explorer_or_a_run(shown):
    from esparse.explorer import dashboard, panel

    run = SimpleNamespace(explorer=lambda: shown)
    for source in (shown, run):
        slider, _message, pictures, _readout = panel(source, views=["kept"], controls=["r"]).children
        assert slider.children[0].description == "experts kept, r" and len(pictures.children) == 1
        assert len(dashboard(source).children[2].children) == 2  # the dashboard and the export


def test_controls_have_names(shown):
    page = widgets.Page(shown)
    board = page.dashboard
    sliders = (board.r, board.mix, board.residual, board.layer, board.share, board.beta)
    numbers = [*(slider.number for slider in sliders), board.method, board.mode]
    named = [*numbers, page.path, page.plan_path, page.corpus, page.button]
    assert all(control.description for control in named) and len({c.description for c in named}) == len(named)


def test_an_exported_plan_prunes_and_skips(shown, traces, tiny, tmp_path, monkeypatch):
    from esparse import __main__

    monkeypatch.chdir(tmp_path)
    page = widgets.Page(shown)
    page.dashboard.r.value = 5
    page.button.click()
    assert page.dashboard.message.value == ""
    assert f"prune MODEL pruned --plan {tmp_path / 'plan.json'}" in page.written.value  # from any folder
    plan = esparse.PruningPlan.load("plan.json")
    assert (plan.r, plan.kept) == (5, shown.kept("web", page.dashboard.choice))
    expected = esparse.search_experts(traces["web"], 5)
    assert plan.losses == pytest.approx(expected.losses, rel=1e-4) and plan.label == expected.label
    by_eq3 = shown.plan("web", Choice(5, "enumerate", residual=0.0))
    expected = esparse.search_experts(traces["web"], 5, loss="eq3").losses
    assert by_eq3.losses == pytest.approx(expected, rel=1e-4) and by_eq3.loss == "eq3"
    assert plan.betas == shown.skipping("web", page.dashboard.choice)["beta"]
    page.button.click()
    assert "plan.json already exists" in page.dashboard.message.value
    page.dashboard.r.value = 8
    assert "keeps every expert" in page.dashboard.message.value
    page.plan_path.value = "other.json"
    page.button.click()
    assert "nothing to prune" in page.dashboard.message.value and not (tmp_path / "other.json").exists()
    assert __main__.main(["prune", str(data_folder() / "tiny"), "pruned", "--plan", "plan.json"]) == 0
    pruned = esparse.prune(esparse.load_model()[0], plan)
    streamed = transformers.AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.float32)
    expected = pruned.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in streamed.state_dict().items())
    with esparse.masked(tiny[0], plan), esparse.skipping(tiny[0], plan.betas):
        score = esparse.evaluate(*tiny, ["web_facts"], limit=4).value.item()
    words = ["evaluate", "tiny", "--tasks", "web_facts", "--limit", "4", "--plan", "plan.json", "--run-dir", "scores"]
    assert __main__.main(words) == 0
    (path,) = (tmp_path / "scores" / "results").iterdir()
    (row,) = json.loads(path.read_text())
    assert row["value"] == score


def test_bad_traces_are_a_sentence_in_the_page(traces, shown, tmp_path):
    page = widgets.Page(shown, tmp_path / "grid")
    former = page.body.children
    traces["web"].save(tmp_path / "trace")
    about = json.loads((tmp_path / "trace" / "trace.json").read_text())
    for change, sentence in (
        (lambda: None, ""),
        (lambda: (tmp_path / "trace" / "trace.json").write_text(json.dumps(about | {"format": 1})), "another version"),
        (lambda: (tmp_path / "trace" / "trace.json").write_text(json.dumps({"format": about["format"]})), "another version"),
        (lambda: (tmp_path / "trace" / "trace.json").write_text(json.dumps(about)[:99]), "may be truncated"),
    ):
        change()
        page.path.value = ""
        page.path.value = str(tmp_path / "trace")
        assert sentence in page.message.value and page.message.value.count("<p") == bool(sentence)
    (tmp_path / "trace" / "trace.json").write_text(json.dumps(about))
    file = tmp_path / "trace" / "layer_03.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    page.path.value = ""
    page.path.value = str(tmp_path / "trace")
    assert "layer_03.safetensors is missing or truncated" in page.message.value
    assert page.body.children != former and len(page.body.children) == 2  # what could be read last is still shown
    assert "There is no trace" in widgets.dashboard({"one": tmp_path / "nothing"}).children[1].value


def test_traces_that_do_not_belong_together(traces, tmp_path):
    other = esparse.trace(random_model("mixtral", 4, 2), random_tokens())
    with pytest.raises(ValueError, match="different models"):
        Explorer({"one": traces["web"], "other": other}, tmp_path)
    with pytest.raises(ValueError, match="one trace, or two"):
        Explorer({}, tmp_path)


def test_a_trace_with_one_layer_and_one_with_one_expert_a_token(tmp_path):
    trace = esparse.trace(random_model("mixtral", 4, 2), random_tokens(), keep=2)
    one = widgets.Page({"one": esparse.Trace(trace.layers[:1], trace.model, trace.tokens)}, tmp_path)
    assert "one MoE layer" in one.dashboard.message.value
    single = widgets.Page({"one": esparse.trace(random_model("mixtral", 4, 1), random_tokens(), keep=2)}, tmp_path)
    assert "nothing can be skipped" in single.dashboard.message.value
    single.dashboard.r.value = 2
    assert single.dashboard.message.value != "" and "Error" not in single.dashboard.message.value
    assert "0.0%" in single.dashboard.readout.value
    assert single.dashboard.explorer.plan("one", single.dashboard.choice).betas is None


def test_a_damaged_file_is_a_sentence_whatever_is_wrong_with_it(traces, shown, tmp_path):
    page = widgets.Page(shown, tmp_path / "grid")
    traces["web"].save(tmp_path / "trace")
    about = json.loads((tmp_path / "trace" / "trace.json").read_text())
    without = [{key: value for key, value in layer.items() if key != "keep"} for layer in about["layers"]]
    for wrong in ([], about | {"layers": without}, about | {"layers": []}):
        (tmp_path / "trace" / "trace.json").write_text(json.dumps(wrong))
        page.path.value = ""
        page.path.value = str(tmp_path / "trace")
        assert page.message.value.count("<p") == 1 and "trace again" in page.message.value


def test_betas_of_layers_stay_while_a_share_is_aimed_at(shown):
    board = widgets.Dashboard(shown)
    board.mode.value = widgets.SKIPPING[2]
    board.layer.value = 2
    board.beta.value = 0.9
    board.mode.value = widgets.SKIPPING[0]
    board.layer.value = 0
    board.mode.value = widgets.SKIPPING[2]
    assert board.choice.skip == ("betas", (0.5, 0.5, 0.9, 0.5, 0.5, 0.5)) and board.beta.value == 0.5
    without_layers = widgets.Dashboard(shown, ("skipping",), ("r", "skip"))
    assert without_layers.mode.options == widgets.SKIPPING[:2]


def test_what_is_typed_between_two_values_is_the_nearest(shown):
    board = widgets.Dashboard(shown)
    board.share.slider.value = 37
    assert board.share.slider.value == 35 and board.choice.skip == ("share", 0.35)
    board.mode.value = widgets.SKIPPING[1]
    board.beta.slider.value = 0.554
    assert board.beta.slider.value == pytest.approx(0.55)


def test_betas_and_axes_reach_all_pairs_of_more_than_two_experts(tmp_path):
    shown = Explorer({"one": esparse.trace(random_model("qwen3", 8, 4), random_tokens(), keep=6)}, tmp_path)
    last = Choice(6, "enumerate", 0, ("betas", (shown.betas[-1],) * shown.layers))
    assert shown.betas[-1] == 3 and min(shown.skipping("one", last)["dropped"]) > 0.99
    top = max(loss for row in shown.grids["one"]["rows"]["6"][0] for loss in row["share loss"])
    assert shown.frame["loss"] >= top


def test_many_experts_have_no_landscape_but_all_the_rest(tmp_path):
    model = random_model("qwen3", 24, 2)
    shown = Explorer({"one": esparse.trace(model, random_tokens(), keep=12)}, tmp_path)
    assert shown.methods[0] == "greedy" and len(shown.sizes) <= 9
    board = widgets.Dashboard(shown)
    board.r.value = 12
    assert board.message.value == ""
    assert shown.view("landscape", Choice(12, "greedy", 0))["corpora"]["one"]["losses"] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved trace of three layers of 24 experts, and its explorer with the whole grid."""
    trace, folder = (
        esparse.trace(random_model("qwen3", 24, 2), random_tokens(8, 32), keep=20),
        tmp_path_factory.mktemp("saved"),
    )
    trace.save(folder / "trace")
    return folder / "trace", Explorer({"one": trace}, folder)


@pytest.fixture
def large(saved, monkeypatch):
    """The same, but from here on the trace is no small one."""
    monkeypatch.setattr(grid, "WHOLE", 0)
    monkeypatch.setattr(widgets, "AHEAD", 0.01)
    return saved


def file_of(tensor: torch.Tensor) -> str:
    """The file whose memory map holds a tensor; the last word that Linux says of other memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.split()[-1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Only Linux tells what memory holds.")
def test_a_saved_trace_is_mapped(saved):
    folder, _ = saved
    for layer, path in zip(esparse.Trace.load(folder).layers, sorted(folder.glob("*.safetensors")), strict=True):
        assert {file_of(tensor) for tensor in layer.tensors().values()} == {str(path)}


def test_a_layer_of_a_large_trace_is_read_when_it_is_looked_at(large):
    async def first() -> None:
        board = widgets.Dashboard(Explorer({"one": large[0]}))
        read = board.explorer.grid._layer.cache_info  # of Gram matrices
        assert board.explorer.missing(board.choice) == [1, 2] and read().misses == 1
        for control, value in ((board.r, 20), (board.layer, 2), (board.method, "random")):
            control.value = value
        assert read().misses == 1 and board.explorer.missing(board.choice) == [0, 1, 2]

    asyncio.run(first())


def test_a_large_trace_is_computed_while_the_kernel_is_idle(large):
    """A step waits for nothing but what it draws; in the end, all numbers and words are those of the whole grid."""
    folder, whole = large

    async def steps() -> None:
        board = widgets.Dashboard(Explorer({"one": folder}))
        for step in (lambda: None, lambda: setattr(board.r, "value", 21), lambda: setattr(board.method, "value", "random")):
            step()
            missing = board.explorer.missing(board.choice)
            assert missing and f"{3 - len(missing)} of 3 layers are computed" in board.message.value
            blank, end = figures(board), time.monotonic() + 60
            while board.message.value:
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            assert all(board.explorer.view(name, board.choice) == whole.view(name, board.choice) for name in VIEWS)
            assert board.explorer.describe(board.choice) == whole.describe(board.choice)
            assert all(figures(board)[name] != blank[name] for name in ("kept", "skipping", "trade_off"))
        board.layer.value = 1
        assert board.explorer.missing(board.choice) == [] and board.message.value == ""

    asyncio.run(steps())


def test_without_a_kernel_and_for_export_all_layers_of_a_large_trace_are_computed(large):
    folder, whole = large
    shown, choice = Explorer({"one": folder}), Choice(21, "greedy")
    assert shown.missing(choice) == [0, 1, 2] and shown.kept("one", choice) == [[], [], []]
    assert shown.plan("one", choice) == whole.plan("one", choice) and shown.missing(choice) == []
    assert shown.plan("one", choice).kept == esparse.search_experts(esparse.Trace.load(folder), 21, method="greedy").kept
    snapshot, expected = (one.snapshot(whole.default) for one in (Explorer({"one": folder}), whole))
    assert snapshot["views"] == expected["views"] and 0 < snapshot["frame"]["loss"] < 2 * expected["frame"]["loss"]
    board = widgets.Dashboard(Explorer({"one": folder}))
    board.method.value = "frequency"
    assert board.explorer.missing(board.choice) == [] and board.message.value == ""


def test_what_cannot_be_computed_is_told(large, monkeypatch):
    folder, _ = large

    async def steps() -> None:
        board = widgets.Dashboard(Explorer({"one": folder}))
        monkeypatch.setattr(grid, "_row", lambda *_: 1 / 0)
        end = time.monotonic() + 20
        while "ZeroDivisionError: division by zero" not in board.message.value:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    asyncio.run(steps())


@pytest.mark.slow
def test_what_opening_and_steps_take_is_measured(tmp_path):
    shape = {"num_hidden_layers": 2, "num_local_experts": 12, "hidden_size": 64, "intermediate_size": 32}
    printed = cost.bench_explorer(tmp_path / "explorer.json", shape, steps=3)
    found = json.loads((tmp_path / "explorer.json").read_text())
    assert "layers in them" in printed and found["opening"]["layers in them"] == 2  # so small a trace is computed whole
    names = [row["control"] for row in found["controls"]]
    assert names == ["r", "method", "residual", "layer", "share", "skip by", "one beta", "a beta for each layer"]
    assert all(0 < row["median"] <= row["p95"] <= row["p95 with the layer"] for row in found["controls"])
