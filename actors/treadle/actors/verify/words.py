r"""The words of a completion's prose, for the parts that look at its form.

Formulas, code, URLs and tags are taken out first. What counts as one word: a run of letters of one script; in Han and
kana, which are written without spaces, each character. Single Latin and Greek letters are taken for variables, and
runs with a digit or an underscore for names; neither is a word, nor is a function's name such as `sin`. Everything
here passes over the text once.

Example: `list(words("Let x = 5, so 答案"))` is `["Let", "so", "答", "案"]`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from treadle.actors.verify.answer import ANSWER_OPEN, THINK_CLOSE

_OPENER = re.compile(  # each alternative begins with a letter of its own, so that the engine can skip to those
    r"```|\$\$|\\\[|\\\(|\\boxed\{|\\begin\{|https?://[^\s，。）)]+|www\.[^\s，。）)]+|`|\$|<(?=[/!|A-Za-z｜])|\\[A-Za-z]+"
)
_BEGIN = "\\begin{"
_CLOSERS = {
    "```": "```",
    "$$": "$$",
    "\\[": "\\]",
    "\\(": "\\)",
    "\\boxed{": "}",
    _BEGIN: "\\end{",
    "`": "`",
    "$": "$",
    "<": ">",
}
_ON_ONE_LINE = frozenset("`$<")
"""Their closer stands on the same line, or they are ordinary signs (`$5`, `a < b`)."""
_LONGEST_LINE = 1000
_LONGEST_NAME = 50
_LATIN = r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff"
_MARKS = r"\u0300-\u036f"
_SCRIPTS = {
    "latin": rf"[{_LATIN}][{_LATIN}{_MARKS}0-9_'’]*",
    "han": r"[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]+",
    "kana": r"[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f]+",
    "hangul": r"[\u1100-\u11ff\u3131-\u318e\uac00-\ud7af]+",
    "cyrillic": rf"[\u0400-\u052f][\u0400-\u052f{_MARKS}]*",
    "arabic": r"[\u0610-\u061a\u0620-\u065f\u066e-\u06d3\u06d5-\u06ed\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff"
    r"\ufb50-\ufdff\ufe70-\ufefc]+",
    "greek": r"[\u0370-\u03ff\u1f00-\u1fff]+",
    "number": r"[\d_][\d_A-Za-z]*",
    "other": r"[^\W\d_]+",
}
_TOKEN = re.compile("|".join(f"(?P<{script}>{pattern})" for script, pattern in _SCRIPTS.items()))
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "log", "ln", "exp", "max", "min", "gcd", "lcm", "mod", "lim", "det")
)
WITHOUT_SPACES = frozenset(("han", "kana"))
_NAME = re.compile(r"[0-9_]")


def thinking(completion: str) -> str:
    """What stands before the answer: up to the last `</think>`, else up to an `<answer>`, else all of it."""
    end = completion.rfind(THINK_CLOSE)
    if end < 0:
        end = completion.find(ANSWER_OPEN)
    return completion if end < 0 else completion[:end]


def prose(text: str) -> str:
    """The text without formulas, code, URLs and tags. An opener without its closer is an ordinary sign."""
    kept: list[str] = []
    never: set[str] = set()
    position = 0
    while (opener := _OPENER.search(text, position)) is not None:
        kept.append(text[position : opener.start()])
        position = _span_end(text, opener, never)
    kept.append(text[position:])
    return " ".join(kept)


def _span_end(text: str, opener: re.Match[str], never: set[str]) -> int:
    """Where the span ends. `never` collects the closers that do not come any more: they are searched for once, not
    once per opener."""
    end = opener.end()
    closer = _CLOSERS.get(opener[0])
    if closer is None or closer in never:
        return end
    if opener[0] in _ON_ONE_LINE:
        line = text[end : end + _LONGEST_LINE].partition("\n")[0]
        found = line.find(closer)
        return end if found < 0 else end + found + len(closer)
    found = text.find(closer, end)
    if found < 0:
        never.add(closer)
        return end
    if opener[0] == _BEGIN:
        return max(found, text.find("}", found, found + _LONGEST_NAME)) + 1
    return found + len(closer)


def words(text: str) -> Iterator[str]:
    """The words in order, as they are written."""
    for script, run in runs(text):
        if script in WITHOUT_SPACES:
            yield from run
        else:
            yield run


def words_per_script(text: str) -> Counter[str]:
    """How many words there are of each script: `latin`, `han`, `kana`, `hangul`, `cyrillic`, `arabic`, `greek`, and
    `other` for the rest."""
    counts: Counter[str] = Counter()
    for script, run in runs(text):
        counts[script] += len(run) if script in WITHOUT_SPACES else 1
    return counts


def runs(text: str) -> Iterator[tuple[str, str]]:
    """Script and letters of each run that is a word, or words without spaces."""
    for token in _TOKEN.finditer(prose(text)):
        script, run = str(token.lastgroup), token[0]
        if script == "latin":
            if len(run) > 1 and run not in _FUNCTIONS and not _NAME.search(run):
                yield script, run
        elif script != "number" and (script != "greek" or len(run) > 1):
            yield script, run
