r"""The reward: does the box mean what the answer key means?

Reinforcement learning optimises exactly what this file says: a false positive teaches cheating, a false
negative starves learning, a hang stops the run, an `eval` would hand the machine to the model. Therefore:

1. The text is read by hand, character by character; sympy never sees text (no sympify, no parse_latex).
   What is read becomes sympy objects through Python operators, with bounds on powers and factorials.
2. Two formulas are the same if their difference vanishes at random points (Schwartz-Zippel), evaluated by
   sympy to as many digits as the question needs; nothing is ever "simplified".
3. All that happens in a worker process. The kernel gives a case LIMIT seconds and MEMORY bytes; what needs
   more is killed and earns 0. Equal strings and plain numbers never get there: they take microseconds.

Glossary: `prediction` what stands in the box; `gold` the answer key; `node` something read, which is a
sympy expression or matrix, or a tuple that begins with its kind: list, tuple, rel, ratio, set, unit, text.
`Hopeless`: cannot be read, or is undefined, or out of bounds. Such a text equals nothing but itself.

Conventions where mathematics leaves a choice: 0.33 is not 1/3; a unit may be missing but not differ; n% is n
or n/100; log has base 10 or e; an odd root of a negative number is real; unknowns are real; (1, 2) may be a
point or an interval, and y = 2x may be given as 2x. A word beside a number must be known to be harmless.
Left out: numbers in words, unit conversion (1 m is not 100 cm), integrals, limits, sums. POSIX only.

    python reward.py 'so \boxed{\frac{1}{2}}' 0.5         # what was read on both sides, and the verdict
"""

import json
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from random import Random

LIMIT = 1.5             # seconds a case may take in its worker
MEMORY = 1 << 30        # bytes of address space a worker may take
MAX_CHARS = 5_000       # longer texts are compared as strings and plain numbers only
MAX_DEPTH = 40          # nested brackets, powers and functions
MAX_BITS = 400_000      # of an exact number: 20,000! fits, 8^8^8 does not


class Hopeless(ValueError):
    """Cannot be read, or is undefined, or is too big to look at."""


def load_sympy():
    """Half a second that only those pay who read: workers, and the command line."""
    global sympy, REALS
    import sympy
    REALS = sympy.Symbol("ℝ", real=True)


# ------------------------------------------------------------------------------------------ the box

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s{}$]*)|\\.|[{}]", re.DOTALL)


def extract_answer(text):
    r"""Content of the last \boxed{...} or \fbox{...} (str); None if there is none or it is empty.

    Braces are balanced and \{ \} do not count; a box in a box is opened; `\boxed 5` is a box; a last box that
    was never closed is no answer; of a reasoning model's response only what follows </think> is read."""
    text = text.rpartition("</think>")[2] if isinstance(text, str) else ""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    groups = []                          # open braces: (where the box of the brace starts or -1, inside)
    last = (-1, 0, 0, 0)                 # last box: its start, its content from and to, its end
    for token in BOX.finditer(text):
        if token[1] == "{":
            groups.append((token.start(), token.end()))
        elif token[0] == "{":
            groups.append((-1, token.end()))
        elif token[1] is not None:       # \boxed 5
            last = (token.start(), token.start(1), token.end(), token.end())
        elif token[0] == "}" and groups:
            start, inside = groups.pop()
            # a box that holds nothing but a box keeps the content of the inner one
            around = text[inside:last[0]] + text[last[3]:token.start()] if last[0] >= inside else "x"
            if start >= 0 and around.strip():
                last = (start, inside, token.start(), token.end())
            elif start >= 0:
                last = (start, last[1], last[2], token.end())
    if any(start > last[0] for start, _ in groups):
        return None
    content = text[last[1]:last[2]].strip()
    bare = last[2] == last[3]            # a full stop behind \boxed 5 is not part of it
    return (content.rstrip(".,;") if bare else content) or None


# ------------------------------------------------------------------------------------------ the cheap path

SPACING = re.compile(r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|(?:thin|med|thick|en)space)(?![a-zA-Z]))|~|\s+")
IGNORED = re.compile(
    r"(?<!\\)\\(?:(?:left|right) ?\.|(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits"
    r"|therefore|bf|it|rm)(?![A-Za-z])|[\[\]()!])|(?<!\\)\$")
DECIMAL = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)?)(?:\.([0-9]*))?")
DIGITS = "([0-9]{1,300})"
FRACTION = re.compile(rf"([+-]?)(?:\\frac\{{{DIGITS}\}}\{{{DIGITS}\}}|{DIGITS}/{DIGITS})")


def normalise(text):
    r"""The text without what never carries meaning: $ signs, \left, spacing, \dfrac, a final full stop."""
    text = re.sub(r",\\! *", ",", text)                              # 32,\! 349
    text = SPACING.sub(" ", IGNORED.sub("", text)).strip(" *")
    text = re.sub(r"(?<!\.)\.$", "", text).strip()
    return squeeze(re.sub(r"\\([dtcs]|nice)frac(?![a-zA-Z])", r"\\frac", text))


def squeeze(text):
    """Without spaces, save between letters, digits and commands: 1 1/2 is not 11/2."""
    return re.sub(r"(?<![0-9A-Za-z.,]) +| +(?![0-9A-Za-z.,\\])", "", text)


