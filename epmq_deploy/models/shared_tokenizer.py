"""A tokenizer that threads may share."""

from threading import RLock
from typing import Any


class SharedTokenizer:
    """A tokenizer that one thread uses at a time; otherwise as that of ``transformers``.

    ``transformers`` sets truncation and padding on the tokenizer itself before it encodes, and
    encodes without holding Python's lock: what another thread asks for would take effect.

    Args:
        tokenizer: of ``transformers``; its attributes are to be set before.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = RLock()

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """Encode texts."""
        with self._lock:
            return self._tokenizer(*texts, **options)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tokenizer, name)
        if not callable(value):
            return value

        def locked(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                return value(*arguments, **options)

        return locked
