"""CPI-FT over densities and thresholds: how much is frozen, and which tasks are trained together.

The validation rows choose among them, as they do among the data-free merges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from .bench import Bench, Scores, Split
from .merging import PAPER, Parameters
from .methods import cpi_ft, cpi_ft_name, stages_of

DENSITIES = (0.01, 0.1, 0.3)
TAUS = (1, 0, 0.1, "auto")  # every task alone; all together; the paper's; those that go the same way
GRID: Sequence[Parameters] = [PAPER | {"density": density, "tau": tau} for density in DENSITIES for tau in TAUS]


def scored(bench: Bench, parameters: Parameters, split: Split) -> Scores:
    """The accuracy per task of CPI-FT with `parameters`, 0 to 1. Equal stages are trained and scored once."""
    return bench.scores(cpi_ft_name(bench, parameters), split, partial(cpi_ft, bench, parameters))


def chosen(benches: Sequence[Bench]) -> Parameters:
    """Those of the grid with the best mean on the validation rows, over tasks and seeds; the first of equals."""
    return max(GRID, key=lambda parameters: mean(_validated(bench, parameters) for bench in benches))


def sweep(benches: Sequence[Bench]) -> Iterator[Mapping[str, Any]]:
    """The mean accuracy on the validation rows over tasks and seeds, 0 to 1, and the numbers of stages of each seed."""
    for parameters in GRID:
        yield {
            "density": parameters["density"],
            "tau": parameters["tau"],
            "mean": mean(_validated(bench, parameters) for bench in benches),
            "stages": [len(stages_of(bench, parameters)) for bench in benches],
        }


def _validated(bench: Bench, parameters: Parameters) -> float:
    return mean(scored(bench, parameters, "validation").values())
