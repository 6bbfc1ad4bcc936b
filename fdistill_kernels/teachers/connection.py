"""A server over HTTP: so many requests at a time, each timed as a whole, and tried again after ever longer waits."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import os
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

from ..provenance import install
from .readers import Misfit

#: Seconds before the second try, doubled for each further one up to the longest; each is multiplied by 0.5 to 1.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
#: Characters of a server's message, which may be a whole reply.
LONGEST_MESSAGE = 500
#: Seconds between two lines of the log.
LINE_EVERY = 5.0
LOG = logging.getLogger("fdistill_kernels.endpoint")
#: How vLLM and SGLang say that a sequence, and what each of them needs after it, are too long.
TOO_LONG = re.compile(
    r"context (length|window)|maximum (model|allowed) length|max_tokens must be at least", re.IGNORECASE
)


class EndpointError(RuntimeError, ConnectionError):
    """The server refused a sequence (`status`: its HTTP status), or did not answer in any try (0)."""

    def __init__(self, what: str, status: int = 0):
        super().__init__(what)
        self.status = status


class Connection:
    """The arguments are those of `Endpoint`."""

    def __init__(
        self, url: str, api_key: str | None, concurrency: int, timeout: float, retries: int, first_wait: float
    ):
        try:
            import anyio  # noqa: F401
            import httpx
        except ImportError as error:
            raise ImportError(f"Endpoint needs the package {error.name}: {install('served')}") from error
        self.url, self.auth = _address(url)
        self.where = self.url + _by_proxy(self.url)  # for errors
        if self.auth and api_key:
            raise ValueError(f"{self.url}: either api_key or the url's user and password, of which a request sends one")
        self.headers = {} if self.auth else _authorization(api_key)
        self.timeout, self.retries, self.first_wait = timeout, retries, first_wait
        self.client = httpx.AsyncClient(
            timeout=None, limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            auth=self.auth, headers=self.headers,
        )  # fmt: skip  # each request is timed as a whole: a reply that trickles would never time out
        self.places = asyncio.Semaphore(concurrency)
        self._not_before, self._next_line, self._untold = 0.0, 0.0, 0

    async def until_it_fits(
        self, what: str, once: Callable[[], Awaitable[Any]], tokens: int = 0, spare: int = 1
    ) -> Any:
        """The result of `once`, which is tried again after ever longer waits. A Retry-After holds for all requests.

        tokens, spare: the length of the sequence, and how much longer the server's context must be, which the error
            says if it is too short.
        """
        import anyio

        for tries in range(1, self.retries + 2):
            try:
                async with self.places:
                    while (rest := self._not_before - time.monotonic()) > 0:
                        await asyncio.sleep(rest)
                    with anyio.fail_after(self.timeout):
                        return await once()
            except Misfit as error:
                happened = str(error)
            except TimeoutError:
                happened = f"no whole reply within {self.timeout} s"
            except EndpointError as error:
                said = str(error)
                if tokens and error.status == 400 and TOO_LONG.search(said):
                    longer = "one token" if spare == 1 else f"{spare} tokens"
                    said += (f" (the server's context must be at least {longer} longer than the longest sequence: "
                             f"{tokens + spare} for this one)")  # fmt: skip
                raise EndpointError(f"{what}: {said} ({self.where})", error.status) from error
            if tries <= self.retries:
                await self._wait(what, happened, tries)
        raise EndpointError(f"{what}: given up after {tries} tries at {self.where}: {happened}")

    async def _wait(self, what: str, happened: str, tries: int) -> None:
        """Waits after so many tries, of which the log has a line every few seconds."""
        wait = _pause(self.first_wait, tries) * random.uniform(0.5, 1)
        wait = max(wait, self._not_before - time.monotonic())
        self._untold += 1
        if time.monotonic() >= self._next_line:
            more = f" (and {self._untold - 1} other retries since the last line)" if self._untold > 1 else ""
            LOG.warning("%s: %s; try %d of %d in %.3g s%s", what, happened, tries + 1, self.retries + 1, wait, more)
            self._next_line, self._untold = time.monotonic() + LINE_EVERY, 0
        await asyncio.sleep(wait)

    async def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request's reply as an object; GET without a body. What another try may mend is a Misfit."""
        import httpx

        try:
            reply = await self.client.request("GET" if body is None else "POST", self.url + path, json=body)
        except httpx.RequestError as error:
            raise Misfit(f"the connection broke: {error!r}") from error
        if reply.status_code != 200:
            said, after = f"status {reply.status_code}: {message_of(reply)}", _seconds(reply.headers.get("Retry-After"))
            if to := reply.headers.get("Location"):
                said += f" (it redirects to {without_credentials(to)}, which is not followed)"
            if reply.status_code not in (408, 429) and reply.status_code < 500:
                raise EndpointError(f"the server refuses it with {said}", reply.status_code)
            if after > self.timeout:
                raise EndpointError(f"the server asks to wait {after:g} s, with {said}", reply.status_code)
            self._not_before = max(self._not_before, time.monotonic() + after)
            raise Misfit(said)
        try:
            found = reply.json()
        except (ValueError, RecursionError) as error:
            raise Misfit(f"a body of {len(reply.content)} bytes that is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise Misfit("it is no JSON object")
        if found.get("error") or found.get("object") == "error":  # with status 200
            raise Misfit(f"the server says: {message_of(reply)}")
        return found


def _pause(first: float, tries: int) -> float:
    """Seconds to wait at most after so many tries."""
    return min(first * 2.0 ** min(tries - 1, 64), LONGEST_WAIT)  # 2¹⁰²⁴ is no float


def message_of(reply: Any) -> str:
    """The server's error message, in the forms of vLLM, SGLang and FastAPI."""
    try:
        found = reply.json()
        found = next((found[name] for name in ("error", "message", "detail") if found.get(name)), found)
        return str(found.get("message", found) if isinstance(found, dict) else found)[:LONGEST_MESSAGE]
    except (ValueError, AttributeError, RecursionError):
        return reply.text[:LONGEST_MESSAGE]


def _address(url: str) -> tuple[str, tuple[str, str] | None]:
    """A server's url without /v1, user and password; and these two."""
    if not isinstance(url, str):
        raise TypeError(f"the url must be text, not {type(url).__name__}")
    shown = without_credentials(url)
    try:
        parts = urllib.parse.urlsplit(url)
        there = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:  # a port of other things than digits
        there = False
    if not there:
        raise ValueError(f"the url must begin with http:// or https:// and a host, without spaces: {shown!r}")
    if set("?#") & set(url):
        raise ValueError(f"the url must end with the server's path, without ?query and #fragment: {shown!r}")
    user, at, host = parts.netloc.rpartition("@")
    auth = tuple(map(urllib.parse.unquote, user.partition(":")[::2]))
    bare = urllib.parse.urlunsplit(parts._replace(netloc=host))
    return bare.rstrip("/").removesuffix("/v1"), auth if at else None  # type: ignore[return-value]


def _by_proxy(url: str) -> str:
    """What an error says of the environment's proxy, which httpx asks, too."""
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return f", by the environment's proxy {without_credentials(proxy)} (NO_PROXY leaves servers out)"


def without_credentials(url: str) -> str:
    """A url as errors and files may have it, without user and password."""
    return re.sub(r"^([^/]*//)?.*@", r"\1", url)


def _authorization(api_key: str | None) -> dict[str, str]:
    """The header of a key; ValueError or TypeError, which do not show it, for what no header can have."""
    if api_key is None:
        api_key = os.environ.get("FDISTILL_API_KEY")
    if api_key is not None and not isinstance(api_key, str):
        raise TypeError(f"api_key must be text, not {type(api_key).__name__}")
    if api_key and not re.fullmatch(r"[!-~]+", api_key):
        raise ValueError("api_key has spaces, line breaks or letters that are not ASCII; of a key that was read from a "
                         "file give .strip()")  # fmt: skip
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _seconds(after: str | None) -> float:
    """Seconds to wait by a Retry-After header, which has seconds or a date."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(after or 0))
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(after or "").timestamp() - time.time())
    return 0.0
