r"""The reward: is the number in the box the number in the answer key?

Reinforcement learning optimises exactly what this file says. A false positive teaches the model to cheat, a false negative
starves it, a hang stops the run, and an `eval` would hand the machine to the model. So the text is parsed by hand into a
small tree (never eval, sympify or parse_latex), and the tree is *evaluated under bounds*, never simplified:

1. **Cheap path**, in this process, microseconds: equal strings after normalisation, or two plain rational numbers.
2. **Meaning**, in a worker process: both trees are evaluated in exact fractions as far as that goes and in mpmath floats at
   two precisions from there on. Two formulas that agree at random points are the same formula (Schwartz-Zippel); a difference
   that is really zero shrinks with the precision, a tiny number does not.
3. **Limits**: a worker has LIMIT seconds a case, counted by the kernel (an alarm kills it, whatever it is doing), and MEMORY
   bytes. It leaves when its pipe closes or its parent dies.

Glossary: `prediction` = what stands in the box, `gold` = the answer key, `node` = tree such as ("pow", ("sym", "x"), ("num", 2)),
`Hopeless` = text we cannot read, or a value beyond the bounds: never equal to anything, except by string.
Left out: word problems in words ("five" is not 5), unit conversion (1 m is not 100 cm), integrals and limits, calendars.

    python reward.py 'so \boxed{\frac{1}{2}}' 0.5      # shows what was read on both sides, and the verdict
"""

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

import mpmath
from mpmath import mp

LIMIT = 1.5               # seconds a case may take inside its worker
MEMORY = 1 << 30          # bytes of address space a worker may have
MAX_CHARS = 50_000        # longer texts are compared as strings only
MAX_DEPTH = 40            # nested brackets, powers, functions
MAX_BITS = 400_000        # of an exact number: 20,000! fits, 8^8^8 does not
MAX_DIGITS = 2_000        # |log10| of an inexact number


class Hopeless(ValueError):
    """Cannot be read, or is undefined, or is too big to look at."""


# ---------------------------------------------------------------------------------------------- the box

def extract_answer(text):
    r"""Content of the last \boxed{...} or \fbox{...} of a response (str), or None if there is none, or it is empty or unclosed.

    Braces are balanced, \{ and \} do not count, a box around a box is opened, `\boxed 5` is understood, and of a reasoning
    model's response only what follows </think> is read."""
    if not isinstance(text, str):
        return None
    text = text.rpartition("</think>")[2]
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    stack, best = [], (-1, None)                                    # best = (start, content) of the last box
    for token in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s{}$]+)?|\\.|[{}]", text, re.DOTALL):
        box = token[0].startswith(("\\boxed", "\\fbox"))
        if box and token[1] != "{":                                 # \boxed 5
            best = token.start(), (token[1] or "").rstrip(".,;")
        elif token[0].endswith("{") and token[0] != "\\{":
            stack.append((token.start() if box else -1, token.end()))
        elif token[0] == "}" and stack:
            start, inside = stack.pop()
            if start >= 0:
                best = start, text[inside:token.start()]
    if any(start > best[0] for start, _ in stack):                  # a later box was never closed
        return None
    content = (best[1] or "").strip()
    if re.match(r"\\(boxed|fbox)\s*\{", content) and content.endswith("}"):
        return extract_answer(content)
    return content or None


# ---------------------------------------------------------------------------------------------- cheap path

SPACING = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z])|(?:thin|med|thick|en)space(?![a-zA-Z]))|~|\s+")
SIZING = re.compile(r"(?<!\\)\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|strut|,?!)(?![A-Za-z])")


@lru_cache(4096)
def normalise(text):
    r"""The same text without what never changes its meaning: $, spacing, \left, \dfrac for \frac, a final full stop."""
    text = re.sub(r"(?<!\\)\\[\[\]()]|(?<!\\)\$", "", SIZING.sub("", text)).replace("\\!", "")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", SPACING.sub(" ", text)).strip().rstrip(".").strip()
    return re.sub(r"(?<![0-9A-Za-z.,]) | (?![0-9A-Za-z.,\\])", "", text)


DECIMAL = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)?)(?:\.([0-9]*))?")
FRACTION = re.compile(r"([+-]?)(?:\\frac\{(-?[0-9]{1,300})\}\{(-?[0-9]{1,300})\}|([0-9]{1,300})/([0-9]{1,300}))")


@lru_cache(4096)
def rational(text):
    """Canonical (numerator, denominator) of a plain rational, else None. A decimal stays a string: linear in its length."""
    if match := DECIMAL.fullmatch(text):
        sign, whole, part = match[1], re.sub("[{},]", "", match[2]).lstrip("0"), (match[3] or "").rstrip("0")
        if not match[2] and not match[3]:
            return None
        if len(whole) + len(part) > 300:
            return sign.strip("+") + whole + "." + part, 1
        return Fraction(int(whole + part or 0) * (-1 if sign == "-" else 1), 10 ** len(part)).as_integer_ratio()
    if match := FRACTION.fullmatch(text):
        top, bottom = int(match[2] or match[4]), int(match[3] or match[5])
        return Fraction(-top if match[1] == "-" else top, bottom).as_integer_ratio() if bottom else None


def cheap(prediction, gold):
    """True or False where that is certain without parsing, else None."""
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.strip() == gold.strip()
    prediction, gold = normalise(prediction), normalise(gold)
    if prediction == gold:
        return bool(gold)
    left, right = rational(prediction), rational(gold)
    if left is None or right is None:
        return None
    return left == right or (None if 1 < min(left[1], right[1]) else False)  # 0.3333333333333333 needs a closer look


# ---------------------------------------------------------------------------------------------- reading: text to tokens
# The alphabet after `prepare`: digits, letters, \commands, { } as TeX groups, one character for every operator and relation,
# «words», ⦃ ⦄ for set braces, ⟪ ⟫ around a matrix with ↵ between rows and & between cells, 0.1~6 for 0.1666...

SYMBOLS = {r"\cdot \times \ast \cdotp \bullet × · ⋅ ∙ ∗ •": "*", r"\div ÷ ⁄ ∕": "/", r"\pm ±": "±", r"\mp ∓": "∓",
           r"\le \leq \leqslant <= ≤ ⩽": "≤", r"\ge \geq \geqslant >= ≥ ⩾": "≥", r"\ne \neq != ≠": "≠", r"\lt": "<", r"\gt": ">",
           r"\approx \simeq ≈": "≈", r"\in ∈": "∈", r"\cup \bigcup ∪": "∪", r"\cap ∩": "∩", r"\setminus \backslash ∖": "∖",
           r"\infty \infin ∞": "∞", r"\pi \uppi π": "π", r"\emptyset \varnothing ∅": "∅", r"\land \wedge ∧": "∧", r"\lor \vee ∨": "∨",
           r"\mathbb{R} \mathbb{R} \mathbb\ R \R \Reals \mathbf{R} ℝ": "ℝ", r"\langle ⟨": "⟨", r"\rangle ⟩": "⟩",
           r"\lfloor": "⌊", r"\rfloor": "⌋", r"\lceil": "⌈", r"\rceil": "⌉", r"\mid ∣": "∣", r"\vert \lvert \rvert \lVert \rVert \| \Vert ‖ ": "|",
           r"\ldots \dots \cdots \dotsc ... …": "…", r"\{ \lbrace": "⦃", r"\} \rbrace": "⦄", r"\lbrack": "[", r"\rbrack": "]",
           r"\lparen": "(", r"\rparen": ")", r"^{\circ} ^\circ ^{\degree} ^\degree \degree \textdegree ^{o} ° º ˚": "°",
           r"\% ％ \text{%}": "%", r"\$ \textdollar": "«$»", "€ \\euro": "«€»", "£ \\pounds": "«£»", "¥ \\yen": "«¥»", "₹": "«₹»", "¢ \\cent": "«¢»",
           "**": "^", "− – — ‒ ﹣ ∸": "-", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", r"\prime ′": "'", r"\lg": r"\log_{10} ",
           r"\arccos": r"\acos ", r"\arcsin": r"\asin ", r"\arctan": r"\atan ", r"\dbinom \tbinom \choose": r"\binom", r"\mathrm{T} \top \intercal": "T"}
