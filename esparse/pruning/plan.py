"""A pruning plan: the experts to keep in each MoE layer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import read_json, refuse_existing, write_json
from ..moe.routers import Router
from ..tracing.trace import check_experts


@dataclass
class PruningPlan:
    """The experts that each layer keeps, in rising order, and their losses on the calibration set (None: unknown).

    runner_up: the loss of the second best subset, where all were tried. model, tokens: digests of the model and of the
    calibration set (of a mixture: of its sets and their shares). betas: for skipping on top of the plan, one per layer, or
    None. loss: what `losses` are, see `search_experts`.
    """

    method: str
    r: int
    kept: list[list[int]]
    losses: list[float | None]
    model: str
    tokens: str
    runner_up: list[float] | None = None
    betas: list[float] | None = None
    loss: str = "eq3"

    @property
    def label(self) -> str:
        """How the plan was made, for reports and model cards."""
        return f"method: {self.method}" + f", loss: {self.loss}" * (self.loss != "eq3") + f", r = {self.r}"

    def check(self, model: str, layers: Sequence[tuple[int, int, Router]]) -> None:
        """ValueError unless the plan was made with the model of this fingerprint and fits its MoE layers.

        layers: each one's number of experts, number per token, and router.
        """
        if model != self.model or len(layers) != len(self.kept):
            raise ValueError("This pruning plan was made with another model: trace the model you want to use it with.")
        for kept, (n, k, router) in zip(self.kept, layers, strict=True):
            check_experts(self.r, n, k, router=router)
            if len(kept) != self.r or sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < n:
                raise ValueError(f"The plan must keep {self.r} different experts of a layer in rising order, got {kept}.")

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; raises FileExistsError if `path` exists."""
        write_json(refuse_existing(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a saved plan. Raises FileNotFoundError, or ValueError for a file that is no plan."""
        try:
            plan = cls(**read_json(path, "pruning plan"))
            whole = isinstance(plan.r, int) and len(plan.losses) == len(plan.kept)
            whole = whole and all(isinstance(expert, int) for kept in plan.kept for expert in kept)
        except TypeError:
            whole = False
        if not whole:
            raise ValueError(f"{path} is no pruning plan of esparse.")
        return plan
