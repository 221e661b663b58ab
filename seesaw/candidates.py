"""The settings of each data-free merge: the validation rows choose among them, the test rows judge the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from .bench import Bench, Scores
from .merging import DEFAULTS, KEPT, PAPER, Parameters, spelled
from .methods import by_mergekit, by_singular_vectors, merged

FACTORS = (0.3, 0.4, 0.5, 0.6)
DENSITIES = (0.01, 0.05, 0.1)
ISO_FACTORS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)


@dataclass(frozen=True, slots=True)
class Merge:
    """A data-free merge: what its scores are filed under, how it is made, and the settings it may have."""

    prefix: str
    make: Callable[[Bench, Parameters], Path]
    settings: Sequence[Parameters]
    on_both: bool = False  # whether its settings are chosen on both models, instead of the encoder alone


def _mergekits(method: str, *settings: Parameters) -> Merge:
    return Merge(f"mergekit-{method}", lambda bench, parameters: by_mergekit(bench, method, parameters), settings)


def _spectral(method: str, *factors: float, on_both: bool = False) -> Merge:
    settings = [{"lambda": factor} for factor in factors]
    return Merge(method, lambda bench, parameters: by_singular_vectors(bench, method, parameters), settings, on_both)


def _fusion(*settings: Parameters) -> Merge:
    return Merge("fusion", merged, settings)


MERGES: Mapping[str, Merge] = {  # by the name in the tables
    "plain average": _mergekits("task_arithmetic", {"normalize": True}),
    "task arithmetic": _mergekits("task_arithmetic", *({"lambda": factor} for factor in FACTORS)),
    "ties": _mergekits(
        "ties",
        *(
            {"density": p, "lambda": f, "normalize": True}
            for p, f in ((0.1, 1.0), (0.1, 1.5), (0.2, 0.7), (0.2, 1.0), (0.2, 1.5), (0.5, 1.0), (0.5, 1.5))
        ),
    ),
    "dare (linear)": _mergekits("dare_linear", *({"density": 0.5, "lambda": factor} for factor in FACTORS)),
    "dare (ties)": _mergekits("dare_ties", *({"density": 0.5, "lambda": factor} for factor in FACTORS)),
    "singular vectors: TSV-Merge": _spectral("tsv", 0.8, 1.0, 1.2),
    "singular vectors: Iso-C": _spectral("iso", *ISO_FACTORS),
    "singular vectors: Iso-C, chosen on both": _spectral("iso", *ISO_FACTORS, on_both=True),
    "fusion as in the paper": _fusion(PAPER),
    "fusion as in the paper, density chosen": _fusion(*(PAPER | {"density": p} for p in DENSITIES)),
    "localize-and-stitch": _fusion(
        *({"density": p, "conflict": "mean", "space": "delta", "rest": 0} for p in (0.1, 0.2))
    ),
    "magmax": _fusion({"density": 1, "conflict": "largest"} | KEPT),
    "fusion, singular values kept": _fusion(DEFAULTS | KEPT),
    "fusion, singular values kept, chosen": _fusion(
        *(
            {"density": p, "conflict": conflict, "space": "delta"} | KEPT
            for p in (0, 0.01, 0.1, 0.2)
            for conflict in (("largest", "mean", "elect") if p else ("last",))
        )
    ),
    "fusion, cpimerge's defaults": _fusion(DEFAULTS),
    "fusion, chosen": _fusion(
        *(
            DEFAULTS | {"density": p, "conflict": conflict}
            for p in (0, 0.01, 0.1, 0.2)
            for conflict in (("largest", "mean") if p else ("last",))
        )
    ),
}

OWN = [name for name, merge in MERGES.items() if merge.make is merged]


def make(bench: Bench, name: str, parameters: Parameters) -> Path:
    """The merge `name` of the bench's experts, with `parameters`."""
    return MERGES[name].make(bench, parameters)


def key(name: str, parameters: Parameters) -> str:
    """What a candidate's scores are filed under; equal for what is the same merge under two names."""
    return f"{MERGES[name].prefix}-{spelled(parameters)}"


def chosen(encoders: Sequence[Bench], causals: Sequence[Bench], name: str) -> Parameters:
    """The candidate with the best mean score on the validation rows, over tasks and seeds; the first of equals."""
    benches = [*encoders, *causals] if MERGES[name].on_both else encoders
    return max(MERGES[name].settings, key=lambda parameters: mean_validation(benches, name, parameters))


def mean_validation(benches: Sequence[Bench], name: str, parameters: Parameters) -> float:
    """The mean accuracy on validation rows over tasks and seeds, 0 to 1."""
    return mean(mean(scores.values()) for scores in validated(benches, name, parameters))


def validated(benches: Sequence[Bench], name: str, parameters: Parameters) -> list[Scores]:
    """The accuracies on validation rows of every seed."""
    case = key(name, parameters)
    return [bench.scores(case, "validation", partial(make, bench, name, parameters)) for bench in benches]
