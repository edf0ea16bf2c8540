"""What file systems raise: whether trying again may help, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import tenacity

from lmssl.data.cancel import Cancelled
from lmssl.errors import DataError

_REFUSED = (FileNotFoundError, PermissionError, ImportError, TypeError, ValueError, DataError, Cancelled)
_NO_ACCESS = ("NoCredentialsError", "CredentialRetrievalError")
Result = TypeVar("Result")


def unmasked(url: str, attempt: Callable[[], Result]) -> Result:
    """Try; the file system for the web says of whatever fails while it looks at a file that the file is not there."""
    try:
        return attempt()
    except FileNotFoundError as error:
        cause = error.__cause__
        if url.startswith("http") and isinstance(cause, Exception) and _status(cause) not in (404, 410):
            raise cause from None
        raise


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help."""
    if not isinstance(error, Exception) or isinstance(error, _REFUSED) or _is_refusal(error):
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in (408, 429)


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or type(error).__name__ in _NO_ACCESS or _status(error) in (401, 403)


def _status(error: BaseException) -> int | None:
    """What a server answered, under the names that the file systems' libraries give it."""
    response = getattr(error, "response", None)
    for holder, name in (
        (error, "status"),
        (response, "status_code"),
        (error, "code"),
    ):  # `code` warns where `status` is
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    return None


@contextmanager
def explained(url: str, give_up_seconds: float) -> Iterator[None]:
    """Turn what file systems raise into errors that say what to do."""
    try:
        yield
    except tenacity.RetryError as error:
        last = error.last_attempt
        raise DataError(
            f"gave up after {last.attempt_number} attempts in {give_up_seconds:g} seconds: {_said(last.exception())}",
            where=url,
            remedy="check the network and the server; the same command goes on where the download stopped",
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            "there is no such file or bucket, or the pattern matches nothing",
            where=url,
            remedy="check the spelling and, for another server than the provider's, its endpoint",
        ) from error
    except (DataError, Cancelled):
        raise
    except Exception as error:
        if _is_refusal(error):
            raise DataError(
                f"access is denied: {_said(error)}", where=url, remedy="check the credentials and their rights"
            ) from error
        raise DataError(
            f"the file cannot be read: {_said(error)}", where=url, remedy="check the address and the server"
        ) from error


def _said(error: BaseException | None) -> str:
    if error is not None and not str(error) and error.__cause__ is not None:
        return _said(error.__cause__)  # a timeout, of which only the cause says where
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
