"""Shared fixtures: small random models of three families, the embedded model, and one run of everything slow.

Most grids run on a sample that has each kind once. Their other cases are marked `exhaustive` and run with `--exhaustive`.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes with threads of their own would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

import esparse
from esparse.__main__ import main
from esparse.files import checkout, made_once
from esparse.moe.layers import moe_layers
from esparse.tests.families import COMPOSITES, NEWER

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def random_model(family: str, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64, **changed):
    """A small model whose experts and routing differ enough for subsets to matter; eager experts, as float64 needs."""
    torch.manual_seed(seed)
    shape = SHAPE | changed
    if family == "mixtral":
        config = transformers.MixtralConfig(**shape, num_local_experts=n, num_experts_per_tok=k)
    elif family == "qwen3":
        own = {"num_experts": n, "num_experts_per_tok": k, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 8}
        config = transformers.Qwen3MoeConfig(**shape, **own)
    else:
        config = transformers.OlmoeConfig(**shape, num_experts=n, num_experts_per_tok=k, norm_topk_prob=False)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for layer in moe_layers(model):
        torch.nn.init.normal_(layer.gate.weight, std=0.5)
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model = model.to(dtype)
    model.set_experts_implementation("eager")
    return model


def random_tokens(sequences: int = 4, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (sequences, length), generator=torch.Generator().manual_seed(seed))


def block_input(model, number: int, tokens: torch.Tensor) -> torch.Tensor:
    """The hidden states that enter one MoE block."""
    seen = []
    hook = moe_layers(model)[number].block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest value of the second: rounding is such a share."""
    return ((one - other).abs().max() / other.abs().max()).item()


def assert_greedy(model, generated: torch.Tensor, prompt: int) -> None:
    """Each token behind the prompt is the likeliest after those before it, without a cache, up to what rounding decides."""
    logits = model(generated[:, :-1]).logits[:, prompt - 1 :]
    taken = logits.gather(2, generated[:, prompt:, None])
    assert generated.shape[1] > prompt and apart(taken[..., 0], logits.amax(2)) < 1e-5


@pytest.fixture(scope="session")
def tiny():
    """The embedded model and its tokenizer; tests leave it as they found it."""
    return esparse.load_model()


@pytest.fixture(scope="session")
def tiny_tokens(tiny):
    return esparse.calibration_tokens("web", tiny[1], sequences=16, length=128)


@pytest.fixture(scope="session")
def tiny_trace(tiny, tiny_tokens):
    return esparse.trace(tiny[0], tiny_tokens, keep=4)


_RELOADER = """
import sys, torch, transformers
from safetensors.torch import save_file
transformers.logging.set_verbosity_error()
for line in sys.stdin:
    folder = line.strip()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("eager")
    tokens = torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        save_file({"logits": model(tokens, use_cache=False).logits.contiguous()}, folder + "/logits.safetensors")
    assert not any(name.startswith("esparse") for name in sys.modules)
    print("done", flush=True)
"""


@pytest.fixture(scope="session")
def reloaded():
    """Logits of a saved folder as stock transformers computes them, in a process that never imports esparse."""
    process = subprocess.Popen([sys.executable, "-c", _RELOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def logits(folder) -> torch.Tensor:
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        while (line := process.stdout.readline()).strip() != "done":
            assert line, f"{folder} did not reload"
        return load_file(folder / "logits.safetensors")["logits"]

    yield logits
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="session")
def tiny_scores(tiny):
    """The offline suite on the embedded model, 100 items a task, and the seconds that this took."""
    started = time.perf_counter()
    return esparse.evaluate(*tiny, "tiny", limit=100), time.perf_counter() - started


def command(*words, **options):
    """`python -m esparse ...` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "esparse", *words], capture_output=True, text=True, cwd=checkout(), **options)


@pytest.fixture
def call(capsys, monkeypatch):
    """The same in this process, which has imported all that it needs: exit status, standard output and standard error."""

    def called(*words) -> subprocess.CompletedProcess:
        capsys.readouterr()
        status = main([*map(str, words)])
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())

    monkeypatch.chdir(checkout())
    return called


LIMIT = 10  # items a task where all notebooks run, of one task of either kind: multiple choice and generation
FEW = ("--set", f"LIMIT={LIMIT}", "--set", "TASKS=['web_facts', 'arithmetic_problems']")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Every notebook, run once with few items a task, for all workers: the run folder, and what was printed."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def run(printed: Path) -> None:
        result = command("notebooks", *FEW, "--run-dir", str(base / "finished"))
        assert result.returncode == 0, result.stdout + result.stderr
        printed.write_text(result.stdout)

    return base / "finished", made_once(base / "finished.txt", run).read_text()


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run every case of the grids that otherwise run on a sample")


EXHAUSTIVE = pytest.mark.exhaustive


def sampled(cases: Iterable, sample: Collection) -> list:
    """The cases of a parametrised grid; those that are not in the sample run with `--exhaustive` alone."""
    cases = list(cases)
    assert all(case in cases for case in sample)
    further = lambda case: pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=EXHAUSTIVE)  # noqa: E731
    return [case if case in sample else further(case) for case in cases]


def pytest_collection_modifyitems(config, items):
    """Without --exhaustive the cases beyond the samples are left out; with an older transformers, families it lacks. pytest
    counts both as deselected."""
    if not config.getoption("--exhaustive"):
        further = {item for item in items if item.get_closest_marker("exhaustive")}
        config.hook.pytest_deselected(items=list(further))
        items[:] = [item for item in items if item not in further]
    unknown = {name for name, since in NEWER.items() if Version(transformers.__version__) < Version(since)}
    unknown |= {name for name, (_, text, _) in COMPOSITES.items() if text in unknown}
    # Each worker begins with a share of this list, and takes from others' ends when it has none left. So the first runs the
    # notebooks meanwhile, and nothing that waits to be alone waits for them.
    first = {(True, False): 0, (False, True): 1, (True, True): 2, (False, False): 3}
    items.sort(key=lambda item: first[bool(item.get_closest_marker("alone")), "finished" in item.fixturenames])
    named = {item: set(map(str, item.callspec.params.values())) if hasattr(item, "callspec") else set() for item in items}
    lacking = [item for item in items if named[item] & unknown]
    config.hook.pytest_deselected(items=lacking)
    items[:] = [item for item in items if item not in lacking]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """A test marked `alone` waits until the other workers' tests have ended, and theirs wait for it."""
    folder, kind = checkout() / ".runs", fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    folder.mkdir(exist_ok=True)
    with (folder / "turn.lock").open("w") as turn, (folder / "running.lock").open("w") as running:
        fcntl.flock(turn, fcntl.LOCK_EX)  # held while waiting: until an `alone` test has run, no other begins
        fcntl.flock(running, kind)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Fixtures may ask their test whether it failed."""
    report = (yield).get_result()
    item.failed = getattr(item, "failed", False) or report.failed


@pytest.fixture
def impatient(monkeypatch):
    """The hub is asked again as often as ever, without the half minute of waiting in between."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