SYMBOLS = {old: new for olds, new in SYMBOLS.items() for old in olds.split(" ") if old}
SYMBOL = re.compile("|".join(re.escape(old) + ("(?![A-Za-z])" if old[-1].isalpha() and old[0] == "\\" else "")
                             for old in sorted(SYMBOLS, key=len, reverse=True)))
SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾ᵀ", "0123456789+-ni()T"))
SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "acot", "asec", "acsc", "sinh", "cosh", "tanh", "asinh",
             "acosh", "atanh", "log", "ln", "exp", "sqrt", "frac", "binom", "max", "min", "gcd", "lcm", "abs", "det"}
GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "rho", "sigma", "tau", "phi", "psi", "omega"}
WORDS = {"and": "∧", "or": "∨", "infinity": "∞", "inf": "∞", "infty": "∞", "pi": "π", "percent": "%", "degree": "°", "degrees": "°", "deg": "°",
         "arcsin": r"\asin ", "arccos": r"\acos ", "arctan": r"\atan ", "root": r"\sqrt ", "choose": "«choose»"}
UNIT_NAMES = """km kilometer kilometre, m meter metre, cm centimeter centimetre, mm millimeter millimetre, in inch inche, ft foot feet,
yd yard, mi mile, g gram, kg kilogram kilo, mg milligram, lb pound, oz ounce, l liter litre, ml milliliter millilitre, sec second s,
min minute, hr hour h, wk week, yr year, day, month, $ dollar usd buck, ¢ cent, € euro eur, £ gbp, ¥ yen jpy, ₹ rupee inr,
rad radian, mph, kph kmh, n newton, j joule, kj kilojoule, w watt, kw kilowatt, v volt, hz hertz, pa pascal, mol mole, amp ampere,
gal gallon, qt quart, pt pint, unit, nm, cc, ohm"""
UNITS = {name: names.split()[0] for names in UNIT_NAMES.split(",") for name in names.split()}
TWO_LETTER_WORDS = {"no", "is", "of", "to", "at", "by", "in", "if", "it", "we", "as", "an", "am", "pm", "be", "so", "up", "on"}
QUALIFIERS = {"not", "no", "least", "most", "more", "less", "fewer", "greater", "than", "between", "to", "from", "except", "either", "neither",
              "about", "around", "nearly", "almost", "under", "over", "below", "above", "maybe", "if", "when", "unless", "isn", "never", "undefined"}


def word(match):
    """A run of plain letters: a function name, a product of variables (abc, xy), a unit or a word."""
    text = match[0]
    low = text.lower()
    if low in WORDS:
        return WORDS[low]
    if text in FUNCTIONS or text in GREEK:
        return f"\\{text} "
    if low in UNITS and len(low) > 1 or low in TWO_LETTER_WORDS:
        return f"«{text}»"
    product_like = len(text) == 2 or len(text) < 5 and not re.search("[eiou]|(?!^)a", low)
    return text if product_like and not low.rstrip("s") in UNITS else f"«{text}»"


def text_command(match):
    r"""\text{...} and its relatives: words become «words»; mathematics in them stays mathematics."""
    command, content = match[1], match[2].strip()
    if command.startswith(("math", "bold", "bm", "pmb", "up")) and command != "mathrm" or content in ("e", "i", "d", "T", "π"):
        return content if len(content) < 2 else f" {content} "
    if content.lower() in FUNCTIONS or content.lower() in WORDS or content.lower() in ("and", "or"):
        return f" {content} "
    if len(content) == 1 and content.isalpha():
        return f"«{content}»"
    bare = re.sub(r"[{}^\d\s/*.-]", " ", content).split()
    if bare and content[0].isalpha() and all(w.lower().rstrip("s") in UNITS or w.lower() in UNITS for w in bare):
        return f"«{content}»"                                        # m/s^2
    return f" {content} "


