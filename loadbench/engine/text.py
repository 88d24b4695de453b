"""The text of one answer, collected piece by piece as UTF-8: a hash of all of it, and as much of it as is kept.

A piece comes with every chunk, so it is only laid down; the hash is computed at the end.
"""

from __future__ import annotations

from hashlib import blake2b

KEPT_BYTES = 4 << 20
"""Beyond it a text is hashed and forgotten: a million tokens, which no answer has, and a server may send for ever."""


class Text:
    """What was said so far. Whoever adds to ``said`` itself calls `let_go` once it holds more than KEPT_BYTES."""

    __slots__ = ("_beginning", "_hash", "said")

    def __init__(self) -> None:
        self.said = bytearray()
        self._hash: blake2b | None = None
        self._beginning = b""

    def __bool__(self) -> bool:
        return bool(self.said or self._beginning)

    def __str__(self) -> str:
        """The text, of a very long one its beginning."""
        return (self._beginning or bytes(self.said))[:KEPT_BYTES].decode("utf-8", "ignore")  # cut within a character

    def add(self, piece: bytes) -> None:
        """Take the next piece, whole characters in UTF-8."""
        self.said += piece
        if len(self.said) > KEPT_BYTES:
            self.let_go()

    def hash(self) -> str | None:
        """16 hexadecimal digits that are the same for the same text; None where nothing was said."""
        if self._hash is None:
            return blake2b(self.said, digest_size=8).hexdigest() if self.said else None
        whole = self._hash.copy()
        whole.update(self.said)
        return whole.hexdigest()

    def let_go(self) -> None:
        """Hash what is there, and keep it only if it is the beginning."""
        if self._hash is None:
            self._hash, self._beginning = blake2b(digest_size=8), bytes(self.said)
        self._hash.update(self.said)
        self.said.clear()


def hash_of(text: str) -> str | None:
    """The hash of an answer with this text."""
    whole = Text()
    whole.add(text.encode())
    return whole.hash()
