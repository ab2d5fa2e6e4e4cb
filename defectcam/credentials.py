"""Where CVAT is and with which token: read from variables, refused without showing a secret, and sent by one HTTP client.

What is given on a command line can be seen by everybody on the machine, so a token is read from ADVCAM_CVAT_TOKEN
alone, and a database's password from ADVCAM_DB (`defectcam.feedback.store`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import httpx

from defectcam import __version__
from defectcam.settings import RequestError, read_variable

TOKEN = "ADVCAM_CVAT_TOKEN"


def checked_token(token: str) -> str:
    """A token without the white space around it, which comes with files of other systems.

    Raises:
        RequestError: it cannot be a token; the message does not show it.
    """
    token = token.strip()
    if not re.fullmatch("[!-~]+", token):
        raise RequestError(f"{TOKEN} must be letters, digits and signs without blanks in between")
    return token


def checked_url(url: str, source: str) -> str:
    """CVAT's address without white space around it and without a slash at its end.

    Args:
        source: the variable or option that it is from, for the message.

    Raises:
        RequestError: it is no address, or holds a user or password, which then is not shown.
    """
    url = url.strip()
    if "@" in url:
        raise RequestError(f"{source} holds a user or password: give the address alone, and the token as {TOKEN}")
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
        found = repr(url) if ":" in url else "no address"  # but maybe the token, in the wrong variable
        raise RequestError(f"{source} is {found}, but must be like http://cvat-server:8080")
    return url.rstrip("/")


def address_from(environ: Mapping[str, str]) -> tuple[str, str]:
    """ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN, "" where not set; RequestError as above."""
    url, token = (read_variable(environ, name) or "" for name in ("ADVCAM_CVAT_URL", TOKEN))
    return url and checked_url(url, "ADVCAM_CVAT_URL"), token and checked_token(token)


def is_login_key(token: str) -> bool:
    """Whether a token is a key of CVAT's own login, 40 hexadecimal digits; personal access tokens, of newer servers, are not."""
    return bool(re.fullmatch("[0-9a-f]{40}", token))


def http_client(url: str, token: str, source: str, retries: int = 0, **options: Any) -> httpx.Client:
    """A client for CVAT's address. It sends the token, and asks no proxy of the environment.

    Args:
        url, token: as checked above.
        source: the variable or option that the address is from, for the message.
        retries: of connections alone: a request that may have arrived is never sent twice.
        options: of `httpx.Client`.

    Raises:
        RequestError: the address or the file of SSL_CERT_FILE cannot be used; the message does not show the token.
    """
    scheme = "Token" if is_login_key(token) else "Bearer"
    headers = {"Authorization": f"{scheme} {token}", "User-Agent": f"defectcam/{__version__}"}
    try:
        transport = httpx.HTTPTransport(retries=retries)  # httpx takes proxies only for a transport that it makes itself
        return httpx.Client(base_url=url, headers=headers, transport=transport, **options)
    except OSError as error:  # of a certificate file
        file = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
        raise RequestError(f"SSL_CERT_FILE is {file!r}, which cannot be read as PEM: {error}") from None
    except httpx.InvalidURL as error:
        raise RequestError(f"{source} is {url!r}, which is no address: {error}") from None
