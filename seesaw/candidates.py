"""The settings of each data-free merge: the validation rows choose among them, the test rows judge the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from .bench import Bench, Scores
from .merging import DEFAULTS, PAPER, Parameters
from .methods import by_mergekit, by_singular_vectors, merged

FACTORS = (0.3, 0.4, 0.5, 0.6)

MERGEKIT: Mapping[str, tuple[str, Sequence[Parameters]]] = {  # by the name in the tables: mergekit's, and its settings
    "plain average": ("task_arithmetic", [{"normalize": True}]),
    "task arithmetic": ("task_arithmetic", [{"lambda": factor} for factor in FACTORS]),
    "ties": (
        "ties",
        [
            {"density": p, "lambda": f, "normalize": True}
            for p, f in ((0.1, 1.0), (0.1, 1.5), (0.2, 0.7), (0.2, 1.0), (0.2, 1.5), (0.5, 1.0), (0.5, 1.5))
        ],
    ),
    "dare (linear)": ("dare_linear", [{"density": 0.5, "lambda": factor} for factor in FACTORS]),
    "dare (ties)": ("dare_ties", [{"density": 0.5, "lambda": factor} for factor in FACTORS]),
}

SPECTRAL: Mapping[str, tuple[str, Sequence[Parameters]]] = {
    "singular vectors: TSV-Merge": ("tsv", [{"lambda": factor} for factor in (0.8, 1.0, 1.2)]),
    "singular vectors: Iso-C": ("iso", [{"lambda": factor} for factor in (1.5, 2.0, 2.5)]),
}

DENSITIES = (0.01, 0.05, 0.1)
OWN: Mapping[str, Sequence[Parameters]] = {
    "fusion as in the paper": [PAPER],
    "fusion as in the paper, density chosen": [PAPER | {"density": p} for p in DENSITIES],
    "localize-and-stitch": [{"density": p, "conflict": "mean", "space": "delta", "rest": 0} for p in (0.1, 0.2)],
    "magmax": [{"density": 1, "conflict": "largest"}],
    "fusion, cpimerge's defaults": [DEFAULTS],
    "fusion, chosen": [
        {"density": p, "conflict": conflict, "space": "delta"}
        for p in (0, 0.01, 0.1, 0.2)
        for conflict in (("largest", "mean", "elect") if p else ("last",))
    ],
}


def settings(name: str) -> Sequence[Parameters]:
    """The candidates of a data-free merge, by its name in the tables."""
    others = {**MERGEKIT, **SPECTRAL}
    return others[name][1] if name in others else OWN[name]


def make(bench: Bench, name: str, parameters: Parameters) -> Path:
    """The merge `name` of the bench's experts, with `parameters`."""
    if name in SPECTRAL:
        return by_singular_vectors(bench, SPECTRAL[name][0], parameters)
    return by_mergekit(bench, MERGEKIT[name][0], parameters) if name in MERGEKIT else merged(bench, parameters)


def key(name: str, parameters: Parameters) -> str:
    """What a candidate's scores are filed under; equal for what is the same merge under two names."""
    if name in MERGEKIT:
        prefix = f"mergekit-{MERGEKIT[name][0]}"
    else:
        prefix = SPECTRAL[name][0] if name in SPECTRAL else "fusion"
    return "-".join((prefix, *(f"{setting}={value}" for setting, value in sorted(parameters.items()))))


def chosen(benches: Sequence[Bench], name: str) -> Parameters:
    """The candidate with the best mean score on the validation rows, over tasks and seeds; the first of equals."""
    return max(settings(name), key=lambda parameters: mean_validation(benches, name, parameters))


def mean_validation(benches: Sequence[Bench], name: str, parameters: Parameters) -> float:
    """The mean accuracy on validation rows over tasks and seeds, 0 to 1."""
    return mean(mean(scores.values()) for scores in validated(benches, name, parameters))


def validated(benches: Sequence[Bench], name: str, parameters: Parameters) -> list[Scores]:
    """The accuracies on validation rows of every seed."""
    case = key(name, parameters)
    return [bench.scores(case, "validation", partial(make, bench, name, parameters)) for bench in benches]
