"""Where CVAT is and with which token: read from variables, and refused without showing a secret.

What is given on a command line can be seen by everybody on the machine, so a token is read from ADVCAM_CVAT_TOKEN
alone, and a database's password from ADVCAM_DB (`defectcam.feedback.store`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from defectcam.request import RequestError

TOKEN = "ADVCAM_CVAT_TOKEN"
SECRETS = (TOKEN, "ADVCAM_DB")  # variables that no process may hand on


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
    url, token = (environ.get(name, "").strip() for name in ("ADVCAM_CVAT_URL", TOKEN))
    return url and checked_url(url, "ADVCAM_CVAT_URL"), token and checked_token(token)
