"""What a command of `fastamp paper` asked for, told from its text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastamp.paper.plan import Experiment, Run

DEFAULT_SEEDS = "10"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "5" (0 to 4), "0-9" or "3,7".

    Raises:
        ValueError: another text, or no seeds.
    """
    seeds: list[int] = []
    try:
        if text.strip().isdecimal():
            seeds += range(int(text))
        else:
            for part in text.split(","):
                first, dash, last = part.strip().partition("-")
                seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(f"{text!r} are no seeds; write 5 for 0 to 4, 0-9, or 3,7")
    return tuple(seeds)


def parse_ratios(text: str) -> tuple[float, ...]:
    """Shares of the data from "0.03,0.1,1".

    Raises:
        ValueError: another text, or a number outside (0, 1].
    """
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; write shares of the data, as in 0.03,0.1,1") from None
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"{text!r}: a share of the data is above 0 and at most 1")
    return ratios


@dataclass(frozen=True)
class Command:
    """A command that makes runs.

    Attributes:
        text: as it was given.
        experiment: the name of what it makes.
        extent: by "datasets", "models", "methods" and "ratios": what it asks for in place of the experiment's own.
        seeds: as it was given.
    """

    text: str
    experiment: str
    extent: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]

    def runs(self, experiment: Experiment) -> list[Run]:
        """Its runs, each once."""
        return list(dict.fromkeys(experiment.runs(seeds=self.seeds, **self.extent)))


def read_commands(texts: Iterable[str], experiments: Mapping[str, Experiment]) -> list[Command]:
    """The commands among texts that make one of the experiments, and whose names are known."""
    found = []
    for text in texts:
        words = shlex.split(text)
        if words[:2] != ["fastamp", "paper"] or words[2:3] == [] or words[2] not in experiments:
            continue
        given = {}
        rest = iter(words[3:])
        for word in rest:
            name, equals, value = word.partition("=")
            if name in ("--datasets", "--models", "--methods", "--ratios", "--seeds"):
                given[name[2:]] = value if equals else next(rest, "")
        try:
            seeds = parse_seeds(given.pop("seeds", DEFAULT_SEEDS))
            extent: dict[str, Any] = {
                name: parse_ratios(value) if name == "ratios" else tuple(part.strip() for part in value.split(","))
                for name, value in given.items()
            }
            experiments[words[2]].runs(seeds=seeds, **extent)
        except ValueError:  # of another version's names
            continue
        found.append(Command(text, words[2], extent, seeds))
    return found
