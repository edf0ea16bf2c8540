"""The error tree: every failure a user can cause or meet.

::

    LmsslError                exit code 1
    ├── RecipeError           2  the recipe or an override is wrong
    ├── DataError             3  a corpus, a record or the cache
    ├── TokenizerError        4  a tokenizer folder or its training
    ├── ModelError            5  a model that cannot be built from the recipe
    ├── CheckpointError       6  a run folder or a checkpoint
    ├── ExportError           7  an export that cannot be written or does not match
    ├── TrainingError         8  the run itself: non-finite losses, a wrong launch
    ├── PushError             9  an upload; the run, the export and what was uploaded before are intact
    ├── EvaluationError      10  a model, a suite or its files that cannot be evaluated
    └── Preempted            75  stopped by a signal after saving; the same command continues

Each error says what is wrong, where, and the remedy; nothing half-written stays behind.
"""

from __future__ import annotations


class LmsslError(Exception):
    """A failure explained in three parts: what, where and the remedy."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(what, where, remedy)

    def __reduce__(self) -> tuple[object, ...]:
        # Loader workers pickle errors; keyword-only arguments need this to survive the trip.
        return (_rebuild, (type(self), self.what, self.where, self.remedy))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


def _rebuild(kind: type[LmsslError], what: str, where: str | None, remedy: str | None) -> LmsslError:
    return kind(what, where=where, remedy=remedy)


class RecipeError(LmsslError):
    """The recipe or a command-line override is wrong."""

    exit_code = 2


class DataError(LmsslError):
    """A corpus, one of its records, or the token cache."""

    exit_code = 3


class TokenizerError(LmsslError):
    """A tokenizer folder or the training of one."""

    exit_code = 4


class ModelError(LmsslError):
    """A model that cannot be built from the recipe."""

    exit_code = 5


class CheckpointError(LmsslError):
    """A run folder or a checkpoint."""

    exit_code = 6


class ExportError(LmsslError):
    """An export that cannot be written or does not match its checkpoint."""

    exit_code = 7


class TrainingError(LmsslError):
    """The run itself: non-finite losses, a launch without distribution."""

    exit_code = 8


class PushError(LmsslError):
    """An upload that cannot be made or was refused; nothing on this machine is changed by it."""

    exit_code = 9


class EvaluationError(LmsslError):
    """A folder that is no model, a model that cannot answer, or an evaluation file with something wrong."""

    exit_code = 10


class Preempted(LmsslError):
    """Stopped by a signal after saving; the same command continues the run."""

    exit_code = 75
