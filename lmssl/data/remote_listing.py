"""What servers say of files: which there are, how large they are, and what tells their versions apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from lmssl.errors import DataError

_VERSION_KEYS = (
    *("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "last_modified"),
    *("updated", "mtime"),
)


def file_system(url: str, silence_seconds: float) -> Any:
    """The file system of a URL; a web server may be silent for so long while it connects or answers.

    The libraries of the other schemes have such limits; for the web there is but one of five minutes for all of a
    request, which would stop a slow download that gets on, and leaves no time to try again after a server that hangs.
    """
    import fsspec

    options = {}
    if _is_web(url):
        from fsspec.implementations import http

        # Of the library that fsspec asks the web with, which is not a requirement of ours.
        limit = http.aiohttp.ClientTimeout(total=None, sock_connect=silence_seconds, sock_read=silence_seconds)
        options["client_kwargs"] = {"timeout": limit}
    return fsspec.core.url_to_fs(str(url), use_listings_cache=False, **options)[0]


def listed(system: Any, url: str, is_wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Infos of files by URL; a web server's lists have no sizes."""
    system.invalidate_cache()
    if _is_web(url):
        found = _listed_on_web(system, url)
    elif any(sign in url for sign in "*?["):
        found = system.glob(url, detail=True)
    elif system.isfile(url):
        found = {url: system.info(url)}
    else:
        found = {name: info for name, info in system.find(url, detail=True).items() if is_wanted(name)}
    files = {name: info for name, info in found.items() if info.get("type") != "directory"}
    if not files:
        raise FileNotFoundError(url)
    return {system.unstrip_protocol(name): info for name, info in files.items()}


def version_of(info: dict[str, Any]) -> str:
    """Size and what else tells two versions of a file apart, as `records.file_version` puts it."""
    mark = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return f"{info.get('size')}.{mark.strip(chr(34))}"


def _listed_on_web(system: Any, url: str) -> dict[str, dict[str, Any]]:
    """A file, or what a pattern matches of the links on the page of its folder; a question mark begins a query."""
    folder, _, name = urlsplit(url).path.rpartition("/")
    if any(sign in folder for sign in "*["):
        raise DataError(
            "a web server's folders cannot be searched; only the name of a file may be a pattern",
            where=url,
            remedy="give one pattern for each folder",
        )
    if any(sign in name for sign in "*["):
        # Else a server that fails while it lists would be taken for one without files.
        found: dict[str, dict[str, Any]] = system.glob(url, detail=True, on_error="raise")
        return found
    return {url: system.info(url)}


def _is_web(url: str) -> bool:
    return url.startswith("http")
