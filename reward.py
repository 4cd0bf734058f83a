r"""The reward: does the box mean what the answer key means?

Reinforcement learning optimises exactly what this file says: a false positive teaches cheating, a false negative starves
learning, a hang stops the run, an `eval` would hand the machine to the model. So the text is read by hand into a small tree
(never eval, sympify or parse_latex), and the tree is evaluated under bounds, never "simplified":

1. cheap path, in this process, microseconds: equal strings after normalisation, or two plain rational numbers;
2. meaning, in a worker process: exact fractions as far as they go, then mpmath (sympy's arithmetic) at two precisions.
   Formulas that agree at random points are the same formula (Schwartz-Zippel). A difference that is really zero shrinks
   with the precision; a tiny number, 10^-100, does not;
3. limits: a case has LIMIT seconds, counted by the kernel (an alarm kills the worker whatever it is doing), and MEMORY bytes.

Glossary: `prediction` what stands in the box; `gold` the answer key; `node` a tree, ("pow", ("sym", "x"), ("num", 2));
`Hopeless` a text that cannot be read, or a value that is undefined or out of bounds: equal to nothing, except as a string.
Conventions where mathematics leaves a choice: 0.33 is not 1/3, units may be missing but not differ, n% is n or n/100,
log has base 10 or e, an odd root of a negative number is real, unknowns are real unless i occurs.
Left out: numbers in words, unit conversion (1 m is not 100 cm), integrals, limits, sums. POSIX only.

    python reward.py 'so \boxed{\frac{1}{2}}' 0.5         # what was read on both sides, and the verdict
"""

import atexit
import json
import math
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import time
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import product

from mpmath import mp

LIMIT = 1.5             # seconds a case may take in its worker
MEMORY = 1 << 30        # bytes of address space a worker may have
MAX_CHARS = 6_000       # longer texts are compared as strings and plain numbers only
MAX_DEPTH = 40          # nested brackets, powers and functions
MAX_BITS = 400_000      # of an exact number: 20,000! fits, 8^8^8 does not
MAX_DIGITS = 2_000      # |log10| of an inexact number


class Hopeless(ValueError):
    """Cannot be read, or is undefined, or is too big to look at."""


# -------------------------------------------------------------------------------- the box


def extract_answer(text):
    r"""Content of the last \boxed{...} or \fbox{...} (str); None if there is none, or it is empty or was never closed.

    Braces are balanced and \{ \} do not count; a box in a box is opened; `\boxed 5` is a box; of a reasoning model's
    response only what follows </think> is read."""
    text = text.rpartition("</think>")[2] if isinstance(text, str) else ""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    stack = []                                                       # open braces: (where its box starts or -1, inside)
    last = (-1, 0, 0, 0)                                             # last box: start, inside, end of inside, end
    for token in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s{}$]*)|\\.|[{}]", text, re.DOTALL):
        if token[1] == "{" or token[0] == "{":
            stack.append((token.start() if token[1] else -1, token.end()))
        elif token[1] is not None:                                   # \boxed 5
            last = (token.start(), token.start(1), token.end(), token.end())
        elif token[0] == "}" and stack:
            start, inside = stack.pop()
            wraps = last[0] >= inside and not (text[inside:last[0]] + text[last[3]:token.start()]).strip()
            if start >= 0:
                last = (start, *(last[1:3] if wraps else (inside, token.start())), token.end())
    if any(start > last[0] for start, _ in stack):                   # a later box was never closed
        return None
    content = text[last[1]:last[2]].strip()
    return (content if text[last[2]:last[3]] else content.rstrip(".,;")) or None


# -------------------------------------------------------------------------------- the cheap path

SPACING = re.compile(r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|(?:thin|med|thick|en)space)(?![a-zA-Z]))|~|\s+")
IGNORED = re.compile(r"(?<!\\)\\(?:(?:left|right) ?\.|(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits"
                     r"|therefore|bf|it|rm)(?![A-Za-z])|[\[\]()!])|(?<!\\)\$")
DECIMAL = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)?)(?:\.([0-9]*))?")
FRACTION = re.compile(r"([+-]?)(?:\\frac\{([0-9]{1,300})\}\{([0-9]{1,300})\}|([0-9]{1,300})/([0-9]{1,300}))")


def normalise(text):
    r"""The text without what never carries meaning: $ signs, \left, spacing, \dfrac for \frac, a final full stop."""
    text = re.sub(r"(?<!\.)\.$", "", SPACING.sub(" ", IGNORED.sub("", text)).strip(" *")).strip()
    return squeeze(re.sub(r"\\([dtcs]|nice)frac(?![a-zA-Z])", r"\\frac", text))


def squeeze(text):
    """Without spaces, save between letters, digits and commands: 1 1/2 is not 11/2."""
    return re.sub(r"(?<![0-9A-Za-z.,]) +| +(?![0-9A-Za-z.,\\])", "", text)


def rational(text):
    """A plain decimal or fraction as (numerator, denominator), else None. Long ones stay strings: linear in their length."""
    match = DECIMAL.fullmatch(text)
    if match and (match[2] or match[3]):
        whole, part = re.sub("[{},]", "", match[2]).lstrip("0"), (match[3] or "").rstrip("0")
        if len(whole) + len(part) > 300:
            return match[1].strip("+") + whole + "." + part, 1
        top, bottom = int(whole + part or 0), 10 ** len(part)
    elif match := FRACTION.fullmatch(text):
        top, bottom = int(match[2] or match[4]), int(match[3] or match[5])
    return Fraction(-top if match[1] == "-" else top, bottom).as_integer_ratio() if match and bottom else None


def cheap(prediction, gold):
    """True or False where that is certain without reading on, else None."""
    if max(len(prediction), len(gold)) > 100_000:
        return prediction.strip() == gold.strip()
    prediction, gold = normalise(prediction), normalise(gold)
    if prediction == gold:
        return bool(gold)
    left, right = rational(prediction), rational(gold)
    if left and right and (left == right or min(left[1], right[1]) == 1):
        return left == right                                         # but 0.3333333333333333 and 1/3: look closer
    return None if max(len(prediction), len(gold)) <= MAX_CHARS else False


# -------------------------------------------------------------------------------- text to tokens
# What `prepare` leaves: digits, letters, \commands, { } as TeX groups, one character for every operator, «words», ⦃ ⦄ for set
# braces, ⟪ ⟫ around a matrix with ↵ between rows and & between cells, and 0.1~6 for 0.1666...

