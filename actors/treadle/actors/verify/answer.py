"""Where the answer stands in a completion. Every verifier reads the same region.

A right number inside the thinking is not an answer: whoever searches the whole text rewards a policy that
lists candidates and commits to none.
"""

from __future__ import annotations

import unicodedata

THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
BOX_OPEN = "\\boxed{"
_LOOKALIKES = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | {0x2212: 0x2D}


def answer_region(text: str) -> str:
    """The part of a completion that counts as its answer; linear in the text.

    The last closed `<answer>` after the last `</think>`; where no tag is opened, all text after
    `</think>`; where nothing was thought either, the last box, and without a box the whole text. An
    `<answer>` that never closes was cut off and gives the empty string, which no verifier accepts.

    Example: `answer_region("<think>5 or 6</think><answer> 6 </answer>")` is `"6"`.
    """
    thought = text.rfind(THINK_CLOSE)
    tail = text if thought < 0 else text[thought + len(THINK_CLOSE) :]
    opened = tail.rfind(ANSWER_OPEN)
    if opened >= 0:
        closed = tail.find(ANSWER_CLOSE, opened)
        return tail[opened + len(ANSWER_OPEN) : closed].strip() if closed >= 0 else ""
    if thought >= 0:
        return tail.strip()
    if BOX_OPEN in text:
        return last_box(text)
    return text.strip()


def last_box(text: str) -> str:
    """The content of the last `\\boxed{…}`, braces matched; empty when there is none or it never closes."""
    opened = text.rfind(BOX_OPEN)
    if opened < 0:
        return ""
    begin = opened + len(BOX_OPEN)
    depth = 1
    for position in range(begin, len(text)):
        char = text[position]
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[begin:position].strip()
    return ""


def without_eos(text: str, eos: str) -> str:
    """The completion without its closing EOS text (special tokens are kept when completions are decoded)."""
    return text.removesuffix(eos) if eos else text


def boxless(region: str) -> str:
    """The region itself, or what it boxes: `The answer is \\boxed{5}.` answers 5."""
    return last_box(region) if BOX_OPEN in region else region


def plain(text: str) -> str:
    """One spelling per text: composed characters, full-width ASCII and the minus sign as ASCII, runs of
    whitespace as one space.

    Compatibility forms stay (NFKC would turn `10²` into `102`), and so do zero-width and direction marks:
    text that only looks equal is not equal.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_LOOKALIKES)
    return " ".join(text.split())
