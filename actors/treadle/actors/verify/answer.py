"""Where the answer stands in a completion. Every verifier reads the same region.

A right number inside the thinking is not an answer: whoever searches the whole text rewards a policy that
lists candidates and commits to none.
"""

from __future__ import annotations

import re
import unicodedata

THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
BOX_OPEN = "\\boxed{"
MAX_COMPOSED = 10_000
"""Longest text that is brought to composed form: composing a long pile of accents takes quadratic time."""
_LOOKALIKES = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | {0x2212: 0x2D}
_UNSEEN = dict.fromkeys(
    (
        *(0x00AD, 0x061C, 0xFEFF),
        *(*range(0x200B, 0x2010), *range(0x202A, 0x202D), *range(0x2060, 0x2062), *range(0x2066, 0x206A)),
    )
)
"""Marks that neither show nor change what is shown: zero-width spaces and joiners, soft hyphens, direction
marks, embeddings and isolates. The overrides (U+202D, U+202E) stay, because they turn `132` into `231`."""
SEEN = re.compile(rf"[^\s{''.join(map(chr, _UNSEEN))}]")
"""A character that shows."""
_ARABIC_SIGNS = {0x066A: "%", 0x066B: ".", 0x066C: ","}
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_VULGAR = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_ROOT = re.compile(r"√\s?(?:([0-9]+|[A-Za-z])|[({]([^(){}]*)[)}])")
_SIGNS = str.maketrans(
    {
        "×": "\\times ",
        "÷": "\\div ",
        "·": "\\cdot ",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "±": "\\pm ",
        "∞": "\\infty ",
        "π": "\\pi ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "∅": "\\emptyset ",
        "≈": "\\approx ",
        "θ": "\\theta ",
        "°": "^\\circ ",
    }
)
_DIGIT = re.compile(r"[^\D0-9]")


def answer_region(text: str) -> str:
    """The part of a completion that counts as its answer; linear in the text.

    The last closed `<answer>` after the last `</think>`; where no tag is opened, all text after
    `</think>`; where nothing was thought either, the last box, and without a box the whole text. An
    `<answer>` that never closes was cut off and gives the empty string, which no verifier accepts.

    Example: `answer_region("<think>5 or 6</think><answer> 6 </answer>")` is `"6"`.
    """
    region, marked = answer_text(text)
    return last_box(region) if not marked and BOX_OPEN in region else region


def answer_text(text: str) -> tuple[str, bool]:
    """The answer's text with all its boxes, and whether the completion marks it (by `</think>` or
    `<answer>`); see `answer_region`."""
    thought = text.rfind(THINK_CLOSE)
    tail = text if thought < 0 else text[thought + len(THINK_CLOSE) :]
    opened = tail.rfind(ANSWER_OPEN)
    if opened >= 0:
        closed = tail.find(ANSWER_CLOSE, opened)
        return (tail[opened + len(ANSWER_OPEN) : closed].strip() if closed >= 0 else ""), True
    return tail.strip(), thought >= 0


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
    """One spelling per text: composed characters (up to `MAX_COMPOSED` of them), full-width ASCII and the
    minus sign as ASCII, runs of whitespace as one space.

    Compatibility forms stay (NFKC would turn `10²` into `102`), and so do zero-width and direction marks:
    text that only looks equal is not equal. `math` reads more kindly, by `readable`.
    """
    if not text.isascii():
        if len(text) <= MAX_COMPOSED:
            text = unicodedata.normalize("NFC", text)
        text = text.translate(_LOOKALIKES)
    return " ".join(text.split())


def readable(text: str) -> str:
    """`plain`, for what is read as mathematics: without marks that do not show, and with the decimal digits of
    every script as ASCII.

    Example: `readable("١٣\u200b٢")` is `"132"`.
    """
    if not text.isascii():
        text = text.translate(_UNSEEN).translate(_ARABIC_SIGNS)
        text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
    return plain(text)


def as_latex(text: str) -> str:
    """Signs of mathematics outside ASCII as LaTeX, for a parser that knows only that: `2√3 ≤ x²` becomes
    `2\\sqrt{3} \\le  x^{2}`."""
    if text.isascii():
        return text
    text = _RAISED.sub(
        lambda run: f"^{{{unicodedata.normalize('NFKC', run[0]).translate(_LOOKALIKES)}}}", text
    )
    text = _VULGAR.sub(_fraction, text)
    return _ROOT.sub(r"\\sqrt{\1\2}", text).translate(_SIGNS)


def _fraction(sign: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", sign[0]).partition("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"
