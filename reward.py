r"""The reward: does the box mean what the answer key means?

Reinforcement learning optimises exactly what this file says: a false positive teaches cheating, a
false negative starves learning, a hang stops the run, an `eval` hands the machine to the model. So:

1. The text is read by hand; sympy never sees text (no sympify, parse_expr or parse_latex). What was
   read becomes sympy objects through Python operators, with bounds on powers and factorials.
2. Two formulas are the same if their difference vanishes at random points (Schwartz-Zippel), to as
   many digits as that takes. Nothing is ever "simplified".
3. This happens in a worker process, where the kernel gives a case LIMIT seconds and MEMORY bytes: a
   case that needs more is killed and earns 0. Equal strings and plain numbers take microseconds.

Glossary: `prediction` what stands in the box; `gold` the answer key; `node` what was read: a sympy
expression or matrix, or a tuple that begins with its kind: list, tuple, rel, ratio or set.
Where mathematics leaves a choice: 0.33 is not 1/3; n% is n or n/100; log has base 10 or e; an odd
root of a negative number is real; unknowns are real; (1, 2) is a point or an interval; y = 2x may
be 2x. 5 cm is 5 times the symbol «cm»; a unit may be missing but not differ; a word that is
neither a known unit nor a noun in the plural refuses the answer.
Left out: numbers in words, conversion of units, determinants, integrals, limits, sums. POSIX only.

    python reward.py 'so \boxed{\frac{1}{2}}' 0.5    # what was read on both sides, and the verdict
"""

import json, math, mmap, os, re, resource, signal, subprocess, sys, unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from itertools import product
from multiprocessing.connection import wait
from random import Random

LIMIT = 1.5             # seconds of processor time a case may take in its worker
MEMORY = 1 << 30        # bytes of address space a worker may take
MAX_CHARS = 5_000       # longer texts are compared as strings and plain numbers only
MAX_BITS = 400_000      # of an exact number: 20,000! fits, 8^8^8 does not

class Hopeless(ValueError):
    """Unreadable, undefined, or too big to look at."""

def load_sympy():
    """Half a second that only those pay who read: workers, and the command line."""
    global sympy, ONE, REALS, LOG_BASE
    import sympy
    ONE, REALS, LOG_BASE = sympy.Integer(1), symbol("ℝ"), symbol("base of log")

# ---------------------------------------------------------------------------- the cheap path
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s{}$]*)|\\.|[{}]", re.DOTALL)
SPACING = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|(?:thin|med|thick|en)space)(?![a-zA-Z]))|~|\s+")
SQUEEZE = re.compile(r"(?<![0-9A-Za-z.,]) +| +(?![0-9A-Za-z.,\\])")      # 1 1/2 is not 11/2
IGNORED = re.compile(
    r"(?<!\\)\\(?:(?:left|right) ?\.|(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle"
    r"|limits|therefore|bf|it|rm|boxed|fbox)(?![A-Za-z])|[\[\]()!])|(?<!\\)\$")
PLAIN = re.compile(
    r"[+-]?(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]{1,300})?(?:\.[0-9]{0,300})?"
    r"|[+-]?(?:[0-9]{1,300}/|\\frac\{[0-9]{1,300}\}\{)[0-9]{1,300}\}?")
POINT = re.compile(r"\((?:(?:0|-?[1-9][0-9]*)(?:,(?!\))|(?=\)))){2,}\)")

def extract_answer(text):
    r"""Content of the last \boxed{...} or \fbox{...} (str); None if there is none or it is empty.
    Braces are balanced, \{ \} do not count, a box in a box is opened, `\boxed 5` is a box; a last
    box that was never closed is no answer; only what follows </think> is read."""
    text = text.rpartition("</think>")[2] if isinstance(text, str) else ""
    groups = []                          # open braces: (where the brace's box starts or -1, inside)
    last = (-1, 0, 0, 0)                 # last box: its start, its content from and to, its end
    for token in BOX.finditer(text):
        if "{" in (token[0], token[1]):
            groups.append((token.start() if token[1] else -1, token.end()))
        elif token[1] is not None:       # \boxed 5
            last = (token.start(), token.start(1), token.end(), token.end())
        elif token[0] == "}" and groups:
            start, inside = groups.pop()
            if start < 0: continue
            alone = last[0] >= inside and not text[inside:last[0]].strip()
            alone = alone and not text[last[3]:token.start()].strip()        # a box around a box
            last = (start, *(last[1:3] if alone else (inside, token.start())), token.end())
    content = text[last[1]:last[2]].rstrip(".,; " if last[2] == last[3] else None).lstrip()
    return None if any(start > last[0] for start, _ in groups) else content or None

def normalise(text):
    r"""The text without what never carries meaning: $, \left, spacing, \dfrac, a full stop."""
    text = re.sub(r",\\! *", ",", text)                              # 32,\! 349
    text = SPACING.sub(" ", IGNORED.sub("", text)).strip(" *")
    text = re.sub(r"(?<!\.)\.$", "", text).strip()
    return SQUEEZE.sub("", re.sub(r"\\([dtcs]|nice)frac(?![a-zA-Z])", r"\\frac", text))

def rational(text):
    """A plain decimal or fraction as a Fraction, else None."""
    try:
        text = re.sub(r"\\frac|[{},]", "", text.replace("}{", "/")) if PLAIN.fullmatch(text) else ""
        return Fraction(text)
    except (ValueError, ZeroDivisionError): return None

