"""Keys of providers: from the environment only, and nowhere to be read."""

import logging
import os
from dataclasses import dataclass, field
from urllib.parse import quote, quote_plus

from hdpo_jax.config import ConfigError

HIDDEN = "[key]"


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key and the environment variable that it came from."""

    variable: str
    value: str = field(repr=False)

    @classmethod
    def from_environment(cls, variable: str) -> "ApiKey":
        """Raises ConfigError, one line, where there is none."""
        value = os.environ.get(variable, "").strip()
        if not value:
            raise ConfigError(f"{variable} is not set; expected the provider's key in the environment")
        # What can not stand in a header would be shown by the error that says so.
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ConfigError(f"{variable} holds characters that no key has; expected the provider's key alone")
        return cls(variable=variable, value=value)

    def redacted(self, text: str) -> str:
        """The text with something else in the key's place, as it is or as it stands in addresses."""
        for form in (self.value, quote(self.value, safe=""), quote_plus(self.value)):
            text = text.replace(form, HIDDEN)
        return text


class Redaction(logging.Filter):
    """Keeps a key out of what a library logs: httpx logs the address of every request."""

    def __init__(self, key: ApiKey):
        super().__init__()
        self._key = key

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._key.redacted(record.getMessage()), None
        return True