SYMBOLS = r"""
* \cdot \times \ast \bullet × · ⋅ ∙ ∗ •    / \div ÷ ⁄ ∕    ± \pm    ∓ \mp    - − – — ‒ ﹣    ^ **    = \equiv ==
< \lt    > \gt    ≤ \le \leq \leqslant <= ⩽    ≥ \ge \geq \geqslant >= ⩾    ≠ \ne \neq !=    ≈ \approx \simeq    ∈ \in
∪ \cup \bigcup    ∩ \cap    ∖ \setminus \backslash    ∧ \land \wedge    ∨ \lor \vee    : \colon ∶    … \ldots \dots \cdots ...
∞ \infty \infin    π \pi    ∅ \emptyset \varnothing    ℝ \mathbf{R} \R \Reals    ∣ \mid    | \vert \lvert \rvert \| \Vert ‖
⦃ \{ \lbrace    ⦄ \} \rbrace    [ \lbrack    ] \rbrack    ⟨ \langle    ⟩ \rangle    ⌊ \lfloor    ⌋ \rfloor    ⌈ \lceil
⌉ \rceil    ↵ \cr    ° ^{\circ} ^\circ ^{\degree} ^\degree \degree \textdegree ˚    % \%    ' \prime ^\prime ^{\prime} ′
«$» \$    «€» € \euro    «£» £ \pounds    «¥» ¥    «₹» ₹    «¢» ¢    \sqrt √    \sqrt[3] ∛    \sqrt[4] ∜
\log_{10} \lg    \asin \arcsin    \acos \arccos    \atan \arctan    \binom \dbinom \tbinom
"""
SYMBOLS = {old: new + " " * new.startswith("\\") for new, *olds in map(str.split, re.split(r" {4}|\n", SYMBOLS.strip()))
           for old in olds}
SYMBOL = re.compile("|".join(re.escape(old) + r"(?![A-Za-z])" * old[-1].isalpha()
                             for old in sorted(SYMBOLS, key=len, reverse=True)))
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾ᵀ", "0123456789+-ni()T"))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
FUNCTIONS = set("""sin cos tan sec csc cot asin acos atan asec acsc acot sinh cosh tanh asinh acosh atanh log ln exp max min gcd
lcm abs det""".split())
COMMANDS = FUNCTIONS | {"sqrt", "frac", "binom", "vec", "hat", "bar", "overline", "tilde"}
GREEK = set("alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi psi omega".split())
WORDS = {"and": "∧", "or": "∨", "infinity": "∞", "infty": "∞", "pi": "π", "percent": "%",
         "degree": "°", "degrees": "°", "deg": "°", "thousand": "*10^3", "million": "*10^6", "billion": "*10^9",
         "arcsin": r"\asin ", "arccos": r"\acos ", "arctan": r"\atan "}
UNITS = {name: names.split()[0] for names in """km kilometer kilometre, m meter metre, cm centimeter centimetre, ft foot feet,
mm millimeter millimetre, in inch inche, yd yard, mi mile, g gram, kg kilogram kilo, mg milligram, lb pound, oz ounce, unit,
l liter litre, ml milliliter millilitre, s sec second, min minute, h hr hour, day, wk week, month, yr year, $ dollar usd buck,
¢ cent, € euro eur, £ gbp, ¥ yen, ₹ rupee, rad radian, mph mi/h mile/h, kph km/h, n newton, j joule, w watt, v volt, hz hertz,
pa pascal, mol mole, gal gallon, qt quart, pt pint""".split(",") for name in names.split()}
SHORT_WORDS = set("sq cu no is of to at by in if it we as an am pm be so up on".split())
QUALIFIERS = set("""not no least most more less fewer greater than between to from except either neither about around nearly
almost under over below above maybe if when unless never""".split())             # "at least 5" is not 5
NUMERALS = {"two": "2", "three": "3", "eight": "8", "ten": "10", "sixteen": "16"}


def word(match):
    """A run of letters: a function, a unit or another word, or a product of variables (xy, abc)."""
    if match[0][0] in "«\\":
        return match[0]
    text, low, rest = match[0], match[0].lower(), match.string[match.end():]
    if low in WORDS:
        return WORDS[low]
    if text in GREEK or text in COMMANDS and not (low in UNITS and not rest.strip(" .})")):     # 5 min, but min(5, 6)
        return f"\\{text} "
    known = low in UNITS or low.rstrip("s") in UNITS or low in SHORT_WORDS
    variables = not known and (len(text) == 2 or len(text) < 5 and not re.search("[eiou]|(?!^)a", low))
    return text if variables else f"«{text}»"


def text_command(match):
    r"""\text{...}: words become «words» like all others; a single letter does too (5\text{ m}), save e and i."""
    if re.match("math(?!rm)|bold|bm|pmb", match[1]):
        return f" {match[2]} " if len(match[2]) > 1 else match[2]
    return " " + re.sub(r"(?<![A-Za-z\\])([A-DF-Za-df-hj-z])(?![A-Za-z])", r"«\1»", match[2]) + " "


