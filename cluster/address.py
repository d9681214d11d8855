"""Ray's HTTP interface at an address: asked with token and TLS, and what is wrong when it gives no answer."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_prep.errors import UserError

_SECONDS = 5.0
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")  # of requests, of curl, of OpenSSL


@dataclass(frozen=True)
class Versions:
    """What the head of a cluster runs, such as 2.60.0 and 3.11.2."""

    ray: str
    python: str


def token(env: Mapping[str, str]) -> str | None:
    """Find Ray's token as Ray itself does: variable, named file, file in the home folder.

    Raises:
        UserError: what is found there is no token; the message does not repeat it.
    """
    if env.get("RAY_AUTH_MODE", "token") != "token":
        return None
    found, where = env.get("RAY_AUTH_TOKEN"), "RAY_AUTH_TOKEN"
    if not found:
        path = Path(env.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        found, where = path.read_text(errors="replace").strip() if path.is_file() else None, str(path)
    if found and not (found.isascii() and found.isprintable() and " " not in found):
        raise UserError(
            f"{where} holds no token, which is one word of ASCII: `ray get-auth-token` prints the right one"
        )
    return found


def ca_file(env: Mapping[str, str]) -> str | None:
    """File or folder of the certificate authorities to trust, None for the system's own.

    Raises:
        UserError: a variable names none that exists.
    """
    for name in CA_VARIABLES:
        if path := env.get(name):
            if not os.path.exists(path):
                raise UserError(f"{name}={path} does not exist: name the file of the cluster's certificate authority")
            return path
    return None


def nodes(address: str, env: Mapping[str, str]) -> list[dict[str, Any]]:
    """Nodes of the cluster whose dashboard is at `address`, dead ones included; the answer proves address and token."""
    answer = ask(address, "/api/v0/nodes?detail=true", env)
    try:
        return answer["data"]["result"]["result"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{address} answers, but not as Ray's dashboard does: correct the address") from error


def versions(address: str, env: Mapping[str, str]) -> Versions:
    """Versions of Ray and Python that the cluster was started with."""
    told = ask(address, "/api/v0/cluster_metadata", env)["data"]
    return Versions(told["rayVersion"], told["pythonVersion"])


def ask(address: str, path: str, env: Mapping[str, str]) -> Any:
    """JSON that Ray answers at `path`.

    Args:
        address: of the dashboard, http://host:port or https://host:port.
        path: with its query.
        env: where token and certificate authority are looked up.

    Raises:
        UserError: nothing answers, it refuses the token, or its certificate is not trusted.
    """
    request = urllib.request.Request(address + path)
    if found := token(env):
        request.add_header("Authorization", f"Bearer {found}")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS, context=_tls(address, env)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise UserError(_refused(address, error.code, found is not None)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(_unanswered(address, getattr(error, "reason", error))) from error


def _tls(address: str, env: Mapping[str, str]) -> ssl.SSLContext | None:
    if not address.startswith("https://"):
        return None
    path = ca_file(env)
    folder = path is not None and os.path.isdir(path)
    try:
        return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    except ssl.SSLError as error:
        raise UserError(f"{path} holds no certificates ({error.reason}): name a PEM file") from error


def _refused(address: str, status: int, had_token: bool) -> str:
    if status in (401, 403):
        if had_token:
            return f"Ray at {address} refused the token: correct RAY_AUTH_TOKEN, or the file of RAY_AUTH_TOKEN_PATH"
        return f"Ray at {address} asks for a token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"
    return f"{address} answered {status}: is this the address of Ray's dashboard?"


def _unanswered(address: str, reason: Any) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {address} is not trusted ({reason.verify_message}): set REQUESTS_CA_BUNDLE to the PEM "
            "file of the authority that signed it, and use the host name that it was made for"
        )
    if isinstance(reason, ssl.SSLError):
        return f"{address} does not speak TLS ({reason.reason}): write http://, or ask for a port that does"
    tls = "" if address.startswith("https://") else ", or write https:// if it speaks TLS"
    return f"no Ray cluster at {address} ({reason}): check host and port of its dashboard{tls}"