def cheap(prediction, gold):
    """True or False where that is certain without reading on, else None."""
    if max(len(prediction), len(gold)) > 100_000: return prediction.strip() == gold.strip()
    prediction, gold = normalise(prediction), normalise(gold)
    if prediction == gold: return bool(gold)
    # numbers; but between 0.3333333333333333 and 1/3 a closer look decides
    a, b = rational(prediction), rational(gold)
    if None not in (a, b) and (a == b or 1 in (a.denominator, b.denominator)): return a == b
    # points with whole coordinates, as many on both sides
    a, b = prediction.replace(", ", ","), gold.replace(", ", ",")
    if POINT.fullmatch(a) and POINT.fullmatch(b) and a.count(",") == b.count(","): return a == b
    return None if max(len(prediction), len(gold)) <= MAX_CHARS else False

# ---------------------------------------------------------------------------- words
WORDS = {"and": "∧", "or": "∨", "infinity": "∞", "infty": "∞", "pi": "π", "percent": "«%»",
         "pct": "«%»", "degree": "«°»", "degrees": "«°»", "deg": "«°»", "thousand": "*10^3",
         "million": "*10^6", "billion": "*10^9", "minus": "-", "negative": "-", "plus": "+",
         "times": "*", "squared": "^2", "cubed": "^3", "per": "/", "mph": "«mi»/«h»", "old": ""}
UNITS = {name: names.split()[0] for names in """km kilometer kilometre, m meter metre,
cm centimeter centimetre, ft foot feet, mm millimeter millimetre, in inch inche, yd yard, mi mile,
g gram, kg kilogram kilo, mg milligram, lb pound, oz ounce, unit, l L liter litre, s sec second,
ml milliliter millilitre, min minute, h hr hour, day, wk week, month, yr year, $ dollar usd buck,
¢ cent, € euro eur, £ gbp, ¥ yen, ₹ rupee, rad radian, N newton, J joule, W watt, V volt, hz hertz,
pa pascal, mol mole, gal gallon, qt quart, pt pint, kelvin, C celsiu, F fahrenheit, °, %
""".split(",") for name in names.split()}
NOUN = re.compile(r"""(?!(?:plus|minus|times|less|unless|always|besides|is|was|has|this|yes|versus|
halves|quarters|ones|twos|threes|fives|sixes|nines|zeros|zeroes|tens|dozens|scores|pairs|couples|
doubles|triples|negatives|opposites|inverses|reciprocals|roots|powers|factorials|logs|multiples|
percents|modulus|gross|nots|.*(?:third|four|fif|six|seven|eigh|nin|ten|twelf|eleven|teen|tie|
hundred|thousand|illion)(?:th)?s)$)[a-z]{3,}s|
people|men|women|children|mice|geese|dice|fish|sheep""", re.X)
LEADING = re.compile(r"""(^|[,;∧∨])(?:\ ?«(?:the|is|are|final|answer|result|solution|value|exactly|
total|area|volume|perimeter|length|width|height|radius|distance|speed|time|probability|number|sum|
cost|price|so|we|get|therefore|thus|hence)»)+\ ?[:=]?(?=\ ?[\w({\\«⦃⟪+-])""", re.X | re.I)
SHORT_WORDS = set("sq cu no is of to at by in if it we as an am pm be so up on".split())

def word(match):
    """A run of letters: a function, a unit or another word, or a product of variables (xy, abc)."""
    text, low = match[0], match[0].lower()
    if text[0] in "«\\" or low in WORDS: return WORDS.get(low, text)
    last = not match.string[match.end():].strip(" .})")
    if text in COMMANDS and not (low in UNITS and last): return f"\\{text} "  # 5 min, but min(5, 6)
    known = low in UNITS or low.rstrip("s") in UNITS or text in SHORT_WORDS
    short = len(text) == 2 or len(text) < 5 and not re.search("[eiou]|(?!^)a", low)
    return text if short and not known else f"«{text}»"

def text_command(match):
    r"""\text{...}: words become «words»; a single letter does too (5\text{ m}), save e and i."""
    if re.match("math(?!rm)|bold|bm|pmb", match[1]):
        return f" {match[2]} " if len(match[2]) > 1 else match[2]
    return " " + re.sub(r"(?<![A-Za-z\\])([A-DF-Za-df-hj-z])(?![A-Za-z])", r"«\1»", match[2]) + " "

def unit(name):
    """The canonical name of a unit or of things that are counted; any other word is Hopeless."""
    name = name.lower() if len(name) > 1 else name                   # 3 m are metres, 3 M millions
    name = name if name in UNITS or name.rstrip("s") not in UNITS else name.rstrip("s")
    if name not in UNITS and not NOUN.fullmatch(name): raise Hopeless(name)
    return UNITS.get(name, name)

def plain(text):
    """A text answer without case, punctuation and markup."""
    text = re.sub(r"\\[a-z]+|[«»{}]", " ", text).lower()
    return " ".join(re.sub(r"[^\w%$€£]+", " ", text).split())

# ---------------------------------------------------------------------------- text to tokens
# What `prepare` leaves: digits, letters, \commands, { } as TeX groups, one character for every
# operator, «words», ⦃ ⦄ for set braces, ⟪ ⟫ around a matrix, ↵ between rows, 0.1~6 for 0.166...

