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
from pydantic import TypeAdapter, ValidationError

from defectcam.credentials import TOKEN, checked_token, checked_url, http_client, is_login_key
from defectcam.cvat_answers import Page, T
from defectcam.settings import RequestError, read_variable
from defectcam.validation import first_problem

TIMEOUT_S = 120
CONNECT_RETRIES = 3
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
        self._token = checked_token(token)
        self.has_login_key = is_login_key(self._token)
        self._client = http_client(self.url, self._token, "--url", CONNECT_RETRIES, timeout=TIMEOUT_S)
        self._client.headers["Accept"] = "application/vnd.cvat+json, application/json, */*"
        if organisation:
            if not re.fullmatch(r"[\w.-]+", organisation, re.ASCII):
                raise RequestError(f"--org is {organisation!r}, but must be the organisation's short name, such as bridges")
            self._client.headers["X-Organization"] = organisation

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
        raise CvatError(f"{where}: {self._text(response)[:SHOWN_CHARACTERS]}")

    def json(self, path: str, kind: type[T] = dict) -> T:
        """CVAT's answer to GET; arguments and errors as of `read`."""
        return self.read(path, self.request("GET", path), kind)

    def patch(self, path: str, body: dict) -> dict:
        """CVAT's answer to a PATCH; errors as of `read`."""
        return self.read(path, self.request("PATCH", path, json=body), dict)

    def read(self, path: str, response: httpx.Response, kind: type[T]) -> T:
        """What an answer of status 200 holds.

        Args:
            kind: what it must be, such as one of `defectcam.cvat_answers`, dict or list[dict].

        Raises:
            CvatError: another status, no JSON, or a field that is missing or of another type; names the address.
        """
        self.check(path, response, 200)
        text = self._text(response)
        try:
            return TypeAdapter(kind).validate_json(text)
        except ValidationError as error:
            odd = f"{text[:60]} ({first_problem(error)})"
            if error.errors()[0]["type"] == "json_invalid":
                html = "html" in response.headers.get("Content-Type", "") or text.lstrip().startswith("<")
                odd = f"{'a web page and no JSON' if html else 'no JSON'} ({text!r:.60})"
            raise CvatError(f"{self.url}{path} answers {odd}: is this CVAT's address?") from None

    def pages(self, path: str, kind: type[T] = dict) -> list[T]:
        """All results of a list, page by page.

        The link to the next page may name a host or a scheme that only the server knows, and lack the path in which a
        proxy serves CVAT. So only its query is used.

        Raises:
            CvatError: as of `read`.
        """
        results: list[T] = []
        here, asked = path, set()
        while here and here not in asked:
            asked.add(here)
            page = self.json(here, Page[kind])
            results += page.results
            query = urlsplit(page.next or "").query
            here = query and f"{path.partition('?')[0]}?{query}"
        return results

    def path_of(self, link: str) -> str:
        """A link of an answer as `request` takes it: from "/api" on, whatever host and proxy it names."""
        parts = urlsplit(link)
        path = parts.path.removeprefix(urlsplit(self.url).path)
        return f"{path}?{parts.query}" if parts.query else path

    def _text(self, response: httpx.Response) -> str:
        """An answer without the token: a server's error page may repeat what it was sent."""
        return response.text.replace(self._token, "...")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--org`; and a `--token` that is refused, since others see what is on the command line."""

    class Refused(argparse.Action):
        def __call__(self, parser, *_) -> None:
            parser.error(f"others can see what is on the command line: give the token as {TOKEN}, not by --token")

    url = read_variable(os.environ, "ADVCAM_CVAT_URL") or ""
    parser.add_argument("--url", default=url, help=f"CVAT's (default: $ADVCAM_CVAT_URL); the token is read from ${TOKEN}")
    parser.add_argument("--org", default="", metavar="NAME", help="short name of the organisation, if the tasks have one")
    parser.add_argument("--token", action=Refused, help=argparse.SUPPRESS)


def client_of(args: argparse.Namespace) -> CvatClient:
    """The client for the CVAT that `add_server_options` and the environment name.

    Raises:
        RequestError: none is named, or not well.
    """
    token = read_variable(os.environ, TOKEN)
    if not (args.url.strip() and token):
        raise RequestError(f"give --url (or ADVCAM_CVAT_URL), and a token as {TOKEN}")
    return CvatClient(args.url, token, args.org)
