"""Train or held out, decided by content alone."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "heldout", "all")


def is_heldout(content: str, fraction: float) -> bool:
    """Whether this content belongs to the held-out part. Depends on nothing but the content and the fraction:
    not on order, seed, file or process. A larger fraction holds out a superset."""
    digest = hashlib.blake2b(content.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def in_split(content: str, split: str, fraction: float) -> bool:
    """Whether the content is in "train", "heldout" or "all"."""
    return split == "all" or is_heldout(content, fraction) == (split == "heldout")
