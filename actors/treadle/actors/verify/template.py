"""`format`: the template of DeepSeek-R1-Zero, or of R1, by a scanner that reads the text once.

A completion has R1-Zero's form when it is exactly

    <think> something </think> <answer> something </answer>

with each tag once and in this order, nothing but whitespace before, between and after the two blocks, and no
forged turn. In R1's own form the answer is free text without tags (`answer_tags=False`). Regular expressions for this
accept a second answer or an answer inside the thinking, and backtrack quadratically on repeated tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify.answer import ANSWER_CLOSE, ANSWER_OPEN, SEEN, THINK_CLOSE

if TYPE_CHECKING:
    from treadle.platform.records import Json

THINK_OPEN = "<think>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
ROLE_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "[INST]",
    "\nUser:",
    "\nHuman:",
    "\nAssistant:",
)
"""Texts that open a turn. A completion that holds one has answered a question it asked itself."""


class FormatVerifier:
    """Format 1 for the template, else 0; needs nothing from the payload.

    `answer_tags` chooses the template: R1-Zero's with `<answer>` (the default), or R1's without. `opened` says that
    prompts end with `<think>`, so that completions begin inside the thinking. With `eos` a completion must end with
    that text and hold it nowhere else; the pool strips it beforehand and leaves this empty. A completion that was cut
    off loses the credit in the pool: it cannot be told here.

    Example: `FormatVerifier(answer_tags=False, opened=True).matches("because</think>It is 5.")` is true.
    """

    name = "format"
    deterministic = True

    def __init__(
        self,
        *,
        opened: bool = False,
        eos: str = "",
        forbidden: tuple[str, ...] = ROLE_MARKERS,
        answer_tags: bool = True,
    ) -> None:
        self._opened = opened
        self._eos = eos
        self._forbidden = forbidden
        self._answer_tags = answer_tags
        self.version = "2" if answer_tags else "2 (answer_tags=False)"

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
        return has_template(text, self._answer_tags) and not any(marker in text for marker in self._forbidden)


def has_template(text: str, answer_tags: bool = True) -> bool:
    """Whether the text is the two blocks and nothing else; each character is visited a bounded number of
    times."""
    pieces = []
    begin = 0
    for tag in TAGS if answer_tags else TAGS[:2]:
        position = text.find(tag, begin)
        if position < 0:
            return False
        pieces.append(text[begin:position])
        begin = position + len(tag)
    pieces.append(text[begin:])
    filled = (pieces[1], pieces[3] if answer_tags else pieces[2])
    empty = (pieces[0], pieces[2], pieces[4]) if answer_tags else (pieces[0],)
    if any(piece.strip() for piece in empty) or not all(map(SEEN.search, filled)):
        return False
    return all(tag not in piece for tag in TAGS for piece in filled)
