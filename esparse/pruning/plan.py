"""A pruning plan: the experts to keep in each MoE layer."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import read_json, refuse_existing, write_json


@dataclass
class PruningPlan:
    """The experts that each layer keeps, in rising order, and their reconstruction losses (Eq. 3) on the calibration set.

    runner_up: the loss of the second best subset, where all were tried. model, tokens: digests of the model and of the
    calibration set. betas: for skipping on top of the plan, one per layer, or None.
    """

    method: str
    r: int
    kept: list[list[int]]
    losses: list[float]
    model: str
    tokens: str
    runner_up: list[float] | None = None
    betas: list[float] | None = None

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