@lru_cache(256)
def prepare(text, thousands=True):
    """Unicode and LaTeX to the small alphabet above. thousands: 1,234 is one number; otherwise a list of two."""
    def sub(pattern, new):
        nonlocal text
        text = re.sub(pattern, new, text)

    sub(f"[{''.join(RAISED)}]+", lambda m: "^{" + "".join(map(RAISED.get, m[0])) + "}")
    sub(f"[{''.join(LOWERED)}]+", lambda m: "_{" + "".join(map(LOWERED.get, m[0])) + "}")
    sub("[¼-¾⅐-⅞]", lambda m: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄")))
    text = unicodedata.normalize("NFKC", text.replace("º", "°").replace("ℝ", r"\R ").replace("\\\\", "↵"))
    text = "".join(str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) != "Cf")
    sub("[α-ωΓ-Ω]", lambda m: "\\" + unicodedata.name(m[0]).split()[-1].lower().replace("lamda", "lambda") + " ")
    text = SYMBOL.sub(lambda m: SYMBOLS[m[0]], normalise(text))
    sub(r"\\mathbb ?\{? ?([A-Z]) ?\}?", lambda m: "ℝ" if m[1] == "R" else m[1])
    sub(r"↵ ?\[[^\]]*\]", "↵")
    sub(r"\\begin ?\{(\w*matrix|array|cases)\} ?(?:\{[lcr| ]*\})?", lambda m: "⟪" + {"v": "|", "c": ";"}.get(m[1][0], ","))
    sub(r"\\end ?\{(\w*matrix|array|cases)\}", "⟫")
    sub(r"\\(boxed|fbox)(?![a-zA-Z])", "")
    sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}")
    for _ in range(4):                                               # outermost first; four nested \text are plenty
        sub(r"\\(text\w*|mbox|hbox|operatorname|math\w+|boldsymbol|bm|pmb)\*? ?\{((?:[^{}]|\{[^{}]*\})*)\}", text_command)
    sub(r"(?<=[\d.])\\dot ?\{?(\d)\}?(\d*)\\dot ?\{?(\d)\}?", r"(\1\2\3)")          # 0.\dot12\dot3 is 0.(123)
    sub(r"(?<!\d)(\d*)\.(\d*) ?(?:\\(?:overline|bar|dot) ?\{? ?(\d+) ?\}?|\((\d+)\))", r"\g<1>.\2~\3\4")
    sub(r"(?<!\d)(\d*)\.(\d{0,9}?)(\d{1,9}?)\3\3+ ?…", r"\1.\2~\3")          # 0.333...
    sub(r"(?<![\w.,~^_])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", ""))
    sub(r"(?<=\d)\{,\}(?=\d)", ",")
    if thousands:
        sub(r"(?<![\w.,~^_])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""))
    sub(r"(?<=[a-z])\.(?= ?[A-Za-z^])", "")                          # sq. units, a.m., in.^2
    sub(r"(?<=[\d)}]) ?(\b(?:[kc]?m|mi|ft|g|kg)/(?:s|h|hr|sec|min|[kc]?m)\b(?:\^\{?[23]\}?)?)", r"«\1»")
    sub(r"«[^»]*»|\\[A-Za-z]+|[A-Za-z]{2,}", word)
    sub("« +", "«")
    sub(" *» *«", " ")
    sub("(?:all|«all) *«?real(?: number)?s»", "ℝ")
    sub(r" ?«base» ?(\d+)|_\{? ?«(\w+)» ?\}?", lambda m: "_{" + (m[1] or NUMERALS.get(m[2], m[2])) + "}")
    sub(r"\((\d+)\)_", r"\1_")                                       # (101)_2
    sub(r"(?<![\w)])([\[\]])([^\[\]()]*,[^\[\]()]*)([\[\]])",        # ]1, 2[
        lambda m: "(["[m[1] == "["] + m[2] + ")]"[m[3] == "]"])
    return squeeze(re.sub(r"\s+", " ", text)).lstrip(" \"'`").rstrip(" .,;↵\"'`")


# -------------------------------------------------------------------------------- tokens to a tree


def num(value):
    return ("num", Fraction(value))


def sym(name):
    return ("sym", name)


def mul(*factors):
    return ("mul", *factors)


def negative(node):
    return ("num", -node[1], *node[2:]) if node[0] == "num" else mul(num(-1), node)


def inverse(node):
    return ("pow", node, num(-1))


UNIT_WORD = r"«[^»]*»(?: ?\^\{?-?\d+\}?)?"
UNIT = rf"(?:{UNIT_WORD}[ */]*)+|\\frac ?\{{ ?{UNIT_WORD} ?\}} ?\{{ ?{UNIT_WORD} ?\}}"
MIXED = r"\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}|(?<= )(\d+) ?/ ?(\d+)(?![\d.])"
CLOSING = {"(": r"[)\]]", "[": r"[)\]]", "{": r"\}", "⟨": "⟩", "⌊": "⌋", "⌈": "⌉", "|": r"\|"}


class Reader:
    """A position in a prepared text, and one method a grammar rule.

    answer > relation > union > item > sum > term > factor > atom. No backtracking, depth bounded by MAX_DEPTH; anything
    unexpected is Hopeless."""

    def __init__(self, text):
        self.text, self.i, self.depth, self.in_bars, self.in_function, self.unit = text, 0, 0, False, False, None

    def see(self, pattern):
        return re.compile(f" ?(?:{pattern})").match(self.text, self.i)

    def take(self, pattern):
        match = self.see(pattern)
        self.i = match.end() if match else self.i
        return match

    def need(self, pattern):
        return self.take(pattern) or self.fail()

    def fail(self):
        raise Hopeless(f"cannot read {self.text[self.i:self.i + 20]!r}")

    def whole(self):
        node = self.answer()
        return node if self.see("$") else self.fail()

    def answer(self):
        """Relations between commas, "and", "or": ("list", separator, *items); one alone is itself."""
        items, separators = [self.relation()], ""
        while match := self.take("(?:[,;] ?)?[∧∨]|[,;]"):
            separators += match[0]
            items.append(self.relation())
        return items[0] if len(items) == 1 else ("list", "∨" if "∨" in separators else "∧", *items)

    def relation(self):
        """a < b <= c, y = 2x + 1, x in (2, 6], 4 : 9. A leading "f(x) =", "a_n =", "Answer:" or "=" is dropped."""
        self.take("«[^»]*» ?:|[=≈]")
        self.take(r"(?:[A-Za-z]|\\[a-z]+ )(?:_\{?\w+\}?)?'*(?:\^\{?-1\}?)?\((?:[A-Za-z](?:, ?[A-Za-z])*|\d+)\)="
                  r"|[A-Za-z]_\{?[a-z]\}?=")
        parts, signs = [self.union()], ""
        while match := self.take("[=<>≤≥≠≈∈:]"):
            signs += match[0].strip()
            parts.append(self.union())
        if not signs:
            return parts[0]
        return ("ratio", *parts) if set(signs) == {":"} else ("rel", signs, *parts)

    def union(self):
        node = self.item()
        while match := self.take("[∪∩∖]"):
            other = self.item()
            lists = match[0] == "∪" and node[0] == other[0] == "list"
            node = (*node, *other[2:]) if lists else ("set", match[0].strip(), node, other)
        return node

    def item(self):
        """A sum, with words or a currency in front and a unit behind: ("unit", name, sum)."""
        outer, self.unit = self.unit, None
        if match := self.take(r"«(\w[^»]*)»(?! ?[,;=∧∨:)\]|∣⦄<>≤≥]| ?$|\()"):
            if set(match[1].lower().split()) & QUALIFIERS:
                self.fail()
        node = self.sum()
        if match := self.take(UNIT):
            self.set_unit(re.sub(r"\\frac ?\{([^{}]*)\} ?\{(.*)\}", r"\1/\2", match[0]))
        node, self.unit = ("unit", self.unit, node) if self.unit else node, outer
        return node

    def set_unit(self, text):
        unit = canonical_unit(text)
        if self.unit not in (None, unit) or set(unit.split()) & QUALIFIERS:
            self.fail()
        self.unit = unit

    def sum(self):
        terms, signs = [], self.take(r"[+\-±∓](?: ?[+\-])*")
        while signs or not terms:
            at, signs = self.i, signs[0] if signs else ""
            term = self.term()
            if "±" in signs or "∓" in signs:                         # ± 1 ± i has four values, ± 1 ∓ i two
                sign = sym("±" if "∓" in self.text else f"±{at}")
                term = mul(negative(sign) if "∓" in signs else sign, term)
            terms.append(negative(term) if signs.count("-") % 2 else term)
            signs = self.take(r"[+\-±∓](?: ?[+\-])*")
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self):
        factors = [self.factor()]
        while True:
            if match := self.take(r"([*/]) ?(-?)"):
                factor = inverse(self.factor()) if match[1] == "/" else self.factor()
                factors.append(negative(factor) if match[2] else factor)
            elif self.starts_factor():
                factors.append(self.factor())
            else:
                return factors[0] if len(factors) == 1 else mul(*factors)

    def starts_factor(self):
        """Does a factor follow without an operator? 2x, 2(x), 2^{3}5; but not 2 3, x2, or the bar that closes |x|."""
        if self.see(r"[\d.]"):
            return self.text[self.i - 1] in "})]!"
        closing_bar = self.in_bars and self.see(r"\|")
        return self.see(r"[A-Za-zπ∞({\[⟪⌊⌈|]|\\[A-Za-z]") and not self.see(UNIT) and not closing_bar

    def factor(self):
        """An atom and what stands behind it: ! ^ ' % °."""
        if currency := self.take("«[$€£¥₹]»"):
            self.set_unit(currency[0])
        node = self.atom()
        for _ in range(5):
            match = self.take(r"!!?(?![=!])|\^|%|° ?«?[CF]»?(?![A-Za-z])|°|'")
            mark = match[0].strip() if match else ""
            if mark == "^":
                node = self.power(node)
            elif mark[:1] == "!":
                node = ("fn", "factorial" + mark[1:], node)
            elif mark == "'":
                node = sym(node[1] + "'") if node[0] == "sym" else self.fail()
            elif mark == "°" and self.in_function:                   # sin 30° is a number; alone, ° is a unit
                node = mul(node, sym("π"), num(Fraction(1, 180)))
            elif mark:
                self.set_unit(mark)
            else:
                return node
        return self.fail()

    def power(self, base):
        if base[0] == "matrix" and self.take(r"\{ ?T ?\}|T|\\top"):
            return ("matrix", *zip(*base[1:]))
        self.depth += 1
        sign = self.take("[-+]")
        digits = self.take(r"\d+(?:\.\d+)?")                         # 2^10 is 1024 although TeX sets 2^1 0
        exponent = num(digits[0]) if digits else self.atom()
        if self.take(r"\^"):
            exponent = self.power(exponent) if self.depth < MAX_DEPTH else self.fail()
        self.depth -= 1
        return ("pow", base, negative(exponent) if sign and "-" in sign[0] else exponent)

    def atom(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail()
        node = self.number() or self.bracket() or self.command() or self.name() or self.fail()
        self.depth -= 1
        return node

    def number(self):
        if match := self.take(r"(\d+|\d[\dA-F]*(?=_\{?1\d))_(?:\{[ ({]*(\w+)[ )}]*\}|(\d+))"):
            return sym(f"{match[1]}_{match[2] or match[3]}")         # 101_2 is a symbol of its own: bases must agree
        match = self.take(r"(\d*)\.(\d*)(?:~(\d+))?(?:[eE]([+-]?\d{1,5}))?|(\d+)(?:[eE]([+-]?\d{1,5}))?")
        if not match or match[0].strip() == ".":
            return self.fail() if match else None
        whole, part, repeating = match[1] or match[5] or "0", match[2] or "", match[3]
        shift = int(match[4] or match[6] or 0)
        value = Fraction(int(whole + part), 10 ** len(part))
        if repeating:
            value += Fraction(int(repeating), 10 ** len(part) * (10 ** len(repeating) - 1))
        value *= Fraction(10) ** shift
        mixed = self.see(MIXED) if match[5] else None
        if mixed and int(mixed[1] or mixed[3]) < int(mixed[2] or mixed[4]):
            self.take(MIXED)
            value += Fraction(int(mixed[1] or mixed[3]), int(mixed[2] or mixed[4]))
        if len((whole + part).lstrip("0")) >= 15 and part and not repeating:
            return ("num", value, len(part) - shift)                 # full double precision: may stand for a fraction
        return num(value)

    def name(self):
        r"""x, x_1, \alpha, π, or a «word»."""
        match = self.take(r"([A-Za-zπ∞ℝ…])|\\([A-Za-z]+)|«([^»]*)»|(∅)")
        if not match or match[4]:
            return match and ("empty",)
        if match[3] and len(match[3]) > 1:
            return ("text", plain(match[3]))
        sub = self.take(r"_(?:\{([^{}]*)\}|(\w))")
        return sym("".join(match.groups("")) + ("_" + (sub[1] or sub[2] or "").replace(" ", "") if sub else ""))

    def bracket(self):
        match = self.take(r"[({\[⦃⟨⌊⌈|⟪]")
        if not match:
            return None
        opening, outer = match[0].strip(), (self.in_bars, self.unit)
        self.in_bars, self.unit = opening == "|", None
        if opening == "⟪":
            node = self.matrix()
        elif opening == "⦃":
            node = self.braces()
        else:
            node = self.answer()
            closing = self.need(CLOSING[opening])[0].strip()
            if opening == "|" and node[0] == "matrix":
                node = determinant(node[1:])
            elif opening in "⌊⌈|":
                node = ("fn", {"⌊": "floor", "⌈": "ceil", "|": "abs"}[opening], node)
            elif node[0] == "list" and opening != "{":
                node = ("tuple", opening + closing, *node[2:])
        self.in_bars, self.unit = outer
        return node

    def braces(self):
        r"""\{1, 2\} is ("list", ...); \{x : x > 2\} is the inequality."""
        if self.take("⦄"):
            return ("empty",)
        builder = self.take(r"[A-Za-z](?:∈[ℝA-Z]+)?[|∣:]")
        node = self.answer()
        self.need("⦄")
        return node if builder or node[0] == "list" else ("list", "∧", node)

    def matrix(self):
        kind, rows = self.need("[|;,]")[0].strip(), [[]]
        while not self.take("⟫"):
            rows[-1].append(self.answer())
            if self.take("↵"):
                rows.append([])
            elif not self.see("⟫"):
                self.need("&")
        rows = [tuple(row) for row in rows if row]
        if kind == ";":                                              # cases: a system
            return ("list", "∧", *(row[0] if len(row) == 1 else ("tuple", "()", *row) for row in rows))
        return determinant(rows) if kind == "|" else ("matrix", *rows)

    def command(self):
        match = self.see(r"\\([A-Za-z]+)")
        if not match or match[1] not in COMMANDS:
            return None
        self.i, name = match.end(), match[1]
        if name in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            return mul(top, inverse(bottom)) if name == "frac" else ("fn", "binom", top, bottom)
        if name == "sqrt":
            index = num(2)
            if self.take(r"\["):
                index = self.answer()
                self.need(r"\]")
            return ("pow", self.argument(r"\d+(?:\.\d+)?"), inverse(index))
        if name not in FUNCTIONS:
            return sym(f"{name} {self.argument()}")                  # \vec{v}, \overline{AB}
        base = self.argument(r"\d+(?=[ ({])|\d") if name == "log" and self.take("_") else None
        power = self.power(num(1))[2] if self.take(r"\^") else None
        if power == num(-1):
            name, power = "a" + name, None                           # sin^{-1}
        argument = self.function_argument()
        node = ("fn", name, *(argument[2:] if argument[0] in ("tuple", "list") else [argument]))
        if base:
            node = mul(("fn", "ln", argument), inverse(("fn", "ln", base)))
        return ("pow", node, power) if power else node

    def argument(self, digits=r"\d"):
        r"""What \frac and \sqrt take: a group, a token, or so many digits."""
        match = self.take(digits)
        return num(match[0]) if match else self.atom()

    def function_argument(self):
        """sin(x), or sin 2x up to the next operator, bracket or function."""
        outer, self.in_function = self.in_function, True
        if self.see(r"[({\[|⦃]"):
            node = self.atom()
        else:
            sign, factors = self.take("-"), [self.factor()]
            while self.starts_factor() and not self.see(r"\(|\\(?:" + "|".join(FUNCTIONS) + ")(?![a-z])"):
                factors.append(self.factor())
            node = mul(num(-1 if sign else 1), *factors)
        self.in_function = outer
        return node


@lru_cache(256)
def readings(text):
    """The trees a text may mean, at most two: 1,234 is a number or a list. Cached, so that a gold answer is read once."""
    trees = []
    for thousands in (True, False) if "," in text else (True,):
        try:
            trees.append(Reader(prepare(text, thousands)).whole())
        except Exception:                                            # untrusted text: whatever it provokes, it is not read
            pass
    return list(dict.fromkeys(trees))


def plain(text):
    """A text answer without case, punctuation and markup."""
    return " ".join(re.sub(r"[^\w%$€£]+", " ", re.sub(r"\\[a-z]+|[«»{}]", " ", text).lower()).split())


def canonical_unit(text):
    """'square centimeters' -> 'cm^2', 'miles per hour' -> 'mph', other words -> themselves in the singular."""
    def short(match):
        singular = match[0].rstrip("s") if len(match[0]) > 2 else match[0]
        return UNITS.get(match[0]) or UNITS.get(singular, singular)

    text = re.sub(r"\bper\b", "/", re.sub("[«»{}.*]", " ", text.lower()))
    text = re.sub(r"\b(?:square|sq) +(\w+)|(\w+) +squared", r"\1\2^2", text)
    text = re.sub(r"\b(?:cubic|cu) +(\w+)|(\w+) +cubed", r"\1\2^3", text)
    text = re.sub(r"(?<=[a-z])(?=[23]\b)", "^", re.sub("[a-z]+", short, text))
    text = re.sub(r" ?([/^°]) ?", r"\1", " ".join(re.sub(r"(\w+) ?\^ ?-(\d)", r"/\1^\2", text).split())).strip(" /")
    return UNITS.get(text, text.removesuffix("^1"))


# -------------------------------------------------------------------------------- a tree to a value

CONSTANTS = {"π": lambda: +mp.pi, "e": lambda: +mp.e, "i": lambda: mp.mpc(0, 1)}
ON_INTEGERS = {"factorial": math.factorial, "factorial!": lambda n: math.prod(range(n, 0, -2)), "binom": math.comb,
               "gcd": math.gcd, "lcm": math.lcm}
ON_NUMBERS = {name: getattr(mp, name) for name in FUNCTIONS - {"log", "max", "min", "gcd", "lcm", "abs", "det"}}
ON_NUMBERS |= {"factorial": mp.factorial, "binom": mp.binomial}


def inexact(value):
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def checked(value, env):
    """The value, if it is defined and within bounds. env["mag"] remembers the largest |log2| that passed."""
    if isinstance(value, Fraction):
        top, bottom = value.numerator.bit_length(), value.denominator.bit_length()
        if top + bottom > MAX_BITS:
            raise Hopeless("too big")
        env["mag"] = max(env["mag"], abs(top - bottom))
        return value
    if isinstance(value, mp.mpc) and value.imag == 0:
        value = value.real
    if not mp.isfinite(value) or env.get("real") and isinstance(value, mp.mpc):
        raise Hopeless("undefined")
    env["mag"] = max(env["mag"], abs(int(mp.mag(value))) if value else 0)
    if env["mag"] > 3.33 * MAX_DIGITS:
        raise Hopeless("too big")
    return value


def evaluate(node, env):
    """Fraction as long as that is exact, else mpf or mpc at the current precision.

    env: symbol -> Fraction; "mag" (see checked); "real": complex values are undefined; "log10": log has base 10, not e."""
    kind, *args = node
    if kind == "num":
        return checked(args[0], env)
    if kind == "sym" and (args[0] in env or args[0] in CONSTANTS):
        return env[args[0]] if args[0] in env else CONSTANTS[args[0]]()
    if kind == "unit":
        return evaluate(args[1], env)
    if kind not in ("add", "mul", "pow", "fn"):
        raise Hopeless(kind)
    values = [evaluate(arg, env) for arg in args[kind == "fn":]]
    if kind == "fn":
        return checked(apply(args[0], values, env), env)
    if kind == "pow":
        return checked(power(*values, env), env)
    total = values[0]
    for value in values[1:]:
        if not (isinstance(total, Fraction) and isinstance(value, Fraction)):
            total, value = inexact(total), inexact(value)
        total = checked(total + value if kind == "add" else total * value, env)
    return total


def power(base, exponent, env):
    """base^exponent; an odd root of a negative real is the real one, as at school."""
    rational_exponent = isinstance(exponent, Fraction)
    if base == 0:
        if not rational_exponent or exponent <= 0:
            raise Hopeless("undefined")
        return Fraction(0)
    if rational_exponent and exponent.denominator == 1 and isinstance(base, Fraction):
        if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent) > MAX_BITS and abs(base) != 1:
            raise Hopeless("too big")
        return base ** int(exponent)
    if rational_exponent and exponent.denominator % 2 and not isinstance(base, mp.mpc) and base < 0:
        return (-1) ** (exponent.numerator % 2) * mp.power(inexact(-base), inexact(exponent))
    base, exponent = inexact(base), inexact(exponent)
    if env.get("real") and base < 0 and not mp.isint(exponent):
        raise Hopeless("not real")
    return mp.power(base, exponent)


