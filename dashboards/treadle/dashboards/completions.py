"""Completions as blocks: what was thinking, what the answer, what a special token."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(
    r"</?(?:think|answer)>|<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|\[(?:BOS|EOS|PAD|UNK)\]"
)


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a completion. `kind` is `thinking`, `answer`, `plain` or `token` (a special token).

    Example: `<think>4+5=9</think><answer>9</answer><eos>` is thinking `4+5=9`, answer `9`, token `<eos>`.
    """

    kind: str
    text: str


def blocks(text: str) -> list[Block]:
    """The completion in reading order. Unclosed tags hold to the end, stray closing tags show as tokens; no
    character but the paired tags themselves is left out. Linear in the text."""
    found: list[Block] = []
    kind, at = "plain", 0
    for tag in _TAG.finditer(text):
        _add(found, kind, text[at : tag.start()])
        kind = _after(tag.group(), kind, found)
        at = tag.end()
    _add(found, kind, text[at:])
    return found


def _after(tag: str, kind: str, found: list[Block]) -> str:
    """The kind of what follows the tag."""
    name = {"<think>": "thinking", "</think>": "thinking", "<answer>": "answer", "</answer>": "answer"}.get(
        tag
    )
    if name and not tag.startswith("</"):
        return name
    if name and name == kind:
        return "plain"
    found.append(Block("token", tag))
    return kind


def _add(found: list[Block], kind: str, text: str) -> None:
    if text.strip():
        found.append(Block(kind, text.strip("\n")))