@lru_cache(4096)
def prepare(text, thousands=True):
    """Unicode and LaTeX to the small alphabet above. thousands: 1,234 is one number, else a list of two."""
    text = re.sub(f"[{''.join(SUPER)}]+", lambda m: "^{" + "".join(SUPER[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(SUB)}]+", lambda m: "_{" + "".join(SUB[c] for c in m[0]) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    text = text.replace("\\\\", "↵").replace("…", r"\ldots ").replace("′", "'")
    text = SYMBOL.sub(lambda m: SYMBOLS[m[0]], text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text if unicodedata.category(c) != "Cf")
    text = re.sub("[α-ωΓ-Ω]", lambda m: "\\" + unicodedata.name(m[0]).split()[-1].lower().replace("lamda", "lambda") + " ", text)
    text = re.sub(r"↵(\s*\[[^\]]*\])?", "↵", normalise(SYMBOL.sub(lambda m: SYMBOLS[m[0]], text)))
    text = re.sub(r"\\begin ?\{(\w*matrix|array|cases|aligned)\*?\} ?(\{[lcr| ]*\})?", lambda m: "⟪" + m[1][0], text)
    text = re.sub(r"\\end ?\{\w+\*?\}", "⟫", text)
    text = re.sub(r"\\(?:boxed|fbox)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\frac ?(?=\d)(\d) ?(\d)", r"\\frac{\1}{\2}", text)
    for _ in range(4):                                               # innermost first; four nested \text are plenty
        text = re.sub(r"\\(text\w*|mathrm|mbox|hbox|operatorname|math\w+|boldsymbol|bm|pmb|rm|bf|it)\*? ?\{([^{}]*)\}", text_command, text)
    text = re.sub(r"\b0*(\d*)\.(\d*) ?(?:\\(?:overline|bar|dot) ?\{? ?(\d+) ?\}?|\((\d+)\))",
                  lambda m: f"{m[1] or 0}.{m[2]}~{m[3] or m[4]}", text)
    text = re.sub(r"\b(\d*)\.(\d*?)(\d+?)\3\3+ ?…", r"\1.\2~\3", text)                     # 0.333...
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", "," if thousands else "", text)
    text = re.sub(r"(?<![\w.,~^_])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", ""), text)
    if thousands:
        text = re.sub(r"(?<![\w.,~^_])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<![\\A-Za-z«])[A-Za-z]{2,}(?![^«]*»)", word, text)
    text = re.sub(r"» ?«", " ", re.sub("« +", "«", text))
    text = re.sub(r" ?«base» ?(\d+)", r"_{\1}", text)
    text = re.sub(r"\((\d+)\)_", r"\1_", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;").strip()


# ---------------------------------------------------------------------------------------------- reading: tokens to a tree

def num(value):
    return ("num", Fraction(value))


def sym(name):
    return ("sym", name)


def mul(*factors):
    return ("mul", *factors)


def inverse(node):
    return ("pow", node, num(-1))


@lru_cache(4096)
def parse(text):
    """Prepared text -> tree. Raises Hopeless. Recursive descent, one pass, depth bounded."""
    reader = Reader(text)
    node = reader.answer()
    if not reader.at_end():
        raise Hopeless(text[reader.i:][:20])
    return node


class Reader:
    """A position in a prepared text, and one method a rule of the grammar: answer > relation > union > item > sum > term > factor > atom."""

    def __init__(self, text):
        self.text, self.i, self.depth, self.bars, self.in_function, self.unit = text, 0, 0, 0, False, None

    def take(self, pattern):
        match = re.compile(" ?(?:" + pattern + ")").match(self.text, self.i)
        self.i = match.end() if match else self.i
        return match

    def see(self, pattern):
        return re.compile(" ?(?:" + pattern + ")").match(self.text, self.i)

    def at_end(self):
        return self.see("$") is not None

    def need(self, pattern):
        return self.take(pattern) or self.fail()

    def fail(self):
        raise Hopeless(f"cannot read {self.text[self.i:self.i + 20]!r}")

    def answer(self):
        """Relations between commas, semicolons, "and", "or"."""
        items, separators = [self.relation()], set()
        while match := self.take(r"(?:[,;] ?)?[∧∨]|[,;]"):
            separators.add(match[0].strip()[-1])
            items.append(self.relation())
        return items[0] if len(items) == 1 else ("list", "∨" if "∨" in separators else "∧" if "∧" in separators else ",", *items)

    def relation(self):
        """a, a < b <= c, y = 2x + 1, x in (2, 6], 4 : 9; f(x) = and decoration in front are dropped."""
        self.take(r"«[^»]*» ?[:=](?! ?$)|[=≈]")
        self.take(r"(?:[A-Za-z]|\\[a-z]+ )(?:_\{?\w+\}?)?'*(?:\^\{?-1\}?)? ?\((?:[A-Za-z](?:, ?[A-Za-z])*|\d+)\) ?=")
        parts, signs = [self.union()], []
        while match := self.take("[=<>≤≥≠≈∈:]"):
            signs.append(match[0].strip())
            parts.append(self.union())
        if not signs:
            return parts[0]
        if set(signs) == {":"}:
            return ("ratio", *parts)
        return ("rel", tuple(signs), *parts)

    def union(self):
        node = self.item()
        while match := self.take("[∪∩∖]"):
            node = ("set", match[0].strip(), node, self.item())
        return node

    def item(self):
        """A sum with the unit behind it."""
        outer, self.unit = self.unit, None
        if match := self.take("«([^»]*)»(?= ?[^ ,;=∧∨])"):               # decoration or currency in front
            if set(match[1].lower().split()) & QUALIFIERS:
                self.fail()
            self.unit = canonical_unit(match[1]) if match[1] in UNITS else None
        node = self.sum()
        if match := self.take(r"(?:«[^»]*»(?:\^\{?-?\d+\}?)?[ */]*)+|\\frac ?\{ ?«[^»]*» ?\} ?\{ ?«[^»]*»(?:\^\{?\d\}?)? ?\}"):
            self.set_unit(canonical_unit(re.sub(r"\\frac ?\{([^{}]*)\} ?\{(.*)\}", r"\1/\2", match[0])))
        node, self.unit = ("unit", self.unit, node) if self.unit else node, outer
        return node

    def set_unit(self, unit):
        if self.unit not in (None, unit) or set(re.split(r"\W+", unit)) & QUALIFIERS:
            self.fail()
        self.unit = unit

    def sum(self):
        terms, first = [], True
        while (match := self.take(r"[+\-±∓](?: ?[+\-])*")) or first:
            signs = match[0] if match else ""
            term = self.term()
            if "±" in signs or "∓" in signs:
                term = mul(sym("±") if "±" in signs else mul(num(-1), sym("±")), term)
            terms.append(mul(num(-1), term) if signs.count("-") % 2 else term)
            first = False
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self):
        factors = [self.factor()]
        while True:
            if match := self.take(r"[*/]"):
                sign = self.take(r"[-+]")
                factor = self.factor()
                factors.append(inverse(factor) if "/" in match[0] else factor)
                factors.extend([num(-1)] if sign and "-" in sign[0] else [])
            elif self.starts_factor():
                factors.append(self.factor())
            else:
                return factors[0] if len(factors) == 1 else mul(*factors)

    def starts_factor(self):
        if self.see(r"[\d.]"):
            return self.text[self.i - 1] in "})]"                       # 2^{3}5 but not "2 3" and not x2
        if self.see(r"\|"):
            return self.bars == 0
        return self.see(r"[A-Za-zπ∞({\[⟪⌊⌈]|\\[A-Za-z]") is not None

    def factor(self):
        """An atom and what stands behind it: ! ^ % ° '."""
        node, postfixes = self.atom(), 0
        while match := self.take(r"!!?(?![=!])|\^|%|° ?[CF](?![A-Za-z])|°|'"):
            mark, postfixes = match[0].strip(), postfixes + 1
            if postfixes > 4:
                self.fail()
            if mark == "^":
                node = self.power(node)
            elif mark[0] == "!":
                node = ("fn", "factorial" if mark == "!" else "factorial2", node)
            elif mark == "°" and self.in_function:
                node = mul(node, sym("π"), num(Fraction(1, 180)))
            elif mark == "'":
                node = sym(node[1] + "'") if node[0] == "sym" else self.fail()
            else:
                self.set_unit(mark.replace(" ", ""))
        return node

    def power(self, base):
        if self.take(r"\{ ?T ?\}|T"):
            return ("matrix", *zip(*base[1:])) if base[0] == "matrix" else ("pow", base, sym("T"))
        if self.take(r"\{ ?\* ?\}|\*"):
            self.fail()
        sign = self.take("[-+]")
        exponent = num(self.take(r"[0-9]+(?:\.[0-9]+)?")[0]) if self.see(r"[0-9]") else self.atom()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail()
        if self.take(r"\^"):
            exponent = self.power(exponent)
        self.depth -= 1
        return ("pow", base, mul(num(-1), exponent) if sign and "-" in sign[0] else exponent)

    def atom(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail()
        node = self.number() or self.symbol() or self.bracket() or self.command() or self.fail()
        self.depth -= 1
        return node

    def number(self):
        if match := self.take(r"(\d[0-9A-Fa-f]*)_(?:\{ ?[({]?(\w+|«\w+»)[)}]? ?\}|(\d+))"):   # 101_2: its own symbol, so bases must agree
            return sym(f"{match[1]} base {match[2] or match[3]}")
        match = self.take(r"(\d+)(?:\.(\d*)(?:~(\d+))?)?(?:[eE]([+-]?\d{1,5})(?![A-Za-z\d]))?|\.(\d+)")
        if not match:
            return None
        whole, part, repeating = match[1] or "0", match[2] or match[5] or "", match[3]
        value = Fraction(int(whole + part), 10 ** len(part))
        if repeating:
            value += Fraction(int(repeating), (10 ** len(repeating) - 1) * 10 ** len(part))
        if match[4]:
            value *= Fraction(10) ** int(match[4])
        if "." not in match[0]:
            mixed = r"\\frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))|(?<= )(\d+) ?/ ?(\d+)(?![\d.])"
            ahead = self.see(mixed)
            if ahead:
                top, bottom = int(ahead[1] or ahead[2] or ahead[5]), int(ahead[3] or ahead[4] or ahead[6])
                if top < bottom:
                    self.take(mixed)
                    return num(value + Fraction(top, bottom))
        elif len((whole + part).lstrip("0")) >= 15 and not repeating:
            return ("num", value, len(part) - int(match[4] or 0))       # full double precision: may stand for a fraction
        return num(value)

    def symbol(self):
        match = self.take(r"([A-Za-zπ∞ℝ∅…])|\\(?!frac|sqrt|binom|log|ln|exp|vec|hat|bar|overline|tilde|sum|prod)([A-Za-z]+)|«([^»]*)»")
        if not match or match[2] in FUNCTIONS:
            self.i = match.start() if match else self.i
            return None
        if match[1] == "∅":
            return ("list", ",")
        if match[3]:
            return ("text", plain(match[3]))
        name = match[1] or match[2]
        if sub := self.take(r"_(?:\{([^{}]*)\}|(\w))"):
            name += "_" + (sub[1] or sub[2] or "").replace(" ", "")
        return sym(name)

    def bracket(self):
        match = self.take(r"[({\[⦃⟨⌊⌈|⟪]|\](?=[^\[\]]*[\[\]])")
        if not match:
            return None
        opening = match[0].strip()
        if opening == "⟪":
            return self.matrix()
        bars, self.bars = self.bars, int(opening == "|")
        in_function, self.in_function = self.in_function, False if opening != "{" else self.in_function
        unit, self.unit = self.unit, None
        if opening == "⦃":
            node = self.braces()
        else:
            node = self.answer()
            closing = self.need(r"[)\]\[]" if opening in "([]" else {"{": r"\}", "⟨": "⟩", "⌊": "⌋", "⌈": "⌉", "|": r"\|"}[opening])[0].strip()
            if opening in "⌊⌈|":
                node = ("fn", {"⌊": "floor", "⌈": "ceil", "|": "abs"}[opening], node)
            elif node[0] == "list" and node[1] == "," and opening != "{":
                opening, closing = {"]": "("}.get(opening, opening), {"[": ")"}.get(closing, closing)
                node = ("tuple", opening + closing, *node[2:])
        self.bars, self.in_function, self.unit = bars, in_function, unit
        return node

    def braces(self):
        r"""\{1, 2\}, \{\}, or \{x : x > 2\}, which is the inequality."""
        if self.take("⦄"):
            return ("list", ",")
        builder = self.take(r"[A-Za-z] ?(?:∈ ?[ℝA-Z]+ ?)?[|∣:]")
        node = self.answer()
        self.need("⦄")
        return node if builder or node[0] == "list" else ("list", ",", node)

    def matrix(self):
        kind, rows = self.need("[a-zA-Z]")[0].strip(), [[]]
        while not self.take("⟫"):
            rows[-1].append(self.answer())
            if self.take("↵"):
                rows.append([])
            else:
                self.take("&") or self.see("⟫") or self.fail()
        rows = tuple(tuple(row) for row in rows if row)
        if kind == "c":                                                  # cases: a system of relations
            return ("list", ",", *(row[0] if len(row) == 1 else ("tuple", "()", *row) for row in rows))
        return ("fn", "det", ("matrix", *rows)) if kind == "v" else ("matrix", *rows)

    def argument(self):
        r"""What \frac and \sqrt take: a group, or one token; several digits only where TeX habits allow it."""
        if match := self.take(r"\d"):
            return num(match[0])
        return self.atom()

    def command(self):
        match = self.take(r"\\([A-Za-z]+)")
        if not match:
            return None
        name = match[1]
        if name == "frac":
            top = self.argument()
            return mul(top, inverse(self.argument()))
        if name == "sqrt":
            root = self.answer() if self.take(r"\[") else num(2)
            if root != num(2) or self.text[self.i - 1] == "]":
                self.take(r"\]")
            digits = self.take(r"\d+(?:\.\d+)?")
            return ("pow", num(digits[0]) if digits else self.atom(), inverse(root))
        if name == "binom":
            top = self.argument()
            return ("fn", "binom", top, self.argument())
        if name in ("vec", "hat", "bar", "overline", "tilde"):
            return sym(f"{name} {self.argument()}")
        if name not in FUNCTIONS:
            self.fail()
        base = None
        if name == "log" and self.take("_"):
            base = self.argument() if not self.see(r"\d") else num(self.take(r"\d+" if self.see(r"\d+ ?[({ ]") else r"\d")[0])
        power = None
        if self.take(r"\^"):
            sign = self.take("-")
            power = self.argument()
            power = mul(num(-1), power) if sign else power
        argument = self.function_argument()
        if name in ("max", "min", "gcd", "lcm"):
            argument = argument[2:] if argument[0] in ("tuple", "list") else (argument,)
            return ("fn", name, *argument)
        if power in (num(-1), mul(num(-1), num(1))):
            name, power = "a" + name, None
        if name == "exp":
            node = ("pow", sym("e"), argument)
        elif base:
            node = mul(("fn", "ln", argument), inverse(("fn", "ln", base)))
        else:
            node = ("fn", name, argument)
        return ("pow", node, power) if power else node

    def function_argument(self):
        """sin(x), or sin 2x up to the next operator or function."""
        outer, self.in_function = self.in_function, True
        if self.see(r"[({\[|]"):
            node = self.atom_in_function()
        else:
            sign, factors = self.take("-"), [self.factor()]
            while self.starts_factor() and not self.see(r"\\(?:" + "|".join(FUNCTIONS - {"frac", "sqrt"}) + r")(?![a-z])|\("):
                factors.append(self.factor())
            node = mul(*factors, num(-1 if sign else 1))
        self.in_function = outer
        return node

    def atom_in_function(self):
        unit, self.unit = self.unit, None
        opening = self.take(r"[({\[]")
        if not opening:
            node = self.atom()
        else:
            node = self.answer()
            self.need(r"[)}\]]")
            if self.unit:
                self.fail()
        self.unit = unit
        return node


def plain(text):
    """A text answer without case, punctuation, spacing and plural of its brackets."""
    return " ".join(re.sub(r"[^\w%$€£]+", " ", re.sub(r"\\[a-z]+|[«»{}]", " ", text).lower()).split())


@lru_cache(1024)
def canonical_unit(text):
    """'square centimeters' -> 'cm^2', 'miles per hour' -> 'mi/hr', any other words -> themselves in the singular."""
    text = re.sub(r"[«»{}.]", " ", text.lower()).replace("*", " ")
    text = re.sub(r"\bper\b", "/", text)
    text = re.sub(r"\b(?:square|sq) +(\w+)|(\w+) +squared", r"\1\2^2", text)
    text = re.sub(r"\b(?:cubic|cu) +(\w+)|(\w+) +cubed", r"\1\2^3", text)
    text = re.sub(r"[a-z]+", lambda m: UNITS.get(m[0]) or UNITS.get(m[0].rstrip("s")) or (m[0][:-1] if m[0].endswith("s") else m[0]), text)
    text = re.sub(r"(?<=[a-z])([23])\b", r"^\1", text)
    text = re.sub(r" ?(\w+) ?\^ ?-(\d)", lambda m: f"/{m[1]}" + (f"^{m[2]}" if m[2] != "1" else ""), text)
    text = re.sub(r" ?([/^]) ?", r"\1", " ".join(text.split()))
    return {"mi/hr": "mph", "km/hr": "kph"}.get(text, text)


# ---------------------------------------------------------------------------------------------- values

CONSTANTS = {"π": lambda: +mp.pi, "e": lambda: +mp.e, "i": lambda: mp.mpc(0, 1)}
MPMATH = {"sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "sec": mp.sec, "csc": mp.csc, "cot": mp.cot, "asin": mp.asin, "acos": mp.acos,
          "atan": mp.atan, "acot": mp.acot, "asec": mp.asec, "acsc": mp.acsc, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh,
          "asinh": mp.asinh, "acosh": mp.acosh, "atanh": mp.atanh, "ln": mp.ln}


def inexact(value):
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def checked(value, env):
    """The value itself, if it is defined and within bounds. env["mag"] remembers the largest |log2| seen."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise Hopeless("too big")
        return value
    if isinstance(value, mp.mpc) and value.imag == 0:
        value = value.real
    if not mp.isfinite(value) or env.get("real") and isinstance(value, mp.mpc):
        raise Hopeless("undefined")
    if value:
        env["mag"] = max(env["mag"], abs(int(mp.mag(value))))
        if env["mag"] > 3.33 * MAX_DIGITS:
            raise Hopeless("too big")
    return value


def evaluate(node, env):
    """Value of a tree: a Fraction as long as that is exact, else an mpf or mpc at the current precision. env: symbol -> Fraction."""
    kind, *args = node
    if kind == "num":
        return args[0]
    if kind == "sym":
        if args[0] in env:
            return env[args[0]]
        if args[0] in CONSTANTS:
            return CONSTANTS[args[0]]()
        raise Hopeless(args[0])
    if kind == "unit":
        return evaluate(args[1], env)
    if kind not in ("add", "mul", "pow", "fn"):
        raise Hopeless(kind)
    if kind == "fn" and args[0] == "det":
        return evaluate(determinant(args[1][1:]), env)
    values = [evaluate(arg, env) for arg in args[kind == "fn":]]
    if kind == "fn":
        return checked(function(args[0], values, env), env)
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
    if isinstance(exponent, Fraction):
        if base == 0:
            if exponent <= 0:
                raise Hopeless("0^0 or 1/0")
            return Fraction(0)
        if isinstance(base, Fraction) and exponent.denominator == 1:
            if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent) > MAX_BITS and abs(base) != 1:
                raise Hopeless("too big")
            return base ** int(exponent)
        real_base = not isinstance(base, mp.mpc)
        if real_base and base < 0 and exponent.denominator % 2 and exponent.denominator > 1:
            return (-1) ** (exponent.numerator % 2) * power(-base, exponent, env)
        if isinstance(base, Fraction) and base > 0 and exponent.denominator < 100:
            root = exact_root(base, exponent.denominator)
            if root is not None:
                return power(root, Fraction(exponent.numerator), env)
    base, exponent = inexact(base), inexact(exponent)
    if base == 0 or abs(exponent) * (1 + abs(mp.mag(base))) > 3.33 * MAX_DIGITS * 2:
        raise Hopeless("too big")
    if env.get("real") and base < 0 and not mp.isint(exponent):
        raise Hopeless("not real")
    return mp.power(base, exponent)


def exact_root(value, n):
    roots = []
    for integer in (value.numerator, value.denominator):
        if integer.bit_length() > 5000:
            return None
        root = math.isqrt(integer) if n == 2 else round(integer ** (1 / n)) if integer < 1 << 50 else None
        if root is None or root ** n != integer:
            return None
        roots.append(root)
    return Fraction(*roots)


def function(name, values, env):
    x = values[0]
    whole = all(isinstance(v, Fraction) and v.denominator == 1 for v in values)
    if name == "abs":
        return abs(x)
    if name in ("floor", "ceil"):
        if isinstance(x, mp.mpc):
            raise Hopeless("floor of a complex number")
        if not isinstance(x, Fraction) and abs(x - mp.nint(x)) < mp.mpf(10) ** (-mp.dps // 2):
            x = mp.nint(x)                                                # 3 computed as 2.999...
        return Fraction(int(mp.floor(x) if name == "floor" else mp.ceil(x))) if not isinstance(x, Fraction) else \
            Fraction(math.floor(x) if name == "floor" else math.ceil(x))
    if name in ("max", "min"):
        return (max if name == "max" else min)(values, key=inexact)
    if name in ("gcd", "lcm"):
        if not whole:
            raise Hopeless(name)
        return Fraction(getattr(math, name)(*map(int, values)))
    if name == "factorial2":
        if not whole or not 0 <= x <= 20_000:
            raise Hopeless(name)
        return Fraction(math.prod(range(int(x), 0, -2)))
    if name == "factorial":
        if whole:
            if not 0 <= x <= 20_000:
                raise Hopeless(name)
            return Fraction(math.factorial(int(x)))
        if abs(x) > 1000:
            raise Hopeless(name)
        return mp.gamma(inexact(x) + 1)
    if name == "binom":
        n, k = values
        if whole and n >= 0:
            if min(k, n - k) * int(n).bit_length() > MAX_BITS:
                raise Hopeless(name)
            return Fraction(math.comb(int(n), int(k)) if 0 <= k else 0)
        if max(abs(n), abs(k)) > 1000:
            raise Hopeless(name)
        return mp.binomial(inexact(n), inexact(k))
    if name == "log":                                                     # no base: 10 or e, whichever reading fits both sides
        return mp.log(inexact(x)) / (mp.log(10) if env.get("log10") else 1) if x else checked(mp.nan, env)
    if name not in MPMATH or len(values) != 1:
        raise Hopeless(name)
    if abs(x) > 1e4 and name in ("sinh", "cosh", "tanh"):
        raise Hopeless("too big")
    if name == "ln" and x == 0:
        raise Hopeless("ln 0")
    return mp.mpf(0) if x == 0 and name in ("sin", "tan") else MPMATH[name](inexact(x))


def determinant(rows):
    if any(len(row) != len(rows) for row in rows) or len(rows) > 4:
        raise Hopeless("determinant")
    if len(rows) == 1:
        return rows[0][0]
    return ("add", *(mul(num((-1) ** j), rows[0][j], determinant([row[:j] + row[j + 1:] for row in rows[1:]])) for j in range(len(rows))))


@lru_cache(4096)
def symbols(node):
    """Names of the symbols in a tree, constants included."""
    if node[0] == "sym":
        return frozenset([node[1]])
    return frozenset().union(*(symbols(part) for part in node[1:] if isinstance(part, tuple)
                               and part and isinstance(part[0], (str, tuple))))


def agree(a, b, env):
    """Do two trees have the same value at this point? Exactly, or |a - b| shrinking with the precision."""
    env = dict(env, mag=0)
    gaps, extra = [], 0
    for digits in (40, 110):
        mp.dps = digits + extra
        left, right = evaluate(a, env), evaluate(b, env)
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left == right or double_precision(a, right) or double_precision(b, left)
        left, right = inexact(left), inexact(right)
        if digits == 40 and env["mag"] > 60:                              # big and small numbers mixed: look closer
            extra = env["mag"] // 3
            mp.dps = digits + extra
            left, right = inexact(evaluate(a, env)), inexact(evaluate(b, env))
        gaps.append(abs(left - right))
        if gaps[0] > mp.mpf(2) ** env["mag"] * mp.mpf(10) ** -20:
            return False
    return bool(gaps[1] == 0 or gaps[1] < gaps[0] * mp.mpf(10) ** -40 or gaps[1] < mp.mpf(10) ** -70 * abs(left))


def double_precision(node, value):
    """0.3333333333333333 for 1/3: a decimal of 15 digits and more, right to its last place, for a fraction no decimal can write."""
    if node[0] != "num" or len(node) < 3:
        return False
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest > 1 and abs(node[1] - value) < Fraction(10) ** -node[2]


def equal(a, b):
    """Are two scalar trees the same number, or the same function of their symbols?"""
    names = symbols(a) | symbols(b)
    if "∞" in names:
        return infinite(a) == infinite(b)
    readings = ({"log10": True}, {"log10": False}) if "log" in repr((a, b)) else ({},)
    return any(same_function(a, b, sorted(names - set(CONSTANTS)), "i" in names, reading) for reading in readings)


def infinite(node):
    """+1, -1, or the node itself where it is not just infinity."""
    sign = 1
    while node[0] == "mul" and len(node) == 3 and node[1] in (num(-1), num(1)):
        sign, node = sign * int(node[1][1]), node[2]
    return sign if node == sym("∞") else node


def same_function(a, b, names, complex_numbers, env):
    if not names:
        return agree(a, b, env)
    for real in (False,) if complex_numbers else (True, False):
        rng, agreed = random.Random(7), 0
        for trial in range(24):                                           # (0, 1), positive, negative first, large
            size = (1, 9, 9, 400)[trial % 4]
            point = {name: Fraction(rng.randint(1, 900 * size), 907) * (-1 if trial % 4 == 2 and (k == 0 or rng.random() < 0.5) else 1)
                     for k, name in enumerate(names)}
            try:
                if not agree(a, b, {**env, **point, "real": real}):
                    return False
            except (Hopeless, ZeroDivisionError):
                continue                                                  # outside the domain of one of them
            agreed += 1
            if agreed == 6:
                return True
        if agreed >= 3:
            return True
    return False


# ---------------------------------------------------------------------------------------------- comparing answers

def is_value(node):
    return node[0] in ("num", "sym", "add", "mul", "pow", "fn")


def substitute(node, name, value):
    if node == sym(name):
        return value
    return tuple(substitute(part, name, value) if isinstance(part, tuple) else part for part in node)


def settle(node):
    """A tree in the form that is compared: signs expanded, x = 5 -> 5, one-element lists opened, matrices multiplied out."""
    if "±" in symbols(node) and node[0] != "list":
        return settle(("list", ",", *(substitute(node, "±", num(s)) for s in (1, -1))))
    if node[0] == "list":
        items = []
        for item in node[2:]:
            item = settle(item) if "±" in symbols(item) else item
            items.extend(item[2:] if item[0] == "list" else [item])
        names = {item[2] for item in items if assigned(item)}
        if len(names) == 1:
            items = [item[3] if assigned(item) else item for item in items]
        return settle(items[0]) if len(items) == 1 else ("list", node[1], *items)
    if node[0] == "rel":
        signs, parts = node[1], list(node[2:])
        if set(signs) == {"≈"} or signs[-1:] == ("≈",):
            return settle(parts[0] if len(parts) == 2 else ("rel", signs[:-1], *parts[:-1]))
        if signs[0] == "∈" and len(signs) == 1:
            return settle(parts[1])
        if set(signs) == {"="}:
            if is_name(parts[0]) and not symbols(parts[0]) & symbols(("tuple", "", *parts[1:])) or parts[0][0] == "tuple":
                bare = parts[1:]
                if not any(symbols(part) - set(CONSTANTS) - {"±"} for part in bare) or parts[0][0] in ("text", "tuple"):
                    parts = bare
            elif is_name(parts[-1]) and len(parts) == 2 and not symbols(parts[0]) - set(CONSTANTS):
                parts = parts[:1]
            if len(parts) == 1:
                return settle(parts[0])
            if not any(symbols(part) - set(CONSTANTS) for part in parts) and all(equal(part, parts[-1]) for part in parts):
                return parts[-1]
    if node[0] in ("mul", "add"):
        return matrix_arithmetic(node)
    return node


def assigned(item):
    return item[0] == "rel" and item[1] == ("=",) and item[2][0] == "sym" and not symbols(item[3]) - set(CONSTANTS) - {"±"}


def is_name(node):
    r"""x, x_1, AB, \angle ABC, P(A), \text{area}: what may stand before "= 5" without being part of the answer."""
    if node[0] == "fn" and node[1] == "abs":
        return is_name(node[2])
    return node[0] in ("sym", "text") or node[0] == "mul" and all(f[0] == "sym" and (f[1][:1].isupper() or len(f[1]) > 1) for f in node[1:])


def matrix_arithmetic(node):
    """Scalar times matrix and matrix plus matrix, entry by entry; anything else is left alone."""
    parts = [settle(part) for part in node[1:]]
    matrices = [part for part in parts if part[0] == "matrix"]
    if not matrices or (node[0] == "mul" and len(matrices) > 1) or (node[0] == "add" and len(matrices) < len(parts)):
        return node
    if node[0] == "mul":
        scalars = [part for part in parts if part[0] != "matrix"]
        return ("matrix", *(tuple(mul(*scalars, cell) for cell in row) for row in matrices[0][1:]))
    if len({(len(m), len(m[1])) for m in matrices}) > 1:
        return node
    return ("matrix", *(tuple(("add", *cells) for cells in zip(*rows)) for rows in zip(*(m[1:] for m in matrices))))


def same(a, b):
    """The verdict on two trees."""
    if a == b:
        return True
    a, b = settle(a), settle(b)
    unit_a, a = (a[1], settle(a[2])) if a[0] == "unit" else (None, a)
    unit_b, b = (b[1], settle(b[2])) if b[0] == "unit" else (None, b)
    if unit_a != unit_b and unit_a and unit_b:
        return False
    if unit_a != unit_b and is_value(a) and is_value(b):
        unit, marked, other = (unit_a, a, b) if unit_a else (unit_b, b, a)
        factor = {"%": num(Fraction(1, 100)), "°": mul(sym("π"), num(Fraction(1, 180)))}.get(unit)
        return equal(marked, other) or factor is not None and equal(mul(marked, factor), other)
    if is_value(a) and is_value(b):
        return equal(a, b) or same_up_to_constant(a, b)
    for left, right in ((a, b), (b, a)):
        if left[0] == "ratio" and len(left) == 3 and is_value(right):
            return equal(mul(left[1], inverse(left[2])), right)
        if left[0] == "tuple" and right[0] == "list" and all(assigned(item) for item in right[2:]):
            return same(left, ("tuple", left[1], *(item[3] for item in sorted(right[2:], key=lambda item: item[2][1]))))
    if a[0] == b[0] == "list":
        return same_items(a[2:], b[2:]) or is_region(a) and is_region(b) and same_region(a, b)
    if a[0] == b[0] == "tuple":
        return a[1] == b[1] and same_in_order(a[2:], b[2:])
    if a[0] == b[0] == "matrix":
        return len(a) == len(b) and all(same_in_order(row, other) for row, other in zip(a[1:], b[1:]))
    if a[0] == b[0] == "ratio":
        return len(a) == len(b) and all(equal(mul(x, b[1]), mul(y, a[1])) for x, y in zip(a[2:], b[2:]))
    if is_region(a) and is_region(b) and (a[0] != "tuple" or b[0] != "tuple"):
        if a[0] == b[0] == "rel":
            return same_relation(a, b)
        return same_region(a, b)
    if a[0] == b[0] == "rel":
        return same_relation(a, b)
    if a[0] == b[0] == "text":
        return a[1] == b[1]
    return False


def same_in_order(left, right):
    return len(left) == len(right) and all(same(x, y) for x, y in zip(left, right))


def same_items(left, right):
    """The same items in any order, repetitions counted."""
    rest = list(right)
    if len(left) != len(right):
        return False
    for item in left:
        match = next((k for k, other in enumerate(rest) if same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def same_up_to_constant(a, b):
    """Antiderivatives: ln|2x| + C and ln|x| + C are one answer; the constant must stand on both sides."""
    def split(node):
        constants = [t for t in node[1:] if t in (sym("C"), sym("c"), sym("K"), sym("k"))] if node[0] == "add" else []
        return ("add", num(0), *(t for t in node[1:] if t not in constants)) if len(constants) == 1 else None
    left, right = split(a), split(b)
    if left is None or right is None or not symbols(left) - set(CONSTANTS):
        return False
    names = symbols(left) | symbols(right)
    difference = ("add", left, mul(num(-1), right))
    shifted = difference
    for k, name in enumerate(sorted(names - set(CONSTANTS))):
        shifted = substitute(shifted, name, num(Fraction(17 + k, 11)))
    return equal(difference, shifted)


def same_relation(a, b):
    """Two equations or inequalities: one is the other times a constant (positive, if it is to keep its direction)."""
    flip = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
    if a[1] == b[1] and same_in_order(a[2:], b[2:]):
        return True
    if tuple(flip.get(s, s) for s in reversed(a[1])) == b[1] and same_in_order(a[:1:-1], b[2:]):
        return True
    if len(a[1]) > 1 or len(b[1]) > 1:
        return is_region(a) and is_region(b) and symbols(a) - set(CONSTANTS) == symbols(b) - set(CONSTANTS) and same_region(a, b)
    f, g = (("add", rel[2], mul(num(-1), rel[3])) for rel in (a, b))
    names = sorted((symbols(f) | symbols(g)) - set(CONSTANTS))
    if not all(is_value(part) for part in (*a[2:], *b[2:])) or not names:
        return False
    for start in (13, 29, 41):
        point = {name: num(Fraction(start + 7 * k, 17 + k)) for k, name in enumerate(names)}
        f0, g0 = f, g
        for name, value in point.items():
            f0, g0 = substitute(f0, name, value), substitute(g0, name, value)
        try:
            sign = evaluate(mul(f0, g0), {"mag": 0})
        except (Hopeless, ZeroDivisionError):
            continue
        if sign == 0 or isinstance(sign, mp.mpc):
            continue
        if equal(mul(f, g0), mul(g, f0)):
            return (a[1][0] if sign > 0 else flip.get(a[1][0], a[1][0])) == b[1][0]
        break
    if a[1] == b[1] == ("=",):
        return same_curve(f, g)
    return len(names) == 1 and same_region(a, b)


def same_curve(f, g):
    """xy = 1 and y = 1/x: the numerators agree up to a constant. sympy does the algebra on small polynomials."""
    import sympy
    try:
        polys = [sympy.Poly(sympy.fraction(sympy.together(to_sympy(side)))[0]) for side in (f, g)]
        return polys[0].gens == polys[1].gens and polys[0].monic() == polys[1].monic()
    except (Hopeless, sympy.PolynomialError, sympy.CoercionFailed):
        return False


def to_sympy(node):
    """A rational function with exponents up to 8; names are numbered, so that no text reaches sympy."""
    import sympy
    kind, *args = node
    if kind == "num":
        return sympy.Rational(args[0].numerator, args[0].denominator)
    if kind == "sym" and args[0] not in CONSTANTS:
        return sympy.Symbol("v" + "_".join(str(ord(c)) for c in args[0]))
    if kind == "pow" and args[1][0] in ("num", "mul"):
        exponent = evaluate(args[1], {"mag": 0})
        if isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= 8:
            return to_sympy(args[0]) ** int(exponent)
    if kind in ("add", "mul"):
        return (sympy.Add if kind == "add" else sympy.Mul)(*map(to_sympy, args))
    raise Hopeless("not a rational function")


# ---------------------------------------------------------------------------------------------- sets of real numbers

def is_region(node):
    if node[0] == "list":
        return len(node) > 2 and all(item[0] == "rel" and is_region(item) for item in node[2:])
    if node[0] == "rel":
        return "=" not in node[1] and len(symbols(node) - set(CONSTANTS) - {"∞"}) == 1
    return node[0] == "set" or node == sym("ℝ") or node[0] == "tuple" and len(node) == 4 and set(node[1]) <= set("()[]")


def real(node, env):
    if infinite(node) in (1, -1):
        return infinite(node) * mp.inf
    value = inexact(evaluate(node, dict(env, mag=0)))
    if isinstance(value, mp.mpc):
        raise Hopeless("not real")
    return value


def below(x, y, strictly):
    if x == y or abs(x - y) < mp.mpf(10) ** -25 * (1 + abs(y)):
        return not strictly
    return x < y


def contains(node, x):
    """Is the real number x in the set, or does it satisfy the inequality?"""
    if node == sym("ℝ"):
        return True
    if node[0] == "tuple":
        lo, hi = real(node[2], {}), real(node[3], {})
        return below(lo, x, node[1][0] == "(") and below(x, hi, node[1][1] == ")")
    if node[0] == "set":
        left, right = contains(node[2], x), contains(node[3], x)
        return {"∪": left or right, "∩": left and right, "∖": left and not right}[node[1]]
    if node[0] == "list" and node[2:] and node[2][0] == "rel":
        return (any if node[1] == "∨" else all)(contains(item, x) for item in node[2:])
    if node[0] == "list":
        return any(below(x, real(item, {}), False) and below(real(item, {}), x, False) for item in node[2:])
    if node[0] != "rel":
        raise Hopeless("not a set")
    env = {name: x for name in symbols(node) - set(CONSTANTS) - {"∞"}}
    try:
        values = [real(part, env) for part in node[2:]]
    except (Hopeless, ZeroDivisionError):
        return False                                                      # outside the domain
    for sign, y, z in zip(node[1], values, values[1:]):
        holds = {"<": below(y, z, True), "≤": below(y, z, False), ">": below(z, y, True), "≥": below(z, y, False),
                 "≠": not (below(y, z, False) and below(z, y, False))}.get(sign, False)
        if not holds:
            return False
    return True


def borders(node):
    """Points where membership may change, as far as they can be read off: end points, points, and roots of linear inequalities."""
    if node[0] == "tuple":
        return [real(part, {}) for part in node[2:]]
    if node[0] == "set":
        return borders(node[2]) + borders(node[3])
    if node[0] == "list":
        return [p for item in node[2:] for p in (borders(item) if item[0] == "rel" else [real(item, {})])]
    points = []
    if node[0] == "rel":
        (name,) = symbols(node) - set(CONSTANTS) - {"∞"}
        for left, right in zip(node[2:], node[3:]):
            try:
                y0, y1, y2 = (real(left, {name: Fraction(x)}) - real(right, {name: Fraction(x)}) for x in (1, 2, 3))
            except (Hopeless, ZeroDivisionError):
                continue
            if y0 != y1 and mp.isfinite(y0 - y1) and abs(y0 - 2 * y1 + y2) < mp.mpf(10) ** -20:
                points.append(1 - y0 / (y1 - y0))
    return points


def same_region(a, b):
    """Two sets of reals: same membership at every border, beside it, and on a grid. At least one side must show its borders."""
    mp.dps = 40
    known = [p for p in borders(a) + borders(b) if mp.isfinite(p)]
    if not known and sym("ℝ") not in (a, b) and not (a[0] == b[0] == "tuple"):
        return False
    beside = [p + s * mp.mpf(10) ** -9 for p in known[:40] for s in (-1, 1)]
    grid = [mp.mpf(k) / 4 + mp.mpf(1) / 1000 for k in range(-48, 49)] + [mp.mpf(10) ** k * s for k in (2, 3, 6) for s in (-1, 1)]
    return all(contains(a, x) == contains(b, x) for x in known[:40] + beside + grid)


# ---------------------------------------------------------------------------------------------- one case

def choice(text):
    """The letter of a multiple-choice answer, bracketed, dotted or followed by what it stands for; else None."""
    text = re.sub(r"[«»\\{}]|text\w*|mathrm|mathbf", " ", text).strip()
    match = re.fullmatch(r"[(\[]? ?([A-Ja-j]) ?[)\]]?[.:]?", text) or re.match(r"\(([A-J])\)|([A-J])[).:] ", text)
    if not match or re.search(r"\b[A-J]\b|∨|\bor\b", text[match.end():]):
        return None
    return (match[1] or match[2]).upper()


def readings(text):
    """The ways to read a text: 1,234 is a number, or a list of two numbers."""
    trees = []
    for thousands in (True, False):
        try:
            trees.append(parse(prepare(text, thousands)))
        except (Hopeless, RecursionError, ValueError, IndexError, KeyError):
            pass
    return list(dict.fromkeys(trees))


def is_equiv_here(prediction, gold):
    """The whole comparison, in this process and without limits: what a worker runs."""
    left, right = prepare(prediction), prepare(gold)
    if left == right:
        return bool(left)
    if re.fullmatch(r"\W*[A-Ja-j]\W*", plain(gold)):
        letter = choice(normalise(prediction))
        if letter is not None and letter == choice(normalise(gold)):
            return True
    if re.fullmatch(r"[«» a-zA-Z'-]+", left) and "«" in left + right and plain(left) == plain(right):
        return True
    for a, b in product(readings(prediction), readings(gold)):
        try:
            if same(a, b):
                return True
        except (Hopeless, ArithmeticError, ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError, MemoryError,
                NotImplementedError, mpmath.NoConvergence):
            continue
    return False


# ---------------------------------------------------------------------------------------------- workers

def work():
    """The worker's life: a JSON line [prediction, gold] in, a byte out. The alarm has its default action, so the kernel kills."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                          # Ctrl-C is the parent's business
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)                                         # bounded by MAX_CHARS instead
    sys.setrecursionlimit(3000)
    parent = os.getppid()
    os.write(1, b"r")
    while True:
        while not select.select([0], [], [], 1)[0]:
            if os.getppid() != parent:                                    # killed, and a forked sibling holds our pipe open
                return
        line = sys.stdin.buffer.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        verdict = is_equiv_here(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, b"1" if verdict else b"0")


class Worker:
    """A plain subprocess rather than multiprocessing: it needs no __main__ guard and does not care about threads or forks."""
    alive, idle = set(), []

    def __init__(self):
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        self.inbox, self.outbox = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.deadline = math.inf
        self.ready = False
        Worker.alive.add(self)

    def send(self, prediction, gold):
        data = json.dumps([prediction, gold]).encode() + b"\n"
        while data:
            data = data[os.write(self.inbox, data):]
        self.deadline = time.monotonic() + (LIMIT + 0.3 if self.ready else 60)

    def kill(self):
        Worker.alive.discard(self)
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def forget_workers():
    """In a forked child: the workers belong to the parent. Close our copies of their pipes, so that they see it go."""
    for worker in Worker.alive:
        for pipe in (worker.process.stdin, worker.process.stdout):
            pipe.close()
        worker.process.returncode = 0
    Worker.alive, Worker.idle = set(), []


os.register_at_fork(after_in_child=forget_workers)


def judge(cases):
    """Verdicts on (prediction, gold) pairs, in order, from as many workers as there are cores. Safe in any thread."""
    verdicts, todo, busy = [False] * len(cases), list(enumerate(cases))[::-1], {}
    try:
        while todo or busy:
            while todo and len(busy) < (os.cpu_count() or 1):
                worker = Worker.idle.pop() if Worker.idle else Worker()
                try:
                    worker.send(*todo[-1][1])
                except OSError:                                           # died while idle
                    worker.kill()
                    continue
                busy[worker.outbox] = worker, todo.pop()[0]
            poll = select.poll()
            for fd in busy:
                poll.register(fd, select.POLLIN)
            wait = min(worker.deadline for worker, _ in busy.values()) - time.monotonic()
            for fd, _ in poll.poll(max(0, wait) * 1000 + 1):
                worker, index = busy[fd]
                answer = os.read(fd, 1)
                if answer == b"r":
                    worker.ready, worker.deadline = True, time.monotonic() + LIMIT + 0.3
                    continue
                del busy[fd]
                verdicts[index] = answer == b"1"
                if answer:
                    Worker.idle.append(worker)
                else:
                    worker.kill()                                         # the alarm or the memory limit got it: 0
            for fd, (worker, _) in list(busy.items()):
                if time.monotonic() > worker.deadline:
                    del busy[fd]
                    worker.kill()
    finally:
        for worker, _ in busy.values():                                   # Ctrl-C in the middle: leave nothing running
            worker.kill()
    return verdicts


# ---------------------------------------------------------------------------------------------- the contract

def rewards(responses, answers):
    """1.0 or 0.0 for every (response, answer key) pair, in order. Never raises on their content; every case is limited."""
    verdicts, cases = [0.0] * len(responses), []
    if len(answers) != len(responses):
        raise ValueError(f"{len(responses)} responses for {len(answers)} answers")
    for k, (response, answer) in enumerate(zip(responses, answers)):
        prediction = extract_answer(response)
        gold = str(answer) if answer is not None else ""
        gold = extract_answer(gold) or gold
        if prediction is None or not gold.strip():
            continue
        verdict = cheap(prediction, gold)
        if verdict is None:
            cases.append((k, (prediction, gold)))
        verdicts[k] = float(bool(verdict))
    for (k, _), verdict in zip(cases, judge([case for _, case in cases])):
        verdicts[k] = float(verdict)
    return verdicts


def reward(response, answer):
    r"""1.0 if the last \boxed{} of the response means the same as the answer key, else 0.0."""
    return rewards([response], [answer])[0]


def is_equiv(prediction, gold):
    """Do two answers (without box) mean the same? Symmetric in spirit; None is equal to nothing."""
    if prediction is None or gold is None:
        return False
    prediction, gold = str(prediction), str(gold)
    verdict = cheap(prediction, gold)
    return judge([(prediction, gold)])[0] if verdict is None else verdict


def show(text):
    if text is None:
        return "nothing boxed"
    trees = readings(text)
    return f"{text!r:.200}\n    read as {trees[0]!r:.500}" if trees else f"{text!r:.200}\n    read as text {plain(prepare(text))!r:.500}"


def main():
    if sys.argv[1:] == ["--worker"]:
        return work()
    if len(sys.argv) != 3:
        print("usage: python reward.py RESPONSE ANSWER", file=sys.stderr)
        sys.exit(2)
    response, answer = sys.argv[1:]
    print("prediction:", show(extract_answer(response)))
    print("answer key:", show(extract_answer(answer) or answer))
    print("reward:", reward(response, answer))


if __name__ == "__main__":
    main()
