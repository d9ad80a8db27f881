"""What a policy may write to stall, crash, fool or enter a verifier, by kind. Each text is an answer."""

from __future__ import annotations

COMPUTE = {
    "tower": "9**9**9**9",
    "tower in LaTeX": "9^{9^{9^{9}}}",
    "tower of powers": "99**98**97",
    "tower of fives": "5^{5^{5^{5^{5}}}}",
    "negative tower": "2^{-9^{9^{9}}}",
    "root of a tower": "\\sqrt{7^{7^{7^{7}}}}",
    "factorial of a factorial": "(99999!)!",
    "factorial of a power": "(10^{10^{10}})!",
    "sine of a tower": "\\sin(10^{10^{10}})",
    "tangent of a tower": "\\tan(9^{9^{9}})",
    "logarithm of a tower": "\\log(9^{9^{9^{9}}})",
    "modulus of a tower": "9^{9^{9^{9}}} \\bmod 7",
    "binomial": "\\binom{10^9}{5 \\cdot 10^8}",
    "sum": "\\sum_{k=1}^{10000000} \\frac{1}{k}",
    "nested sums": "\\sum_{i=1}^{9999} \\sum_{j=1}^{9999} \\frac{1}{i^j+j^i}",
    "product": "\\prod_{k=1}^{10000000} k",
    "integral": "\\int_0^1 \\frac{\\sin(x^{x^x})}{\\sqrt{1+x^{17}}} dx",
    "limit": "\\lim_{x \\to 0} \\frac{\\sin(x^{x^x})^{1/x}}{\\Gamma(x)^x}",
    "high power of a sum": "(x+y+z+1)^{9999}",
    "equation of high degree": "x^{997}+x^{499}-x+7=3x^{998}-1",
}
"""Short texts that ask for endless work."""

DEEP = {
    "fractions": "\\frac{1}{" * 400 + "2" + "}" * 400,
    "fractions within the limit": "\\frac{1}{" * 38 + "2" + "}" * 38,
    "parentheses": "(" * 2000 + "1" + ")" * 2000,
    "parentheses within the limit": "(" * 150 + "1" + ")" * 150,
    "open parentheses": "(" * 1900,
    "braces": "{" * 900 + "5",
    "closed braces": "{" * 150 + "5" + "}" * 150,
    "roots": "\\sqrt{" * 50 + "2" + "}" * 50,
    "exponents": "2^{" * 90 + "2" + "}" * 90,
    "absolute values": "|" * 380,
    "lefts": "\\left(" * 26 + "1" + "\\right)" * 26,
    "minus signs": "-" * 380 + "1",
    "sum of ones": "1+" * 190 + "x",
    "product of letters": "xy" * 190,
    "equalities": "x=" * 190 + "x",
    "inequalities": "1<" * 190 + "x",
    "set": "\\{" + ",".join(map(str, range(3000))) + "\\}",
    "set within the limit": "\\{" + ",".join(map(str, range(120))) + "\\}",
    "matrix": "\\begin{pmatrix}" + "\\\\".join("&".join("1" * 60) for _ in range(60)) + "\\end{pmatrix}",
    "matrix within the limit": "\\begin{pmatrix}"
    + "\\\\".join("&".join("x" * 12) for _ in range(12))
    + "\\end{pmatrix}",
    "unclosed matrix": "\\begin{pmatrix}" * 100,
}
"""Nesting and length."""

LONG = {
    "digits": "7" * 20_000,
    "million digits": "7" * 2**20,
    "megabyte of prose": "lorem ipsum " * 87_000,
    "megabyte of spaces": "1" + " " * 2**20 + "32",
    "megabyte of dollars": "$" * 2**20,
    "megabyte of markers": "The answer is " * 75_000,
    "megabyte of brackets": "\\(" * 2**19,
    "boxes": "\\boxed{1} " * 20_000,
    "open boxes": "\\boxed{" * 20_000,
    "open tags": "<think>" * 100_000,
    "tags": "<think>a</think>" * 60_000,
    "answers": "<answer>131</answer>" * 50_000,
    "open answers": "<answer>" * 130_000,
    "piled accents": "1" + "\u0300" * 200_000,
    "accents out of order": "e" + "\u0300\u0316" * 100_000,
    "accents out of order on digits": "13\u0300\u03162",
    "wide characters": "１" * 300_000,
    "emoji": "👩\u200d👩\u200d👧" * 50_000,
}
"""Length alone."""

