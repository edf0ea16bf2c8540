from __future__ import annotations

import math
import random
from importlib import util

import pytest

from lmssl.errors import LmsslError
from lmssl.finetune import scores
from lmssl.finetune.scores import better, class_scores, loss_scores, number_scores, require_libraries


def test_two_classes_by_hand() -> None:
    found, wanted = ["1", "1", "0", "0", "1", "0"], ["1", "0", "0", "0", "1", "1"]
    tp, fp, fn, tn = 2, 1, 1, 2
    got = class_scores(found, wanted, labels=("0", "1"))
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert got["macro_f1"] == pytest.approx((2 * tp / (2 * tp + fp + fn) + 2 * tn / (2 * tn + fp + fn)) / 2)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert got["matthews"] == pytest.approx((tp * tn - fp * fn) / root)


def test_one_answer_for_all_is_worth_nothing() -> None:
    got = class_scores(["a"] * 6, ["a", "b"] * 3, labels=("a", "b"))
    assert (got["accuracy"], got["f1"], got["matthews"]) == (0.5, 0.0, 0.0)


def test_a_missing_prediction_is_wrong() -> None:
    got = class_scores(["a", None, "c"], ["a", "b", "c"], labels=("a", "b", "c"))
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["f1"] == got["macro_f1"] == pytest.approx(2 / 3)


def test_correlations_by_hand() -> None:
    draw = random.Random(3)
    found, wanted = ([draw.random() for _ in range(50)] for _ in range(2))

    def pearson(a: list[float], b: list[float]) -> float:
        means = sum(a) / len(a), sum(b) / len(b)
        top = sum((x - means[0]) * (y - means[1]) for x, y in zip(a, b, strict=True))
        return top / math.sqrt(sum((x - means[0]) ** 2 for x in a) * sum((y - means[1]) ** 2 for y in b))

    def ranks(values: list[float]) -> list[float]:
        return [float(sorted(values).index(value)) for value in values]

    got = number_scores(found, wanted)
    assert got["pearson"] == pytest.approx(pearson(found, wanted))
    assert got["spearman"] == pytest.approx(pearson(ranks(found), ranks(wanted)))
    assert number_scores([1.0, 1.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_losses() -> None:
    assert loss_scores(6.0, 3) == {"loss": 2.0, "perplexity": pytest.approx(math.e**2)}
    assert better("loss", 1.0, 2.0)
    assert better("accuracy", 2.0, 1.0)
    assert not better("accuracy", 1.0, 1.0)


def test_missing_libraries_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries()
    monkeypatch.setattr(scores, "find_spec", lambda name: None if name == "sklearn" else util.find_spec(name))
    with pytest.raises(LmsslError, match=r"(?s)scikit-learn must be installed.*lmssl\[finetune\]"):
        require_libraries()
