"""Scores of predictions, by scikit-learn and scipy; the extra `finetune` brings both.

>>> class_scores(["1", "0", "1", "1"], ["1", "0", "0", "1"], labels=("0", "1"))["accuracy"]
0.75
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

from lmssl.errors import LmsslError

HIGHER_IS_BETTER = {"loss": False, "perplexity": False}
"""Every other metric is better the higher it is."""


def better(metric: str, first: float, second: float) -> bool:
    """Whether the first score beats the second."""
    return first > second if HIGHER_IS_BETTER.get(metric, True) else first < second


def require_libraries() -> None:
    """Say what to install before anything is trained.

    Raises:
        LmsslError: scikit-learn or scipy is missing.
    """
    missing = [name for module, name in (("sklearn", "scikit-learn"), ("scipy", "scipy")) if not _has(module)]
    if missing:
        raise LmsslError(
            f"{' and '.join(missing)} must be installed to score predictions",
            where="lmssl finetune",
            remedy='pip install "lmssl[finetune]"',
        )


def class_scores(found: Sequence[str | None], wanted: Sequence[str], *, labels: tuple[str, ...]) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of labels or tags.

    `f1` is that of the second of two labels (GLUE's 1), and the mean over labels where there are more; `macro_f1` is
    the mean over the labels that occur, in both cases. No prediction (None) is a wrong one.
    """
    guesses = ["" if label is None else label for label in found]
    metrics = _metrics()
    occurring = [label for label in labels if label in {*wanted, *guesses}]
    macro = metrics.f1_score(wanted, guesses, labels=occurring, average="macro", zero_division=0)
    f1 = macro
    if len(labels) == 2:
        f1 = metrics.f1_score(wanted, guesses, labels=[labels[1]], average="macro", zero_division=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it minds rows of one label, for which 0 is the right answer
        matthews = metrics.matthews_corrcoef(wanted, guesses)
    accuracy = sum(a == b for a, b in zip(guesses, wanted, strict=True)) / len(wanted)
    return {"accuracy": accuracy, "f1": float(f1), "macro_f1": float(macro), "matthews": float(matthews)}


def number_scores(found: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman correlation; 0 where all predictions are the same number."""
    from scipy import stats  # type: ignore[import-untyped]

    if len(set(found)) == 1:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(found, wanted).statistic),
        "spearman": float(stats.spearmanr(found, wanted).statistic),
    }


def loss_scores(loss_sum: float, num_targets: int) -> dict[str, float]:
    """Nats per target and its exponential."""
    loss = loss_sum / num_targets
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _metrics() -> ModuleType:
    from sklearn import metrics  # type: ignore[import-untyped]

    module: ModuleType = metrics
    return module


def _has(module: str) -> bool:
    return find_spec(module) is not None