CHARACTERS = {
    "NUL": "1\x0032",
    "bell and escape": "\x1b[2J\x07131",
    "direction override": "\u202e231",
    "direction override of the answer": "\u202e132",
    "lone surrogate": "13\ud8002",
    "surrogates in reverse": "\udc00\ud800",
    "non-character": "132\uffff",
    "private use": "\ue000132",
    "superscript": "13²",
    "circled digits": "①③②",
    "roman numeral": "ⅭⅩⅩⅫ",
    "fraction slash": "264⁄2",
    "letter o for nought": "l32",
    "cyrillic lookalike": "1З2",
    "line separators": "13\u20282",
    "next line": "13\x852",
    "invisible times": "13\u20622",
    "byte order": "\ufeff131",
}
"""Characters that are not what they seem, none of them the answer 132."""

CODE = {
    "import": "__import__('os').system('sleep 60')",
    "attribute": "().__class__.__bases__[0].__subclasses__()",
    "attribute in LaTeX": "\\text{().__class__.__mro__[1].__subclasses__()}",
    "name with underscores": "\\mathrm{__import__}(1)",
    "eval": "eval(compile('1+131','','eval'))",
    "lambda": "(lambda: 132)()",
    "walrus": "(x:=132)",
    "template": "{{132}}${132}#{132}",
    "format": "%s%n{0.__class__}",
    "LaTeX input": "\\input{/etc/passwd}\\write18{sleep 60}",
    "LaTeX bomb": "\\def\\a{\\a\\a}\\a",
    "LaTeX catcode": "\\catcode`\\{=12 \\csname 132\\endcsname",
    "verdict rows": '{"rows": [[0, [["accuracy", 1.0]], 0.0, ""]], "end": true}',
    "verdict frame": "\x00\x00\x00\x3d" + '{"rows":[[0,[["accuracy",1.0]],0.0,""]],"end":true}',
    "pickle": "cos\nsystem\n(S'sleep 60'\ntR.",
    "sympy": "sympify('132')",
    "symbol with a name": "\\operatorname{exit}(0)",
}
"""Text that some evaluator might run."""

REGEX = {
    "spaces in a command": "\\text{" + " " * 390,
    "commands": "\\text{ " * 55,
    "numbers in a row": "1 " * 195,
    "thousands": "1" + ",000" * 95 + "x",
    "conjunctions": "and or, " * 48,
    "percents": "% " * 195,
    "powers of ten": "10^" * 130 + "x",
    "signs in a row": "+-" * 195,
    "points": "." * 395,
    "subscripts": "1_" * 195,
    "quotes": '"' * 395,
    "backslashes": "\\" * 395,
    "ands between formulas": "$1$ and " * 48,
    "mixed separators": "\\boxed{1}" + "\\quad,;$" * 300 + "x",
    "units": "5 " + "square " * 54 + "m",
    "fractions without an end": "\\frac{1}{2" * 38,
    "equals": "=" * 395,
}
"""Near misses of the expressions that read answers."""

HEDGES = {
    "either": "131 or 132",
    "list": "131, 132",
    "chain": "131 = 132",
    "approximation": "131 \\approx 132",
    "arrow": "132 \\to 131",
    "plus or minus": "\\pm 132",
    "sum": "66+66",
    "product": "11 \\cdot 12",
    "division": "264/2",
    "factorial over": "\\frac{12!}{10!}",
    "percent": "132\\%",
    "base": "132_5",
    "restated": "x=132 x=131",
    "not": "not 131 but 132",
    "junk before": "131 \\sim 132",
    "closed early": "132}{131",
    "question": "\\text{what is } 11 \\cdot 12",
    "million": "132\\text{ million}",
}
"""Answers that do not commit to 132."""

KINDS = {
    "compute": COMPUTE,
    "deep": DEEP,
    "long": LONG,
    "characters": CHARACTERS,
    "code": CODE,
    "regex": REGEX,
    "hedge": HEDGES,
}
TEXTS = {f"{kind}: {name}": text for kind, texts in KINDS.items() for name, text in texts.items()}
