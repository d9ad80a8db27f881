"""`format`: the R1 template, by a scanner that reads the text once.

A completion has the form when it is exactly

    <think> something </think> <answer> something </answer>

with each tag once and in this order, nothing but whitespace before, between and after the two blocks, and no
forged turn. Regular expressions for this accept a second answer or an answer inside the thinking, and
backtrack quadratically on repeated tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify.answer import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE

if TYPE_CHECKING:
    from treadle.platform.records import Json

THINK_OPEN = "<think>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
ROLE_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "[INST]",
    "\nUser:",
    "\nHuman:",
    "\nAssistant:",
)
"""Texts that open a turn. A completion that holds one has answered a question it asked itself."""


class FormatVerifier:
    """Format 1 for the template, else 0; needs nothing from the payload.

    `opened` says that prompts end with `<think>`, so that completions begin inside the thinking. With
    `eos` a completion must end with that text and hold it nowhere else; the pool strips it beforehand and
    leaves this empty.
    """

    name = "format"
    version = "1"

    def __init__(
        self, opened: bool = False, eos: str = "", forbidden: tuple[str, ...] = ROLE_MARKERS
    ) -> None:
        self._opened = opened
        self._eos = eos
        self._forbidden = forbidden

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:  # noqa: ARG002  the form does not depend on the task
        return (("format", float(self.matches(completion))),)

    def matches(self, completion: str) -> bool:
        """Whether the completion has the form."""
        if self._eos:
            if not completion.endswith(self._eos):
                return False
            completion = completion.removesuffix(self._eos)
            if self._eos in completion:
                return False
        text = THINK_OPEN + completion if self._opened else completion
        return has_template(text) and not any(marker in text for marker in self._forbidden)


def has_template(text: str) -> bool:
    """Whether the text is the two blocks and nothing else; each character is visited a bounded number of
    times."""
    pieces = []
    begin = 0
    for tag in TAGS:
        position = text.find(tag, begin)
        if position < 0:
            return False
        pieces.append(text[begin:position])
        begin = position + len(tag)
    pieces.append(text[begin:])
    before, thinking, between, answer, after = pieces
    if before.strip() or between.strip() or after.strip():
        return False
    if not thinking.strip() or not answer.strip():
        return False
    return all(tag not in thinking and tag not in answer for tag in TAGS)
