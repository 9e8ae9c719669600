"""The GPU code paths on a CPU: the kernel in Triton's interpreter and through its compiler, the rest with torch's own."""

import subprocess
import sys
import warnings

import pytest
import torch

import esparse
from esparse import kernels
from esparse.moe import experts
from esparse.moe.layers import moe_layers
from esparse.tests.conftest import apart, assert_greedy, random_model, random_tokens
from esparse.tests.families import family_model

_INTERPRETED = """
import itertools, os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from esparse import kernels
generator, cases = torch.Generator().manual_seed(0), 0
counts = ([1, 0, 1, 0], [0, 0, 0, 0], [3, 0, 20, 1], [70, 5, 0, 130], [0, 0, 0, 17])
for dtype, transposed, counts in itertools.product((torch.float32, torch.float16), (True, False), counts):
    rows = torch.randn(sum(counts) + 3, 72, generator=generator).to(dtype)
    weight = torch.randn(4, 100, 72, generator=generator).to(dtype).mT
    weight = weight.contiguous() if transposed else weight
    found = kernels.launch(rows, weight, torch.tensor(counts).cumsum(0).int())
    of = torch.arange(4).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("rk,rkc->rc", rows[: len(of)].double(), weight.double()[of])
    scale = 1e-6 if dtype == torch.float32 else 1e-3
    assert torch.allclose(found[: len(of)].double(), expected, rtol=scale, atol=30 * scale), (dtype, transposed, counts)
    cases += 1
print("cases", cases)
"""

_COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from esparse import kernels
names = kernels._product.arg_names
for capability, dtype, rows in [(75, "fp16", 2), (80, "bf16", 2), (80, "bf16", 4096), (90, "bf16", 2), (90, "fp32", 4096)]:
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    sizes = kernels.blocking(rows, 8, 4096, kind)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"SIZE": 4096, **sizes}
    types = {name: "*" + dtype for name in ("x", "w", "out")} | {"ends": "*i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    made = triton.compile(ASTSource(kernels._product, signature, constants), GPUTarget("cuda", capability, 32), options)
    assert made.asm["cubin"] and made.metadata.shared <= (64 if capability == 75 else 99) * 1024, made.metadata.shared
    print("compiled", capability, dtype, rows)
"""


@pytest.mark.parametrize(("script", "said"), [(_INTERPRETED, "cases 20"), (_COMPILED, "compiled 90 fp32 4096")])
@pytest.mark.slow
def test_the_kernel_multiplies_rightly_and_compiles_for_gpus_from_the_t4_on(script, said):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and said in done.stdout, done.stderr[-2000:]


def test_there_is_a_block_for_every_row():
    """The grid is an upper bound: experts never fill more blocks of rows than it has."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        n, count = int(torch.randint(1, 65, (), generator=generator)), int(torch.randint(1, 3000, (), generator=generator))
        rows = kernels.blocking(count, n, 64, torch.bfloat16)["ROWS"]
        counts = torch.bincount(torch.randint(0, n, (count,), generator=generator), minlength=n)
        assert -(-counts // rows).sum() <= min(count, -(-count // rows) + n)


def test_a_gpu_the_kernel_does_not_run_on_is_told_of_once(monkeypatch):
    def launch(*_):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "_works", {})
    monkeypatch.setattr(kernels, "triton", object())
    with pytest.warns(
        UserWarning, match="does not run on cpu in torch.float32 .RuntimeError: no such device.: skipping is slower"
    ):
        assert not kernels.works(torch.device("cpu"), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.works(torch.device("cpu"), torch.float32)


class _Device:
    """Experts as if they lay on another device: what is chosen there depends on nothing else."""

    def __init__(self, kind: str, dtype: torch.dtype):
        self.down_proj = type("Weight", (), {"device": torch.device(kind), "dtype": dtype, "requires_grad": True})

    def parameters(self):
        return [torch.empty(4, 32, 24, dtype=torch.bfloat16)]


@pytest.mark.parametrize(
    ("kind", "dtype", "capability", "pairs", "works", "expected"),
    [
        ("cuda", torch.bfloat16, (9, 0), 2, True, kernels.launch),
        ("cuda", torch.bfloat16, (9, 0), 8192, True, experts.grouped_mm),
        ("cuda", torch.bfloat16, (9, 0), 2, False, experts.grouped_mm),
        ("cuda", torch.float32, (9, 0), 8192, True, kernels.launch),
        ("cuda", torch.bfloat16, (8, 0), 8192, True, kernels.launch),
        ("cuda", torch.float16, (7, 5), 2, True, kernels.launch),
        ("cuda", torch.float16, (7, 5), 2, False, None),
        ("mps", torch.float16, None, 2, False, None),
        ("cpu", torch.bfloat16, None, 2, False, experts.grouped_mm),
        ("cpu", torch.float64, None, 2, False, None),
    ],
)
def test_the_path_is_chosen_by_device_dtype_and_batch(monkeypatch, kind, dtype, capability, pairs, works, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(kernels, "works", lambda *_: works)
    with torch.no_grad():
        assert experts._product(_Device(kind, dtype), torch.empty(1), pairs, False) is expected


KINDS = ["mixtral", "olmoe", "gpt_oss", "deepseek_v3", "phimoe", "minimax_m2"]


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_skipping_compiles_in_one_graph_for_every_kind_of_router(family):
    """fullgraph: a wait for the host or a shape that depends on the data would break the graph and raise."""
    model, tokens = family_model(family), random_tokens()
    betas = esparse.median_betas(esparse.trace(model, tokens))
    with esparse.skipping(model, betas):
        block = moe_layers(model)[0]
        x = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        expected = block.block(x)
        torch._dynamo.reset()
        found = torch.compile(block.block, fullgraph=True, backend="aot_eager")(x)
    for mine, theirs in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True):
        assert apart(mine, theirs) < 1e-5


@torch.no_grad()
def test_generation_with_static_caches_and_compiled_gives_the_same_tokens(tiny):
    import transformers

    model, tokenizer = tiny
    ids = tokenizer("The town of", return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "do_sample": False}
    torch._dynamo.reset()
    with esparse.skipping(model, [0.5] * 6):
        for kind in ("dynamic", "static"):
            assert_greedy(model, model.generate(ids, **options, cache_implementation=kind), ids.shape[1])
        config = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True  # generate compiles on GPUs alone, unless told
        compiled = model.generate(ids, **options, cache_implementation="static", compile_config=config)
        del model._compiled_call
        assert_greedy(model, compiled, ids.shape[1])


class _Uncomputed(torch.autograd.Function):
    """A grouped product whose rows behind the last end, and their gradients, hold what was in memory."""

    @staticmethod
    def forward(ctx, rows, weight, ends):
        ctx.save_for_backward(rows, weight, ends)
        out = experts.grouped_mm(rows, weight, ends)
        out[ends[-1] :] = 1e3
        return out

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, ends = ctx.saved_tensors
        with torch.enable_grad():
            rows, weight = rows.detach().requires_grad_(), weight.detach().requires_grad_()
            out = experts.grouped_mm(rows, weight, ends)
        left, right = torch.autograd.grad(out, (rows, weight), gradient)
        left[ends[-1] :] = 1e3
        return left, right, None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_pass_a_grouped_product_with_dropped_pairs(family):
    """Rows that are not computed hold whatever was in memory; no gradient may come from them, biases included."""
    layer, x = moe_layers(family_model(family))[0].experts, torch.randn(9, 32, requires_grad=True)
    expert = torch.randint(0, 8, (9, 2), generator=torch.Generator().manual_seed(0))
    expert[::2, 1] = 8
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad(experts._grouped(layer, x, expert, _Uncomputed.apply).square().sum(), wanted)
    expected = torch.autograd.grad(experts._one_after_another(layer, x, expert, None).square().sum(), wanted)
    for one, other in zip(ours, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_frozen_experts_hand_gradients_on():
    """What is trained may lie elsewhere: then no operator without a gradient may run them."""
    layer, x = moe_layers(family_model("mixtral"))[0].experts, torch.randn(9, 32, requires_grad=True)
    layer.requires_grad_(False)
    expert = torch.randint(0, 8, (9, 2), generator=torch.Generator().manual_seed(0))
    assert torch.autograd.grad(experts.pair_outputs(layer, x, expert).sum(), x)[0].abs().sum() > 0


def test_odd_widths_run_too():
    """torch's grouped product refuses rows that are no multiple of 16 bytes."""
    layer = moe_layers(random_model("mixtral", 4, 2, dtype=torch.float32))[0].experts
    layer.gate_up_proj, layer.down_proj = torch.nn.Parameter(torch.randn(4, 12, 32)), torch.nn.Parameter(torch.randn(4, 32, 6))
    expert = torch.randint(0, 4, (9, 2), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = torch.randn(9, 32)
        assert torch.equal(experts.pair_outputs(layer, x, expert), experts._one_after_another(layer, x, expert, None))


@torch.no_grad()
def test_other_betas_need_no_other_graph():
    model, graphs = family_model("mixtral"), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    block, x = moe_layers(model)[0].block, torch.randn(2, 5, model.config.hidden_size)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for beta in (0.0, 0.4, 0.9):
        with esparse.skipping(model, [beta] * 3):
            assert apart(compiled(x), block(x)) < 1e-5
    assert len(graphs) == 1
