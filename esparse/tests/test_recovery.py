"""Recovery, compared with independent computations: least squares, brute force, gradients of the loss written out."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch

import esparse
from esparse import __main__, recovery
from esparse.files import data_folder
from esparse.moe.layers import moe_layers
from esparse.moe.masking import masked_layer
from esparse.pruning import weights
from esparse.tests.conftest import block_input, random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tracing.trace import Trace

TOKENS = random_tokens()
OTHER = random_tokens(seed=5)


def pruned_to(model, r: int, method: str = "enumerate"):
    """A copy of a model pruned to r experts, its trace and its plan."""
    trace = esparse.trace(model, TOKENS, keep=r)
    plan = esparse.search_experts(trace, r, method=method)
    return esparse.prune(copy.deepcopy(model), plan), trace, plan


@pytest.mark.parametrize(("family", "n", "k", "r"), [("mixtral", 8, 2, 5), ("qwen3", 6, 3, 4), ("olmoe", 8, 2, 4)])
@torch.no_grad()
def test_scales_are_the_least_squares_solution(family, n, k, r):
    """Against lstsq on the experts' outputs themselves, [tokens * d, r]."""
    model = random_model(family, n, k)
    trace = esparse.trace(model, TOKENS, keep=r)
    layer, kept = moe_layers(model)[1], list(range(r))
    x = block_input(model, 1, TOKENS)
    target, columns = layer.block(x), []
    with masked_layer(layer, kept):
        for expert in kept:
            others = layer.experts.down_proj.clone()
            layer.experts.down_proj.zero_()
            layer.experts.down_proj[expert] = others[expert]
            columns.append(layer.block(x).flatten())
            layer.experts.down_proj.copy_(others)
    expected = torch.linalg.lstsq(torch.stack(columns, 1), target.flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(esparse.expert_scales(trace.layers[1], kept), expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_scaled_experts_come_nearer_and_an_unused_one_stays():
    model = random_model("mixtral", 8, 2)
    pruned, trace, plan = pruned_to(model, 5)
    x = block_input(model, 0, TOKENS)
    target, before = moe_layers(model)[0].block(x), moe_layers(pruned)[0].block(x)
    scales = esparse.scale_experts(pruned, trace, plan)
    after = moe_layers(pruned)[0].block(x)
    loss = esparse.reconstruction_loss(trace.layers[0], plan.kept[0])
    assert (after - target).norm() < (before - target).norm() == pytest.approx(loss, rel=1e-6)
    assert all(len(layer) == 5 for layer in scales)
    few = esparse.trace(model, TOKENS[:1, :2], keep=5).layers[0]  # two tokens cannot use five experts
    found = esparse.expert_scales(few, plan.kept[0])
    used = set(few.order.gather(1, few.routing(plan.kept[0])[0]).flatten().tolist())
    for scale, expert in zip(found.tolist(), plan.kept[0], strict=True):
        assert expert in used or scale == pytest.approx(1)


@torch.no_grad()
def test_scales_reach_biases_too():
    model = family_model("gpt_oss")
    pruned, trace, plan = pruned_to(model, 5)
    before = copy.deepcopy(moe_layers(pruned)[1].experts)
    scales = torch.tensor(esparse.scale_experts(pruned, trace, plan)[1])
    after = moe_layers(pruned)[1].experts
    torch.testing.assert_close(after.down_proj_bias, before.down_proj_bias * scales[:, None])
    torch.testing.assert_close(after.down_proj, before.down_proj * scales[:, None, None])


def test_scales_refuse_what_does_not_belong_together():
    model = random_model("mixtral", 8, 2)
    pruned, trace, plan = pruned_to(model, 5)
    with pytest.raises(ValueError, match="not pruned to this plan: its layers must have 5 experts"):
        esparse.scale_experts(model, trace, plan)
    with pytest.raises(ValueError, match="made with another model"):
        esparse.scale_experts(pruned, Trace(trace.layers, "another", trace.tokens), plan)


def plain_differences(student, teacher, kept, tokens) -> list[list[float]]:
    """Mean squared differences of experts' outputs, expert by expert and token by token."""
    found = []
    for mine, theirs, keep in zip(moe_layers(student), moe_layers(teacher), kept, strict=True):
        inputs = []
        for model, layer in ((student, mine), (teacher, theirs)):
            seen = []
            hook = layer.experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
            with torch.no_grad():
                model(tokens)
            hook.remove()
            inputs.append(seen[0])
        row = []
        for place, expert in enumerate(keep):
            values = []
            for token in range(tokens.numel()):
                if expert in inputs[1][1][token]:
                    outputs = [
                        layer.experts(x[0][token : token + 1], torch.full((1, 1), number), torch.ones(1, 1, dtype=x[0].dtype))
                        for layer, x, number in ((mine, inputs[0], place), (theirs, inputs[1], expert))
                    ]
                    values.append((outputs[0] - outputs[1]).square().mean().item())
            row.append(sum(values) / len(values) if values else 0.0)
        found.append(row)
    return found


@pytest.mark.slow
def test_expert_differences_are_those_of_every_token_by_itself():
    teacher = random_model("mixtral", 6, 2)
    student, _, plan = pruned_to(teacher, 4)
    with (
        torch.no_grad(),
        recovery.capture_expert_inputs(moe_layers(student)) as now,
        recovery.capture_expert_inputs(moe_layers(teacher)) as before,
    ):
        student(OTHER)
        teacher(OTHER)
    expected = plain_differences(student, teacher, plan.kept, OTHER)
    with torch.no_grad():
        for i, pair in enumerate(zip(moe_layers(student), moe_layers(teacher), strict=True)):
            found = recovery.expert_differences(*pair, now[i], before[i], plan.kept[i])
            torch.testing.assert_close(found.double(), torch.tensor(expected[i], dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert sum(expected[0]) < 1e-9 * sum(expected[1])  # the first layer hears the same; later ones do not


def test_lambda_makes_both_losses_alike_in_the_first_batch():
    teacher = family_model("mixtral")
    student, _, plan = pruned_to(teacher, 5)
    measure = recovery._ExpertsLoss(student, teacher, plan)
    inputs = {"input_ids": OTHER, "labels": OTHER}
    loss, cross_entropy = measure(student, inputs), student(**inputs).loss.item()
    assert loss.item() == pytest.approx(2 * cross_entropy, rel=1e-5)
    apart = sum(itertools.chain(*plain_differences(student, teacher, plan.kept, OTHER)))
    assert measure.balance == pytest.approx(cross_entropy / apart, rel=1e-3)
    loss.backward()
    assert all(layer.experts.down_proj.grad.abs().sum() > 0 for layer in moe_layers(student))


def agreement(student, teacher) -> float:
    expected = teacher(OTHER).logits.log_softmax(-1)
    return recovery.kl(expected, student(OTHER).logits).item() / OTHER.numel()


@pytest.mark.parametrize("method", recovery.TRAINED_METHODS)
def test_every_method_trains_what_it_says_and_keeps_zeros(method):
    teacher = family_model("mixtral")
    student, _, plan = pruned_to(teacher, 5)
    weights.prune_weights(student, TOKENS, 0.5)
    present, before = weights.zeros(student), copy.deepcopy(student.state_dict())
    with torch.no_grad():
        first = agreement(student, teacher)
    options = {"teacher": teacher, "plan": plan, "steps": 30, "learning_rate": 3e-3, "batch_size": 2}
    report = esparse.recover(student, OTHER, method, **options)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    gates = {name for name in before if name.endswith("gate.weight")}
    assert changed == gates if method == "router" else changed > gates
    assert report["trained"] == sum(p.numel() for n, p in student.named_parameters() if n in changed or method != "router")
    assert len(report["losses"]) == 30 and report["losses"][-1] < report["losses"][0]
    assert all((parameter[~mask] == 0).all() for parameter, mask in present.items()) and present
    assert not student.training and all(p.requires_grad and p.grad is None for p in student.parameters())
    assert (report["balance"] is not None) == (method == "experts")
    if method == "router":
        with torch.no_grad():
            assert agreement(student, teacher) < first


def test_the_same_seed_trains_the_same_model_by_either_name_of_the_keyword():
    runs = []
    for keyword in ("method", "rung"):
        student, _, _ = pruned_to(family_model("mixtral"), 5)
        runs.append(esparse.recover(student, TOKENS, **{keyword: "tune"}, steps=5, batch_size=2)["losses"])
    assert runs[0] == runs[1]


def test_plain_tuning_is_adamw_on_the_cross_entropy():
    """The first loss is the model's own on the batch that the seed draws; all batches together hold all rows."""
    student = family_model("mixtral")
    report = esparse.recover(copy.deepcopy(student), TOKENS, "tune", steps=1, batch_size=4)
    with torch.no_grad():
        assert report["losses"][0] == pytest.approx(student(TOKENS, labels=TOKENS).loss.item(), rel=1e-4)


def plan_like(layers: int) -> esparse.PruningPlan:
    return esparse.PruningPlan("enumerate", 5, [[3, 4, 5, 6, 7]] * layers, [0.0] * layers, "another", "tokens")


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("lora", {}, "Unknown method 'lora': choose from router, experts, tune"),
        ("experts", {"teacher": None}, "learns from the full model: give it as teacher="),
        ("experts", {"plan": None}, "has 5 experts, the teacher 8: give the pruning plan"),
        ("router", {"teacher": family_model("mixtral", num_hidden_layers=2)}, "the teacher has 2 MoE layers, the student 3"),
        ("experts", {"teacher": family_model("mixtral", intermediate_size=16)}, "are of another shape than the teacher's"),
        ("experts", {"teacher": family_model("mixtral", 4)}, "the teacher 4, and the plan keeps 5"),
        ("experts", {"plan": plan_like(layers=2)}, "plan is for 2 MoE layers, the models have 3"),
        ("experts", {"plan": plan_like(layers=4)}, "plan is for 4 MoE layers, the models have 3"),
        ("experts", {"plan": plan_like(layers=3)}, "plan was made with another model"),
        ("router", {"teacher": family_model("mixtral", vocab_size=70)}, "another vocabulary"),
        ("experts", {"teacher": family_model("mixtral", vocab_size=50)}, "another vocabulary"),
    ],
)
def test_models_that_do_not_match_are_refused(method, change, message):
    teacher = family_model("mixtral")
    student, _, plan = pruned_to(teacher, 5)
    plan.kept[0] = [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match=message):
        esparse.recover(student, TOKENS, method, **{"teacher": teacher, "plan": plan} | change)


def test_equal_experts_have_nothing_to_teach():
    teacher = family_model("mixtral")
    with pytest.raises(ValueError, match="there is nothing to distil"):
        esparse.recover(copy.deepcopy(teacher), TOKENS, "experts", teacher=teacher, steps=1)


@pytest.mark.parametrize(("method", "rounding"), [("tune", 1e-3), ("experts", 0.2)])  # an expert's mean is over a process
@pytest.mark.slow
def test_two_processes_train_what_one_does(method, rounding, tiny, tiny_trace, tmp_path):
    """Two processes with two sequences each take the step that one with all four takes."""
    plan = esparse.search_experts(tiny_trace, 6)
    pruned = esparse.prune(copy.deepcopy(tiny[0]), plan)
    before = copy.deepcopy(pruned)
    esparse.save_model(pruned, tiny[1], tmp_path / "pruned", plan)
    words = ["-m", "esparse", "recover", str(tmp_path / "pruned"), str(tmp_path / "tuned"), "--method", method]
    words += ["--teacher", "tiny", "--plan", str(tmp_path / "pruned" / "plan.json"), "--corpus", "arithmetic"]
    words += ["--sequences", "4", "--length", "64", "--steps", "1", "--batch-size", "2"]
    words += ["--learning-rate", "1e-3", "--dtype", "float32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    own = os.environ | {"TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert done.returncode == 0 and "parameters trained" in done.stdout, done.stderr[-3000:]
    found = esparse.load_model(str(tmp_path / "tuned"))[0]
    tokens = esparse.calibration_tokens("arithmetic", tiny[1], sequences=4, length=64)
    options = {"teacher": tiny[0], "plan": plan, "steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    esparse.recover(pruned, tokens, method, **options)
    moved = apart = 0.0
    for one, other, start in zip(found.parameters(), pruned.parameters(), before.parameters(), strict=True):
        apart, moved = apart + (one - other).square().sum().item(), moved + (other - start).square().sum().item()
    assert apart < rounding * moved


_SHARDS = """
import torch
from torch.distributed.fsdp import fully_shard
import esparse
from esparse import recovery
from esparse.pruning import weights
torch.distributed.init_process_group("gloo")
model, _ = esparse.load_model()
assert recovery.gathered(model) is None
with torch.no_grad():
    model.model.layers[0].mlp.experts.down_proj[0, :, ::2] = 0  # in the first process' shard alone
expected = {name: tensor + 1 for name, tensor in model.state_dict().items()}
expected["model.layers.0.mlp.experts.down_proj"][0, :, ::2] = 0
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
present = weights.zeros(model)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
weights.restore_zeros(model, present)
state = recovery.gathered(model)
if torch.distributed.get_rank() == 0:
    assert expected.keys() - state.keys() == {"lm_head.weight"}  # tied to the embeddings
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    whole = esparse.load_model()[0]
    whole.load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.state_dict().items())
    print("whole again")
torch.distributed.destroy_process_group()
"""


def test_shards_are_gathered_and_their_zeros_stay(tmp_path):
    (tmp_path / "shards.py").write_text(_SHARDS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "shards.py"]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert done.returncode == 0 and "whole again" in done.stdout, done.stderr[-3000:]


def test_the_papers_setting_is_one_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(data_folder() / "fsdp.yaml"))
    assert read.distributed_type == "FSDP" and read.fsdp_config["fsdp_version"] == 2
    asked = __main__._parser().parse_args(["recover", "pruned", "recovered"])
    assert (asked.steps, asked.learning_rate) == (recovery.PAPER["steps"], recovery.PAPER["learning_rate"]) == (900, 2e-5)
    assert (asked.corpus, recovery.PAPER["schedule"]) == ("metamath", "cosine")
    for option in ("--method", "--rung"):
        assert __main__._parser().parse_args(["recover", "pruned", "recovered", option, "router"]).method == "router"


def test_a_teacher_under_fsdp_is_refused_before_anything_is_trained(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    student, tokens = copy.deepcopy(tiny[0]), torch.full((2, 16), 5)
    for method in ("experts", "router"):
        with pytest.raises(ValueError, match="no process holds a whole teacher"):
            esparse.recover(student, tokens, method, teacher=tiny[0], steps=1)
    with pytest.raises(ValueError, match="second version alone: launch with --fsdp_version 2"):
        esparse.recover(student, tokens, "tune", steps=1)


def test_half_precision_learns_as_float32_does(tiny):
    """At the paper's learning rate most steps are smaller than bfloat16 can hold: the result is float32's, rounded once."""
    tokens, trained = torch.randint(5, 900, (8, 32), generator=torch.Generator().manual_seed(0)), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(tiny[0]).to(torch.bfloat16).to(dtype)
        before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        esparse.recover(model, tokens, "tune", steps=4, learning_rate=1e-4)
        assert all(p.dtype == dtype for p in model.parameters())
        trained[dtype] = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    moved = sum((trained[torch.bfloat16][name] != before[name]).sum().item() for name in before)
    same = sum((trained[torch.bfloat16][name] == trained[torch.float32][name]).sum().item() for name in before)
    total = sum(p.numel() for p in before.values())
    assert moved > 0.1 * total and same > 0.99 * total


def test_what_balances_the_load_is_not_trained(tiny):
    model = copy.deepcopy(tiny[0])
    fixed = model.model.layers[0].mlp.gate.weight.requires_grad_(False)
    before = fixed.detach().clone()
    found = esparse.recover(model, torch.full((2, 16), 5), "router", teacher=tiny[0], steps=1, learning_rate=1e-2)
    assert torch.equal(fixed, before) and found["trained"] == 5 * 8 * 128
