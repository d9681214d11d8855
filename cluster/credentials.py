"""What must not travel with a job: keys, tokens and passwords in files, settings and addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from datasets_prep.errors import UserError

_CURE = "keys reach a job through the environment of the cluster's nodes or their roles, never with it"
_NAMES = (
    *(".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", ".netrc", ".pypirc", ".git-credentials"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "kubeconfig", "auth_token", "ray_token"),
)
_SAMPLES = (".example", ".sample", ".template")
_PATTERNS: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("an AWS access key", re.compile(rb"\b(?:AKIA|ASIA)(?![0-9A-Z]*EXAMPLE)[0-9A-Z]{16}\b")),
    (
        "an AWS secret key",
        re.compile(rb"(?i)secret_?access_?key[\"']?\s*[:=]\s*[\"']?(?![\w/+]*EXAMPLE)[a-z0-9/+]{40}(?![a-z0-9/+])"),
    ),
    ("a private key", re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/]{16}")),
    ("a GitHub token", re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50})")),
    ("a GitLab token", re.compile(rb"\bglpat-[A-Za-z0-9_-]{20}")),
    ("a Hugging Face token", re.compile(rb"\bhf_[A-Za-z0-9]{30}")),
    ("a Slack token", re.compile(rb"\bxox[abprs]-[0-9]{8,}-[A-Za-z0-9-]{12}")),
    ("a Google API key", re.compile(rb"\bAIza[A-Za-z0-9_-]{35}")),
    ("an API key", re.compile(rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32}")),
    ("a JSON web token", re.compile(rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10}")),
)
_VARIABLE = re.compile(r"SECRET|PASSWORD|TOKEN$|_KEY$|KEY_ID$")
_IN_QUERY = re.compile(r"signature|^sig$|token|secret|password|api_?key|credential", re.IGNORECASE)
_SHORTEST = 16  # characters of a variable's value that is looked for: shorter ones occur by chance


def own_secrets(env: Mapping[str, str]) -> dict[str, bytes]:
    """Secret values that an environment holds, Ray's token file included, by the variable's name."""
    values = {name: value for name, value in env.items() if _VARIABLE.search(name)}
    path = Path(env.get("RAY_AUTH_TOKEN_PATH", ""))
    if path.is_file():
        values["RAY_AUTH_TOKEN_PATH"] = path.read_text().strip()
    return {name: value.encode() for name, value in values.items() if len(value) >= _SHORTEST}


def check_file(name: str, data: bytes, own: Mapping[str, bytes]) -> None:
    """Refuse a file that holds, or by its name would hold, what gives access to something.

    Args:
        name: '/'-separated path in the package.
        data: its contents.
        own: secrets by name, as of `own_secrets`.

    Raises:
        UserError: naming file, line and kind, never the secret.
    """
    base = PurePosixPath(name).name
    if any(fnmatch(base, pattern) for pattern in _NAMES) and not base.endswith(_SAMPLES):
        raise UserError(
            f"the package would hold {name}, by its name a file of secrets: "
            f"`git rm --cached {name}` and add it to .gitignore; {_CURE}"
        )
    for what, at in _found(data, own):
        line = data.count(b"\n", 0, at) + 1
        raise UserError(f"the package would hold {what}, in line {line} of {name}: take it out and revoke it; {_CURE}")


def _found(data: bytes, own: Mapping[str, bytes]) -> Iterator[tuple[str, int]]:
    for what, pattern in _PATTERNS:
        if match := pattern.search(data):
            yield what, match.start()
    for variable, value in own.items():
        if (at := data.find(value)) >= 0:
            yield f"the value of {variable}", at


def check_settings(tree: Any, path: str = "") -> None:
    """Refuse settings with a secret in them, by name or by value, be it in an address: they are shown, logged and kept.

    Raises:
        UserError: naming the setting, never the secret.
    """
    if isinstance(tree, Mapping):
        for name, value in cast(Mapping[str, Any], tree).items():
            below = f"{path}.{name}" if path else name
            if _VARIABLE.search(name):
                raise UserError(f"{below} is by its name a secret, and settings are logged: take it out; {_CURE}")
            check_settings(value, below)
    elif isinstance(tree, list | tuple):
        for value in cast(list[Any], tree):
            check_settings(value, path)
    elif isinstance(tree, str):
        check_address(path, tree)
        for what, _ in _found(tree.encode(), {}):
            raise UserError(f"{path} holds {what}, and settings are logged: take it out; {_CURE}")


def check_address(name: str, uri: str) -> None:
    """Refuse an address with a password, a signature or a token in it.

    Raises:
        UserError: naming setting or variable, and the address without the secret.
    """
    if "://" not in uri:
        return
    parts = urlsplit(uri)
    user, _, host = parts.netloc.rpartition("@")
    keyed = ":" in user or user and parts.scheme not in ("abfss", "abfs", "hdfs")  # of which a user is no secret
    signed = [key for key, _ in parse_qsl(parts.query) if _IN_QUERY.search(key)]
    if keyed or signed:
        what = f"the query {signed[0]}=…" if signed else "a user and password"
        raise UserError(
            f"{name}={parts.scheme}://{host}{parts.path} was given with {what}, and addresses are logged: "
            f"leave it out; {_CURE} (AWS_…, MLFLOW_TRACKING_USERNAME and _PASSWORD)"
        )
