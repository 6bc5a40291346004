"""Fetches a file over HTTP so that a broken connection costs only what was not yet received."""

import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from conet_jax.errors import InputError

# The paper's Amazon pair: "the two largest categories", books as the target (Section 3.1).
_AMAZON = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
URLS = {
    "amazon": {
        "target": _AMAZON + "ratings_Books.csv",
        "source": _AMAZON + "ratings_Movies_and_TV.csv",
    }
}
_CHUNK = 1 << 20
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be gone on the next attempt


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            _check_scheme(newurl)
        except InputError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(
    url: str,
    path: str | os.PathLike,
    *,
    retries: int = 5,
    timeout: float = 60.0,
    wait: Callable[[float], None] = time.sleep,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Downloads ``url`` to ``path``, resuming what an earlier attempt or call has left.

    The data goes to ``path`` with ``.part`` appended and is renamed when its size is the one that
    the server announced; a file that is already at ``path`` is taken as complete. If the file on
    the server has changed in between (by its ETag or date), the download starts afresh.

    Args:
      url: http or https.
      path: where the file is to stand.
      retries: attempts in a row that bring nothing before it is given up.
      timeout: seconds without an answer after which an attempt has failed.
      wait: called with the seconds to wait before the next attempt.
      say: called with a line of text before each such wait.

    Raises:
      InputError: the address is wrong, the server refuses, or the attempts are used up.
    """
    _check_scheme(url)
    path = Path(path)
    if path.exists():
        return
    part, fruitless = path.with_name(path.name + ".part"), 0
    most = _size(part)  # a server that cannot resume starts over: only a new record is progress
    opener = urllib.request.build_opener(_HttpOnly)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if _attempt(opener, url, part, timeout):
                part.rename(path)
                _tag(part).unlink(missing_ok=True)
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"status {error.code} {error.reason}"
            if error.code not in _PASSING:
                raise InputError(f"{url}: cannot be downloaded: {reason}") from error
        except _BROKEN as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        fruitless = 0 if _size(part) > most else fruitless + 1
        most = max(most, _size(part))
        if fruitless > retries:
            raise InputError(
                f"{url}: cannot be downloaded: {reason}, {fruitless} attempts in a row; the same "
                f"command goes on where this one stopped ({_size(part):,} bytes so far)"
            )
        seconds = min(2.0**fruitless, 30.0)
        say(f"{reason}; attempts left: {retries - fruitless + 1}, the next in {seconds:.0f} s")
        wait(seconds)


def _attempt(opener: urllib.request.OpenerDirector, url: str, part: Path, timeout: float) -> bool:
    """One request; whether the file is complete now."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"}
    tag = _tag(part).read_text() if _tag(part).exists() else ""
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        if _content_range(error.headers)[1] == have:  # all was there, but for the renaming
            return True
        part.unlink()
        return False
    with answer:
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
            start, total = _content_range(answer.headers)
            if start != have:
                raise http.client.HTTPException(f"range from {start} where {have} was asked for")
        else:
            length = answer.headers["Content-Length"]
            have, total = 0, int(length) if length and length.isdigit() else None
            # What cannot be recognised as the same file later cannot be resumed.
            etag = answer.headers["ETag"] or ""
            strong = etag if not etag.startswith("W/") else ""
            _tag(part).write_text(strong or answer.headers["Last-Modified"] or "")
        with open(part, "ab" if have else "wb") as file:
            shutil.copyfileobj(answer, file, _CHUNK)
    # Without an announced size a clean end of the (chunked) answer is all there is to go by.
    if total is not None and _size(part) > total:
        part.unlink()
        raise http.client.HTTPException("more data than announced")
    return total is None or _size(part) == total


def _content_range(headers: http.client.HTTPMessage) -> tuple[int, int | None]:
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers["Content-Range"] or "")
    if found is None:
        return -1, None
    start, total = found.groups()
    return int(start or -1), None if total == "*" else int(total)


def _check_scheme(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"{url}: only http and https addresses are fetched")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")
