"""The one answer that a completion commits to, as text.

Finding the answer is linear in the completion. What takes more looks at no more than `MAX_PROSE` characters.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from treadle.actors.verify.answer import BOX_OPEN, answer_text, last_box

MAX_PROSE = 4000
"""What is searched of a longer answer is its tail; a box counts wherever it stands."""

_OTHER_BOX = re.compile(r"\\(?:fbox|boxed)\s*\{")
_BRACE = re.compile(r"\\boxed\{|\{|\}")
_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_MARKER = re.compile(r"(?:\banswer|答案)[\s*_]{0,4}(?:is\b|[:：=]|是|为)[\s*_:：=]{0,8}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.。](?:\s|$)|\n|\*\*")
_HEDGE = re.compile(r"\b(?:or|not|either|if)\b", re.IGNORECASE)
_BETWEEN = re.compile(
    r"(?:[\s,;$()\[\]、，；\\]|\\q?quad|\bor\b|\band\b|或|和|[A-Za-z](?:_\{?[A-Za-z0-9]{1,3}\}?)?\s*="
    r"|\\(?:text|mathrm|textbf)\s*\{[\s,;]*(?:and|or)?[\s,;]*\})*",
)
_PERCENT = re.compile(r"[\s$]*(?:\\?%|percent|pct)", re.IGNORECASE)


class _Box(NamedTuple):
    content: str
    begin: int
    end: int


def committed_answer(completion: str, *, last_box_counts: bool = True) -> str:
    """The answer, or the empty string where the completion does not commit to one.

    Of the answer's region (see `answer.answer_text`), in this order:

    - its last box. Boxes with nothing but commas, `and` or `or` between them are one answer with several values.
      Where boxes contradict each other the last one counts: it alone can earn anything, so nothing is gained by
      writing several. With `last_box_counts=False` there is no answer then;
    - what follows the last `answer is` or `Answer:`, to the end of the sentence;
    - its only formula (`$…$`, `\\(…\\)`, `\\[…\\]`), or several formulas with nothing but commas, `and` or `or`
      between them. Several formulas in prose are a choice and no answer;
    - all of it.

    Example: `committed_answer("<think>\\boxed{4}</think>It is \\boxed{1} and \\boxed{2}.")` is `"1, 2"`.
    """
    return _committed(answer_text(completion)[0], last_box_counts)


def expected_answer(gold: str) -> str:
    """The answer that a prompt's payload expects: found like one in a completion, which has no tags."""
    return _committed(gold.strip(), True)


def _committed(region: str, last_counts: bool) -> str:
    region = _OTHER_BOX.sub(lambda _: BOX_OPEN, region)
    if BOX_OPEN in region:
        return _boxed(region, last_counts)
    tail = region[-MAX_PROSE:]
    stated = 0
    for marker in _MARKER.finditer(tail):
        stated = marker.end()
    return _stated(tail[stated:]) if stated else _only(tail, region)


def _boxed(region: str, last_counts: bool) -> str:
    last = last_box(region)
    tail = region[-MAX_PROSE:]
    boxes = _boxes(tail)
    if not last or not boxes:
        return last  # empty where the box never closes: the answer was cut off
    row = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _BETWEEN.fullmatch(tail[box.end : row[0].begin]):
            break
        row.insert(0, box)
    contents = list(dict.fromkeys(box.content for box in row))
    if not last_counts and not {box.content for box in boxes} <= set(contents):
        return ""
    return ", ".join(contents)


def _boxes(text: str) -> list[_Box]:
    """The closed boxes in order; of nested ones the innermost."""
    found: list[_Box] = []
    opened: list[re.Match[str]] = []
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened and (start := opened.pop())[0] == BOX_OPEN:
            content = text[start.end() : brace.start()].strip()
            if found and found[-1].begin > start.start():
                found[-1] = _Box(found[-1].content, start.start(), brace.end())
            elif content and BOX_OPEN not in content:
                end, content = _with_percent(text, brace.end(), content)
                found.append(_Box(content, start.start(), end))
    return found


def _stated(text: str) -> str:
    """What is stated first: formulas in a row, or words up to the end of the sentence; of `the largest n is 34` the
    34."""
    formula = _FORMULA.match(text)
    if formula:
        return ", ".join(_row(text, [formula, *_FORMULA.finditer(text, formula.end())]))
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    subject, _, value = sentence.rpartition(" is ")
    if subject and not _HEDGE.search(subject):
        sentence = value
    return _only(sentence, sentence.strip())


def _only(text: str, otherwise: str) -> str:
    """The formulas of a text as one answer; `otherwise` where there is none, nothing where they are for choice."""
    found = list(_FORMULA.finditer(text))
    if not found:
        return otherwise
    row = _row(text, found)
    return ", ".join(row) if {_content(text, match)[1] for match in found} == set(row) else ""


def _row(text: str, found: list[re.Match[str]]) -> list[str]:
    """The first formula, and those that follow with nothing but separators between; each once."""
    end, content = _content(text, found[0])
    contents = [content]
    for after in found[1:]:
        if not _BETWEEN.fullmatch(text[end : after.start()]):
            break
        end, content = _content(text, after)
        if content not in contents:
            contents.append(content)
    return contents


def _content(text: str, formula: re.Match[str]) -> tuple[int, str]:
    content = next(group for group in formula.groups() if group is not None)
    return _with_percent(text, formula.end(), content.strip())


def _with_percent(text: str, end: int, content: str) -> tuple[int, str]:
    """A percent sign that stands behind a box or formula belongs to it; returns where it ends as well."""
    percent = _PERCENT.match(text, end)
    return (percent.end(), f"{content}\\%") if percent else (end, content)
