"""A run: one model, two corpora, and one folder. Traces, scores and figures are made once there; all notebooks share them."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..checkpoints.by_output import choose_by_output
from ..checkpoints.estimate import preflight
from ..checkpoints.folder import CONFIG, side_files, weight_files
from ..checkpoints.jobs import prune_weights_checkpoint, trace_checkpoint
from ..checkpoints.layout import expert_counts
from ..checkpoints.models import larger_than_memory, load_model, load_tokenizer, read_dtype
from ..checkpoints.reader import CheckpointReader, fetch, read_config
from ..corpora import calibration_tokens, held_out, is_local, of_each, parts
from ..files import SHIPPED, checkout, digest, made_once, read_json, write_json
from ..measure.evaluation import evaluate, is_group, perplexity, resolve_tasks, task_names, task_version
from ..moe.identity import fingerprint
from ..moe.layers import moe_layers
from ..pruning.mask import masked
from ..pruning.plan import PruningPlan
from ..pruning.search import check_method, search_experts
from ..pruning.skipping import skipping
from ..tiny_model.training import PRESETS
from ..tracing.recorder import tokens_digest, trace
from ..tracing.trace import FORMAT, Trace, check_experts

if TYPE_CHECKING:
    import pandas as pd

    from ..explorer.grid import Explorer

LABELS = {"web": "web (synthetic)", "arithmetic": "arithmetic (synthetic)", "c4": "C4", "math": "MATH", "gsm8k": "GSM8K"}


@dataclass
class Run:
    """The notebooks' parameters, named in lower case, and everything computed from them.

    None takes the default that fits the model: for the tiny ones the synthetic corpora, 64 sequences of 256 tokens
    and the embedded tasks, 100 items each; for others C4, MATH, 128 sequences of 2048 and the paper's eight tasks. With an
    empty list of tasks none is scored. dtype, method, tasks: as for `load_model`, `search_experts` and `evaluate`.
    keep: one size or several. Raises ValueError for an unknown dtype or method, and for a `keep` that is no whole number.
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
    keep: Sequence[int] | int | None = None
    method: str = "enumerate"
    tasks: Sequence[str] | str | None = None
    limit: int | None = None
    folder: str | Path | None = None
    batch_size: int | None = None  # task items per batch: 128 for the tiny models, 8 for others

    def __post_init__(self):
        self.model_name = str(self.model_name)
        tiny = self.model_name in PRESETS
        dtype = read_dtype(self.dtype, eight_bits=True)
        self.dtype = dtype and str(dtype).removeprefix("torch.")
        check_method(self.method)
        self.keep = [self.keep] if isinstance(self.keep, int) else self.keep
        if not all(isinstance(r, int) for r in self.keep or ()):
            raise ValueError(f"The sizes to keep must be whole numbers of experts, got {self.keep!r}.")
        self.general = self.general or ("web" if tiny else "c4")
        self.domain = self.domain or ("arithmetic" if tiny else "math")
        self.sequences = self.sequences or (64 if tiny else 128)
        self.length = self.length or (256 if tiny else 2048)
        self.tasks = tuple(task_names(("tiny" if tiny else "paper") if self.tasks is None else self.tasks))
        self.limit = self.limit or (100 if tiny else None)
        self.batch_size = self.batch_size or (128 if tiny else 8)
        self.folder = Path(self.folder) if self.folder else default_folder(self.model_name)
        if self.folder.is_file():
            raise NotADirectoryError(f"{self.folder} is a file: give a folder for traces and results.")

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any]) -> "Run":
        """The run for a notebook's parameters, as in `globals()`: MODEL, RUN_DIR and the other fields' names in capitals. For
        a model that does not ship it first prints `preflight` to stderr."""
        names = {field.name.upper(): field.name for field in fields(cls)} | {"MODEL": "model_name", "RUN_DIR": "folder"}
        run = cls(**{field: values[name] for name, field in names.items() if name in values})
        if run.model_name not in PRESETS:
            tqdm.write(run.preflight().to_string(), file=sys.stderr)
        return run

    @cached_property
    def _loaded(self):
        device_map = self.device_map or ("auto" if self.streamed else None)
        # With several processes, each holds the whole model on its own GPU.
        mine = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None
        device = None if device_map else mine
        return load_model(self.model_name, dtype=self.dtype, device=device, device_map=device_map, revision=self.revision)

    @cached_property
    def source(self) -> Path:
        """The folder of the model's checkpoint, downloaded if it comes from the hub. Raises ValueError for presets that are
        made in memory."""
        if self.model_name in PRESETS and self.model_name not in SHIPPED:
            raise ValueError(f"{self.model_name} is in no folder: write it with save_model, and give the folder as MODEL.")
        return fetch(self.model_name, self.revision)

    @cached_property
    def streamed(self) -> bool:
        """Whether the model is larger than the free memory. It is then traced layer by layer from disk; in an evaluation, the
        part that does not fit stays on disk."""
        return self.model_name not in PRESETS and larger_than_memory(self.source, dtype=self.dtype)

    def preflight(self) -> "pd.Series":
        """What tracing and pruning this model would take, before it is read: see `preflight.preflight`."""
        import pandas as pd

        if self.model_name in PRESETS:
            return pd.Series({"access": "ships with the package", "download": "nothing"}, name="preflight")
        options = {"sequences": self.sequences, "length": self.length, "dtype": self._from_disk, "revision": self.revision}
        r = min(self.keep) if self.keep else None
        return pd.Series(preflight(self.model_name, r, destination=self.folder, **options), name="preflight")

    @property
    def _from_disk(self) -> torch.dtype | None:
        """The dtype for computing layer by layer from disk (None: the checkpoint's). It is never int8."""
        return None if self.dtype == "int8" else read_dtype(self.dtype)

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
        """Tells this model from others in the same place. Its routers alone would not show pruned weights."""
        if self.model_name in PRESETS:
            return fingerprint(self.model)
        beside = [self.source / name for name in (CONFIG, *side_files(self.source, same_experts=True)[0])]
        files = [*weight_files(self.source), *sorted(beside)]
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]

    @cached_property
    def _experts(self) -> tuple[int, int]:
        """The number of experts per layer, and per token."""
        if self.streamed:
            return expert_counts(CheckpointReader(self.source).config)
        layer = moe_layers(self.model)[0]
        return layer.n, layer.k

    @cached_property
    def sizes(self) -> list[int]:
        """The numbers of experts to keep, falling: KEEP, or 7, 6, 5 and 4 eighths of all. Raises ValueError for a number that
        cannot be kept. Warns if the only size is all experts."""
        n, k = self._experts
        for r in self.keep or ():
            check_experts(r, n, k)
        sizes = sorted(set(self.keep or [max(k, n * part // 8) for part in (7, 6, 5, 4)]), reverse=True)
        if sizes == [n]:
            least = "fewer cannot be kept, since a token is routed to all" if n == k else "KEEP asks for no other size"
            warnings.warn(f"Nothing is pruned here: {least}. Results for r = {n} are those of the full model.", stacklevel=2)
        return sizes

    @property
    def size(self) -> int:
        """The size for notebooks that show one: the second of `sizes`, or the only one."""
        return self.sizes[:2][-1]

    def tokens(self, corpus: str, *, sequences: int | None = None, seed: int | None = None) -> torch.Tensor:
        """The calibration set of a corpus, [sequences, length]. Held-out documents of a file or folder are left out."""
        names = of_each(corpus, lambda name: "rest" if is_local(name) else None)
        drawn = (names, sequences or self.sequences, self.length, self.seed if seed is None else seed)
        if drawn not in self._drawn:
            options = dict(zip(("sequences", "length", "seed"), drawn[1:], strict=True))
            self._drawn[drawn] = calibration_tokens(names, self.tokenizer, **options)
        return self._drawn[drawn]

    @cached_property
    def _drawn(self) -> dict[tuple, torch.Tensor]:
        """Calibration sets by their corpus, shape and seed: drawing one takes longer than most of its uses."""
        return {}

    def held_out(self, corpus: str) -> torch.Tensor:
        """As many sequences as `tokens`, in no calibration set: from the held-out split, or, for a file or folder, from every
        fifth document."""
        return self.tokens(held_out(corpus), seed=self.seed + 1)

    def trace(self, corpus: str, *, tokens: torch.Tensor | None = None) -> Trace:
        """The trace of the full model on a corpus, down to the smallest size asked for; made once, then read."""
        tokens = self.tokens(corpus) if tokens is None else tokens
        keep = min(self.sizes)
        key = digest(FORMAT, self.model_key, tokens_digest(tokens), list(tokens.shape), self.seed, keep)

        def make(folder: Path) -> None:
            if self.streamed:
                device = "cuda" if torch.cuda.is_available() else None
                trace_checkpoint(self.source, tokens, folder, keep=keep, dtype=self._from_disk, device=device)
            else:
                trace(self.model, tokens, keep=keep).save(folder)

        return Trace.load(made_once(self.folder / "traces" / key, make))

    def explorer(self) -> "Explorer":
        """Both corpora's traces as an `Explorer`. The estimate for a real model is for this model if it is a Mixtral that does
        not ship, else for Mixtral 8x7B."""
        from ..explorer.grid import MIXTRAL, Explorer

        traces = {self.label(corpus): self.trace(corpus) for corpus in (self.general, self.domain)}
        config = {} if self.model_name in PRESETS else read_config(self.source).to_dict()
        own = {key: config.get(key) for key in (*MIXTRAL, "head_dim")} | {"name": self.model_name}
        shape = own if config.get("model_type") == "mixtral" else MIXTRAL
        return Explorer(traces, self.folder / "explorer", self.model_name, shape)

    def plan(
        self, corpus: str, r: int, method: str | None = None, *, seed: int | None = None, loss: str = "residual"
    ) -> PruningPlan:
        """The experts to keep, by `method` (None: METHOD) and `loss`, calibrated on a corpus; made once, then read."""
        method, seed = method or self.method, self.seed if seed is None else seed
        tokens = self.tokens(corpus)
        key = digest(self.model_key, tokens_digest(tokens), r, method, loss, seed, min(self.sizes))

        def make(path: Path) -> None:
            model = self.model if method == "progressive" else None
            options = {"method": method, "loss": loss, "model": model, "tokens": tokens, "seed": seed}
            search_experts(self.trace(corpus), r, **options).save(path)

        return PruningPlan.load(made_once(self.folder / "plans" / f"{key}.json", make))

    def scores(self, plan: PruningPlan | None = None, betas: Sequence[float] | None = None) -> "pd.DataFrame":
        """TASKS on the model, masked to a plan and skipping with betas if given; see `evaluation.evaluate`. Each task is stored
        separately, and an interrupted run continues. With a limit up to 100, the tasks are scored in one call."""
        import pandas as pd

        if not self.tasks:
            raise ValueError("No tasks are asked: give at least one as TASKS, or None for those that fit the model.")
        betas = _dropping(betas)
        key, tasks = (self.model_key, plan and plan.kept, betas), resolve_tasks(self.tasks)
        paths = {task: self._path(*key, ["scores", task, task_version(task), self.limit]) for task in tasks}
        missing = [task for task in tasks if not paths[task].exists()]
        few = [task for task in missing if self.limit and self.limit <= 100 and not is_group(task)]  # scored in one call
        for some in tqdm([few] * bool(few) + [[task] for task in missing if task not in few], desc="tasks", leave=False):
            with self._inside(plan, betas):
                table = evaluate(self.model, self.tokenizer, some, limit=self.limit, batch_size=self.batch_size)
            rows = json.loads(table.reset_index().to_json(orient="records", double_precision=15))
            for task in some:
                write_json(paths[task], [row for row in rows if len(some) == 1 or row["task"] == task])
        rows = [row for task in tasks for row in read_json(paths[task], "result")]
        return pd.DataFrame(rows).drop_duplicates("task").set_index("task")

    def perplexity(self, corpus: str, plan: PruningPlan | None = None, betas: Sequence[float] | None = None) -> float:
        """Perplexity on the held-out tokens of a corpus."""
        tokens, betas = self.held_out(corpus), _dropping(betas)
        return self.evaluate_variant(plan, betas, ["perplexity", tokens_digest(tokens)], lambda: perplexity(self.model, tokens))

    def chosen_by_output(self, corpus: str, r: int, text: str | None = None) -> tuple[PruningPlan, dict]:
        """The plan of `choose_by_output`, calibrated on a corpus and validated on eight other sequences of it (or of `text`),
        and the seconds and KLs of the choice; made once, then read."""
        tokens = self.tokens(text or corpus, sequences=8, seed=self.seed + 2000)

        def choose() -> dict:
            started = time.perf_counter()
            plan, report = choose_by_output(self.model, self.trace(corpus), r, tokens)
            return {"plan": asdict(plan), "seconds": time.perf_counter() - started, "kl": report}

        drawn = [tokens_digest(self.tokens(corpus)), tokens_digest(tokens)]
        found = self.cached(choose, self.model_key, "choice by output", drawn, r, min(self.sizes))
        return PruningPlan(**found.pop("plan")), found

    @property
    def experts(self) -> int:
        """The number of experts in each MoE layer."""
        return self._experts[0]

    def another_draw(self, corpus: str) -> tuple[Trace, torch.Tensor]:
        """The trace of other sequences of the same corpus, and their tokens: its difference from the first draw is noise."""
        tokens = self.tokens(corpus, seed=self.seed + 1000)
        return self.trace(corpus, tokens=tokens), tokens

    def quality(self, plan: PruningPlan | None = None, betas: Sequence[float] | None = None, *, tasks: bool = True) -> dict:
        """Held-out perplexity on both corpora, each task, and the tasks' mean and its standard error (None without tasks)."""
        perplexities = {"perplexity": [self.perplexity(corpus, plan, betas) for corpus in (self.general, self.domain)]}
        if not (tasks and self.tasks):
            return perplexities | {"average": None, "stderr": None, "tasks": {}}
        scores = self.scores(plan, betas)
        scores = scores[~scores.metric.str.contains("perplexity")]  # a perplexity is no share, so it is not averaged
        stderr = math.sqrt((scores.stderr.fillna(0) ** 2).sum()) / len(scores)
        return perplexities | {
            "average": float(100 * scores.value.mean()),
            "stderr": 100 * stderr,
            "tasks": (100 * scores.value).round(2).to_dict(),
        }

    def evaluate_variant(
        self, plan: PruningPlan | None, betas: Sequence[float] | None, what: list, compute: Callable[[], Any]
    ) -> Any:
        """The result of `compute` on the model as if pruned and skipping; made once, then read."""

        def inside():
            with self._inside(plan, betas):
                return compute()

        return self.cached(inside, self.model_key, plan and plan.kept, betas, what)

    @contextmanager
    def _inside(self, plan: PruningPlan | None, betas: Sequence[float] | None) -> Iterator[None]:
        with ExitStack() as stack:
            if plan:
                stack.enter_context(masked(self.model, plan))
            if betas is not None:
                stack.enter_context(skipping(self.model, betas))
            yield

    def cached(self, compute: Callable[[], Any], *key: Any) -> Any:
        """A value that JSON can hold, computed the first time, then read from the run folder."""
        path = made_once(self._path(*key), lambda path: write_json(path, compute()))
        return read_json(path, "result")

    def _path(self, *key: Any) -> Path:
        return self.folder / "results" / f"{digest(*key)}.json"

    def on_checkpoint(self, folder: Path) -> "Run":
        """The same run on a checkpoint made from this run's model, in the same run folder."""
        dtype = self.dtype or ("float32" if self.model_name in PRESETS else None)
        return replace(self, model_name=str(folder), revision=None, dtype=dtype)

    def sparse(self, corpus: str, sparsity: float | str, method: str, *, scope: str = "experts", dense: bool = False) -> "Run":
        """A run of the model with pruned weights, calibrated on a corpus; made once, on disk. See `weights.prune_weights`."""
        tokens, options = self.tokens(corpus), {"method": method, "scope": scope, "dense": dense}
        key = digest(self.model_key, tokens_digest(tokens), str(sparsity), options)
        # The tiny models are stored in bfloat16, which masks do not change, and computed in float32.
        options["dtype"] = torch.float32 if self.model_name in PRESETS else self._from_disk
        options["device"] = "cuda" if torch.cuda.is_available() else None

        def make(folder: Path) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the report names experts without tokens
                prune_weights_checkpoint(self.source, folder, sparsity, calibration=tokens, **options)

        return self.on_checkpoint(made_once(self.folder / "sparse" / key, make))

    def label(self, corpus: str) -> str:
        """A corpus's name in figures: synthetic ones are never called C4 or MATH."""
        short = {one: LABELS.get(one) or _short(one) for one in (corpus, self.general, self.domain)}
        alike = len({self.general, self.domain}) > 1 and short[self.general] == short[self.domain] == short[corpus]
        return corpus if alike else short[corpus]

    @property
    def embedded(self) -> bool:
        """Whether this is the tiny model on its own two corpora with default calibration: the notebooks' text and checks are
        about its numbers."""
        asked = (self.model_name, self.general, self.domain, self.sequences, self.length, self.seed, self.keep, self.method)
        return asked == ("tiny", "web", "arithmetic", 64, 256, 42, None, "enumerate")

    def figure(self, name: str, data: dict):
        """Draw a registered figure, save it in the run folder as PNG, PDF and JSON, and return it."""
        from .figures import save_figure

        return save_figure(name, data, self.folder / "figures")

    def describe(self) -> "pd.Series":
        """The parameters as resolved."""
        import pandas as pd

        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "batch_size")}
        return pd.Series(values, name="value")


def _dropping(betas: Sequence[float] | None) -> Sequence[float] | None:
    """Betas, or None if they drop nothing: the scores then equal those without skipping."""
    return betas if betas and any(betas) else None


def _short(corpus: str) -> str:
    return " and ".join(f"{weight} x " * (weight > 1) + Path(name).name for name, weight in parts(corpus))


def default_folder(model_name: str) -> Path:
    """`.runs/MODEL` of the checkout."""
    return checkout() / ".runs" / model_name.strip("/").replace("/", "--")
