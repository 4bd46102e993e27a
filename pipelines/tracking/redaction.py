"""Removal of credentials from everything that is recorded."""

import os
import re
from typing import Any

import yaml

_SECRET_KEY = r"[\w.-]*(?:passw|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential)[\w.-]*"
_SECRET = re.compile(
    r"(?<=://)[^\s/@'\"]+(?=@)"  # user:password@ in an address
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\b(?:gh[pousr]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{16,})"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r"|(?<=Bearer )[\w.~+/=-]{12,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----|[\s\S]*)"
)
# In code, in shell scripts, in addresses: `api_key: str = "…"`, `TOKEN=…`, `--password …`.
_SECRET_ASSIGNED = re.compile(
    rf"""((?:{_SECRET_KEY}["']?\]?(?:\s*:[\w. |\[\]]{{1,40}}?(?==))?\s*[:=]\s*)|--{_SECRET_KEY}\s+)"""
    r"""(?:(["'])(?:(?!\2).)+\2|[^\s"'(){}\[\],;&]{6,}+(?!\())""",
    re.IGNORECASE,
)


def redact(value: Any, key: str = "") -> Any:
    """Replaces whatever looks like a credential by ``***``.

    Args:
        value: text, or nested dictionaries and lists.
        key: the name it goes by; one such as ``api_key`` makes a credential of any text.

    Returns:
        The same without credentials.
    """
    if isinstance(value, dict):
        return {name: redact(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, key) for inner in value]
    secret = re.search(_SECRET_KEY, key, re.IGNORECASE)
    if secret and isinstance(value, int | float) and not isinstance(value, bool) and "token" not in key.lower():
        return "***"  # but `num_tokens` is a number
    if not isinstance(value, str) or not value:
        return value
    if secret:
        return "***"
    for name in list(os.environ):  # of which a thread of MLflow's may take one away meanwhile
        known = os.environ.get(name, "")
        if len(known) >= 8 and re.search(_SECRET_KEY, name, re.IGNORECASE):
            value = value.replace(known, "***")
    return _SECRET_ASSIGNED.sub(r"\1***", _SECRET.sub("***", value))


def redact_yaml(text: str) -> str:
    """Redacts a YAML document; unchanged if there is nothing to hide."""
    plain = yaml.safe_load(text)
    hidden = redact(plain)
    return text if hidden == plain else yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def without_login(uri: str) -> str:
    """Removes user and password from a URL."""
    return re.sub(r"(?<=://)[^\s/]*@", "", uri)
