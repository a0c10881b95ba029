"""Takes secrets out of what is about to be recorded somewhere that other people read.

Three signs give a secret away: the name it goes by, the shape it has inside a longer text, and being the
value of an environment variable with such a name. When in doubt it is taken out.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

_CERTAIN = re.compile(
    "password|passwd|passphrase|secret|credential|apikey|accesskey|privatekey|accesstoken|authtoken|authorization"
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_IN_TEXT = (
    # user:password@ (or token@) in a URI; database URIs allow a slash in the password
    (re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://)(?:[^\s/?#@:]*:\S*|[^\s/?#]+)@"), rf"\1{REDACTED}@"),
    (re.compile(r"(authorization[\"']?\s*[=:]\s*[\"']?)[^\n\"']+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/_.=\-]{12,}"), rf"\1 {REDACTED}"),
    # tokens with a well-known beginning: Hugging Face, GitHub, OpenAI and its like, AWS, Databricks, Slack
    (re.compile(r"\b(hf_|gh[pousr]_|github_pat_|sk-|AKIA|ASIA|dapi|xox[abp]-)[A-Za-z0-9_\-]{12,}"), REDACTED),
)
_ASSIGNED = re.compile(r"""([A-Za-z_][\w.\-]*)(["']?\s*[=:]\s*["']?)([^\s&;,"']+)""")
_OPTION = re.compile(r"""(--[A-Za-z][\w.\-]*)(\s+["']?)([^\s"']+)""")


def looks_secret(name: str) -> bool:
    """Whether a setting, environment variable or query parameter of this name holds a secret.

    `HF_TOKEN`, `apiKey` and `aws.secret_access_key` do; `tokens_per_frame`, `tokenizer` and `monkey` do not.
    """
    if _CERTAIN.search(re.sub("[^a-z]", "", name.lower())):
        return True
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in ("key", "keys", "pwd") or word.endswith("token") for word in words)


class Redactor:
    """Knows the secrets that are in the environment at the moment it is made."""

    def __init__(self) -> None:
        values = {
            value
            for name, value in os.environ.items()
            if looks_secret(name) and name not in ("PWD", "OLDPWD") and len(value) >= 8
        }
        self._known = sorted(values, key=len, reverse=True)  # a secret may begin with another one

    def text(self, text: str) -> str:
        """`text` without the secrets in it."""
        for value in self._known:
            text = text.replace(value, REDACTED)
        for pattern, replacement in _IN_TEXT:
            text = pattern.sub(replacement, text)
        return _OPTION.sub(_redact_value, _ASSIGNED.sub(_redact_value, text))

    def line(self, text: str) -> str:
        """The same on one line, of at most 300 characters."""
        return self.text(" ".join(text.split()))[:300]

    def tree(self, value: Any, name: str = "") -> Any:
        """Nested mappings and sequences without the secrets in them, in types that YAML and JSON have.

        Whatever is below a name that looks secret is taken out, except for booleans and `None`.
        """
        if value is None or isinstance(value, bool):
            return value
        if looks_secret(name):
            return REDACTED
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.tree(entry, str(key)) for key, entry in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.tree(entry) for entry in value]
        if isinstance(value, int | float):
            return int(value) if isinstance(value, int) else float(value)  # plain, whatever subclass it was
        return self.text(str(value))


def _redact_value(match: re.Match[str]) -> str:
    name, separator, value = match.groups()
    # https://host/?token=… is an assignment in one.
    return name + separator + (REDACTED if looks_secret(name) else _ASSIGNED.sub(_redact_value, value))
