"""What must not leave this machine: tokens, keys, names of people and machines, paths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from safetensors import safe_open

SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|glpat-[\w-]{20,})"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password in a URL": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@"),
}
HOME = re.compile(r"(?:(?<![\w.~-])(?:file://)?/|(?:\.\./)+)(?:home|Users|root)/[\w.-]+")
"""A folder of a person, also by the way up from here."""

_COMMON_USERS = ("root", "user", "admin", "ubuntu", "debian", "runner", "test", "app", "data", "work", "home")
"""Accounts that name nobody."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Tokens were learned from text: whatever looks like a path there is a word that was frequent."""

_ABSOLUTE = re.compile(r"^(?:file://)?(?:~|/|[A-Za-z]:[\\/]|\\\\)|(?:^|[\\/])\.\.[\\/]")
"""A way up from the working folder tells as much as an absolute path."""

_URL = re.compile(r"\b(?!file:)[a-z][a-z0-9+.-]*://\S+")
_MAX_TEXT_BYTES = 64 << 20


def findings(folder: Path, words: Sequence[str] = ()) -> Iterator[str]:
    """Sentences on what is private in the files of a folder; secrets themselves are not repeated.

    Args:
        words: found as whole words, they are private as well: a host anywhere; a part of a path (`/users/ann`, `/ann`)
            outside of URLs, which belong to everybody.
    """
    hosts = [re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])") for word in words if word and word[0] != "/"]
    paths = [HOME, *(re.compile(rf"{re.escape(word)}(?![\w-])") for word in words if word[:1] == "/")]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        text = _text(path)
        for what, pattern in SECRETS.items():
            if pattern.search(text):
                yield f"{what} in {name}"
        if path.name in _VOCABULARIES:
            continue
        for place, patterns in ((text, hosts), (_URL.sub("", text), paths)):
            for match in filter(None, (pattern.search(place) for pattern in patterns)):
                yield f"{match[0]!r} in {name}"


def _text(path: Path) -> str:
    """What people can read of a file: all of a text, what libraries wrote beside the numbers of a weights file."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            return "\n".join([*(f"{k}={v}" for k, v in (file.metadata() or {}).items()), *file.keys()])
    with path.open("rb") as file:
        # Weights in other formats have their metadata in front.
        return file.read(_MAX_TEXT_BYTES).decode("utf-8", errors="replace")


def shortened(value: Any) -> Any:
    """Values of a recipe without passwords, queries and tokens, and with telling paths cut to their last part.

    >>> shortened({"path": ["/data/ann/corpus/*.txt", "corpora/*.txt"], "url": "https://ann:pw@host/x.txt?sig=1"})
    {'path': ['.../*.txt', 'corpora/*.txt'], 'url': 'https://host/x.txt'}
    """
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(item) for item in value]
    if not isinstance(value, str):
        return value
    for pattern in SECRETS.values():
        if pattern is not SECRETS["a password in a URL"]:
            value = pattern.sub("(removed)", value)
    if "://" in value and not value.startswith("file://"):
        parts = urlsplit(value)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if _ABSOLUTE.search(value):
        return f".../{PurePosixPath(value.replace(chr(92), '/')).name}"
    return value


def private_words(*, home: Path, working: Path, host: str, user: str = "") -> tuple[str, ...]:
    """Words that would tell where a model was made: two folders, a user's folder, the machine if its name is telling.

    >>> private_words(home=Path("/users/ann"), working=Path("/"), host="localhost", user="ann")
    ('/users/ann', '/ann')
    """
    folders = [str(path) for path in (home, working) if len(path.parts) > 1]
    # Alone, a name may be a word of the card; in a path it is a folder of theirs.
    users = [f"/{user}"] if len(user) > 2 and user not in _COMMON_USERS else []
    return (*dict.fromkeys([*folders, *users]), *([host] if len(host) > 3 and re.search(r"[\d.-]", host) else []))