SYMBOLS = r"""
* \cdot \times \ast \bullet × · ⋅ ∙ ∗ •    / \div ÷ ⁄ ∕    ± \pm    - − – — ‒ ﹣    ^ **
= \equiv ==    < \lt    > \gt    ≤ \le \leq \leqslant <= ⩽    ≥ \ge \geq \geqslant >= ⩾    ∈ \in
≠ \ne \neq !=    ≈ \approx \simeq    ∪ \cup \bigcup    ∩ \cap    ∖ \setminus \backslash
∧ \land \wedge    ∨ \lor \vee    : \colon ∶    … \ldots \dots \cdots ...    ∞ \infty \infin
π \pi    ∅ \emptyset \varnothing    ℝ \mathbb{R} \mathbf{R} \R    | \mid \vert \lvert \rvert \| ∣
⦃ \{ \lbrace    ⦄ \} \rbrace    [ \lbrack    ] \rbrack    ( \langle ⟨    ) \rangle ⟩ \rfloor ⌋
) \rceil ⌉    \floor( \lfloor ⌊    \ceil( \lceil ⌈    ↵ \cr    ' \prime ^\prime ^{\prime} ′
«°» ° ^{\circ} ^\circ ^{\degree} ^\degree \degree \textdegree ˚    «%» \% %    «$» \$    «¢» ¢
«€» € \euro    «£» £ \pounds    «¥» ¥ \yen    «₹» ₹    \sqrt √    \sqrt[3] ∛    \sqrt[4] ∜
\log_{10} \lg    \binom \dbinom \tbinom
"""
SYMBOLS = {old: new + " " * new[-1].isalpha() for new, *olds in
           map(str.split, re.split(r" {4}|\n", SYMBOLS.strip())) for old in olds}
SYMBOL = re.compile("|".join(re.escape(old) + r"(?![A-Za-z])" * old[-1].isalpha()
                             for old in sorted(SYMBOLS, key=len, reverse=True)))
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾", "0123456789+-ni()"))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
FUNCTIONS = dict(zip("ln exp log gcd lcm floor max min abs ceil".split(),
                     "log exp log gcd lcm floor Max Min Abs ceiling".split()))
for name in "sin cos tan sec csc cot sinh cosh tanh sech csch coth".split():
    FUNCTIONS |= {name: name} | {arc + name: "a" + name for arc in ("a", "ar", "arc")}
COMMANDS = {*FUNCTIONS, "sqrt", "frac", "binom"}
TEXT = r"\\(text\w*|[mh]box|operatorname|math\w+|boldsymbol|bm|pmb)\*? ?\{((?:[^{}]|\{[^{}]*\})*)\}"

