"""One repository on the Hub, reached with patience: what is there, what may be replaced, one commit for a revision."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from lmssl.errors import ExportError, PushError
from lmssl.push.staging import Staged
from lmssl.release.marker import MARKER, parse_marker
from lmssl.release.private import SECRETS

PATIENCE_SECONDS = 900.0
"""How long one upload waits, in all its pauses together, for a Hub that does not answer."""

_LONGEST_WAIT_SECONDS = 120.0
_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
_MODEL_FILE = re.compile(r"(?:.*/)?(?:.+\.(?:safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)|config\.json)")
_AGAIN = "nothing on this machine has changed, and the same command goes on where this one stopped"
Result = TypeVar("Result")


@dataclass(frozen=True)
class There:
    """A revision of a repository as it is."""

    commit: str
    names: tuple[str, ...]
    marker: dict[str, Any] = field(default_factory=dict)
    """Empty: it has none."""


class Hub:
    """A model repository, with the token of `HF_TOKEN` or of the login store."""

    def __init__(
        self,
        repo: str,
        *,
        sleep: Callable[[float], None],
        report: Callable[[str], None],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
            raise PushError(f"{repo!r} names no repository", where="--repo", remedy="write ORGANISATION/NAME")
        token = get_token()
        if token is None:
            raise PushError(
                "there is no token to push with",
                where=repo,
                remedy="run `hf auth login`, or set HF_TOKEN; see docs/export.md",
            )
        self.repo = repo
        self.api = HfApi(token=token)
        self._sleep, self._report, self._patience_seconds = sleep, report, patience_seconds

    def sign_in(self) -> str:
        """Who the token belongs to, asked before anything is made.

        Raises:
            PushError: it is not valid, or only reads.
        """
        who = self._patiently("asking who the token belongs to", self.api.whoami)
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise PushError(
                f"the token of {who['name']} reads and does not write",
                where=self.repo,
                remedy="make one with write access at https://huggingface.co/settings/tokens",
            )
        return str(who["name"])

    def open(self, *, public: bool) -> None:
        """Make the repository if there is none; its visibility is always said, and must be what an existing one has.

        Raises:
            PushError: it may not be made, or has another visibility.
        """
        made = lambda: self.api.create_repo(self.repo, private=not public, exist_ok=True)  # noqa: E731
        self._patiently("making the repository", made)
        info = self._patiently("looking at the repository", lambda: self.api.model_info(self.repo))
        if bool(info.private) == public:
            have, want = ("private", "public") if public else ("public", "private")
            remedy = "change it in the repository's settings" if public else "give --public, or another --repo"
            raise PushError(f"the repository is {have}, and the push is to be {want}", where=self.repo, remedy=remedy)

    def branches(self) -> set[str]:
        """Names of its branches."""
        refs = self._patiently("listing revisions", lambda: self.api.list_repo_refs(self.repo))
        return {branch.name for branch in refs.branches}

    def add_branch(self, revision: str) -> None:
        """Make a branch if there is none of this name."""
        make = lambda: self.api.create_branch(self.repo, branch=revision, exist_ok=True)  # noqa: E731
        self._patiently(f"making the revision {revision}", make)

    def there(self, revision: str) -> There:
        """What a revision holds."""
        return self._patiently(f"looking at {revision}", lambda: self._there(revision))

    def publish(self, staged: Staged, revision: str, message: str) -> bool:
        """Make a revision hold what is staged, in one commit; returns whether one was needed.

        Raises:
            PushError: the repository holds another model, or the Hub refused.
        """
        tried: list[str] = []
        return self._patiently(f"uploading to {revision}", lambda: self._publish(staged, revision, message, tried))

    def _there(self, revision: str) -> There:
        info = self.api.model_info(self.repo, revision=revision)
        names = tuple(sibling.rfilename for sibling in info.siblings or ())
        if MARKER not in names:
            return There(str(info.sha), names)
        with tempfile.TemporaryDirectory(prefix="lmssl-push-") as cache:
            path = self.api.hf_hub_download(self.repo, MARKER, revision=info.sha, cache_dir=cache)
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        marker: dict[str, Any] = {}
        with contextlib.suppress(
            ExportError
        ):  # a file of that name which is none of ours makes it another's repository
            marker = parse_marker(text, self.repo)
        return There(str(info.sha), names, marker)

    def _publish(self, staged: Staged, revision: str, message: str, tried: list[str]) -> bool:
        # All of this is tried again from the start: a connection may drop after the Hub has made the commit.
        there = self._there(revision)
        self.check_same(there, staged.identity)
        if there.marker == staged.marker and set(staged.sizes) <= set(there.names):
            return bool(tried)  # the answer to an earlier attempt was lost, and it had worked
        tried.append(there.commit)
        gone = sorted(set(there.marker.get("files", {})) & set(there.names) - set(staged.sizes))
        operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
            *(CommitOperationAdd(name, staged.folder / name) for name in staged.sizes),
            *(CommitOperationDelete(name) for name in gone),
        ]
        self.api.create_commit(
            self.repo, operations, commit_message=message, revision=revision, parent_commit=there.commit
        )
        return True

    def check_same(self, there: There, identity: str) -> None:
        """Refuse to put a model in the place of another.

        Raises:
            PushError: the revision holds a model of other origin.
        """
        if there.marker.get("identity") == identity:
            return
        if there.marker or any(_MODEL_FILE.fullmatch(name) for name in there.names):
            name = there.marker.get("name")
            raise PushError(
                "the repository holds another model" + (f", {str(name)[:80]!r}" if name else ""),
                where=self.repo,
                remedy="choose another --repo; nothing there was changed",
            )

    def _patiently(self, doing: str, attempt: Callable[[], Result]) -> Result:
        """Try until it works, is refused for good, or patience ends."""

        def told(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome is not None else None
            pause = state.next_action
            self._report(f"{doing}: {_said(error)}; again in {pause.sleep if pause else 0:.0f} s")

        retrying = tenacity.Retrying(
            stop=lambda state: state.idle_for + state.upcoming_sleep > self._patience_seconds,
            wait=_pause_seconds,
            retry=tenacity.retry_if_exception(_is_passing),
            sleep=self._sleep,
            before_sleep=told,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except PushError:
            raise
        except Exception as error:  # the Hub's client, its HTTP library and its upload engine have trees of their own
            raise self._explained(doing, error) from error

    def _explained(self, doing: str, error: Exception) -> PushError:
        if isinstance(error, OfflineModeIsEnabled):
            return PushError("HF_HUB_OFFLINE is set", where=self.repo, remedy="unset it to push")
        if isinstance(error, LocalTokenNotFoundError):
            return PushError("the token is gone", where=self.repo, remedy="run `hf auth login`, or set HF_TOKEN")
        if isinstance(error, ValueError) and "metadata" in str(error):
            return PushError(
                f"the Hub refuses the card: {_said(error)}", where="README.md", remedy="mend its front matter"
            )
        what, remedy = _BY_STATUS.get(_status(error) or 0, ("", ""))
        if _is_passing(error):
            what, remedy = what or "the Hub was not reached", remedy or f"try later: {_AGAIN}"
            what = f"{what}; gave up after {self._patience_seconds / 60:.0f} minutes of waiting"
        return PushError(
            f"{doing} failed: {what + ': ' if what else ''}{_said(error)}",
            where=self.repo,
            remedy=remedy or f"see what the Hub says above; {_AGAIN}",
        )


_BY_STATUS = {
    401: ("the Hub does not know the token", "run `hf auth login`, or set HF_TOKEN to a valid one"),
    403: ("the token may not write there", "use a token with write access to the repository and its organisation"),
    404: ("there is no such repository or organisation, or the token may not see it", "check --repo"),
    409: ("somebody else writes to the repository", f"wait until they are done; {_AGAIN}"),
    412: ("somebody else writes to the repository", f"wait until they are done; {_AGAIN}"),
    413: ("a file is larger than the Hub takes", "export with a smaller --max-shard-size, such as 1GB"),
    429: ("the Hub takes no more requests for now", f"try later: {_AGAIN}"),
}


def _cause(error: BaseException | None) -> BaseException | None:
    """What an upload failed of; huggingface_hub wraps it, status and all, in a RuntimeError that names the file."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int | None:
    status = getattr(getattr(_cause(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_passing(error: BaseException) -> bool:
    """Whether trying again may help."""
    status = _status(error)
    if status is not None:
        return status in _PASSING
    error = _cause(error) or error
    if isinstance(error, OfflineModeIsEnabled | PushError):
        return False
    # A server in trouble answers with pages where the client expects JSON; Xet's engine raises RuntimeError alone.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError | json.JSONDecodeError | RuntimeError) or (
        "TransportError" in kinds
    )


def _pause_seconds(state: tenacity.RetryCallState) -> float:
    """2, 4, 8, ... seconds, or what the Hub asks for."""
    grown = min(_LONGEST_WAIT_SECONDS, 2.0**state.attempt_number)
    error = _cause(state.outcome.exception()) if state.outcome is not None else None
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = re.fullmatch(r"\d+", headers.get("retry-after", "")) or re.search(
        r"\bt=(\d+)", headers.get("ratelimit", "")
    )
    return max(grown, float(asked[asked.re.groups])) if asked else grown


def _said(error: BaseException | None) -> str:
    """One line of an error without what is private in it."""
    cause, status = _cause(error), _status(error)
    server = cause.server_message if isinstance(cause, HfHubHTTPError) else None
    lines = [line.strip() for line in (server or str(cause)).splitlines() if line.strip()]
    text = (f"{status} " if status else "") + (lines[0] if lines else type(cause).__name__)
    text = text if cause is error else f"{error} {text}"
    for pattern in SECRETS.values():
        text = pattern.sub("(removed)", text)
    return text[:300]
