"""The REST client for CVAT: token, organisation, pages, and errors that name a remedy.

It uses only endpoints that CVAT 2.15 and 2.73 share. cvat-sdk refuses servers of another age than its own.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any
from urllib.parse import urlsplit

import httpx

from defectcam.credentials import TOKEN, checked_token, checked_url
from defectcam.request import RequestError

TIMEOUT_S = 120
CONNECT_RETRIES = 3  # of connections alone: a request that may have arrived is never sent twice
SHOWN_CHARACTERS = 200  # of an answer that is no answer
CERTIFICATE_REMEDY = (
    "its certificate is not trusted: set SSL_CERT_FILE to a PEM file with the certificate of the server or of its authority"
)


class CvatError(RuntimeError):
    """CVAT cannot be read or changed; the message says what failed and what to do."""


class CvatClient:
    """Requests to one CVAT server.

    Args:
        url: as in the browser, http://host:port, perhaps with a path in which a proxy serves CVAT.
        token: of a user who may see the tasks: a key of CVAT's login or a personal access token.
        organisation: short name of the organisation to work in, "" for whatever the user may see.

    Attributes:
        has_login_key: whether the token is a key of CVAT's login.

    Raises:
        RequestError: url, token or organisation cannot be one; the message does not show a token.
    """

    def __init__(self, url: str, token: str, organisation: str = "") -> None:
        self.url = checked_url(url, "--url")
        self._token = token = checked_token(token)
        # Keys of CVAT's own login are 40 hex digits; personal access tokens, which newer servers have, are not.
        self.has_login_key = bool(re.fullmatch("[0-9a-f]{40}", token))
        scheme = "Token" if self.has_login_key else "Bearer"
        headers = {"Authorization": f"{scheme} {token}", "Accept": "application/vnd.cvat+json, application/json, */*"}
        if organisation:
            if not re.fullmatch(r"[\w.-]+", organisation, re.ASCII):
                raise RequestError(f"--org is {organisation!r}, but must be the organisation's short name, such as bridges")
            headers["X-Organization"] = organisation
        try:
            transport = httpx.HTTPTransport(retries=CONNECT_RETRIES)
        except OSError as error:  # of a certificate file
            file = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
            raise RequestError(f"SSL_CERT_FILE is {file!r}, which cannot be read as PEM: {error}") from None
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, transport=transport)
        except httpx.InvalidURL as error:
            raise RequestError(f"--url is {self.url!r}, which is no address: {error}") from None

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """CVAT's answer of any status.

        Args:
            path: from "/api" on, with its query.
            options: of httpx: params, json, data, files, headers.

        Raises:
            CvatError: the server cannot be reached, or its certificate is not trusted.
        """
        try:
            # A redirection is followed without the token. That of a change would become a mere question: `check` refuses it.
            return self._client.request(method, path, follow_redirects=method == "GET", **options)
        except httpx.HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise CvatError(f"{self.url} cannot be reached: {CERTIFICATE_REMEDY} ({error})") from error
            raise CvatError(f"{self.url} cannot be reached: {error}; check --url (or ADVCAM_CVAT_URL)") from error

    def checked(self, method: str, path: str, *statuses: int, **options: Any) -> httpx.Response:
        """CVAT's answer of one of some statuses; CvatError for any other, with its remedy."""
        response = self.request(method, path, **options)
        self.check(path, response, *statuses)
        return response

    def check(self, path: str, response: httpx.Response, *statuses: int) -> None:
        """Refuse an answer of another status than these.

        Raises:
            CvatError: names address, status and remedy.
        """
        status = response.status_code
        if status in statuses:
            return
        where = f"{self.url}{path} answers {status}"
        if status in (401, 403):
            is_change = response.request.method != "GET"
            may = "change this (owner, assignee, administrator)" if is_change else "see these tasks"
            raise CvatError(f"{where}: give a valid token ({TOKEN}) of a user who may {may}")
        if response.is_redirect:
            parts = urlsplit(response.headers.get("Location", ""))
            raise CvatError(f"{where}: it sends to {parts.scheme}://{parts.netloc}; give that address as --url")
        raise CvatError(f"{where}: {self._shown(response)}")

    def json(self, path: str, *keys: str) -> dict:
        """CVAT's answer to GET, a JSON object.

        Args:
            keys: that it must have.

        Raises:
            CvatError: another status, no JSON, no object, or a key is missing.
        """
        return self._object(path, self.checked("GET", path, 200), keys)

    def patch(self, path: str, body: dict, *keys: str) -> dict:
        """CVAT's answer to a PATCH, a JSON object; arguments and errors as of `json`."""
        return self._object(path, self.checked("PATCH", path, 200, json=body), keys)

    def objects(self, path: str, response: httpx.Response) -> list[dict]:
        """The JSON list of objects that an answer of status 200 holds; errors as of `json`."""
        self.check(path, response, 200)
        answer = self._parsed(path, response)
        if not isinstance(answer, list) or not all(isinstance(one, dict) for one in answer):
            raise CvatError(f"{self.url}{path} answers {self._shown(response):.60}, no list: is this CVAT's address?")
        return answer

    def pages(self, path: str) -> list[dict]:
        """All results of a list, page by page.

        The link to the next page may name a host or a scheme that only the server knows, and lack the path in which a
        proxy serves CVAT. So only its query is used.

        Raises:
            CvatError: as of `json`.
        """
        results: list[dict] = []
        here, asked = path, set()
        while here and here not in asked:
            asked.add(here)
            page = self.json(here, "results")
            results += page["results"]
            query = urlsplit(page.get("next") or "").query
            here = query and f"{path.partition('?')[0]}?{query}"
        return results

    def path_of(self, link: str) -> str:
        """A link of an answer as `request` takes it: from "/api" on, whatever host and proxy it names."""
        parts = urlsplit(link)
        path = parts.path.removeprefix(urlsplit(self.url).path)
        return f"{path}?{parts.query}" if parts.query else path

    def _parsed(self, path: str, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            html = "html" in response.headers.get("Content-Type", "") or response.text.lstrip().startswith("<")
            what = "a web page and no JSON" if html else "no JSON"
            shown = f"{self._shown(response)!r:.60}"
            raise CvatError(f"{self.url}{path} answers {what} ({shown}): is this CVAT's address?") from None

    def _object(self, path: str, response: httpx.Response, keys: tuple[str, ...]) -> dict:
        answer = self._parsed(path, response)
        missing = [key for key in keys if not isinstance(answer, dict) or key not in answer]
        if not isinstance(answer, dict) or missing:
            lacks = f" without {missing[0]!r}" if missing else ", no object"
            raise CvatError(f"{self.url}{path} answers {self._shown(response):.60}{lacks}: is this CVAT's address?")
        return answer

    def _shown(self, response: httpx.Response) -> str:
        """The beginning of an answer without the token: a server's error page may repeat what it was sent."""
        return response.text.replace(self._token, "...")[:SHOWN_CHARACTERS]


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--org`; and a `--token` that is refused, since others see what is on the command line."""

    class Refused(argparse.Action):
        def __call__(self, parser, *_) -> None:
            parser.error(f"others can see what is on the command line: give the token as {TOKEN}, not by --token")

    url = os.environ.get("ADVCAM_CVAT_URL", "")
    parser.add_argument("--url", default=url, help=f"CVAT's (default: $ADVCAM_CVAT_URL); the token is read from ${TOKEN}")
    parser.add_argument("--org", default="", metavar="NAME", help="short name of the organisation, if the tasks have one")
    parser.add_argument("--token", action=Refused, help=argparse.SUPPRESS)


def client_of(args: argparse.Namespace) -> CvatClient:
    """The client for the CVAT that `add_server_options` and the environment name.

    Raises:
        RequestError: none is named, or not well.
    """
    token = os.environ.get(TOKEN, "")
    if not (args.url.strip() and token.strip()):
        raise RequestError(f"give --url (or ADVCAM_CVAT_URL), and a token as {TOKEN}")
    return CvatClient(args.url, token, args.org)