@lru_cache(256)
def prepare(text, thousands=True):
    """Unicode and LaTeX to the alphabet above. thousands: 1,234 is one number, or else two."""
    def sub(pattern, new):
        nonlocal text
        text = re.sub(pattern, new, text)

    # unicode: raised and lowered digits, vulgar fractions, full width, invisible marks, greek
    sub(f"[{''.join(RAISED)}]+", lambda m: "^{" + "".join(map(RAISED.get, m[0])) + "}")
    sub(f"[{''.join(LOWERED)}]+", lambda m: "_{" + "".join(map(LOWERED.get, m[0])) + "}")
    sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]))
    text = text.replace("º", "°").replace("ℝ", r"\R ").replace("\\\\", "↵")
    text = unicodedata.normalize("NFKC", text)
    text = "".join(str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) != "Cf")
    sub("[α-ωΓ-Ω]", lambda m: f"\\{unicodedata.name(m[0]).split()[-1].lower()} ")
    text = SYMBOL.sub(lambda m: SYMBOLS[m[0]], normalise(text))
    # LaTeX: matrices and systems, fractions without braces, text
    sub(r"↵ ?\[[^\]]*\]", "↵")
    sub(r"\\begin ?\{cases\}(.*?)\\end ?\{cases\}", lambda m: m[1].strip("↵ ").replace("↵", ","))
    sub(r"\\begin ?\{(?:[pbB]|small)?(?:matrix|array)\} ?(?:\{[lcr| ]*\})?", "⟪")
    sub(r"\\end ?\{(\w*matrix|array)\}", "⟫")
    sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}")
    for _ in range(4):  # \text in \text, outermost first
        sub(TEXT, text_command)
    # numbers: 0.\overline{3}, 0.(3), 0.333..., 1 000 000, 1,000, 1 1/2, and 1/3 of 1/3 ≈ 0.33
    sub(r"(\d*)\.(\d*) ?(?:\\(?:overline|bar) ?\{? ?(\d+) ?\}?|\((\d+)\))", r"\g<1>.\2~\3\4")
    sub(r"(?<!\d)(\d*)\.(\d{0,9}?)(\d{1,9}?)\3\3+ ?…", r"\1.\2~\3")
    sub(r"(?<![\w.,~^_])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", ""))
    sub(r"(?<=\d)\{,\}(?=\d)", ",")
    if thousands: sub(r"(?<![\w.,~^_])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""))
    sub(r"(?<![\w.^_}])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}")
    sub(r"(?<![\w.^_}])(\d+) ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}",
        lambda m: f"({m[1]}+{m[2]}/{m[3]})" if int(m[2]) < int(m[3]) else m[0])
    sub(r"(?<=[\d})π»]) ?≈.*", "")
    # words: sq. units, °C, square feet, (cm); what leads to the answer is dropped
    sub(r"(?<=[a-z])\.(?= ?[A-Za-z^])", "")
    sub("(«°») ?([CF])(?![A-Za-z])", r"\1«\2»")
    sub(r"«[^»]*»|\\[A-Za-z]+|[A-Za-z]{2,}", word)
    sub(r"«(?:square|sq)» ?(«\w+»)", r"\1^2")
    sub(r"«(?:cubic|cu)» ?(«\w+»)", r"\1^3")
    sub("(?:all|«all») ?«reals?» ?(?:«numbers?»)?", "ℝ")
    sub(LEADING, r"\1")
    sub(r"(?<=[\d}]) ?\(((?: ?«[^»]*» ?(?:\^\{?\d\}?)?)+)\)$", r"\1")
    # 101_2 is a symbol; <1, 2> is a point; the bars of |x|; {x : x > 0} is x > 0
    sub(r"\(?(\d+)\)?_(?:\{\(?(\d+)\)?\}|(\d))", r"\\base_{\1b\2\3}")
    sub("^<([^<>]*,[^<>]*)>$", r"(\1)")
    sub("⦃ ?[A-Za-z] ?(?:∈ ?[ℝA-Z])? ?[|:](.*)⦄", r"{\1}")
    sub(r"\|([^|]+)\|", r"\\abs(\1)")
    return SQUEEZE.sub("", re.sub(r"\s+", " ", text)).strip(" \"`").rstrip(" .,;↵\"`")

# ---------------------------------------------------------------------------- nodes
def symbol(name):
    """An unknown, a «word», or one of the constants."""
    constants = {"π": sympy.pi, "e": sympy.E, "i": sympy.I, "∞": sympy.oo}
    return constants.get(name) or sympy.Symbol(name, real=True)

def kind(node):
    if isinstance(node, tuple): return node[0]
    return "matrix" if isinstance(node, sympy.MatrixBase) else "value"
def symbols(node):
    """The unknowns in a node."""
    if isinstance(node, tuple): return set().union(*map(symbols, node))
    return getattr(node, "free_symbols", set()) - {LOG_BASE, REALS}

def is_number(node):
    return kind(node) == "value" and not node.free_symbols

def replace(node, values):
    """The node with symbols replaced by numbers."""
    if isinstance(node, tuple): return tuple(replace(part, values) for part in node)
    return node.xreplace(values) if hasattr(node, "xreplace") else node

def checked(value):
    """The number, formula or matrix, if it is defined and not too big."""
    if isinstance(value, sympy.Expr) and not value.has(sympy.nan, sympy.zoo):  # a matrix is one too
        if not value.is_Rational or value.p.bit_length() + value.q.bit_length() < MAX_BITS:
            return value
    raise Hopeless("undefined or too big")

def power(base, exponent):
    """base^exponent within bounds; an odd root of a negative real is the real one, as at school."""
    if base.has(sympy.oo) or exponent.has(sympy.oo) or base == 0 and not exponent.is_positive:
        raise Hopeless("undefined")
    if is_number(base) and is_number(exponent) and base not in (-1, 0, 1):
        bits = base.p.bit_length() + base.q.bit_length() if base.is_Rational else 4
        if abs(exponent.evalf(5)) * bits > MAX_BITS: raise Hopeless("too big")
        if exponent.is_Rational and exponent.q > 1 and exponent.q % 2 and base.is_negative:
            return checked((-ONE) ** exponent.p * power(-base, exponent))
    return checked(base ** exponent)

def call(name, args):
    """A named function of numbers or formulas."""
    args = [replace(arg, {symbol("«°»"): sympy.pi / 180}) for arg in args]
    if name in ("gcd", "lcm"): return sympy.Integer(getattr(math, name)(*args))
    if name in ("factorial", "binomial"):
        small = all(arg.free_symbols or arg.is_Integer and 0 <= arg <= 20_000 for arg in args)
        if not small: raise Hopeless("too big, or no whole number")
    value = checked(getattr(sympy, FUNCTIONS.get(name, name))(*args))
    return value / sympy.log(LOG_BASE) if name == "log" else value  # settled when two sides meet

# ---------------------------------------------------------------------------- tokens to nodes
DEFINES = r"(?:[A-Za-z]|\\[a-z]+ )(?:_\{?\w+\}?)?'*(?:\^\{?-1\}?)?\([A-Za-z0-9, ]+\)="
NUMBER = r"(?=\.?\d)(\d*)\.?(\d*)(?:~(\d+))?(?:[eE]([+-]?\d{1,4}))?"
SIGNS = r"[+\-±](?: ?[+\-])*"

class Reader:
    """A position in a prepared text, and one method a grammar rule:
    answer > relation > union > sum > term > factor > atom. There is no backtracking;
    anything unexpected is Hopeless, and too deep a nesting ends in Python's RecursionError."""
    def __init__(self, text):
        self.text, self.i = text, 0
    def see(self, pattern):
        return re.compile(f" ?(?:{pattern})").match(self.text, self.i)
    def take(self, pattern):
        if match := self.see(pattern): self.i = match.end()
        return match
    def fail(self):
        raise Hopeless(f"cannot read {self.text[self.i:self.i + 20]!r}")
    def chain(self, operand, operators):
        """operand, operator, operand, ...: the operands, and the operators between them."""
        parts, signs = [operand()], ""
        while match := self.take(operators):
            signs += match[0].strip()
            parts.append(operand())
        return parts, signs
    def answer(self, opening=""):
        """Relations between commas, "and", "or": ("list", separator, *items), or the only one."""
        parts, signs = self.chain(self.relation, "(?:[,;] ?)?[∧∨]|[,;]")
        if len(parts) == 1 and opening != "⦃": return parts[0]
        return "list", "∨" if "∨" in signs else "∧", *parts
    def relation(self):
        """a < b <= c, y = 2x + 1, x in (2, 6], 4 : 9. A leading "f(x) =" or "=" is dropped."""
        self.take("[=≈]")
        self.take(DEFINES)
        parts, signs = self.chain(self.union, "[=<>≤≥≠≈∈:]")
        signs = signs.replace("≈", "=")
        if signs == ":=:" and is_name(parts[0]):                     # V_1 : V_2 = 11 : 21
            parts, signs = parts[2:], ":"
        if signs and not signs.strip(">≥"):                          # 2 > x is x < 2
            parts, signs = parts[::-1], signs[::-1].replace(">", "<").replace("≥", "≤")
        # 2 + 3 = 5 is 5, and so is the end of x = 2 + 3 = 5
        while signs[-1:] == "=" and is_number(parts[-2]) and equal(parts[-2], parts[-1]):
            del parts[-2]
            signs = signs[:-1]
        if set(signs) == {":"}:                                      # 0 : 0 would be every ratio
            return self.fail() if 0 in parts else ("ratio", *(part / parts[0] for part in parts))
        if signs == "∈":
            is_set = kind(parts[1]) != "value" or parts[1] == REALS
            return parts[1] if is_name(parts[0]) and is_set else self.fail()
        # 8 = 9 says nothing about an unknown, nor does x < x
        for left, right in zip(parts, parts[1:]):
            if kind(left) == kind(right) == "value" and is_number(sympy.expand(left - right)):
                return self.fail()
        return ("rel", signs, *parts) if signs else parts[0]
    def union(self):
        parts, signs = self.chain(self.sum, "[∪∩∖]")
        for sign in signs: parts[:2] = [("set", sign, *parts[:2])]
        return parts[0]
    def sum(self):
        terms, signs = [], self.take(SIGNS)
        while signs or not terms:
            at, term = self.i, self.term()
            term = term * symbol(f"±{at}") if signs and "±" in signs[0] else term
            terms.append(-term if signs and signs[0].count("-") % 2 else term)
            signs = self.take(SIGNS)
        return terms[0] if len(terms) == 1 else checked(sum(terms[1:], terms[0]))
    def term(self):
        factors = [self.factor()]
        while (match := self.take(r"([*/]) ?(-?)")) or self.starts_factor():
            factor = self.factor()
            factor = power(factor, -ONE) if match and match[1] == "/" else factor
            factors.append(-factor if match and match[2] else factor)
        return factors[0] if not factors[1:] else checked(math.prod(factors[1:], start=factors[0]))
    def starts_factor(self):
        """Does a factor follow without an operator? 2x, 2(x), 2^{3}5, 2^3 3^2; not 2 3, x2."""
        if self.see(r"[\d.]"):
            after_power = self.see(r"\d+\^") and re.search(r"\^\d+$", self.text[:self.i])
            return after_power or self.text[self.i - 1] in "})]!"
        return self.see(r"[A-Za-zπ∞({\[⟪«]|\\[A-Za-z]")
    def factor(self):
        """An atom and what stands behind it, ! and ^, or in front of it: a currency."""
        currency, node = self.take("«[$€£¥₹]»(?= ?[^ ])"), self.atom()
        while match := self.take(r"!(?![=!])|\^"):
            node = power(node, self.exponent()) if "^" in match[0] else call("factorial", [node])
        return node * symbol(currency[0].strip()) if currency else node
    def exponent(self):
        sign = self.take("[-+]")
        exponent = self.argument(r"\d+(?:\.\d+)?")                  # 2^10 is 1024, not 2^1 0
        exponent = power(exponent, self.exponent()) if self.take(r"\^") else exponent
        return -exponent if sign and "-" in sign[0] else exponent
    def atom(self):
        if match := self.take(NUMBER):
            whole, part, repeating, exponent = match.groups("")
            value = sympy.Rational(int(whole + part), 10 ** len(part))
            if repeating:
                value += int(repeating) * ONE / (10 ** len(part + repeating) - 10 ** len(part))
            return value * sympy.Integer(10) ** int(exponent or 0)
        if match := self.take("⟪([^⟪⟫]*)⟫"):
            rows = [row.split("&") for row in match[1].strip("↵ ").split("↵")]
            return sympy.ImmutableDenseMatrix([[read(cell) for cell in row] for row in rows])
        if self.take("∅|⦃ ?⦄"): return "list", "∧"
        if match := self.take(r"[({\[⦃]"):
            opening = match[0].strip()
            node = self.answer(opening)
            closing = self.take({"{": r"\}", "⦃": "⦄"}.get(opening, r"[)\]]")) or self.fail()
            if kind(node) == "list" and opening in "([" and len(node) > 2:
                return "tuple", opening + closing[0].strip(), *node[2:]
            return node
        match = self.take(rf"\\({'|'.join(COMMANDS)})(?![A-Za-z])")
        return self.command(match[1]) if match else self.name()
    def name(self):
        r"""x, x_1, \alpha, π, or «words»: a text if they stand alone, else a unit."""
        text = self.see("((?: ?«[^»]*»)+)(?= ?(?:[,;=∧∨:)⦄]|$))")
        if text and re.search(r"(^|[,;=∧∨:({⦃&]) ?$", self.text[:self.i]):
            self.i = text.end()
            return symbol("text " + plain(text[0]))
        match = self.take(r"([A-Za-zπ∞ℝ…]'*)|\\([A-Za-z]+)|«([^»]*)»(?! ?\()") or self.fail()
        if match[3]: return symbol(f"«{unit(match[3])}»")
        name, sub = "".join(match.groups("")), self.take(r"_(?:\{([^{}]*)\}|\\([A-Za-z]+)|(\w))")
        return symbol(name + "_" + re.sub(r"[ \\]", "", "".join(sub.groups(""))) if sub else name)
    def command(self, name):
        if name == "frac": return checked(self.argument() * power(self.argument(), -ONE))
        if name == "binom": return call("binomial", [self.argument(), self.argument()])
        if name == "sqrt":
            index = self.take(r"\[([^\[\]]*)\]")
            return power(self.argument(r"\d+(?:\.\d+)?"), ONE / (read(index[1]) if index else 2))
        # \log_2, \sin^2 and \sin^{-1}, then the argument: sin(x), or sin 2x up to the next operator
        base = self.argument(r"\d+(?=[ ({])|\d") if name == "log" and self.take("_") else None
        exponent = self.exponent() if self.take(r"\^") else ONE
        name, exponent = ("a" + name, ONE) if exponent == -1 else (name, exponent)
        if self.see(r"[({\[⦃]"):
            argument = self.atom()
        else:
            argument = -self.factor() if self.take("-") else self.factor()
            ends = rf"\(|\\(?:{'|'.join(FUNCTIONS)})(?![a-z])"
            while self.starts_factor() and not self.see(ends):
                argument = argument * self.factor()
        args = argument[2:] if kind(argument) in ("tuple", "list") else [argument]
        value = checked(sympy.log(argument, base)) if base is not None else call(name, args)
        return power(value, exponent)
    def argument(self, digits=r"\d"):
        r"""What \frac and \sqrt take: a group, a token, or so many digits."""
        match = self.take(digits)
        return sympy.Rational(match[0].strip()) if match else self.atom()

def read(text):
    """A prepared text as a node."""
    reader = Reader(text)
    node = reader.answer()
    return node if reader.see("$") else reader.fail()

@lru_cache(256)
def readings(text):
    """The nodes a text may mean, at most two: 1,234 is a number or a list."""
    nodes = []
    for thousands in (True, False) if "," in text else (True,):
        try:
            nodes.append(read(prepare(text, thousands)))
        except Exception: pass  # whatever untrusted text provokes
    return nodes

# ---------------------------------------------------------------------------- equal formulas
def equal(a, b):
    """Are two expressions the same number, or the same function of their symbols?"""
    if a == b or not kind(a) == kind(b) == "value" or sympy.oo in (abs(a), abs(b)): return a == b
    if (a - b).has(LOG_BASE):  # 10 or e, but the same for both
        return any(vanishes(replace(a - b, {LOG_BASE: base})) for base in (10 * ONE, sympy.E))
    return vanishes(a - b) or double_precision(a, b) or double_precision(b, a)

def double_precision(a, b):
    """0.3333333333333333 for 1/3: 15 digits, right to the last, for what no decimal can be."""
    close = a.is_Rational and b.is_Rational and abs(a - b) * a.q < 1 and b.q < 10**6
    return close and abs(a.p) > 10**14 and pow(10, 40, a.q) == 0 != pow(10, 40, b.q)

def is_zero(number, digits=150):
    """Exactly, if it is rational; else sympy adds digits until one is not zero, or says _prec 1."""
    if number.is_Rational: return number == 0
    for value in number.atoms(sympy.Rational):                       # 1 - cos(10^-200) needs more
        digits += min(3000, value.p.bit_length() + value.q.bit_length())
    parts = number.evalf(2, maxn=digits).as_real_imag()
    if not all(part.is_Float or part == 0 for part in parts): raise Hopeless("no number")
    return all(part == 0 or part._prec == 1 for part in parts)

def vanishes(gap):
    """Is it zero wherever it is defined? Asked at six random points; a number needs none."""
    names = sorted(symbols(gap), key=str)
    if not names: return is_zero(gap)
    # under a root or a logarithm school and sympy disagree about negative numbers: not asked there
    inner = [part.args[0] for part in gap.atoms(sympy.log)]
    inner += [part.base for part in gap.atoms(sympy.Pow) if not part.exp.is_Integer]
    integers = gap.has(sympy.factorial, sympy.binomial)
    rng, agreed = Random(7), 0
    for trial in range(24):
        low, high = ((0, 1), (0, 9), (-9, 0), (-9, 400))[trial % 4] if not integers else (0, 40)
        step = 1 if integers else 907
        point = {name: rng.randint(low * step + 1, high * step) * ONE / step for name in names}
        value = replace(gap, point)
        negative = any(part.free_symbols and replace(part, point).is_negative for part in inner)
        if negative or value.has(sympy.nan, sympy.zoo): continue
        if is_zero(value, 30 if agreed else 150):
            agreed += 1
        elif gap.has(sympy.I) or value.is_real is not False:         # arcsin 3 has no real value
            return False
        if agreed == 6: return True
    return agreed >= 3

# ---------------------------------------------------------------------------- equal answers
def is_name(node):
    r"""x, x_1, AB, |AB|, AB/CD, \angle ABC: may stand before "= 5" and is no part of the answer."""
    node = node.args[0] if isinstance(node, sympy.Abs) else node
    if kind(node) != "value" or not node.free_symbols or node.has(REALS): return False
    factors = [1 / part if part.is_Pow else part for part in sympy.Mul.make_args(node)]
    if not all(part.is_Symbol and part.name[0] not in "«±" for part in factors): return False
    capitals = all(part.name[0].isupper() for part in factors)
    return len(factors) == 1 or capitals or {"angle", "overline"} & set(map(str, factors))

def assigned(node):
    """(x, 5) from x = 5 or 5 = x, (y, 2x) from y = 2x; else None."""
    if kind(node) == "rel" and node[1] == "=":
        for name, value in (node[2:], node[:1:-1]):
            vector = kind(name) == kind(value) != "value"
            if (vector or is_name(name)) and not symbols(name) & symbols(value): return name, value
    return None

def items(node):
    """The names and the values that an answer lists: {x}, [1, 2] of x = 1, 2; ± has two values."""
    signs = [name for name in symbols(node) if name.name[0] == "±"]
    if kind(node) == "list":
        found = sum((items(part)[1] if signs else [part] for part in node[2:]), [])
    else:
        choices = product((ONE, -ONE), repeat=len(signs[:5]))
        found = [replace(node, dict(zip(signs, values))) for values in choices]
    pairs = [assigned(item) for item in found]
    stems = {str(pair[0]).split("_")[0] for pair in pairs if pair}
    names = {str(name).split("_")[0] for pair in pairs if pair for name in symbols(pair[0])}
    if len(found) == 1 and pairs[0]: return names, items(pairs[0][1])[1]
    if len(stems) > 1 and None not in pairs:  # x = 1, y = 2 is the point (1, 2)
        return names, [("tuple", "()", *(value for _, value in sorted(pairs, key=str)))]
    return names, [pair[1] if pair and len(stems) == 1 else x for pair, x in zip(pairs, found)]

def same(a, b):
    """The verdict on two nodes."""
    if kind(a) == kind(b) == "rel" and same_relation(a, b): return True
    (names, left), (other_names, right) = items(a), items(b)
    if names and other_names and names != other_names: return False  # both x = 5 and y = 5 are 5
    try:
        one_unknown = len(symbols(a) | symbols(b)) <= 1
        return unordered(left, right) or one_unknown and region(a) == region(b)
    except Exception: return False                                 # what sympy raises is no region

def unordered(left, right):
    """The same items in any order, repetitions counted."""
    rest = list(right)
    for item in left:
        found = [k for k, other in enumerate(rest) if same_item(item, other)]
        if not found: return False
        del rest[found[0]]
    return not rest

def in_order(left, right):
    return len(left) == len(right) and all(map(same, left, right))

def same_item(a, b):
    for ratio, value in ((a, b), (b, a)):
        if kind(ratio) == "ratio" and kind(value) == "value":
            return len(ratio) == 3 and equal(1 / ratio[2], value)
    if kind(a) != kind(b): return False
    if kind(a) == "matrix": return a.shape == b.shape and all(map(equal, a, b))
    if kind(a) in ("tuple", "ratio", "set"):
        return a[:2] == b[:2] and in_order(a[2:], b[2:])  # of a ratio, the first part is 1
    return {"value": same_value, "rel": same_relation, "list": same}[kind(a)](a, b)

def same_value(a, b):
    """Numbers or formulas with their units: one may be missing, both may not differ."""
    sides = []
    for value in (a, b):
        words = [name for name in value.free_symbols if name.name[0] == "«"]
        sides.append(value.as_independent(*words, as_Add=False) if words else (value, ONE))
    (a, unit_a), (b, unit_b) = sides
    both = str(unit_a * unit_b)
    if unit_a != unit_b and (1 not in (unit_a, unit_b) or re.search("[%°]»\\*", both)): return False
    factor = {"«%»": ONE / 100, "«°»": sympy.pi / 180}.get(both)
    if factor is None or equal(a, b): return equal(a, b)
    return equal(a * factor, b) if unit_b == 1 else equal(a, b * factor)

def same_relation(a, b):
    """Part by part, or one is a constant times the other (a positive one, of an inequality)."""
    if a[1] != b[1] or symbols(a) != symbols(b): return False
    if in_order(a[2:], b[2:]) or a[1] in "=≠" and in_order(a[2:], b[:1:-1]): return True
    if len(a) > 4 or not all(kind(part) == "value" for part in a[2:] + b[2:]): return False
    f, g = a[2] - a[3], b[2] - b[3]
    if a[1] == "=":                                                  # y = 1/x is xy = 1
        f, g = (sympy.fraction(sympy.together(side))[0] for side in (f, g))
    names = sorted(symbols(f), key=str)
    point = {name: (13 + 7 * k) * ONE / (17 + k) for k, name in enumerate(names)}
    f0, g0 = replace(f, point), replace(g, point)
    if is_zero(f0) or is_zero(g0) or not vanishes(f * g0 - g * f0): return False
    return a[1] in "=≠" or bool(f0 / g0 > 0)

def region(node):
    """Intervals, unions, inequalities as a sympy set; (3, 2) and x^2 >= 0 are Hopeless."""
    result = sympy.S.Reals if node == REALS else sympy.S.EmptySet
    if kind(node) == "tuple" and len(node) == 4:
        result = sympy.Interval(node[2], node[3], node[1][0] == "(", node[1][1] == ")")
    elif kind(node) == "set":
        parts = [sympy.FiniteSet(*p[2:]) if kind(p) == "list" else region(p) for p in node[2:]]
        result = {"∪": sympy.Union, "∩": sympy.Intersection, "∖": sympy.Complement}[node[1]](*parts)
    elif kind(node) == "list" and {kind(part) for part in node[2:]} == {"rel"}:
        operation = sympy.Intersection if node[1] == "∧" else sympy.Union
        result = operation(*map(region, node[2:]))
    elif kind(node) == "rel":
        compare = {"<": sympy.Lt, "≤": sympy.Le, "≠": sympy.Ne}
        pairs = zip(node[1], node[2:], node[3:])
        result = sympy.Intersection(*(compare[sign](*pair).as_set() for sign, *pair in pairs))
    everything = result == sympy.S.Reals and kind(node) == "rel"
    if everything or result == sympy.S.EmptySet: raise Hopeless("degenerate")
    # equal borders become equal objects: irrational ones are rounded to 20 digits
    return result.replace(lambda x: isinstance(x, sympy.Expr) and x.is_finite and not x.is_Rational,
                          lambda x: sympy.Rational(str(x.evalf(20))))

# ---------------------------------------------------------------------------- one case
def choice(text):
    """The letter of a multiple-choice answer: bracketed, dotted or before what it stands for."""
    text = re.sub(r"[\\{}$*]|text\w*|mathrm|mathbf", " ", SPACING.sub(" ", text)).strip()
    match = (re.fullmatch(r"(?i)(?:(?:option|choice|answer):? )?[(\[]? ?([A-J]) ?[)\]]?[.:]?", text)
             or re.match(r"\( ?([A-J]) ?\)|([A-J])[).:] ", text))
    if not match or re.search(r"\b[A-J]\b|\bor\b", text[match.end():]): return None
    return (match[1] or match[2]).upper()

def compare(prediction, gold):
    """The whole comparison without limits: what a worker runs."""
    left, right = prepare(prediction), prepare(gold)
    if left == right: return bool(left)
    letters = re.search("[A-J]", gold) and min(len(plain(right)), len(plain(left))) == 1
    if letters and choice(gold) and choice(prediction): return choice(gold) == choice(prediction)
    words = "«" in left + right and not re.search(r"[\d+=<>*/^_|{}\\]", left + right)
    if words and plain(left) == plain(right) != "": return True
    for a, b in product(readings(prediction), readings(gold)):
        try:
            if same(a, b): return True
        except Exception: pass  # Hopeless, or what sympy raises
    return False

# ---------------------------------------------------------------------------- workers
def work():
    """A worker: a JSON list of [prediction, gold] a line in, a byte a case out. It imports sympy;
    its forked children do the reading, and one that is killed is replaced in milliseconds."""
    load_sympy()
    compare("x^2<4", "(-2,2)")                                   # imports what sympy imports late
    try:  # macOS refuses, a lower limit stays
        limits = [MEMORY, *resource.getrlimit(resource.RLIMIT_AS)]
        soft = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (soft, limits[2]))
    except (OSError, ValueError): pass
    signal.signal(signal.SIGPROF, signal.SIG_DFL)                # kills even inside a long C call
    sys.set_int_max_str_digits(0)                                # MAX_CHARS bounds them
    os.write(1, b"r")
    while line := sys.stdin.buffer.readline():
        cases = json.loads(line)
        verdicts = mmap.mmap(-1, len(cases))                     # the children write here
        while b"\0" in verdicts[:]:
            if os.fork() == 0:
                for k in range(verdicts[:].index(b"\0"), len(cases)):
                    verdicts[k] = ord("0")                       # in case that this kills us
                    signal.setitimer(signal.ITIMER_PROF, LIMIT)
                    verdicts[k] = ord("01"[compare(*cases[k])])
                os._exit(0)
            os.wait()
        os.write(1, verdicts[:])
    os._exit(0)