def rational(text):
    """A plain decimal or fraction as (numerator, denominator) in lowest terms, else None."""
    decimal, fraction = DECIMAL.fullmatch(text), FRACTION.fullmatch(text)
    if decimal and (decimal[2] or decimal[3]):
        sign, whole = decimal[1], re.sub("[{},]", "", decimal[2]).lstrip("0")
        part = (decimal[3] or "").rstrip("0")
        if len(whole) + len(part) > 300:                             # linear in the length: stays a string
            return sign.strip("+") + whole + "." + part, 1
        top, bottom = int(whole + part or 0), 10 ** len(part)
    elif fraction:
        sign, top, bottom = fraction[1], int(fraction[2] or fraction[4]), int(fraction[3] or fraction[5])
    else:
        return None
    divisor = math.gcd(top, bottom)
    return ((-top if sign == "-" else top) // divisor, bottom // divisor) if bottom else None


def plain_tuple(text):
    """(23, -1/2) as a list of rationals, else None."""
    inside = text[1:-1].split(",")
    if len(inside) < 2 or text[0] + text[-1] != "()" or not re.fullmatch("[-+0-9./,]+", text[1:-1]):
        return None
    values = [rational(value) for value in inside]
    return values if all(values) else None


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
    if prediction[:1] == gold[:1] == "(":
        left, right = plain_tuple(prediction), plain_tuple(gold)
        if left and right and len(left) == len(right) and all(value[1] == 1 for value in left + right):
            return left == right
    return None if max(len(prediction), len(gold)) <= MAX_CHARS else False


# ------------------------------------------------------------------------------------------ words
# What stands beside a number must be harmless: a unit, a lone noun in the plural behind it, one of these words
# before it. All other words refuse the answer, unless the other side says the same.

LEADING = set("""the a an is are final answer result solution value exactly total area volume perimeter length width
height radius distance speed time probability number sum cost price therefore thus hence so we get be""".split())
WORDS = {"and": "∧", "or": "∨", "infinity": "∞", "infty": "∞", "pi": "π", "percent": "%", "pct": "%",
         "degree": "°", "degrees": "°", "deg": "°", "thousand": "*10^3", "million": "*10^6", "billion": "*10^9",
         "minus": "-", "negative": "-", "plus": "+", "times": "*"}
UNITS = {name: names.split()[0] for names in """km kilometer kilometre, m meter metre, cm centimeter centimetre,
ft foot feet, mm millimeter millimetre, in inch inche, yd yard, mi mile, g gram, kg kilogram kilo, mg milligram,
lb pound, oz ounce, unit, l liter litre, ml milliliter millilitre, s sec second, min minute, h hr hour, day,
wk week, month, yr year, $ dollar usd buck, ¢ cent, € euro eur, £ gbp, ¥ yen, ₹ rupee, rad radian,
mph mi/h mile/h, kph km/h, n newton, j joule, w watt, v volt, hz hertz, pa pascal, mol mole, gal gallon,
qt quart, pt pint, k kelvin, c celsiu celsius, f fahrenheit""".split(",") for name in names.split()}
PLURALS = set("people men women children feet mice geese dice fish sheep".split())
NOT_NOUNS = re.compile("""plus|minus|times|less|unless|always|besides|is|was|has|this|yes|versus|halves|quarters
|.*(?:third|four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)(?:th)?s|ones|twos|threes
|fives|sixes|nines|zeros|zeroes|.*ties|tens|dozens|scores|pairs|couples|doubles|triples|negatives|opposites|inverses
|reciprocals|roots|powers|factorials|logs|squares|cubes|multiples|percents|modulus""".replace("\n", ""))
SHORT_WORDS = set("sq cu no is of to at by in if it we as an am pm be so up on".split())


def word(match):
    """A run of letters: a function, a unit or another word, or a product of variables (xy, abc)."""
    text, low = match[0], match[0].lower()
    if text[0] in "«\\":
        return text
    if low in WORDS:
        return WORDS[low]
    last = not match.string[match.end():].strip(" .})")
    if text in GREEK or text in COMMANDS and not (low in UNITS and last):        # 5 min, but min(5, 6)
        return f"\\{text} "
    known = low in UNITS or low.rstrip("s") in UNITS or low in SHORT_WORDS
    vowels = re.search("[eiou]|(?!^)a", low)
    return text if not known and (len(text) == 2 or len(text) < 5 and not vowels) else f"«{text}»"


def text_command(match):
    r"""\text{...}: words become «words»; a single letter does too (5\text{ m}), save e and i."""
    if re.match("math(?!rm)|bold|bm|pmb", match[1]):
        return f" {match[2]} " if len(match[2]) > 1 else match[2]
    return " " + re.sub(r"(?<![A-Za-z\\])([A-DF-Za-df-hj-z])(?![A-Za-z])", r"«\1»", match[2]) + " "


def plain(text):
    """A text answer without case, punctuation and markup."""
    return " ".join(re.sub(r"[^\w%$€£]+", " ", re.sub(r"\\[a-z]+|[«»{}]", " ", text).lower()).split())


def read_unit(text):
    """("cm^2", True) of "square centimeters". True: harmless, so that it may be missing on the other side."""
    def short(match):
        singular = match[0].rstrip("s") if len(match[0]) > 2 else match[0]
        return UNITS.get(match[0]) or UNITS.get(singular, singular)

    words = re.sub(r"\bper\b", "/", re.sub("[«»{}.*]", " ", text.lower())).strip().removesuffix(" old")
    unit = re.sub(r"\b(?:square|sq) +(\w+)|(\w+) +squared", r"\1\2^2", words)
    unit = re.sub(r"\b(?:cubic|cu) +(\w+)|(\w+) +cubed", r"\1\2^3", unit)
    unit = re.sub(r"(?<=[a-z])(?=[23]\b)", "^", re.sub("[a-z]+", short, unit))
    unit = " ".join(re.sub(r"(\w+) ?\^ ?-(\d)", r"/\1^\2", unit).split())
    unit = re.sub(r" ?([/^°]) ?", r"\1", unit).strip(" /").removesuffix("^1")
    noun = words in PLURALS or re.fullmatch("[a-z]{3,}s", words) and not NOT_NOUNS.fullmatch(words)
    names = set(re.findall("[^ /^0-9°%-]+", unit))
    return UNITS.get(unit, unit), bool(noun or names <= set(UNITS.values()))


# ------------------------------------------------------------------------------------------ text to tokens
# What `prepare` leaves: digits, letters, \commands, { } as TeX groups, one character for every operator, «words»,
# ⦃ ⦄ for set braces, ⟪ ⟫ around a matrix with ↵ between rows and & between cells, and 0.1~6 for 0.1666...

SYMBOLS = r"""
* \cdot \times \ast \bullet × · ⋅ ∙ ∗ •    / \div ÷ ⁄ ∕    ± \pm    ∓ \mp    - − – — ‒ ﹣    ^ **    = \equiv ==
< \lt    > \gt    ≤ \le \leq \leqslant <= ⩽    ≥ \ge \geq \geqslant >= ⩾    ≠ \ne \neq !=    ≈ \approx \simeq
∈ \in    ∪ \cup \bigcup    ∩ \cap    ∖ \setminus \backslash    ∧ \land \wedge    ∨ \lor \vee    : \colon ∶
… \ldots \dots \cdots ...    ∞ \infty \infin    π \pi    ∅ \emptyset \varnothing    ℝ \mathbf{R} \R \Reals
∣ \mid    | \vert \lvert \rvert \| \Vert ‖    ⦃ \{ \lbrace    ⦄ \} \rbrace    [ \lbrack    ] \rbrack
⟨ \langle    ⟩ \rangle    ⌊ \lfloor    ⌋ \rfloor    ⌈ \lceil    ⌉ \rceil    ↵ \cr    % \%    ' \prime ^\prime ^{\prime} ′
° ^{\circ} ^\circ ^{\degree} ^\degree \degree \textdegree ˚    «$» \$    «€» € \euro    «£» £ \pounds
«¥» ¥ \yen    «₹» ₹    «¢» ¢    \sqrt √    \sqrt[3] ∛    \sqrt[4] ∜    \log_{10} \lg    \binom \dbinom \tbinom
"""
SYMBOLS = {old: new + " " * new.startswith("\\") for new, *olds in
           map(str.split, re.split(r" {4}|\n", SYMBOLS.strip())) for old in olds}
SYMBOL = re.compile("|".join(re.escape(old) + r"(?![A-Za-z])" * old[-1].isalpha()
                             for old in sorted(SYMBOLS, key=len, reverse=True)))
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾ᵀ", "0123456789+-ni()T"))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
GREEK = set("alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi psi omega".split())
INVERSES = {f"{arc}{name}{h}": f"a{name}{h}" for arc in ("a", "ar", "arc") for h in ("", "h")
            for name in ("sin", "cos", "tan", "sec", "csc", "cot")}
FUNCTIONS = {"ln": "log", "max": "Max", "min": "Min", "gcd": "gcd", "lcm": "lcm", "abs": "Abs", "exp": "exp",
             "log": "log", "sin": "sin", "cos": "cos", "tan": "tan", "sec": "sec", "csc": "csc", "cot": "cot",
             "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "sech": "sech", "csch": "csch", "coth": "coth",
             "floor": "floor", "ceil": "ceiling", **INVERSES}
COMMANDS = set(FUNCTIONS) | {"sqrt", "frac", "binom", "vec", "hat", "bar", "overline", "tilde"}
TEXT = r"\\(text\w*|mbox|hbox|operatorname|math\w+|boldsymbol|bm|pmb)\*? ?\{((?:[^{}]|\{[^{}]*\})*)\}"
RATE = r"(?<=[\d)}]) ?(\b(?:[kc]?m|mi|ft|g|kg)/(?:s|h|hr|sec|min|[kc]?m)\b(?:\^\{?[23]\}?)?)"


@lru_cache(256)
def prepare(text, thousands=True):
    """Unicode and LaTeX to the small alphabet above. thousands: 1,234 is one number; otherwise a list of two."""
    def sub(pattern, new):
        nonlocal text
        text = re.sub(pattern, new, text)

    # unicode: raised and lowered digits, vulgar fractions, full width, invisible characters, greek letters
    sub(f"[{''.join(RAISED)}]+", lambda m: "^{" + "".join(map(RAISED.get, m[0])) + "}")
    sub(f"[{''.join(LOWERED)}]+", lambda m: "_{" + "".join(map(LOWERED.get, m[0])) + "}")
    sub("[¼-¾⅐-⅞]", lambda m: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄")))
    text = unicodedata.normalize("NFKC", text.replace("º", "°").replace("ℝ", r"\R ").replace("\\\\", "↵"))
    text = "".join(str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) != "Cf")
    sub("[α-ωΓ-Ω]", lambda m: "\\" + unicodedata.name(m[0]).split()[-1].lower().replace("lamda", "lambda") + " ")
    text = SYMBOL.sub(lambda m: SYMBOLS[m[0]], normalise(text))
    # LaTeX: number sets, matrices, fractions without braces, text
    sub(r"\\mathbb ?\{? ?([A-Z]) ?\}?", lambda m: "ℝ" if m[1] == "R" else m[1])
    sub(r"↵ ?\[[^\]]*\]", "↵")
    sub(r"\\begin ?\{(?:\w*matrix|array)\} ?(?:\{[lcr| ]*\})?", "⟪,")
    sub(r"\\begin ?\{cases\}", "⟪;")
    sub(r"\\end ?\{(\w*matrix|array|cases)\}", "⟫")
    sub(r"\\(boxed|fbox)(?![a-zA-Z])", "")
    sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}")
    for _ in range(4):                                               # outermost first; four nested \text are plenty
        sub(TEXT, text_command)
    # numbers: 0.\overline{3}, 0.(3), 0.333..., 1 000 000, 1,000
    sub(r"(?<!\d)(\d*)\.(\d*) ?(?:\\(?:overline|bar) ?\{? ?(\d+) ?\}?|\((\d+)\))", r"\g<1>.\2~\3\4")
    sub(r"(?<!\d)(\d*)\.(\d{0,9}?)(\d{1,9}?)\3\3+ ?…", r"\1.\2~\3")
    sub(r"(?<![\w.,~^_])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", ""))
    sub(r"(?<=\d)\{,\}(?=\d)", ",")
    if thousands:
        sub(r"(?<![\w.,~^_])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""))
    # words and units: sq. units, a.m., km/h, (cm)
    sub(r"(?<=[a-z])\.(?= ?[A-Za-z^])", "")
    sub("per cent", "percent")
    sub(RATE, r"«\1»")
    sub(r"«[^»]*»|\\[A-Za-z]+|[A-Za-z]{2,}", word)
    sub("« +", "«")
    sub(" *» *«", " ")
    sub("(?:all|«all) *«?real(?: number)?s»", "ℝ")
    sub(r"(?<=[\d}]) ?\(((?:«[^»]*»(?:\^\{?\d\}?)?)+)\)$", r"\1")
    sub(r"_\{? ?«(\w+)» ?\}?", r"_{\1}")
    # brackets: (101)_2, ]1, 2[, <1, 2>
    sub(r"\((\d+)\)_", r"\1_")
    sub(r"(?<![\w)])([\[\]])([^\[\]()]*,[^\[\]()]*)([\[\]])",
        lambda m: "(["[m[1] == "["] + m[2] + ")]"[m[3] == "]"])
    sub("^<([^<>]*,[^<>]*)>$", r"(\1)")
    return squeeze(re.sub(r"\s+", " ", text)).lstrip(" \"'`").rstrip(" .,;↵\"'`")


# ------------------------------------------------------------------------------------------ tokens to sympy

LOG_BASE = "base of log"                                             # 10 or e: a symbol until two sides are compared


def apply(function, *args):
    """function(*args) as a sympy object; Hopeless if that is no finite value (1/0, ln 0), or far too big."""
    if any(isinstance(arg, sympy.MatrixBase) for arg in args) and function in (sympy.Add, sympy.Mul):
        value = args[0]
        for arg in args[1:]:
            value = value + arg if function is sympy.Add else value * arg
        return value
    if not all(isinstance(arg, sympy.Expr) and arg not in (sympy.oo, -sympy.oo) for arg in args):
        raise Hopeless("not a number")
    value = function(*args)
    if value in (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        raise Hopeless("undefined")
    if value.is_Rational and value.p.bit_length() + value.q.bit_length() > MAX_BITS:
        raise Hopeless("too big")
    return value


def negative(node):
    return -node if node in (sympy.oo, -sympy.oo) else apply(sympy.Mul, sympy.Integer(-1), node)


def divide(top, bottom):
    return apply(sympy.Mul, top, power(bottom, sympy.Integer(-1)))


def power(base, exponent):
    """base^exponent within bounds; an odd root of a negative real is the real one, as at school."""
    if base == 0 and not exponent.is_positive:
        raise Hopeless("0^0")
    if base.is_number and exponent.is_number and base not in (-1, 0, 1):
        bits = base.p.bit_length() + base.q.bit_length() if base.is_Rational else 4
        if abs(exponent.evalf(5)) * bits > MAX_BITS:
            raise Hopeless("too big")
    if exponent.is_Rational and exponent.q > 1 and exponent.q % 2 and base.is_number and base.is_negative:
        return apply(sympy.Mul, sympy.Integer(-1) ** exponent.p, power(-base, exponent))
    return apply(sympy.Pow, base, exponent)


def call(name, args):
    """A named function of numbers or formulas."""
    if name in ("gcd", "lcm"):
        if not all(arg.is_Integer for arg in args):
            raise Hopeless("gcd of what is no integer")
        return sympy.Integer(getattr(math, name)(*map(int, args)))
    if name in ("factorial", "factorial2", "binomial"):
        if any(arg.is_number and not (arg.is_Integer and 0 <= arg <= 20_000) for arg in args):
            raise Hopeless("too big")
    if name == "log":
        return apply(lambda x: sympy.log(x) / sympy.log(sympy.Symbol(LOG_BASE, positive=True)), *args)
    function = sympy.log if name == "ln" else getattr(sympy, FUNCTIONS.get(name, name))
    return apply(function, *args)


UNIT_WORD = r"«[^»]*»(?: ?\^\{?-?\d+\}?)?"
UNIT = rf"(?:{UNIT_WORD}[ */]*)+|\\frac ?\{{ ?{UNIT_WORD} ?\}} ?\{{ ?{UNIT_WORD} ?\}}"
MIXED = r"\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}|(?<= )(\d+) ?/ ?(\d+)(?![\d.])"
CLOSING = {"(": r"[)\]]", "[": r"[)\]]", "{": r"\}", "⟨": "⟩", "⌊": "⌋", "⌈": "⌉", "|": r"\|"}
DEFINES = (r"(?:[A-Za-z]|\\[a-z]+ )(?:_\{?\w+\}?)?'*(?:\^\{?-1\}?)?\((?:[A-Za-z](?:, ?[A-Za-z])*|\d+)\)="
           r"|[A-Za-z]_\{?[a-z]\}?=")


class Reader:
    """A position in a prepared text, and one method a grammar rule.

    answer > relation > union > item > sum > term > factor > atom. There is no backtracking, depth is bounded by
    MAX_DEPTH, and anything unexpected is Hopeless."""

    def __init__(self, text):
        self.text, self.i, self.depth = text, 0, 0
        self.in_bars, self.in_function, self.unit = False, False, None

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
        node = self.listing()
        return node[2] if len(node) == 3 else node

    def listing(self):
        items, separator = [self.relation()], "∧"
        while match := self.take("(?:[,;] ?)?[∧∨]|[,;]"):
            separator = "∨" if "∨" in match[0] else separator
            items.append(self.relation())
        return "list", separator, *items

    def relation(self):
        """a < b <= c, y = 2x + 1, x in (2, 6], 4 : 9. A leading "f(x) =", "a_n =", "Answer:" or "=" is dropped."""
        if label := self.take("«([^»]*)» ?:"):
            self.check_leading(label[1])
        self.take("[=≈]")
        self.take(DEFINES)
        parts, signs = [self.union()], ""
        while match := self.take("[=<>≤≥≠≈∈:]"):
            signs += match[0].strip()
            parts.append(self.union())
        if not signs:
            return parts[0]
        if ":" not in signs:
            return "rel", signs, *parts
        # V_1 : V_2 = 11 : 21 is read as the ratio of the numbers
        if "=" in signs and len(parts) == 4 and is_name(parts[0]) and is_name(parts[1]):
            parts, signs = parts[2:], ":" if signs == ":=:" else "?"
        return ("ratio", *parts) if set(signs) == {":"} else self.fail()

    def union(self):
        node = self.item()
        while match := self.take("[∪∩∖]"):
            other = self.item()
            lists = match[0] == "∪" and kind(node) == kind(other) == "list"
            node = (*node, *other[2:]) if lists else ("set", match[0].strip(), node, other)
        return node

    def item(self):
        """A sum, with words or a currency in front and a unit behind: ("unit", (name, harmless), sum)."""
        outer, self.unit = self.unit, None
        if match := self.take(r"«(\w[^»]*)»(?! ?[,;=∧∨:)\]|∣⦄<>≤≥]| ?$|\()"):
            self.check_leading(match[1])
        node = self.sum()
        if match := self.take(UNIT):
            self.set_unit(re.sub(r"\\frac ?\{([^{}]*)\} ?\{(.*)\}", r"\1/\2", match[0]))
        node, self.unit = ("unit", self.unit, node) if self.unit else node, outer
        return node

    def check_leading(self, words):
        return set(plain(words).split()) <= LEADING or self.fail()

    def set_unit(self, text):
        unit = read_unit(text)
        if self.unit not in (None, unit):
            self.fail()
        self.unit = unit

    def sum(self):
        terms, signs = [], self.take(r"[+\-±∓](?: ?[+\-])*")
        while signs or not terms:
            at, signs = self.i, signs[0] if signs else ""
            term = self.term()
            if "±" in signs or "∓" in signs:                         # ± 1 ± i has four values, ± 1 ∓ i two
                sign = sympy.Symbol("±" if "∓" in self.text else f"±{at}", real=True)
                term = apply(sympy.Mul, negative(sign) if "∓" in signs else sign, term)
            terms.append(negative(term) if signs.count("-") % 2 else term)
            signs = self.take(r"[+\-±∓](?: ?[+\-])*")
        return terms[0] if len(terms) == 1 else apply(sympy.Add, *terms)

    def term(self):
        factors = [self.factor()]
        while True:
            if match := self.take(r"([*/]) ?(-?)"):
                factor = self.factor()
                factor = divide(sympy.Integer(1), factor) if match[1] == "/" else factor
                factors.append(negative(factor) if match[2] else factor)
            elif self.starts_factor():
                factors.append(self.factor())
            else:
                return factors[0] if len(factors) == 1 else apply(sympy.Mul, *factors)

    def starts_factor(self):
        """Does a factor follow without an operator? 2x, 2(x), 2^{3}5; but not 2 3, x2, or the bar that closes |x|."""
        if self.see(r"[\d.]"):
            return self.text[self.i - 1] in "})]!" or self.see(r"\d+\^") and re.search(r"\^\d+$", self.text[:self.i])
        closing_bar = self.in_bars and self.see(r"\|")
        return self.see(r"[A-Za-zπ∞({\[⟪⌊⌈|]|\\[A-Za-z]") and not self.see(UNIT) and not closing_bar

    def factor(self):
        """An atom and what stands behind it: ! ^ ' % °."""
        if currency := self.take("«[$€£¥₹]»"):
            self.set_unit(currency[0])
        node = self.atom()
        for _ in range(5):
            match = self.take(r"!!?(?![=!])|\^|%(?! ?[*/+^(\d])|° ?«?[CF]»?(?![A-Za-z])|°|'")
            mark = match[0].strip() if match else ""
            if mark == "^":
                node = self.power(node)
            elif mark[:1] == "!":
                node = call("factorial" if mark == "!" else "factorial2", [node])
            elif mark == "'":
                node = symbol(node.name + "'") if is_symbol(node) else self.fail()
            elif mark == "°" and self.in_function:                   # sin 30° is a number; alone, ° is a unit
                node = apply(sympy.Mul, node, sympy.pi / 180)
            elif mark:
                self.set_unit(mark)
            else:
                return node
        return self.fail()

    def power(self, base):
        if isinstance(base, sympy.MatrixBase) and self.take(r"\{ ?T ?\}|T|\\top"):
            return base.T
        return power(base, self.exponent())

    def exponent(self):
        self.depth += 1
        sign = self.take("[-+]")
        digits = self.take(r"\d+(?:\.\d+)?")                         # 2^10 is 1024 although TeX sets 2^1 0
        exponent = sympy.Rational(digits[0].strip()) if digits else self.atom()
        if self.take(r"\^"):
            exponent = self.power(exponent) if self.depth < MAX_DEPTH else self.fail()
        self.depth -= 1
        return negative(exponent) if sign and "-" in sign[0] else exponent

    def atom(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail()
        for rule in (self.number, self.bracket, self.command, self.name):
            node = rule()
            if node is not None:                                     # 0 is a node that is falsy
                self.depth -= 1
                return node
        return self.fail()

    def number(self):
        if match := self.take(r"(\d+|\d[\dA-F]*(?=_\{?1\d))_(?:\{[ ({]*(\w+)[ )}]*\}|(\d+))"):
            return symbol(f"{match[1]}_{match[2] or match[3]}")      # 101_2 is a symbol of its own: bases must agree
        match = self.take(r"(\d*)\.(\d*)(?:~(\d+))?(?:[eE]([+-]?\d{1,4}))?|(\d+)(?:[eE]([+-]?\d{1,4}))?")
        if not match:
            return None
        if match[0].strip() == ".":
            self.fail()
        whole, part, repeating = match[1] or match[5] or "0", match[2] or "", match[3]
        value = sympy.Rational(int(whole + part), 10 ** len(part))
        if repeating:
            value += sympy.Rational(int(repeating), 10 ** len(part) * (10 ** len(repeating) - 1))
        value *= sympy.Integer(10) ** int(match[4] or match[6] or 0)
        mixed = self.see(MIXED) if match[5] else None
        if mixed and int(mixed[1] or mixed[3]) < int(mixed[2] or mixed[4]):
            self.take(MIXED)
            value += sympy.Rational(int(mixed[1] or mixed[3]), int(mixed[2] or mixed[4]))
        return value

    def name(self):
        r"""x, x_1, \alpha, π, or a «word»."""
        match = self.take(r"([A-Za-zπ∞ℝ…])|\\([A-Za-z]+)|«([^»]*)»|∅")
        if not match:
            return None
        if match[0].strip() == "∅":
            return "list", "∧"
        if match[3] and len(match[3]) > 1:
            return "text", plain(match[3])
        sub = self.take(r"_(?:\{([^{}]*)\}|\\([A-Za-z]+)|(\w))")
        name = "".join(match.groups(""))
        return symbol(name + "_" + "".join(sub.groups("")).replace(" ", "").strip("\\") if sub else name)

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
            if opening in "⌊⌈|":
                node = call({"⌊": "floor", "⌈": "ceil", "|": "abs"}[opening], [node])
            elif node[:1] == ("list",) if isinstance(node, tuple) else False:
                if opening != "{" and len(node) > 2:
                    node = ("tuple", "()" if opening == "⟨" else opening + closing, *node[2:])
        self.in_bars, self.unit = outer
        return node

    def braces(self):
        r"""\{1, 2\} is ("list", ...); \{x : x > 2\} is the inequality."""
        if self.take("⦄"):
            return "list", "∧"
        builder = self.take(r"[A-Za-z](?:∈[ℝA-Z]+)?[|∣:]")
        node = self.answer() if builder else self.listing()
        self.need("⦄")
        return node

    def matrix(self):
        kind, rows = self.need("[;,]")[0].strip(), [[]]
        while not self.take("⟫"):
            rows[-1].append(self.answer())
            if self.take("↵"):
                rows.append([])
            elif not self.see("⟫"):
                self.need("&")
        rows = [row for row in rows if row]
        if kind == ",":
            return sympy.ImmutableDenseMatrix(rows)
        return ("list", "∧", *(row[0] if len(row) == 1 else ("tuple", "()", *row) for row in rows))      # a system

    def command(self):
        match = self.see(r"\\([A-Za-z]+)")
        if not match or match[1] not in COMMANDS:
            return None
        self.i, name = match.end(), match[1]
        if name in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            return divide(top, bottom) if name == "frac" else call("binomial", [top, bottom])
        if name == "sqrt":
            index = sympy.Integer(2)
            if self.take(r"\["):
                index = self.answer()
                self.need(r"\]")
            return power(self.argument(r"\d+(?:\.\d+)?"), divide(sympy.Integer(1), index))
        if name not in FUNCTIONS:
            return symbol(f"{name} {self.argument()}")               # \vec{v}, \overline{AB}
        return self.function(name)

    def function(self, name):
        base = self.argument(r"\d+(?=[ ({])|\d") if name == "log" and self.take("_") else None
        exponent = self.exponent() if self.take(r"\^") else None
        if exponent == -1:
            name, exponent = "a" + name, None                        # sin^{-1}
        argument = self.function_argument()
        arguments = [argument]
        if isinstance(argument, tuple) and argument[0] in ("tuple", "list"):
            arguments = argument[2:]
        node = call(name, arguments) if base is None else apply(sympy.log, argument, base)
        return node if exponent is None else power(node, exponent)

    def argument(self, digits=r"\d"):
        r"""What \frac and \sqrt take: a group, a token, or so many digits."""
        match = self.take(digits)
        return sympy.Rational(match[0].strip()) if match else self.atom()

    def function_argument(self):
        """sin(x), or sin 2x up to the next operator, bracket or function."""
        outer, self.in_function = self.in_function, True
        if self.see(r"[({\[|⦃]"):
            node = self.atom()
        else:
            sign, factors = self.take("-"), [self.factor()]
            while self.starts_factor() and not self.see(r"\(|\\(?:" + "|".join(FUNCTIONS) + ")(?![a-z])"):
                factors.append(self.factor())
            node = apply(sympy.Mul, *factors)
            node = negative(node) if sign else node
        self.in_function = outer
        return node


def symbol(name):
    """An unknown, or one of the constants."""
    constants = {"π": sympy.pi, "e": sympy.E, "i": sympy.I, "∞": sympy.oo}
    return constants[name] if name in constants else sympy.Symbol(name, real=True)


def is_symbol(node):
    return isinstance(node, sympy.Symbol)


@lru_cache(256)
def readings(text):
    """What a text may mean, at most two nodes: 1,234 is a number or a list. Cached: a gold answer is read once."""
    nodes = []
    for thousands in (True, False) if "," in text else (True,):
        try:
            nodes.append(Reader(prepare(text, thousands)).whole())
        except Exception:                                            # untrusted text: whatever it provokes, it is not read
            pass
    return list(dict.fromkeys(nodes))


# ------------------------------------------------------------------------------------------ equal formulas


def is_value(node):
    return isinstance(node, sympy.Expr) and node != REALS


def symbols(node):
    """Names of the unknowns in a node."""
    if isinstance(node, tuple):
        return set().union(*map(symbols, node))
    return {s.name for s in getattr(node, "free_symbols", ())} - {LOG_BASE, "ℝ"}


def replace(node, values):
    """The node with symbols replaced. values: name -> number."""
    if isinstance(node, tuple):
        return tuple(replace(part, values) for part in node)
    if not hasattr(node, "free_symbols"):
        return node
    return node.xreplace({s: values[s.name] for s in node.free_symbols if s.name in values})


def equal(a, b):
    """Are two expressions the same number, or the same function of their symbols?"""
    if a == b:
        return True
    if sympy.oo in (abs(a), abs(b)):
        return False
    gap = a - b
    if not gap.has(sympy.Symbol(LOG_BASE, positive=True)):
        return vanishes(gap) or double_precision(a, b) or double_precision(b, a)
    return any(vanishes(replace(gap, {LOG_BASE: base})) for base in (sympy.Integer(10), sympy.E))


def double_precision(a, b):
    """0.3333333333333333 for 1/3: a decimal for a fraction no decimal can write, right to the last of a float's digits."""
    if not (a.is_Rational and b.is_Rational and abs(a.p) > 10**14 and b.q < 10**6):
        return False
    return abs(a - b) * a.q < 1 and pow(10, 40, a.q) == 0 != pow(10, 40, b.q)


def is_zero(number, digits=150):
    """Exactly if it is rational; else sympy adds digits until one is not zero, or there are too many (_prec 1)."""
    if number.is_Rational:
        return number == 0
    # 1 - cos(10^-200) needs more digits than it shows
    digits += sum(value.p.bit_length() + value.q.bit_length() for value in number.atoms(sympy.Rational)) % 5000
    parts = number.evalf(2, maxn=digits).as_real_imag()
    if not all(part.is_Float or part == 0 for part in parts):
        raise Hopeless("no number")
    return all(part == 0 or part._prec == 1 for part in parts)


def vanishes(gap):
    """Is the expression zero wherever it is defined? Tried at six random points (one is enough without symbols)."""
    names = sorted(symbols(gap))
    if not names:
        return is_zero(gap)
    rng, agreed = Random(7), 0
    integers = gap.has(sympy.factorial, sympy.factorial2, sympy.binomial)        # n! is about whole n
    # roots and logarithms of negative numbers: school and sympy disagree, so such points are left out
    positive = [part.base for part in gap.atoms(sympy.Pow) if not part.exp.is_Integer and part.base.free_symbols]
    positive += [part.args[0] for part in gap.atoms(sympy.log) if part.free_symbols]
    for trial in range(24):                                          # in turn: in (0, 1), positive, negative, large
        size = (1, 9, 9, 400)[trial % 4]
        point = {name: sympy.Rational(rng.randint(1, 907 * size), 907) for name in names}
        if integers:
            point = {name: sympy.Integer(rng.randint(1, 40)) for name in names}
        elif trial % 4 == 2:
            point = {name: value * (-1 if name == names[0] else rng.choice((-1, 1))) for name, value in point.items()}
        if any(replace(part, point).is_negative for part in positive):
            continue
        value = replace(gap, point)
        if value in (sympy.nan, sympy.zoo):
            continue
        if not is_zero(value, 30 if agreed else 150):
            if gap.has(sympy.I) or value.is_real is not False:
                return False
            continue                                                 # arcsin 3 is outside the domain
        agreed += 1
        if agreed == 6:
            return True
    return agreed >= 3


# ------------------------------------------------------------------------------------------ equal answers

FLIP = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


def is_name(node):
    r"""x, x_1, AB, |AB|, AB/CD, \angle ABC, area: what may stand before "= 5" without being part of the answer."""
    if isinstance(node, tuple):
        return node[0] == "text" and set(node[1].split()) <= LEADING
    if isinstance(node, sympy.Abs):
        return is_name(node.args[0])
    if isinstance(node, sympy.Mul):
        names = [factor.base if factor.is_Pow and factor.exp == -1 else factor for factor in node.args]
        return all(map(is_symbol, names)) and ("angle" in symbols(node) or all(name.name[0].isupper() for name in names))
    return is_symbol(node) and node != REALS


def assigned(node):
    """(x, 5) from x = 5, 5 = x or x = 2 + 3 = 5, (y, 2x) from y = 2x, (area, 5) from area = 5; else None."""
    if kind(node) != "rel" or set(node[1]) != {"="}:
        return None
    name, *values = node[2:]
    if not is_name(name) and kind(name) not in ("tuple", "matrix"):
        name, *values = node[:1:-1]
    vector = kind(name) in ("tuple", "matrix")
    if vector or is_name(name) and not symbols(name) & symbols(tuple(values)):
        if all(same(value, values[-1]) for value in values):
            return name, values[-1]
    return None


def kind(node):
    if isinstance(node, tuple):
        return node[0]
    return "matrix" if isinstance(node, sympy.MatrixBase) else "value"


def items(node):
    """What an answer lists: ± expanded, x = 5 opened to 5, two solutions for one unknown to two values."""
    signs = sorted(name for name in symbols(node) if name[0] == "±")
    if len(signs) > 4:
        raise Hopeless("too many signs")
    if kind(node) == "rel" and node[1] == "∈":
        return items(node[3])
    if kind(node) == "list":
        found = []
        for part in node[2:]:
            found += items(part) if any("±" in name for name in symbols(part)) else [part]
    else:
        choices = product((sympy.Integer(1), sympy.Integer(-1)), repeat=len(signs))
        found = [replace(node, dict(zip(signs, values))) for values in choices]
    pairs = [assigned(item) for item in found]
    names = {pair[0] for pair in pairs if pair}
    if len(found) == 1 and pairs[0]:
        return items(pairs[0][1])
    if len(names) == 1:                                              # x = 1, y = 2 stay equations
        found = [pair[1] if pair else item for pair, item in zip(pairs, found)]
    return [settle(item) for item in found]


def settle(node):
    """One item in the form that is compared: "a ≈ 0.3" -> a, 2 + 3 = 5 -> 5."""
    if kind(node) == "rel":
        if node[1][-1] == "≈":
            return settle(node[2 + is_name(node[2])] if len(node) == 4 else ("rel", node[1][:-1], *node[2:-1]))
        if set(node[1]) == {"="} and not symbols(node) and all(is_value(part) and equal(part, node[2]) for part in node[2:]):
            return node[-1]
    return node


def same(a, b):
    """The verdict on two nodes."""
    if kind(a) == kind(b) == "rel" and same_relation(a, b):
        return True
    pairs = assigned(a), assigned(b)
    if all(pairs) and pairs[0][0] != pairs[1][0]:
        return False                                                 # x = 5 is 5, y = 5 is 5, but they are not the same
    left, right = items(a), items(b)
    for one, other in ((left, right), (right, left)):
        pairs = [assigned(item) for item in one]
        if len(one) > 1 and all(pairs) and not any(map(assigned, other)):
            names, values = zip(*sorted(pairs, key=str))
            if len(other) == 1 and kind(other[0]) == "tuple":        # x = 1, y = 2 is the point (1, 2)
                return same_in_order(other[0][2:], values)
            if len({str(name).split("_")[0] for name in names}) == 1 and len(one) == len(other):
                return unordered(values, other)                      # x_1 = 1, x_2 = 2 are the roots 1, 2
    return len(left) == len(right) and unordered(left, right) or same_region(a, b)


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
    (unit_a, harmless_a), a = (a[1], a[2]) if kind(a) == "unit" else ((None, True), a)
    (unit_b, harmless_b), b = (b[1], b[2]) if kind(b) == "unit" else ((None, True), b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    if unit_a != unit_b and not (harmless_a and harmless_b):
        return False
    if is_value(a) and is_value(b):
        marked, other = (a, b) if unit_a else (b, a)
        factor = {"%": sympy.Rational(1, 100), "°": sympy.pi / 180}.get(unit_a or unit_b)
        return equal(a, b) or factor is not None and unit_a != unit_b and equal(marked * factor, other)
    for ratio, value in ((a, b), (b, a)):
        if kind(ratio) == "ratio" and len(ratio) == 3 and is_value(value):
            return equal(divide(ratio[1], ratio[2]), value)
    if kind(a) != kind(b):
        return False
    if kind(a) == "tuple":
        return a[1] == b[1] and same_in_order(a[2:], b[2:])
    if kind(a) == "matrix":
        return a.shape == b.shape and all(map(equal, a, b))
    if kind(a) == "ratio":                                           # 0:0 is no ratio
        return len(a) == len(b) and all(equal(divide(x, a[1]), divide(y, b[1])) and not is_zero(x) for x, y in zip(a[1:], b[1:]))
    if kind(a) == "rel":
        return same_relation(a, b)
    return a == b or kind(a) == "list" and same(a, b)


def same_relation(a, b):
    """Equations or inequalities: part by part, or one is a constant times the other (negative: the sign turns)."""
    turned = ("rel", "".join(FLIP.get(sign, sign) for sign in reversed(a[1])), *a[:1:-1])
    if degenerate(a) or degenerate(b):
        return False
    if any(side[1] == b[1] and same_in_order(side[2:], b[2:]) for side in (a, turned)):
        return True
    if len(a) > 4 or len(b) > 4 or not all(map(is_value, a[2:] + b[2:])) or symbols(a) != symbols(b):
        return False
    f, g = a[2] - a[3], b[2] - b[3]
    if a[1] == b[1] == "=":                                          # y = 1/x and xy = 1 have the same numerator
        f, g = (sympy.fraction(sympy.together(side))[0] for side in (f, g))
    point = {name: sympy.Rational(13 + 7 * k, 17 + k) for k, name in enumerate(sorted(symbols(f)))}
    f0, g0 = replace(f, point), replace(g, point)
    if is_zero(f0) or is_zero(g0) or not vanishes(f * g0 - g * f0):
        return False                                                 # else f / g is the same everywhere
    sign = (f0 * g0).evalf(2)
    return sign.is_real and (a[1] if sign > 0 else FLIP.get(a[1], a[1])) == b[1]


def degenerate(relation):
    """x = x, x < x, 0 < 1: true or false whatever the unknowns are."""
    pairs = zip(relation[2:], relation[3:])
    return any(is_value(x) and is_value(y) and not symbols(sympy.expand(x - y)) for x, y in pairs)


# ------------------------------------------------------------------------------------------ sets of real numbers


def same_region(a, b):
    """Intervals, unions and inequalities in one unknown: do they contain the same real numbers?"""
    a, b = (node if kind(node) == "list" and len(node) > 3 else items(node)[0] if len(items(node)) == 1 else node for node in (a, b))
    if kind(a) == kind(b) == "tuple" or len(symbols(a) | symbols(b)) > 1:
        return False
    left = region(a)
    return left is not None and left == region(b)


def region(node):
    """The node as a sympy set; None if it is none, or degenerate: empty, or every number although it is an inequality."""
    if node == REALS:
        return sympy.S.Reals
    if kind(node) == "tuple" and len(node) == 4 and set(node[1]) <= set("()[]"):
        low, high = border(node[2]), border(node[3])
        return sympy.Interval(low, high, node[1][0] == "(", node[1][1] == ")") if low < high else None
    if kind(node) == "set":
        left, right = (sympy.FiniteSet(*map(border, part[2:])) if kind(part) == "list" else region(part) for part in node[2:])
        if left is None or right is None:
            return None
        union = {"∪": sympy.Union, "∩": sympy.Intersection, "∖": sympy.Complement}[node[1]](left, right)
        return union or None
    if kind(node) == "list" and len(node) > 3:
        parts = [region(part) for part in node[2:] if kind(part) == "rel"]
        if len(parts) < len(node) - 2 or None in parts:
            return None
        return (sympy.Intersection if node[1] == "∧" else sympy.Union)(*parts) or None
    if kind(node) == "rel" and not set(node[1]) & set("=≈∈:") and len(symbols(node)) == 1:
        pairs = zip(node[2:], node[1], node[3:])
        solution = sympy.Intersection(*(solutions(*pair) for pair in pairs))
        return None if solution in (sympy.S.EmptySet, sympy.S.Reals) else solution
    return None


def border(number):
    """Exact if it is rational, else 20 digits, so that equal borders are the same object."""
    if not (number.is_number and number.is_extended_real):
        raise Hopeless("not real")
    return number if number.is_Rational or number.is_infinite else sympy.Rational(str(number.evalf(20)))


def solutions(left, sign, right):
    """The real x with left < right: between the zeros and poles the sign is constant, so one point each is tried."""
    if sympy.oo in (abs(left), abs(right)):
        return sympy.S.Reals
    (x,), gap = (left - right).free_symbols, left - right
    edges = set()
    for part in (gap, sympy.fraction(sympy.together(gap))[1], *(p.base for p in gap.atoms(sympy.Pow)), *(p.args[0] for p in gap.atoms(sympy.log))):
        if part.has(x):
            zeros = sympy.solveset(part, x, sympy.S.Reals)
            if not isinstance(zeros, sympy.FiniteSet) and zeros != sympy.S.EmptySet:
                raise Hopeless("no finite set of borders")
            edges |= set(zeros)
    values = sorted(edges)
    edges = list(map(border, values))

    def holds(value):
        number = gap.xreplace({x: value})
        if number.is_extended_real is not True or number.is_infinite:
            return False
        if is_zero(number):
            return sign in "≤≥"
        return {"<": number < 0, "≤": number < 0, ">": number > 0, "≥": number > 0, "≠": True}[sign] == True

    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:])]
    inside = [edges[0] - 1, *middles, edges[-1] + 1] if edges else [sympy.Integer(0)]
    bounds = [-sympy.oo, *edges, sympy.oo]
    parts = [sympy.Interval.open(low, high) for low, high, point in zip(bounds, bounds[1:], inside) if holds(point)]
    return sympy.Union(*parts, sympy.FiniteSet(*(edge for edge, value in zip(edges, values) if holds(value))))


# ------------------------------------------------------------------------------------------ one case


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
        except Exception:                                            # undefined or too big: Hopeless, or what sympy raises
            pass
    return False


# ------------------------------------------------------------------------------------------ workers


def limit(kind, amount):
    """As far as the system allows: a lower hard limit stays, and macOS refuses to limit memory."""
    try:
        hard = resource.getrlimit(kind)[1]
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, hard))
    except (OSError, ValueError):
        pass


