"""A run: one model, two corpora, one folder in which traces, scores and figures are made once and shared by notebooks."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .checkpoints import load_model, load_tokenizer
from .corpora import calibration_tokens
from .evaluation import evaluate, perplexity, task_names, task_version
from .files import checkout, digest, read_json, write_json
from .models import fingerprint, free_memory, moe_layers
from .preflight import preflight
from .pruning import PruningPlan, masked
from .search import search_experts
from .shards import Source, expert_counts, fetch, read_config
from .skips import skipping
from .streaming import prune_weights_checkpoint, trace_checkpoint
from .traces import FORMAT, Trace, tokens_digest, trace
from .training import PRESETS

if TYPE_CHECKING:  # tables and figures load what they need when they are asked for: a GPU machine may lack it
    import pandas as pd

    from .explorer import Explorer

LABELS = {"web": "web (synthetic)", "arithmetic": "arithmetic (synthetic)", "c4": "C4", "math": "MATH", "gsm8k": "GSM8K"}
# The split a corpus is held out by, where it has one.
HELD_OUT = {"web": "heldout", "arithmetic": "heldout", "c4": "validation", "math": "test", "gsm8k": "test"}


@dataclass
class Run:
    """The notebooks' parameters, by the same names in lower case, and what is computed from them.

    None takes the default that fits the model: for the tiny ones the synthetic corpora, 64 sequences of 256 tokens
    and the embedded tasks, 100 items each; for others C4, MATH, 128 sequences of 2048 and the paper's eight tasks. An empty
    list of tasks asks none.
    """

    model_name: str = "tiny"
    revision: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    general: str | None = None
    domain: str | None = None
    sequences: int | None = None
    length: int | None = None
    seed: int = 42
    keep: Sequence[int] | None = None
    method: str = "enumerate"
    tasks: Sequence[str] | None = None
    limit: int | None = None
    folder: str | Path | None = None
    batch_size: int | None = None  # items of a task at once: 64 for the tiny models, 8 for others

    def __post_init__(self):
        tiny = self.model_name in PRESETS
        self.general = self.general or ("web" if tiny else "c4")
        self.domain = self.domain or ("arithmetic" if tiny else "math")
        self.sequences = self.sequences or (64 if tiny else 128)
        self.length = self.length or (256 if tiny else 2048)
        self.tasks = tuple(task_names(("tiny" if tiny else "paper") if self.tasks is None else self.tasks))
        self.limit = self.limit or (100 if tiny else None)
        self.batch_size = self.batch_size or (64 if tiny else 8)
        self.folder = Path(self.folder) if self.folder else default_folder(self.model_name)

    @cached_property
    def _loaded(self):
        device_map = self.device_map or ("auto" if self.streamed else None)
        # Of several processes with a GPU each, this one's holds the whole model.
        mine = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None
        device = None if device_map else mine
        return load_model(self.model_name, dtype=self.dtype, device=device, device_map=device_map, revision=self.revision)

    @cached_property
    def source(self) -> Path:
        """The folder of the model's checkpoint, downloaded where it comes from the hub. Raises ValueError for the presets
        that are made in memory."""
        if self.model_name in PRESETS and self.model_name != "tiny":
            raise ValueError(f"{self.model_name} is in no folder: write it with save_model, and give the folder as MODEL.")
        return fetch(self.model_name, self.revision)

    @cached_property
    def streamed(self) -> bool:
        """Whether the model is larger than what is free here: it is then traced layer by layer from disk, and evaluated
        with what does not fit left there."""
        if self.model_name in PRESETS:
            return False
        return sum(path.stat().st_size for path in self.source.glob("*.safetensors")) > 0.8 * free_memory()

    def preflight(self) -> "pd.Series":
        """What tracing and pruning this model takes, before anything is read: see `preflight.preflight`."""
        import pandas as pd

        if self.model_name in PRESETS:
            return pd.Series({"access": "ships with the package", "download": "nothing"}, name="preflight")
        dtype = self.dtype and getattr(torch, self.dtype)
        options = {"sequences": self.sequences, "length": self.length, "dtype": dtype, "revision": self.revision}
        r = min(self.keep) if self.keep else None
        return pd.Series(preflight(self.model_name, r, destination=self.folder, **options), name="preflight")

    @property
    def model(self):
        return self._loaded[0]

    @cached_property
    def tokenizer(self):
        return load_tokenizer(str(self.source)) if self.streamed else self._loaded[1]

    @cached_property
    def model_key(self) -> str:
        return digest(self.model_name, self.revision, self.dtype, self._fingerprint)

    @property
    def _fingerprint(self) -> str | list:
        """What tells this model from others in the same place: its routers alone would not tell one with pruned weights."""
        if self.model_name in PRESETS:
            return fingerprint(self.model)
        files = sorted(path for path in self.source.iterdir() if path.suffix in (".safetensors", ".json"))
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]

    @cached_property
    def _experts(self) -> tuple[int, int]:
        """How many there are, and how many a token is routed to."""
        if self.streamed:
            return expert_counts(Source(self.source).config)
        layer = moe_layers(self.model)[0]
        return layer.n, layer.k

    @cached_property
    def sizes(self) -> list[int]:
        """The numbers of experts to keep, falling: KEEP, or 7, 6, 5 and 4 eighths of them."""
        n, k = self._experts
        return sorted({max(k, r) for r in self.keep or [n * part // 8 for part in (7, 6, 5, 4)]}, reverse=True)

    def tokens(self, corpus: str, *, sequences: int | None = None, seed: int | None = None) -> torch.Tensor:
        """The calibration set of a corpus, [sequences, length]; of a file without its documents held out."""
        names = "+".join(f"{name}/rest" if _is_file(name) else name for name in corpus.split("+"))
        drawn = (names, sequences or self.sequences, self.length, self.seed if seed is None else seed)
        if drawn not in self._drawn:
            options = dict(zip(("sequences", "length", "seed"), drawn[1:], strict=True))
            self._drawn[drawn] = calibration_tokens(names, self.tokenizer, **options)
        return self._drawn[drawn]

    @cached_property
    def _drawn(self) -> dict[tuple, torch.Tensor]:
        """Calibration sets by what they were drawn by: putting one together takes longer than most of what is asked of it."""
        return {}

    def held_out(self, corpus: str) -> torch.Tensor:
        """As many sequences again that no calibration set holds: of the other split, or of a file every fifth document."""
        split = HELD_OUT.get(corpus) or ("heldout" if _is_file(corpus) else None)
        return self.tokens(f"{corpus}/{split}" if split else corpus, seed=self.seed + 1)

    def trace(self, corpus: str, *, tokens: torch.Tensor | None = None) -> Trace:
        """The trace of the full model on a corpus, down to the smallest size asked for; made once, then read."""
        tokens = self.tokens(corpus) if tokens is None else tokens
        keep = min(self.sizes)
        key = digest(FORMAT, self.model_key, tokens_digest(tokens), list(tokens.shape), self.seed, keep)
        folder = self.folder / "traces" / key
        if not folder.exists() and self.streamed:
            dtype = self.dtype and getattr(torch, self.dtype)
            device = "cuda" if torch.cuda.is_available() else None
            trace_checkpoint(self.source, tokens, folder, keep=keep, dtype=dtype, device=device)
        elif not folder.exists():
            trace(self.model, tokens, keep=keep).save(folder)
        return Trace.load(folder)

    def explorer(self) -> "Explorer":
        """Both corpora's traces for `widgets.explorer`, with everything on its grid computed once. What a choice would mean
        is told for this model if it is a Mixtral that does not ship, else for Mixtral 8x7B."""
        from .explorer import MIXTRAL, Explorer

        traces = {self.label(corpus): self.trace(corpus) for corpus in (self.general, self.domain)}
        config = {} if self.model_name in PRESETS else read_config(self.source).to_dict()
        own = {key: config.get(key) for key in (*MIXTRAL, "head_dim")} | {"name": self.model_name}
        shape = own if config.get("model_type") == "mixtral" else MIXTRAL
        return Explorer(traces, self.folder / "explorer", self.model_name, shape)

    def plan(self, corpus: str, r: int, method: str | None = None, *, seed: int | None = None) -> PruningPlan:
        """The experts to keep, by METHOD unless another is named, calibrated on a corpus; made once, then read."""
        method, seed = method or self.method, self.seed if seed is None else seed
        tokens = self.tokens(corpus)
        key = digest(self.model_key, tokens_digest(tokens), r, method, seed, min(self.sizes))
        path = self.folder / "plans" / f"{key}.json"
        if not path.exists():
            model = self.model if method == "progressive" else None
            search_experts(self.trace(corpus), r, method=method, model=model, tokens=tokens, seed=seed).save(path)
        return PruningPlan.load(path)

    def scores(self, plan: PruningPlan | None = None, betas: Sequence[float] | None = None) -> "pd.DataFrame":
        """TASKS on the model, masked to a plan and skipping with betas where given; see `evaluation.evaluate`. Each task is
        kept by itself, and what was interrupted goes on with the next; up to a hundred items each are asked all at once."""
        import pandas as pd

        if not self.tasks:
            raise ValueError("No tasks are asked: give at least one as TASKS, or None for those that fit the model.")
        key = (self.model_key, plan and plan.kept, betas)
        paths = {task: self._path(*key, ["score", task, task_version(task), self.limit]) for task in self.tasks}
        missing = [task for task in self.tasks if not paths[task].exists()]
        few = self.limit and self.limit <= 100  # of each: all tasks at once
        parts = [missing] if few and missing else [[task] for task in missing]
        for some in tqdm(parts, desc="tasks", leave=False):
            with self._inside(plan, betas):
                table = evaluate(self.model, self.tokenizer, some, limit=self.limit, batch_size=self.batch_size)
            for row in json.loads(table.reset_index().to_json(orient="records", double_precision=15)):
                write_json(paths[row["task"]], row)
        return pd.DataFrame([read_json(paths[task], "result") for task in self.tasks]).set_index("task")

    def perplexity(self, corpus: str, plan: PruningPlan | None = None, betas: Sequence[float] | None = None) -> float:
        """Perplexity on the held-out tokens of a corpus."""
        tokens = self.held_out(corpus)
        return self.as_if(plan, betas, ["perplexity", tokens_digest(tokens)], lambda: perplexity(self.model, tokens))

    def as_if(self, plan: PruningPlan | None, betas: Sequence[float] | None, what: list, compute: Callable[[], Any]) -> Any:
        """What `compute` finds on the model as if pruned and skipping, made once, then read."""

        def inside():
            with self._inside(plan, betas):
                return compute()

        return self.once(inside, self.model_key, plan and plan.kept, betas, what)

    @contextmanager
    def _inside(self, plan: PruningPlan | None, betas: Sequence[float] | None) -> Iterator[None]:
        with ExitStack() as stack:
            if plan:
                stack.enter_context(masked(self.model, plan))
            if betas:
                stack.enter_context(skipping(self.model, betas))
            yield

    def once(self, compute: Callable[[], Any], *key: Any) -> Any:
        """A value that JSON can hold, computed the first time and read from the run folder ever after."""
        path = self._path(*key)
        if not path.exists():
            write_json(path, compute())
        return read_json(path, "result")

    def _path(self, *key: Any) -> Path:
        return self.folder / "results" / f"{digest(*key)}.json"

    def of(self, folder: Path) -> "Run":
        """The same on a checkpoint made from this run's model; results go where this run's go."""
        dtype = self.dtype or ("float32" if self.model_name in PRESETS else None)
        return replace(self, model_name=str(folder), revision=None, dtype=dtype)

    def sparse(self, corpus: str, sparsity: float | str, method: str, *, scope: str = "experts", dense: bool = False) -> "Run":
        """A run of the model with pruned weights, calibrated on a corpus; made once, on disk. See `weights.prune_weights`."""
        tokens, options = self.tokens(corpus), {"method": method, "scope": scope, "dense": dense}
        folder = self.folder / "sparse" / digest(self.model_key, tokens_digest(tokens), str(sparsity), options)
        if not folder.exists():
            # The tiny models lie in bfloat16, which masks leave as they are, and are computed in float32.
            dtype = torch.float32 if self.model_name in PRESETS else self.dtype and getattr(torch, self.dtype)
            device = "cuda" if torch.cuda.is_available() else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the report names the experts without tokens
                prune_weights_checkpoint(
                    self.source, folder, sparsity, calibration=tokens, dtype=dtype, device=device, **options
                )
        return self.of(folder)

    def label(self, corpus: str) -> str:
        """How figures name a corpus: synthetic ones are never called C4 or MATH."""
        return LABELS.get(corpus) or " and ".join(Path(name).name for name in corpus.split("+"))

    @property
    def embedded(self) -> bool:
        """Whether this is the tiny model on its own two corpora, calibrated as by default, whose numbers the notebooks vouch
        for."""
        asked = (self.model_name, self.general, self.domain, self.sequences, self.length, self.seed, self.keep, self.method)
        return asked == ("tiny", "web", "arithmetic", 64, 256, 42, None, "enumerate")

    def figure(self, name: str, data: dict):
        """Draw a figure of `plots.FIGURES`, save it in the run folder as PNG, PDF and JSON, and return it."""
        from . import plots

        return plots.save_figure(name, data, self.folder / "figures")

    def describe(self) -> "pd.Series":
        """The parameters as resolved."""
        import pandas as pd

        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "batch_size")}
        return pd.Series(values, name="value")


def _is_file(corpus: str) -> bool:
    return Path(corpus).suffix != "" and Path(corpus).is_file()


def default_folder(model_name: str) -> Path:
    """`.runs/MODEL` of the checkout."""
    return checkout() / ".runs" / model_name.strip("/").replace("/", "--")