IDLE = {}  # process -> its idle workers, for a forked process must not use its parent's

def start():
    """`python reward.py --worker`: a fresh interpreter minds neither threads nor CUDA in this one.
    A notebook has no file to start: there the worker is a fork that lets go of everything else."""
    def fork():
        if os.fork() == 0:
            os.closerange(3, 4096)
            work()

    path = globals().get("__file__")
    command = [sys.executable, *([os.path.abspath(path), "--worker"] if path else ["-c", ""])]
    for _ in range(3):                                           # killed from outside? once more
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=None if path else fork)
        if receive(worker, 1, 60) == b"r": return worker
        worker.kill()
    raise RuntimeError(f"no worker starts: try {' '.join(command)}")

def receive(worker, size, seconds):
    """So many bytes; less if the worker is dead or late."""
    data = b""
    while len(data) < size and wait([worker.stdout], seconds):
        data += os.read(worker.stdout.fileno(), size) or b"?" * size
    return data

def ask(cases):
    """Verdicts from an idle worker or a new one; if it is killed from outside, another is asked."""
    line = (json.dumps(cases, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    idle = IDLE.setdefault(os.getpid(), [])
    for _ in range(3):
        try:
            worker = idle.pop()
        except IndexError: worker = start()
        try:
            worker.stdin.write(line)
            worker.stdin.flush()
            answer = receive(worker, len(cases), LIMIT * (5 + 2 * len(cases)))
        except OSError:
            answer = b"?"
        if answer and b"?" not in answer:
            idle.append(worker)
            return [byte == ord("1") for byte in answer]
        worker.kill()
        worker.wait()
        if not answer:  # stopped, not killed: it was a hang
            break
    return [False] * len(cases)

def judge(cases):
    """Verdicts (bool) on (prediction, gold) pairs, in order, in parallel where not cheap."""
    known = {case: cheap(*case) if all(case) else False for case in cases}
    unclear = [case for case in known if known[case] is None]
    count = min(os.cpu_count() or 1, 16, len(unclear))
    shares = [unclear[k::count] for k in range(count)]
    with ThreadPoolExecutor(count or 1) as threads:
        for share, verdicts in zip(shares, threads.map(ask, shares)):
            known.update(zip(share, verdicts))
    return [known[case] for case in cases]

# ---------------------------------------------------------------------------- the contract
def is_equiv(prediction, gold):
    """Do two answers, without their boxes, mean the same? None is equal to nothing."""
    return None not in (prediction, gold) and judge([(str(prediction), str(gold))])[0]

def rewards(responses, answers):
    """reward() of many pairs, list[float] in their order, read in parallel where that is needed."""
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
    golds = ["" if answer is None else extract_answer(answer) or str(answer) for answer in answers]
    predictions = [extract_answer(response) or "" for response in responses]
    return list(map(float, judge(list(zip(predictions, golds)))))

def reward(response, answer):
    r"""1.0 if the last \boxed{} of the response means the same as the answer, else 0.0."""
    return rewards([response], [answer])[0]

def main():
    if sys.argv[1:] == ["--worker"]: return work()
    if len(sys.argv) != 3:
        print("usage: python reward.py RESPONSE ANSWER", file=sys.stderr)
        sys.exit(2)
    load_sympy()
    response, answer = sys.argv[1:]
    sides = {"response": extract_answer(response), "answer": extract_answer(answer) or answer}
    for side, text in sides.items():
        print(f"{side}: {text!r:.300}")
        for node in readings(text)[:1] if text and len(text) <= MAX_CHARS else []:
            print(f"    read as {node}"[:500])
    print("reward:", reward(response, answer))

if __name__ == "__main__": main()