def work():
    """A worker: a process that has sympy, and lets a forked child do the reading, so that a killed child costs
    milliseconds. The child takes a JSON line [prediction, gold] and gives a byte, until the pipe is closed."""
    load_sympy()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)                    # the kernel kills us, even inside a long C call
    limit(resource.RLIMIT_AS, MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    sys.set_int_max_str_digits(0)                                    # MAX_CHARS bounds them
    sys.setrecursionlimit(3000)
    os.write(1, b"r")
    while os.fork():
        if os.wait()[1] == 0:                                        # the pipe was closed
            os._exit(0)
        os.write(1, b"0")                                            # killed by its alarm or for memory: 0
    while line := sys.stdin.buffer.readline():
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, b"1" if verdict else b"0")
    os._exit(0)


class Worker:
    """`python reward.py --worker`: a fresh interpreter minds neither threads nor CUDA nor a missing __main__ guard."""

    idle = defaultdict(list)             # process -> its idle workers: a forked child must not use its parent's

    def __init__(self):
        path = globals().get("__file__")                             # a notebook has none: there, a forked copy
        command = [sys.executable, os.path.abspath(path), "--worker"] if path else [sys.executable, "-c", ""]
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True,   # Ctrl-C is for the parent
                                        preexec_fn=None if path else work)
        self.ready = False

    def read(self, seconds):
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        return os.read(self.process.stdout.fileno(), 1) if poll.poll(1000 * seconds) else b""

    def ask(self, case):
        """b"1" or b"0", or b"" if the worker is dead, or deaf beyond the limit."""
        self.ready = self.ready or self.read(60) == b"r"
        while self.ready and self.read(0):                           # left over from a child that was killed
            pass
        try:
            self.process.stdin.write(json.dumps(case, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        except OSError:
            return b""
        return self.read(LIMIT + 0.4) if self.ready else b""

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def verdict(case):
    """One verdict from an idle worker, or from a new one. A worker that was killed from outside is replaced."""
    idle = Worker.idle[os.getpid()]
    for _ in range(3):
        try:
            worker = idle.pop()
        except IndexError:
            worker = Worker()
        answer = worker.ask(case)
        if answer:
            idle.append(worker)
            return answer == b"1"
        worker.kill()
    if worker.ready:
        return False
    raise RuntimeError(f"no worker starts: try {sys.executable} {globals().get('__file__')} --worker")


def judge(cases):
    """Verdicts (bool) on (prediction, gold) pairs, in order, from a worker a core. Any thread may call it."""
    different = list(dict.fromkeys(cases))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
        verdicts = dict(zip(different, threads.map(verdict, different)))
    return [verdicts[case] for case in cases]


# ------------------------------------------------------------------------------------------ the contract


def is_equiv(prediction, gold):
    """Do two answers, without their boxes, mean the same? None is equal to nothing. Limited like every case."""
    if prediction is None or gold is None:
        return False
    case = str(prediction), str(gold)
    certain = cheap(*case)
    return judge([case])[0] if certain is None else certain


def rewards(responses, answers):
    """reward() of many pairs, list[float] in their order; the ones that need reading are read in parallel."""
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
    golds = ["" if answer is None else extract_answer(answer) or str(answer) for answer in answers]
    cases = [(extract_answer(response) or "", gold) for response, gold in zip(responses, golds)]
    verdicts = [cheap(*case) if all(case) else False for case in cases]
    unclear = [k for k, known in enumerate(verdicts) if known is None]
    for k, known in zip(unclear, judge([cases[k] for k in unclear])):
        verdicts[k] = known
    return [float(known) for known in verdicts]


def reward(response, answer):
    r"""1.0 if the last \boxed{} of the response means the same as the answer, else 0.0. Nothing makes it raise or hang."""
    return rewards([response], [answer])[0]


def main():
    if sys.argv[1:] == ["--worker"]:
        return work()
    if len(sys.argv) != 3:
        print("usage: python reward.py RESPONSE ANSWER", file=sys.stderr)
        sys.exit(2)
    load_sympy()
    response, answer = sys.argv[1:]
    for name, text in (("response", extract_answer(response)), ("answer", extract_answer(answer) or answer)):
        print(f"{name}: {text!r:.300}")
        for node in readings(text)[:1] if text and len(text) <= MAX_CHARS else []:
            print(f"    read as {node}"[:500])
    print("reward:", reward(response, answer))


if __name__ == "__main__":
    main()
