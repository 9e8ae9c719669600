"""How the models of a study are trained: what a training seed is a seed of."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from .files import digest
from .training import PRESETS, ROWS, STEPS


@dataclass(frozen=True)
class Recipe:
    """How the models of a study are trained: a preset of `training.PRESETS`, so many steps of so many sequences, of which
    five of eight are web and three arithmetic. text: two files that take half of each step, five to three as well; the
    study's corpora are then they.

    Raises ValueError for an unknown preset, for steps or sequences that cannot be, and for files that cannot be told apart.
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
        """What a step's sequences divide into."""
        return sum(ROWS.values()) * (2 if self.text else 1)

    @property
    def rows(self) -> dict[str, int]:
        """Sequences of each corpus in a step."""
        share = self.sequences // self.parts
        return {corpus: n * share for corpus, n in zip((*ROWS, *self.text), (*ROWS.values(), *ROWS.values()), strict=False)}

    def __str__(self) -> str:
        if self == TINY:
            return "the tiny model's"
        corpora = ", ".join(Path(corpus).name for corpus in self.rows)
        return f"{self.preset}, trained for {self.steps} steps of {self.sequences} sequences of {corpora}"

    @property
    def key(self) -> str:
        """What a folder of models of this recipe is called."""
        held = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.text]
        return self.preset if self == TINY else f"{self.preset}-{digest(asdict(self) | {'text': held})}"


TINY = Recipe()  # of the model that ships
