"""The program in a completion: the last fenced block of its answer."""

from __future__ import annotations

import re

from treadle.actors.verify.answer import ANSWER_OPEN, THINK_CLOSE, answer_region
from treadle.actors.verify.programs.languages import language_of

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`\n]*")


def program_text(completion: str, language: str, bare: bool) -> str:
    """The code to judge; empty where the answer commits to none, which no test accepts.

    The last fenced block counts. A fence that never closes was cut off, and what stands before it is not the
    answer; a tag that names another language than the prompt asked for is a wrong answer; no tag, or an
    unknown one, is taken for the language asked for. Without any fence the whole answer counts if `bare`.

    Example: a completion that ends with a block tagged `python` holding `print(1)` gives `print(1)`.
    """
    region = _region(completion)
    block = _last_block(region)
    if block is None:
        return region if bare else ""
    tag, code = block
    return "" if language_of(tag) not in (None, language) else code


def _region(completion: str) -> str:
    """As for every verifier, but that a `\\boxed` is no answer here: code and prose may hold one."""
    if THINK_CLOSE in completion or ANSWER_OPEN in completion:
        return answer_region(completion)
    return completion.strip()


def _last_block(text: str) -> tuple[str, str] | None:
    """Tag and content of the last block, empty where it never closes; None without any block."""
    found: tuple[str, str] | None = None
    opened, tag, lines = "", "", list[str]()
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip("\r"))
        if not opened and fence:
            opened, tag, lines = fence.group(1), fence.group(2), []
        elif opened and _closes(line, opened):
            found, opened = (tag, "\n".join(lines) + "\n"), ""
        elif opened:
            lines.append(line)
    return ("", "") if opened else found


def _closes(line: str, opened: str) -> bool:
    text = line.strip()
    return len(text) >= len(opened) and not text.strip(opened[0]) and len(line) - len(line.lstrip()) <= 3
