"""Tasks of the lm-evaluation-harness, through its own loader of Hugging Face models.

The library is optional: `pip install "lmssl[eval]"`. It is imported here only.
"""

from __future__ import annotations

import importlib.util
import logging
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from transformers import PreTrainedTokenizerFast

from lmssl.errors import EvaluationError
from lmssl.evaluate.questions import Metrics, Result
from lmssl.evaluate.subject import Subject
from lmssl.recipe.suite import HarnessEvaluation
from lmssl.tokenizer.load import ROLES, Tokenizer


def run_harness(section: HarnessEvaluation, subject: Subject, *, batch_rows: int) -> Result:
    """Run an evaluation's tasks; the numbers are the library's.

    Args:
        batch_rows: texts of a forward.
    Raises:
        EvaluationError: the library is missing, the model is not causal, or a task is unknown or cannot be run.
    """
    where = f"evaluation {section.name!r}"
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed", where=where, remedy='pip install "lmssl[eval]"')
    if subject.kind != "causal":
        raise EvaluationError(
            f"lm-eval scores causal models, and {subject.what} is none",
            where=where,
            remedy="use minimal_pairs or multiple_choice, which have pseudo-likelihoods",
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=section.include_path)
    unknown = [task for task in section.tasks if task not in manager.all_tasks]
    if unknown:
        raise EvaluationError(
            f"lm-eval knows no task {unknown[0]!r}",
            where=where,
            remedy="see `lm-eval ls tasks`, or name a folder of task files with include_path",
        )
    subject = subject.with_stock_attention()
    tokenizer = stock_tokenizer(subject.tokenizer)
    try:
        with redirect_stdout(StringIO()):
            wrapped = HFLM(
                pretrained=subject.model,
                tokenizer=tokenizer,
                batch_size=batch_rows,
                max_length=subject.reader.longest_tokens,
            )
            found: dict[str, Any] = simple_evaluate(
                model=wrapped,
                tasks=list(section.tasks),
                task_manager=manager,
                num_fewshot=section.num_fewshot,
                limit=section.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ValueError, KeyError, ConnectionError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise EvaluationError(
            f"lm-eval cannot run its tasks: {reason}",
            where=where,
            remedy="offline, give tasks whose data is on this machine (dataset_path: json) by include_path",
        ) from error
    return _result(found["results"])


def _result(found: dict[str, dict[str, Any]]) -> Result:
    """Numbers by task, named as the library names them, without its filter where there is none."""
    parts: dict[str, Metrics] = {}
    for task, values in found.items():
        numbers = {name.removesuffix(",none"): value for name, value in values.items()}
        parts[task] = {name: float(v) for name, v in numbers.items() if isinstance(v, int | float)}
    metrics = {f"{task}/{name}": v for task, of in parts.items() for name, v in of.items() if "stderr" not in name}
    return Result(metrics, parts)


def stock_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers has it, with its control tokens."""
    names = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in ROLES}
    given = {name: tokenizer.backend.id_to_token(i) for name, i in names.items() if i is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **given)