def apply(name, values, env):
    x = values[0]
    if name == "abs":
        return abs(x)
    if name in ("max", "min"):
        return (max if name == "max" else min)(values)
    if name in ("floor", "ceil"):
        if not isinstance(x, Fraction) and abs(x - mp.nint(x)) < mp.mpf(10) ** (-mp.dps // 2):
            x = mp.nint(x)                                           # 3 computed as 2.999...
        return Fraction(getattr(math, name)(x) if isinstance(x, Fraction) else int(getattr(mp, name)(x)))
    if name in ON_INTEGERS:
        if all(isinstance(v, Fraction) and v.denominator == 1 and v >= 0 for v in values) and values[-1] <= 20_000:
            return Fraction(ON_INTEGERS[name](*map(int, values)))
        if max(map(abs, values)) > 1000:                             # the gamma function of a huge number takes for ever
            raise Hopeless("too big")
    if x == 0 and name in ("log", "ln"):
        raise Hopeless("undefined")
    if name == "log":
        return mp.ln(inexact(x)) / (mp.ln(10) if env.get("log10") else 1)
    if name not in ON_NUMBERS:
        raise Hopeless(name)
    return ON_NUMBERS[name](*map(inexact, values))


def determinant(rows):
    if any(len(row) != len(rows) for row in rows) or len(rows) > 4:
        raise Hopeless("determinant")
    if len(rows) == 1:
        return rows[0][0]
    minors = [determinant([row[:j] + row[j + 1:] for row in rows[1:]]) for j in range(len(rows))]
    return ("add", *(mul(num((-1) ** j), rows[0][j], minor) for j, minor in enumerate(minors)))


# -------------------------------------------------------------------------------- equal formulas


def symbols(node):
    """Names in a tree, without the constants π, e, i."""
    if node[0] == "sym":
        return {node[1]} - set(CONSTANTS)
    return set().union(*(symbols(part) for part in node if isinstance(part, tuple) and part))


def substitute(node, values):
    """The tree with symbols replaced. values: name -> Fraction."""
    if node[0] == "sym" and node[1] in values:
        return num(values[node[1]])
    return tuple(substitute(part, values) if isinstance(part, tuple) and part else part for part in node)


def equal(a, b):
    """Are two trees the same number, or the same function of their symbols? log may mean base 10 or e, but one for both."""
    names = symbols(a) | symbols(b)
    if "∞" in names:
        return infinity(a) == infinity(b) != 0
    text = repr((a, b))
    for log10 in (True, False) if "'log'" in text else (False,):
        for real in (True, False) if names and "'i'" not in text else (False,):
            integers = "factorial" in text or "binom" in text        # n! is about whole n, and exact there
            verdict = same_function(a, b, sorted(names), {"log10": log10, "real": real}, integers)
            if verdict:
                return True
            if verdict is False:
                break
    return False


def infinity(node):
    """+1 or -1 for plus or minus infinity, else 0."""
    if node[0] == "mul" and len(node) == 3 and node[1][0] == "num":
        return int(math.copysign(1, node[1][1])) * infinity(node[2])
    return int(node == sym("∞"))


def same_function(a, b, names, env, integers):
    """Agreement at six random points (one suffices without symbols); None if too few points lie in the domain of both."""
    rng, agreed = random.Random(7), 0
    for trial in range(24 if names else 1):                          # in turn: in (0, 1), positive, negative, large
        point = {name: Fraction(rng.randint(1, 907 * (1, 9, 9, 400)[trial % 4]), 907) for name in names}
        if integers:
            point = {name: Fraction(rng.randint(1, 60)) for name in names}
        elif trial % 4 == 2:
            point = {name: value * (-1 if name == names[0] else rng.choice((-1, 1))) for name, value in point.items()}
        try:
            if not agree(a, b, {**env, **point, "mag": 0}):
                return False
        except (ValueError, ArithmeticError):                        # outside the domain of one of them
            continue
        agreed += 1
        if agreed == 6:
            return True
    return agreed >= min(3, 1 + 2 * len(names)) or None


def agree(a, b, env):
    """The same value at one point? Exactly if it is rational, else: the difference shrinks with the precision."""
    mp.dps = 15
    left, right = evaluate(a, env), evaluate(b, env)
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right or double_precision(a, right) or double_precision(b, left)
    extra = env["mag"] * 3 // 10                                     # digits between the largest and the smallest number
    if extra > MAX_DIGITS:
        raise Hopeless("too big")
    gaps = [abs(inexact(left) - inexact(right))]
    if extra < 50 and gaps[0] > mp.mpf(10) ** (extra - 5):
        return False
    for digits in (40, 110):
        mp.dps = digits + extra
        left, right = inexact(evaluate(a, env)), inexact(evaluate(b, env))
        gaps.append(abs(left - right))
    return bool(gaps[2] <= max(gaps[1] * mp.mpf(10) ** -40, abs(left) * mp.mpf(10) ** (30 - mp.dps)))


def double_precision(node, value):
    """0.3333333333333333 for 1/3: a decimal of 15 digits or more, right to the last, for a fraction no decimal can write."""
    odd = value.denominator
    while odd % 2 == 0 or odd % 5 == 0:
        odd //= 2 if odd % 2 == 0 else 5
    return len(node) == 3 and node[0] == "num" and odd > 1 and (
        abs(node[1] - value) < Fraction(10) ** -node[2] or float(node[1]) == float(value))


# -------------------------------------------------------------------------------- equal answers

FLIP = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


def is_value(node):
    return node[0] in ("num", "sym", "add", "mul", "pow", "fn")


def is_name(node):
    r"""x, x_1, AB, |AB|, \angle ABC, P(A), area: what may stand before "= 5" without being part of the answer."""
    if node[0] == "mul":
        return sym("angle") in node or all(factor[0] == "sym" and factor[1] != factor[1].lower() for factor in node[1:])
    return node[0] in ("sym", "text") and node != sym("π") or node[:2] == ("fn", "abs") and is_name(node[2])


def assigned(node):
    """(x, 5) from x = 5 or 5 = x, (name, 5) from area = 5; else None."""
    if node[0] == "rel" and set(node[1]) == {"="}:
        name, *values = node[2:] if is_name(node[2]) or node[2][0] in ("tuple", "matrix") else node[:1:-1]
        constant = is_name(name) and not any(symbols(value) - {"∞"} for value in values)
        if name[0] in ("tuple", "matrix") or constant and all(same(value, values[-1]) for value in values):
            return name, values[-1]
    return None


def bare(node):
    return node[2] if node[0] == "unit" else node


def items(node):
    """What an answer lists: ± expanded, x = 5 opened to 5, two solutions for one unknown to two values."""
    signs = sorted(name for name in symbols(node) if name[0] == "±")
    if len(signs) > 4:
        raise Hopeless("too many signs")
    if node[0] == "empty":
        return []
    if node[0] == "rel" and node[1] == "∈":
        return items(node[3])
    if node[0] != "list":
        found = [substitute(node, dict(zip(signs, values))) for values in product((1, -1), repeat=len(signs))]
    else:
        found = [x for part in node[2:] for x in (items(part) if any("±" in name for name in symbols(part)) else [part])]
    names = {assigned(x)[0] if assigned(x) else None for x in found}
    if len(found) == 1 and None not in names:
        return items(assigned(found[0])[1])
    if len(names - {None}) == 1:                                     # x = 1, y = 2 stay equations
        found = [assigned(x)[1] if assigned(x) else x for x in found]
    return [settle(x) for x in found]


def settle(node):
    """One item in the form that is compared: "a ≈ 0.3" -> a, 2 + 3 = 5 -> 5, sums and multiples of matrices."""
    if node[0] == "rel":
        if node[1][-1] == "≈":
            return settle(node[2 + is_name(node[2])] if len(node) == 4 else ("rel", node[1][:-1], *node[2:-1]))
        if set(node[1]) == {"="} and not symbols(node) and all(is_value(v) and equal(v, node[2]) for v in node[2:]):
            return node[-1]
    if node[0] in ("add", "mul"):
        parts = [settle(part) for part in node[1:]]
        matrices = [part for part in parts if part[0] == "matrix"]
        scalars = [part for part in parts if part[0] != "matrix"]
        if node[0] == "mul" and len(matrices) == 1:
            return ("matrix", *(tuple(mul(*scalars, cell) for cell in row) for row in matrices[0][1:]))
        if node[0] == "add" and matrices and not scalars and len({(len(m), len(m[1])) for m in matrices}) == 1:
            rows = zip(*(matrix[1:] for matrix in matrices))
            return ("matrix", *(tuple(("add", *cells) for cells in zip(*row)) for row in rows))
    return node


def same(a, b):
    """The verdict on two trees."""
    if a == b:
        return True
    if assigned(a) and assigned(b) and assigned(a)[0] != assigned(b)[0]:
        return False                                                 # x = 5 is 5, y = 5 is 5, but they are not the same
    left, right = items(a), items(b)
    for one, other in ((left, right), (right, left)):
        if len(one) > 1 and all(map(assigned, one)) and not any(map(assigned, other)):
            names, values = zip(*sorted(map(assigned, one)))
            if len(other) == 1 and other[0][0] == "tuple":           # x = 1, y = 2 is the point (1, 2)
                return same_in_order(other[0][2:], values)
            if len({name[-1].split("_")[0] for name in names}) == 1 and len(one) == len(other):
                return unordered(values, other)                      # x_1 = 1, x_2 = 2 are the roots 1, 2
    if len(left) == len(right) and unordered(left, right):
        return True
    regions = [part[0] if len(part) == 1 else node for part, node in ((left, a), (right, b))]
    names = [symbols(region) - {"∞", "ℝ"} for region in regions]
    return (all(map(is_region, regions)) and {regions[0][0], regions[1][0]} != {"tuple"}
            and (names[0] == names[1] or not all(names)) and same_region(*regions))


def unordered(left, right):
    """The same items in any order, repetitions counted."""
    rest = list(right)
    for item in left:
        k = next((k for k, other in enumerate(rest) if same_item(item, other)), None)
        if k is None:
            return False
        del rest[k]
    return True


def same_in_order(left, right):
    return len(left) == len(right) and all(map(same, left, right))


def same_item(a, b):
    unit_a, unit_b = (node[1] if node[0] == "unit" else None for node in (a, b))
    if unit_a and unit_b and unit_a != unit_b:
        return False
    a, b = bare(a), bare(b)
    if is_value(a) and is_value(b):
        marked, other = (a, b) if unit_a else (b, a)
        factor = {"%": num(Fraction(1, 100)), "°": mul(sym("π"), num(Fraction(1, 180)))}.get(unit_a or unit_b)
        return (equal(a, b) or same_antiderivative(a, b)
                or factor is not None and unit_a != unit_b and equal(mul(marked, factor), other))
    for ratio, value in ((a, b), (b, a)):
        if ratio[0] == "ratio" and len(ratio) == 3 and is_value(value):
            return equal(mul(ratio[1], inverse(ratio[2])), value)
    if a[0] != b[0]:
        return False
    if a[0] == "tuple":
        return a[1] == b[1] and same_in_order(a[2:], b[2:])
    if a[0] == "matrix":
        return len(a) == len(b) and all(map(same_in_order, a[1:], b[1:]))
    if a[0] == "ratio":
        return len(a) == len(b) and all(equal(mul(x, b[1]), mul(y, a[1])) for x, y in zip(a[2:], b[2:]))
    if a[0] == "rel":
        return same_relation(a, b)
    return a == b or a[0] == "list" and same(a, b)


def same_antiderivative(a, b):
    """ln|2x| + C and ln|x| + C are one answer; the constant must stand on both sides."""
    constants = {sym(name) for name in "CcKk"}
    if a[0] != "add" or b[0] != "add" or len(constants & set(a)) != 1 or len(constants & set(b)) != 1:
        return False
    f, g = (("add", num(0), *(part for part in side[1:] if part not in constants)) for side in (a, b))
    gap = ("add", f, negative(g))
    names = sorted(symbols(gap))
    return bool(names) and equal(gap, substitute(gap, {name: Fraction(17 + k, 11) for k, name in enumerate(names)}))


def same_relation(a, b):
    """Equations or inequalities: part by part, or one is a constant times the other (negative: the sign turns)."""
    turned = ("rel", "".join(FLIP.get(sign, sign) for sign in reversed(a[1])), *a[:1:-1])
    if any(side[1] == b[1] and same_in_order(side[2:], b[2:]) for side in (a, turned)):
        return True
    if len(a) > 4 or len(b) > 4 or not all(map(is_value, a[2:] + b[2:])) or symbols(a) != symbols(b):
        return False
    f, g = (("add", rel[2], negative(rel[3])) for rel in (a, b))
    point = {name: Fraction(13 + 7 * k, 17 + k) for k, name in enumerate(sorted(symbols(f)))}
    f0, g0 = substitute(f, point), substitute(g, point)
    sign = evaluate(mul(f0, g0), {"mag": 0})
    if isinstance(sign, mp.mpc) or sign == 0:
        return False
    if equal(mul(f, g0), mul(g, f0)):                                # f / g is the same everywhere
        return (a[1] if sign > 0 else FLIP.get(a[1], a[1])) == b[1]
    solutions = [[solved(side, name) for side in (f, g)] for name in symbols(f)] if a[1] == b[1] == "=" else []
    return any(all(pair) and equal(*pair) for pair in solutions)


def solved(f, name):
    """The solution of f = 0 for one unknown as a tree, if f is affine in it: y = 1/x and xy = 1 have the same."""
    at = [substitute(f, {name: Fraction(k)}) for k in (-3, 1, 5)]    # on both sides of 0, because of |x|
    slope = ("add", at[1], negative(at[0]))
    if not equal(slope, ("add", at[2], negative(at[1]))) or equal(slope, num(0)):
        return None
    return ("add", num(-3), mul(num(-4), at[0], inverse(slope)))


# -------------------------------------------------------------------------------- sets of real numbers


def is_region(node):
    """An interval, a union, or inequalities in one unknown."""
    if node[0] == "list":
        return len(node) > 2 and all(part[0] == "rel" and is_region(part) for part in node[2:])
    if node[0] == "rel":
        return not set(node[1]) & set("=≈∈:") and len(symbols(node) - {"∞"}) == 1
    return node[0] == "set" or node == sym("ℝ") or node[0] == "tuple" and len(node) == 4 and set(node[1]) <= set("()[]")


NEAR = mp.mpf(10) ** -25


def real(node, env):
    """mpf value, infinities included."""
    if infinity(node):
        return infinity(node) * mp.inf
    value = inexact(evaluate(node, dict(env, mag=0)))
    if isinstance(value, mp.mpc):
        raise Hopeless("not real")
    return value


@lru_cache(256)
def endpoint(node):
    return real(node, {})                                            # asked for at every point of a grid


def holds(x, sign, y):
    close = x == y or abs(x - y) < NEAR * (1 + abs(y))               # borders are computed, so equality needs a tolerance
    if close:
        return sign in "≤≥="
    return x < y if sign in "<≤" else x > y if sign in ">≥" else sign == "≠"


def contains(node, x):
    """Is the real number x in the set; does it satisfy the inequality?"""
    if node == sym("ℝ"):
        return True
    if node[0] == "tuple":
        return (holds(endpoint(node[2]), "<" if node[1][0] == "(" else "≤", x)
                and holds(x, "<" if node[1][1] == ")" else "≤", endpoint(node[3])))
    if node[0] == "set":
        left, right = contains(node[2], x), contains(node[3], x)
        return {"∪": left or right, "∩": left and right, "∖": left and not right}[node[1]]
    if node[0] == "list":
        parts = [contains(part, x) if part[0] == "rel" else holds(x, "=", real(part, {})) for part in node[2:]]
        return all(parts) if node[1] == "∧" and node[2][0] == "rel" else any(parts)
    try:
        values = [real(part, {name: x for name in symbols(node)}) for part in node[2:]]
    except (ValueError, ArithmeticError):
        return False                                                 # outside the domain
    return all(map(holds, values, node[1], values[1:]))


def borders(node):
    """Where membership may change, as far as it can be read off: end points, and roots of linear inequalities."""
    if node[0] == "rel":
        (name,), found = symbols(node) - {"∞"}, []
        for left, right in zip(node[2:], node[3:]):
            if not infinity(left) and not infinity(right):
                y = [real(("add", left, negative(right)), {name: Fraction(x)}) for x in (1, 2, 3)]
                if abs(y[0] - 2 * y[1] + y[2]) < mp.mpf(10) ** -20 < abs(y[1] - y[0]):
                    found.append(1 - y[0] / (y[1] - y[0]))
        return found
    parts = node[2:] if node[0] in ("tuple", "set", "list") else ()
    return [p for part in parts for p in ([real(part, {})] if is_value(part) and part != sym("ℝ") else borders(part))]


def same_region(a, b):
    """The same membership at every border, just beside it, and on a grid. One side at least must show its borders."""
    mp.dps = 40
    known = [p for p in borders(a) + borders(b) if mp.isfinite(p)][:40]
    grid = [Fraction(k, 3) + Fraction(1, 1000) for k in range(-30, 31)] + [s * 10 ** k for k in (2, 3, 6) for s in (-1, 1)]
    points = known + [p + s * mp.mpf(10) ** -9 for p in known for s in (-1, 1)] + [inexact(x) * mp.one for x in grid]
    return bool(known or sym("ℝ") in (a, b)) and all(contains(a, x) == contains(b, x) for x in points)


# -------------------------------------------------------------------------------- one case


def choice(text):
    """The letter of a multiple-choice answer: bracketed, dotted, or with what it stands for behind it; else None."""
    text = re.sub(r"[\\{}$*]|text\w*|mathrm|mathbf", " ", SPACING.sub(" ", text)).strip()
    match = (re.fullmatch(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? )?[(\[]? ?([A-Ja-j]) ?[)\]]?[.:]?", text)
             or re.match(r"\( ?([A-J]) ?\)|([A-J])[).:] ", text))
    if not match or re.search(r"\b[A-J]\b|\bor\b", text[match.end():]):
        return None
    return (match[1] or match[2]).upper()


def compare(prediction, gold):
    """The whole comparison without limits: what a worker runs."""
    left, right = prepare(prediction), prepare(gold)
    if left == right:
        return bool(left)
    if choice(gold) and choice(prediction) and min(len(plain(right)), len(plain(left))) == 1:
        return choice(gold) == choice(prediction)
    if not re.search(r"[\d+=<>*/^_|{}\\]", left + right) and plain(left) == plain(right) and "«" in left + right:
        return True                                                  # words, and nothing but words
    for a, b in product(readings(prediction), readings(gold)):
        try:
            if same(a, b):
                return True
        except Exception:                                            # undefined or too big: Hopeless, or what mpmath raises
            pass
    return False


# -------------------------------------------------------------------------------- workers


def work():
    """A worker's life: a JSON line [prediction, gold] in, one byte out, until the pipe closes or the parent is gone."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)                    # the kernel kills us, even inside a long C call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)                                    # MAX_CHARS bounds them
    sys.setrecursionlimit(3000)
    parent = os.getppid()
    os.write(1, b"r")
    while True:
        while not select.select([0], [], [], 1)[0]:
            if os.getppid() != parent:                               # killed, while a forked sibling holds our pipe open
                return
        line = sys.stdin.buffer.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, b"1" if verdict else b"0")


class Worker:
    """`python reward.py --worker`: a plain subprocess needs no __main__ guard and minds neither threads nor forks."""

    alive, idle = set(), []

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], bufsize=0,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        start_new_session=True)      # Ctrl-C is for the parent, which closes the pipes
        self.ready = False
        Worker.alive.add(self)

    @classmethod
    def get(cls):
        try:
            return cls.idle.pop()
        except IndexError:
            return cls()

    def send(self, case):
        data = json.dumps(case).encode() + b"\n"
        while data:
            data = data[os.write(self.process.stdin.fileno(), data):]
        self.deadline = time.monotonic() + (LIMIT + 0.3 if self.ready else 60)   # starting Python does not count

    def kill(self):
        Worker.alive.discard(self)
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def forget_workers():
    """In a forked child: the workers are the parent's. Close our copies of their pipes, so that they see it go."""
    for worker in Worker.alive:
        worker.process.stdin.close()
        worker.process.stdout.close()
        worker.process.returncode = 0
    Worker.alive, Worker.idle = set(), []


os.register_at_fork(after_in_child=forget_workers)
atexit.register(lambda: [worker.kill() for worker in list(Worker.alive)])


def judge(cases):
    """Verdicts (bool) on (prediction, gold) pairs, in order, from a worker a core. Any thread may call it."""
    verdicts, todo, busy = [False] * len(cases), list(enumerate(cases))[::-1], {}
    try:
        while todo or busy:
            while todo and len(busy) < min(os.cpu_count() or 1, 16):
                worker = Worker.get()
                busy[worker.process.stdout.fileno()] = worker, todo[-1][0]
                try:
                    worker.send(todo[-1][1])
                    todo.pop()
                except OSError:                                      # it died while idle: another one takes the case
                    del busy[worker.process.stdout.fileno()]
                    worker.kill()
            poll = select.poll()
            for pipe in busy:
                poll.register(pipe, select.POLLIN)
            wait = min(worker.deadline for worker, _ in busy.values()) - time.monotonic()
            for pipe, _ in poll.poll(max(0, wait) * 1000 + 1):
                worker, k = busy[pipe]
                answer = os.read(pipe, 1)
                if answer == b"r":
                    worker.ready, worker.deadline = True, time.monotonic() + LIMIT + 0.3
                    continue
                if not answer and not worker.ready:
                    raise RuntimeError(f"a worker does not start: try {sys.executable} {__file__} --worker")
                del busy[pipe]
                verdicts[k] = answer == b"1"
                Worker.idle.append(worker) if answer else worker.kill()         # killed by its alarm or for memory: 0
            for pipe in [pipe for pipe, (worker, _) in busy.items() if time.monotonic() > worker.deadline]:
                busy.pop(pipe)[0].kill()
    finally:
        for worker, _ in busy.values():                              # Ctrl-C in the middle leaves nothing running
            worker.kill()
    return verdicts


# -------------------------------------------------------------------------------- the contract


def is_equiv(prediction, gold):
    """Do two answers, without their boxes, mean the same? None is equal to nothing. Limited like every case."""
    if prediction is None or gold is None:
        return False
    verdict = cheap(str(prediction), str(gold))
    return judge([(str(prediction), str(gold))])[0] if verdict is None else verdict


def rewards(responses, answers):
    """reward() of many pairs, list[float] in their order; the ones that need reading are read in parallel."""
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
    golds = ["" if answer is None else extract_answer(answer) or str(answer) for answer in answers]
    cases = [(extract_answer(response) or "", gold) for response, gold in zip(responses, golds)]
    verdicts = [cheap(*case) if all(case) else False for case in cases]
    unclear = [k for k, verdict in enumerate(verdicts) if verdict is None]
    for k, verdict in zip(unclear, judge([cases[k] for k in unclear])):
        verdicts[k] = verdict
    return [float(verdict) for verdict in verdicts]


def reward(response, answer):
    r"""1.0 if the last \boxed{} of the response means the same as the answer, else 0.0. No content makes it raise or hang."""
    return rewards([response], [answer])[0]


def show(node):
    """A tree as text: pow(x, 2)."""
    if not isinstance(node, tuple):
        return str(node)
    if node[0] in ("num", "sym"):
        return str(node[1])
    name, parts = ("", node) if isinstance(node[0], tuple) else (node[0], node[1:])    # a matrix row has no name
    return f"{name}({', '.join(map(show, parts))})"


def main():
    if sys.argv[1:] == ["--worker"]:
        return work()
    if len(sys.argv) != 3:
        print("usage: python reward.py RESPONSE ANSWER", file=sys.stderr)
        sys.exit(2)
    response, answer = sys.argv[1:]
    for name, text in (("response", extract_answer(response)), ("answer", extract_answer(answer) or answer)):
        print(f"{name}: {text!r:.300}")
        for tree in readings(text)[:1] if text and len(text) <= MAX_CHARS else []:
            print(f"    read as {show(tree):.500}")
    print("reward:", reward(response, answer))


if __name__ == "__main__":
    main()
