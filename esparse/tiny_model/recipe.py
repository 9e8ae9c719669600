"""Recipes: the settings of a training, without the seed."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import digest
from .training import PRESETS, STEP_SEQUENCES, STEPS


@dataclass(frozen=True)
class Recipe:
    """The settings of a training: a preset of `training.PRESETS`, the number of steps, and the sequences in a step, of which
    five of eight are web and three arithmetic. text: two files, general and domain, for half of each step, also five to
    three. Raises ValueError for an unknown preset, invalid steps or sequences, and missing, equal or misnamed files.
    """

    preset: str = "tiny"
    steps: int = STEPS
    sequences: int = 8
    text: tuple[str, ...] = ()

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"There is no preset {self.preset!r}: choose from {', '.join(PRESETS)}.")
        if self.steps < 1:
            raise ValueError(f"Training takes at least one step, got {self.steps}.")
        if self.sequences < self.parts or self.sequences % self.parts:
            raise ValueError(f"A step takes a multiple of {self.parts} sequences, got {self.sequences}.")
        for path in self.text:
            if "+" in path or not Path(path).is_file():
                raise ValueError(f"{path} is no file, or has a plus sign in its path, which stands between corpora: move it.")
        if self.text and len(set(self.text)) != 2:
            raise ValueError("Text is two files, of which the first is the study's general corpus and the second its domain.")

    @property
    def parts(self) -> int:
        """`sequences` must be a multiple of this."""
        return sum(STEP_SEQUENCES.values()) * (2 if self.text else 1)

    @property
    def rows(self) -> dict[str, int]:
        """Sequences of each corpus in a step."""
        shares = STEP_SEQUENCES | dict(zip(self.text, STEP_SEQUENCES.values(), strict=False))
        return {corpus: share * (self.sequences // self.parts) for corpus, share in shares.items()}

    def __str__(self) -> str:
        if self == TINY:
            return "the tiny model's"
        corpora = ", ".join(Path(corpus).name for corpus in self.rows)
        return f"{self.preset}, trained for {self.steps} steps of {self.sequences} sequences of {corpora}"

    @property
    def key(self) -> str:
        """The name of the folder for this recipe's models."""
        held = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.text]
        return self.preset if self == TINY else f"{self.preset}-{digest(asdict(self) | {'text': held})}"


TINY = Recipe()  # the recipe of the model that ships
