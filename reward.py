r"""The reward: does the box mean what the answer key means?

Reinforcement learning optimises exactly what this file says: a false positive teaches cheating, a
false negative starves learning, a hang stops the run, an `eval` hands the machine to the model. So:

1. The text is read by hand; sympy never sees text (no sympify, parse_expr or parse_latex). What was
   read becomes sympy objects through Python operators, with bounds on powers and factorials.
2. Two formulas are the same if their difference vanishes at random points (Schwartz-Zippel), near
   and far, to as many digits as that takes. Nothing is ever "simplified".
3. This happens in a worker process, where the kernel gives a case LIMIT seconds and MEMORY bytes: a
   case that needs more is killed and earns 0. Equal strings and plain numbers take microseconds.

Glossary: `prediction` what stands in the box; `gold` the answer key; `node` what was read.
Where mathematics leaves a choice: 0.33 is not 1/3; n% is n or n/100; log has base 10 or e; an odd
root of a negative number is real; unknowns are real; (1, 2) is a point or an interval; y = 2x may
be 2x; f(x) is a name, x(x + 1) a product. 5 cm is 5 times the symbol «cm»: behind a number a unit
may be missing, not differ. Any noun phrase there is a unit, unless it computes or denies.
Left out: numbers in words, conversion of units, determinants, integrals, limits, sums. Without fork
(Windows) only equal texts and plain numbers are compared, and a warning says so.

    python reward.py 'so \boxed{\frac{1}{2}}' 0.5    # what was read on both sides, and the verdict
"""

import json, math, mmap, os, re, select, signal, sys, unicodedata, warnings
from fractions import Fraction
from functools import lru_cache
from itertools import product
from multiprocessing.connection import wait
from random import Random

LIMIT = 1.5             # seconds of processor time a case may take in its worker
MEMORY = 1 << 30        # bytes of address space a worker may add to what it starts with
PATIENCE = 100          # seconds without a single verdict after which workers are taken for stopped
MAX_CHARS = 5_000       # longer texts are compared as strings and plain numbers only
MAX_BITS = 4_000_000    # of an exact number: 20,000! and 3^(2^20) fit, 8^8^8 does not

# ---------------------------------------------------------------------------- the contract
# Takes texts; gives rewards (1.0 or 0.0) and verdicts (bool). No model output makes it raise.

def reward(response, answer):
    r"""1.0 if the last \boxed{} of the response means the same as the answer, else 0.0."""
    return rewards([response], [answer])[0]

def rewards(responses, answers):
    """reward() of many pairs, list[float] in their order, read in parallel where that is needed."""
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
    golds = ["" if answer is None else extract_answer(answer) or str(answer) for answer in answers]
    predictions = [extract_answer(response) or "" for response in responses]
    return list(map(float, judge(list(zip(predictions, golds)))))

def is_equiv(prediction, gold):
    """Do two answers, without their boxes, mean the same? None is equal to nothing."""
    return None not in (prediction, gold) and judge([(str(prediction), str(gold))])[0]

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s{}$]*)|\\.|[{}]", re.DOTALL)
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\\[a-z]+(?:\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})+)")

def extract_answer(text):
    r"""Content of the last \boxed{...} or \fbox{...} (str); None if there is none or it is empty.
    Braces are balanced, \{ \} do not count, a box in a box is opened; `\boxed 5` and
    `\boxed\frac12` are boxes, one never closed is no answer; only what follows </think> is read."""
    text = text.rpartition("</think>")[2] if isinstance(text, str) else ""
    text = BARE_BOX.sub(r"\\boxed{\1}", text)
    groups = []                          # open braces: (where its box starts or -1, its inside)
    last = (-1, 0, 0, 0)                 # last box: its start, its content from and to, its end
    for token in BOX.finditer(text):
        if "{" in (token[0], token[1]):
            groups.append((token.start() if token[1] else -1, token.end()))
        elif token[1] is not None:       # \boxed 5.
            content_end = token.start(1) + len(token[1].rstrip(".,;"))
            last = (token.start(), token.start(1), content_end, token.end())
        elif token[0] == "}" and groups:
            start, inside = groups.pop()
            box_inside = last[0] >= inside and not text[inside:last[0]].strip()
            if start >= 0 and box_inside and not text[last[3]:token.start()].strip():
                last = (start, last[1], last[2], token.end())
            elif start >= 0:
                last = (start, inside, token.start(), token.end())
    never_closed = any(start > last[0] for start, _ in groups)
    if never_closed:
        return None
    return text[last[1]:last[2]].strip() or None

def judge(cases):
    """Verdicts (bool) on (prediction, gold) pairs, in order: here if cheap, else by workers."""
    known = {case: cheap(*case) for case in cases}
    unclear = [case for case in known if known[case] is None]
    known.update(zip(unclear, ask(unclear)))
    return [known[case] for case in cases]

# ---------------------------------------------------------------------------- the cheap path
# Takes two texts; gives True or False where that is certain without reading on, else None.

def cheap(prediction, gold):
    """True or False where that is certain without reading on, else None."""
    if max(len(prediction), len(gold)) > 100_000:
        return prediction.strip() == gold.strip()
    prediction, gold = normalise(prediction), normalise(gold)
    if not prediction or not gold or NAN.fullmatch(prediction):
        return False
    if prediction == gold:
        return True
    # numbers; but between 0.3333333333333333 and 1/3 a closer look decides
    a, b = rational(prediction), rational(gold)
    if None not in (a, b) and (a == b or 1 in (a.denominator, b.denominator)):
        return a == b
    # points with whole coordinates, as many on both sides
    a, b = prediction.replace(", ", ","), gold.replace(", ", ",")
    if POINT.fullmatch(a) and POINT.fullmatch(b) and a.count(",") == b.count(","):
        return a == b
    if max(len(prediction), len(gold)) <= MAX_CHARS:
        return None
    return False

# ---------------------------------------------------------------------------- workers
# Takes (prediction, gold) pairs; gives verdicts. A worker, `python reward.py --worker`, is a fresh
# interpreter, which minds neither threads nor CUDA in this one. It forks a reader, to which a case
# is a line of JSON; a verdict is a byte. The kernel kills a reader after LIMIT seconds of its own
# processor time, so a busy machine kills no honest case; the worker then answers 0 and forks again.
# Whoever loses the other end of its pipe ends: a killed owner leaves nothing behind.

IDLE = []       # workers without a case: (process id, pipe of cases, pipe of verdicts)
PIPES = set()   # the pipes of all workers

def ask(cases):
    """Verdicts (bool) of workers, in order; a worker killed or stopped from outside costs none."""
    verdicts, tries, busy, answered = [False] * len(cases), [0] * len(cases), {}, False
    waiting = list(reversed(range(len(cases))))
    try:
        while hasattr(os, "fork") and (waiting or busy):
            # every core gets a case
            while waiting and len(busy) < min(os.cpu_count() or 1, 16):
                worker, number = IDLE.pop() if IDLE else start(), waiting.pop()
                busy[worker[2]] = worker, number
                try:
                    os.write(worker[1], json.dumps(cases[number]).encode() + b"\n")
                except BrokenPipeError:  # it is dead, and its other pipe says so at once
                    pass
            # a byte is a verdict; none, not even the end of the pipe, comes from who is stopped
            for pipe in wait(list(busy), PATIENCE) or list(busy):
                worker, number = busy.pop(pipe)
                byte = os.read(pipe, 1) if wait([pipe], 0) else b""
                if byte:
                    verdicts[number], answered = byte == b"1", True
                    IDLE.append(worker)
                    continue
                stop(worker)
                tries[number] += 1
                if tries[number] < 3:
                    waiting.append(number)
                elif not answered:
                    waiting.clear()
    finally:                             # Ctrl-C: whoever still reads is of no use
        for worker, _ in busy.values():
            stop(worker)
    if cases and not answered:
        warnings.warn("reward.py: without a worker (`python reward.py --worker`; it needs fork and "
                      "sympy) answers that are not plain numbers or equal texts earn 0")
    return verdicts

def start():
    """A new worker. Without a file (a notebook) or an executable it is a fork of this process."""
    (case_end, cases), (verdicts, verdict_end) = os.pipe(), os.pipe()
    PIPES.update((cases, verdicts))
    if sys.executable and "__file__" in globals():
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        actions = [(os.POSIX_SPAWN_DUP2, case_end, 0), (os.POSIX_SPAWN_DUP2, verdict_end, 1),
                   (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        process = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    elif (process := os.fork()) == 0:
        os.dup2(case_end, 0)
        os.dup2(verdict_end, 1)
        os.closerange(3, 4096)
        work()
    os.close(case_end)
    os.close(verdict_end)
    return process, cases, verdicts

def stop(worker):
    """Kill a worker and its reader."""
    process, *pipes = worker
    PIPES.difference_update(pipes)
    for pipe in pipes:
        os.close(pipe)
    for call_system in (os.killpg, os.kill, os.waitpid):
        try:
            call_system(process, 0 if call_system is os.waitpid else signal.SIGKILL)
        except OSError:                  # not yet a group, gone, or SIGCHLD is ignored here
            pass

def forget():
    """A forked process leaves its parent's workers alone, and does not keep them alive."""
    for pipe in PIPES:
        os.close(pipe)
    PIPES.clear()
    IDLE.clear()

if hasattr(os, "fork"):
    os.register_at_fork(after_in_child=forget)

def work():
    """The worker: it keeps a reader alive for as long as its owner lives."""
    os.setsid()                                                  # Ctrl-C is the owner's
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)                    # whatever the owner ignores
    load_sympy()
    compare("x^2<4", "(-2,2)")                                   # imports what sympy imports late
    limit_memory()
    sys.set_int_max_str_digits(0)                                # MAX_CHARS bounds them
    reading = mmap.mmap(-1, 1)                                   # 1 while a case is read
    while True:
        pulse, held_by_reader = os.pipe()
        reader = os.fork()
        if reader == 0:
            os.close(pulse)
            read_cases(reading)
        os.close(held_by_reader)
        # a pipe reports when its other end is closed: the reader's or the owner's
        watch = select.poll()
        watch.register(pulse, 0)
        watch.register(0, 0)
        if 0 in dict(watch.poll()):
            os.kill(reader, signal.SIGKILL)
            os._exit(0)
        os.close(pulse)
        os.waitpid(reader, 0)
        if reading[0]:
            reading[0] = 0
            os.write(1, b"0")

def read_cases(reading):
    """The reader: cases in, verdicts out. After 500 it makes room for one with fresh memory."""
    for _ in range(500):
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(0, 1 << 16) or os._exit(0)
        reading[0] = 1
        signal.setitimer(signal.ITIMER_PROF, LIMIT)              # kills even in a long C call
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        reading[0] = 0
        os.write(1, b"1" if verdict else b"0")
    os._exit(0)

def limit_memory():
    """MEMORY bytes more than now; a lower limit stays, and macOS knows none."""
    import resource
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([now + MEMORY, *limits]), hard))
    except (OSError, ValueError):
        pass

# ---------------------------------------------------------------------------- noise
# Takes a text; gives it without what never carries meaning. The cheap path needs no more.

SPACING = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|(?:thin|med|thick|en)space)(?![a-zA-Z]))|~|\s+")
SQUEEZE = re.compile(r"(?<![0-9A-Za-z.,]) +| +(?![0-9A-Za-z.,\\])")      # 1 1/2 is not 11/2
IGNORED = re.compile(r"""(?<!\\)\\(?:(?:left|right)\ ?\. | [\[\]()!]
    | (?:(?:text)?color|[hv]space|phantom)\*?\ ?\{[^{}]*\}
    | (?:left|right|middle|[bB]igg?[lrm]?|bf|it|rm|displaystyle|textstyle|limits|therefore|boxed
    |fbox|[lL]arge|LARGE|[hH]uge|small|tiny|normalsize
    |underline|underbrace|Rightarrow|implies)(?![A-Za-z])) | (?<!\\)\$""", re.X)
PLAIN = re.compile(
    r"[+-]?(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]{1,300})?(?:\.[0-9]{0,300})?"
    r"|[+-]?(?:[0-9]{1,300}/|\\frac\{[0-9]{1,300}\}\{)[0-9]{1,300}\}?")
POINT = re.compile(r"\((?:(?:0|-?[1-9][0-9]*)(?:,(?!\))|(?=\)))){2,}\)")
NAN = re.compile(r"\W*(?:\\[a-z]+\W*)?nan\W*", re.I)

def normalise(text):
    r"""The text without what never carries meaning: $, \left, spacing, \dfrac, a full stop."""
    text = re.sub(r",\\! *", ",", text)                              # 32,\! 349
    text = SPACING.sub(" ", IGNORED.sub("", text)).strip(" *")
    text = re.sub(r"(?<!\.)\.$", "", text).strip()
    return SQUEEZE.sub("", re.sub(r"\\([dtcs]|nice)frac(?![a-zA-Z])", r"\\frac", text))

def rational(text):
    """A plain decimal or fraction as a Fraction, else None."""
    text = re.sub(r"\\frac|[{},]", "", text.replace("}{", "/")) if PLAIN.fullmatch(text) else ""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None

# ---------------------------------------------------------------------------- words
# Takes the words of a text; gives the names of units, and what words do beside numbers.

WORDS = {"and": "∧", "or": "∨", "infinity": "∞", "infty": "∞", "pi": "π", "percent": "«%»",
         "pct": "«%»", "degree": "«°»", "degrees": "«°»", "deg": "«°»", "thousand": "*10^3",
         "million": "*10^6", "billion": "*10^9", "minus": "-", "negative": "-", "plus": "+",
         "times": "*", "squared": "^2", "cubed": "^3", "per": "/", "mph": "«mi»/«h»", "old": "",
         "kph": "«km»/«h»", "kmh": "«km»/«h»", "kmph": "«km»/«h»"}
PREFIXES = {"": "", "n": "nano", "μ": "micro", "m": "milli", "c": "centi", "k": "kilo",
            "M": "mega", "G": "giga", "T": "tera"}
SI_UNITS = """m meter metre, g gram, s second, l liter litre, J joule, W watt, V volt, A ampere amp,
Pa pascal, Hz hertz, eV electronvolt, N newton, Ω ohm, F farad, C coulomb, T tesla, H henry, B byte,
mol mole, cal calorie, Wb weber, Wh"""
OTHER_UNITS = """kg kilo kilos, mi mile, ft foot feet, in inch inche, yd yard, lb pound, oz ounce,
unit, min minute, h hr hour, day, wk week, month, yr year, s sec, $ dollar usd buck, ¢ cent, l L,
€ euro eur, £ gbp, ¥ yen, ₹ rupee, rad radian, gal gallon, qt quart, pt pint, C celsiu, ml mL,
K kelvin, F fahrenheit, °, %, g gm, AU, dB, ton tonne, acre, cup, erg, atm, amu, rpm, dL, mmHg"""
UNITS = {}                                       # every spelling in the singular -> canonical name
for short, *names in map(str.split, SI_UNITS.split(",")):
    for prefix, long_prefix in PREFIXES.items():
        UNITS[prefix + short] = prefix + short
        for name in names:
            UNITS[long_prefix + name] = prefix + short
for names in map(str.split, OTHER_UNITS.split(",")):
    UNITS |= dict.fromkeys(names, names[0])
GLUED_UNITS = set("cm mm km kg ft in yd lb oz hr".split())       # 5cm, but 3mg is a product

# what computes, denies or hedges behind a number: "3 dozen", "3 less", "3 is wrong"
COMPUTES = set("""
plus minus less more fewer greater smaller larger bigger least most than over under above below
between about around approximately roughly nearly almost divided multiplied increased decreased
squared cubed doubled tripled halved twice thrice double triple half halves thirds quarter
quarters ones twos threes fives sixes nines zeros zeroes fours sevens eights negatives opposites
inverses reciprocals roots powers factorials logs logarithms percents scores couples score gross
couple opposite inverse reciprocal root power factorial log ln logarithm modulus modulo mod sum
difference product quotient not nots no nor never and or but except if unless otherwise either
neither both all any some none is are was were be has have does do yes wrong incorrect false true
correct maybe perhaps this that up down short away off out versus always besides st nd rd th ish
infinity undefined unknown neg sin cos tan sqrt zero one two three four five six seven eight nine
ten eleven twelve tens dozen dozens
""".split())
NUMBER_WORD = (r"\w*(?:teen|ty|hundred|thousand|illion)s?|hundredths"
               r"|\w*(?:four|fif|six|seven|eigh|nin|ten|ie)ths")
NOT_LAST = r"positive|negative|first|second|third|\w+th|to|of|choose"
COUNTED = {"quarters", "scores", "ones", "sixes", "fours", "tens"}       # so in parentheses
HEDGES = set("""
not no nor never n't either or between least most than about approximately around except if
unless
""".split())
LEADS = set("""
the is are final answer ans result solution value exactly total area volume perimeter length
width height radius distance speed time probability number sum cost price so we get therefore
thus hence
""".split())
WORD = r"(?<![A-Za-z«\\'-])((?![eiE](?![A-Za-z]))[A-Za-z](?:[A-Za-z]|[-'](?=[A-Za-z]))*)(?!»)"

def singular(word):
    """boxes: box, berries: berry, apples: apple."""
    word = re.sub(r"(x|ss|ch|sh)es$", r"\1", re.sub(r"ies$", "y", word))
    return re.sub(r"(?<!s)s$", "", word)

def known_unit(name):
    """The canonical name of a unit, or None: Hours are h, but mW is not MW."""
    for spelling in (name, name.lower(), singular(name.lower())):
        if spelling in UNITS and (len(spelling) > 1 or spelling == name):
            return UNITS[spelling]

def mark(match):
    r"""\text{...}: every word in « », save e and i; \mathbf{...} and the like only decorate."""
    name, content = match[1], match[2]
    behind_number = re.search(r"[\d})»]\s*[/*]?\s*$", match.string[:match.start()])
    if re.match("math|bold|bm|pmb", name):
        if name != "mathrm" or not (behind_number or " " in content):
            if len(content) > 1:
                return f" {content} "
            return content
    content = re.sub(WORD, r"«\1»", content)
    if content[:1] == "«":
        return content + " "
    return f" {content} "

def bare_unit(match):
    r"""Behind a number and last, outside \text{}: 5 cm, 5cm, 3 mg."""
    space, run = match.groups()
    sure = space or len(run) > 2 or run in GLUED_UNITS
    if sure and known_unit(run):
        return f" «{run}»"
    return match[0]

def noun_phrase(match):
    """Behind a number: «right»«triangles» is «#right triangle», «inches»«of»«snow» is «in»."""
    words = re.findall("«([^»]*)»", match[0])
    refused = COMPUTES | {"square", "sq", "cubic", "cu", *WORDS} - {"times", "per", "negative"}
    if "(" in match[0]:
        refused -= COUNTED
    for word in words:
        if word.lower() in refused or re.fullmatch(NUMBER_WORD, word.lower()) or word[0] == "#":
            return match[0]
    # the noun stands before "of snow", "to choose", "in a box"
    head = re.split(r" (?:of|in|to|for|which|who|with|from|on|at)\b", " ".join(words))[0].split()
    noun = head[-1]
    if re.fullmatch(NOT_LAST, noun.lower()) or len(noun) == 1 and not known_unit(noun):
        return match[0]
    if all(map(known_unit, head)) or "per" in words:
        return "".join(f"«{word}»" for word in (words if "per" in words else head))
    if len(noun) > 3:
        noun = singular(noun.lower())
    return "«#" + " ".join([*sorted(head[:-1]), known_unit(noun) or noun]) + "»"

def leading_words(match):
    """Before a value: "the answer is", "Answer:", "the sum of the roots is"; not "it is not"."""
    words = re.findall("«([^»]*)»", match[2].lower())
    claims = words[-1] in ("is", "are", "equals") and not HEDGES & {*words}
    if claims or LEADS.issuperset(words):
        return match[1]
    return match[0]

def plain(text):
    """A text answer without case, punctuation and markup."""
    text = re.sub(r"\\[a-z]+|[«»{}]", " ", text).lower()
    return " ".join(re.sub(r"[^\w%$€£]+", " ", text).split())

# ---------------------------------------------------------------------------- text to tokens
# Takes a text in LaTeX or Unicode; gives a text in a small alphabet: digits, letters, \commands,
# { } as TeX groups, one character for every operator, «words», ⦃ ⦄ for set braces, ⟪ ⟫ around a
# matrix or a system, ↵ between its rows, 0.1~6 for 0.166...

SYMBOLS = r"""
* \cdot \times \ast \bullet × · ⋅ ∙ ∗ •    / \div ÷ ⁄ ∕    ± \pm    - − – — ‒ ﹣    ^ **
= \equiv == ≡    < \lt    > \gt    ≤ \le \leq \leqslant <= ⩽    ≥ \ge \geq \geqslant >= ⩾    ∈ \in
≠ \ne \neq !=    ≈ \approx \simeq    ∪ \cup \bigcup    ∩ \cap    ∖ \setminus \backslash
∧ \land \wedge    ∨ \lor \vee    : \colon ∶    … \ldots \dots \cdots ...    ∞ \infty \infin
π \pi    ∅ \emptyset \varnothing    ℝ \mathbb{R} \mathbf{R} \R    ℤ \mathbb{Z} \Z    ℕ \mathbb{N} \N
ℚ \mathbb{Q} \Q    ℂ \mathbb{C}    | \mid \vert \lvert \rvert \| ∣    '' ^{\prime\prime}
⦃ \{ \lbrace    ⦄ \} \rbrace    [ \lbrack    ] \rbrack    ( \langle ⟨    ) \rangle ⟩ \rfloor ⌋
) \rceil ⌉    \floor( \lfloor ⌊    \ceil( \lceil ⌈    ↵ \cr    ' \prime ^\prime ^{\prime} ′
«°» ° ^{\circ} ^\circ ^{\degree} ^\degree \degree \textdegree ˚    «%» \% %    «$» \$    «¢» ¢
«€» € \euro    «£» £ \pounds    «¥» ¥ \yen    «₹» ₹    \sqrt √    \sqrt[3] ∛    \sqrt[4] ∜
\log_{10} \lg    \binom \dbinom \tbinom    \epsilon \varepsilon    \phi \varphi    \theta \vartheta
l \ell    i \imath    j \jmath    \Omega Ω
"""
SYMBOLS = {old: new + " " * new[-1].isalpha() for new, *olds in
           map(str.split, re.split(r" {4}|\n", SYMBOLS.strip())) for old in olds}
SYMBOL = re.compile("|".join(re.escape(old) + r"(?![A-Za-z])" * old[-1].isalpha()
                             for old in sorted(SYMBOLS, key=len, reverse=True)))
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾₀₁₂₃₄₅₆₇₈₉", "0123456789+-ni()0123456789")
FUNCTIONS = dict(zip("ln exp log gcd lcm floor max min abs ceil cis".split(),
                     "log exp log gcd lcm floor Max Min Abs ceiling cis".split()))
for name in "sin cos tan sec csc cot sinh cosh tanh sech csch coth".split():
    FUNCTIONS |= {name: name} | {arc + name: "a" + name for arc in ("a", "ar", "arc")}
COMMANDS = "|".join([*FUNCTIONS, "sqrt", "frac", "binom"])
DIGIT_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
COMPOUNDS = "h min, min s, day h, wk day, yr month, ft in, lb oz, m cm, km m, kg g, $ ¢".split(", ")

def thousands_number(match):
    """1,234 is a number; inside ( [ ⦃ it is two, unless it can be nothing else: (1,000 + x)."""
    opened = []
    for bracket in re.findall(r"[({\[⦃)}\]⦄]", match.string[:match.start()]):
        opened = opened[:-1] if bracket in ")}]⦄" else [*opened, bracket]
    in_list = opened and opened[-1] != "{" and not re.fullmatch(r"\d+,0\d\d", match[0])
    if in_list:
        return match[0]
    return match[0].replace(",", "")

def mixed_number(match):
    whole, top, bottom = match.groups()
    if int(top) < int(bottom):
        return f"({whole}+{top}/{bottom})"
    return match[0]

def base_number(match):
    r"""Digits in a base are a symbol: 101_2 is \base_{101b2}."""
    digits, base = match[1].strip("()").lstrip("0") or "0", (match[2] or match[3]).strip("«» ")
    return rf"\base_{{{digits}b{DIGIT_WORDS.index(base) if base in DIGIT_WORDS else base}}}"

def compound(match):
    """3 hours and 20 minutes are added; 3 apples and 20 pears are a list."""
    first, second = known_unit(match[2]), known_unit(match[4])
    together = f"({match[1]}«{first}»+{match[3]}«{second}»)"
    if f"{first} {second}" in COMPOUNDS:
        return together
    return match[0]

def split_letters(match):
    return " ".join(match[0])

ENVIRONMENT = r"\{(?:\w*(?:matrix|array)|cases|aligned|align|gathered|gather|split)\*?\}"
TEXT = r"\\(text\w*|[mh]box|operatorname|math\w+|boldsymbol|bm|pmb)\*? ?\{((?:[^{}]|\{[^{}]*\})*)\}"
BESIDE = r"[-+*/^_={}()<>|&∖≤≥≠:]"
PHRASE = r"(?<=[\d})\]π!]) *(?:\( ?(?:«[^»]*»,? ?)+\)|(?:«[^»]*»,? ?)+)(?= *$|[,;∧∨)\]⦄=↵&])"
VALUE = r"(?=\s*[\w({\\⦃⟪+\-±.\[|«])"

# the rules, in their order: pattern, replacement             # before                  after
RAW_RULES = [
    (r"""(?s)^\s*["'`]+(.*?)["'`]+\s*$""", r"\1"),             # '5'                     5
    (r"\\\\", "↵"),                                            # x=1\\y=2                x=1↵y=2
    (r"\\mathbb ?([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),       # \mathbb R               \mathbb{R}
    (r"\\prime ?\\prime", r"\\prime\\prime"),                  # \prime \prime         \prime\prime
    (r"(?<=\d) +\(([A-Za-z][A-Za-z '/-]*)\)\s*$", r"\\text{(\1)}"),  # 8 (pens)   8\text{(pens)}
    (r"(?<=\d)\\text\{K\}", r"\\text{thousands}"),           # 3\text{K}, not 3\text{ K}
    (r"(?<=\d) +([KJNWVT])(?=\s*\$?\s*$)", r"\\text{ \1}"),    # 35 K                    35\text{ K}
    (r"[,;]?\s*\\q?quad\s*(?=[A-Za-z](?:_\{?\w+\}?)?\s*=)", ", "),   # x=1\quad y=2   x=1, y=2
    (r"^(USD|EUR) +(?=[\d.])", lambda m: {"USD": "\\$", "EUR": "€"}[m[1]]),   # USD 5   \$5
    (r"(?<=\d) ?x ?(?=10\^)", "*"),                            # 6.02 x 10^{23}        6.02*10^{23}
]
LATEX_RULES = [
    (r"↵ ?\[[^\]]*\]", "↵"),                                   # ↵[4pt]                  ↵
    (rf"\\begin ?{ENVIRONMENT} ?(?:\{{[lcr| ]*\}})?", "⟪"),    # \begin{cases}           ⟪
    (rf"\\end ?{ENVIRONMENT}", "⟫"),                           # \end{cases}             ⟫
    (r"⦃ ?(?=⟪[^⟫]*⟫$)", ""),                                  # \left\{⟪x=1⟫            ⟪x=1⟫
    (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),  # {n\choose k}  \binom{n}{k}
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),                # \frac12                 \frac{1}{2}
    (r"\(? ?\\(?:pmod|bmod|mod)(?![a-z]) ?\{?(\w+)\}? ?\)?", r"«mod»\1"),   # \pmod 7    «mod»7
    (r"^[^=,;<>\d]*\\(?:vec|overrightarrow)(?![a-z])[^=,;<>\d]*[*|][^=,;<>\d]*=(?=[^=]*$)", ""),
    (r"[\\;:, ]*\(([a-z] ?∈[^()]*)\)$", r",\1"),               # x=kπ (k∈ℤ)              x=kπ,k∈ℤ
]
NUMBER_RULES = [
    (r"\\mu ?(?:\{\})? ?«", "«μ"),                             # \mu«m»                  «μm»
    (r"\\(?:hat|widehat)(?![a-z]) ?(?:\{ ?([ijk]) ?\}|([ijk])(?![a-z]))", r" \1\2 "),   # \hat{i}  i
    (r"\\(?:vec|overrightarrow)(?![a-z]) ?(?:\{ ?([A-Za-z]+) ?\}|([A-Za-z]))", r" \1\2 "),
    (r"\.(\d*)\\dot ?\{? ?(\d) ?\}?(?:(\d*)\\dot ?\{? ?(\d) ?\}?)?", r".\1~\2\3\4"),   # 0.\dot3
    (r"\\(d?dot|hat|tilde|bar) ?\{ ?([A-Za-z]) ?\}", r"\\\1\2 "),                # \dot{x}   \dotx
    (r"(\d*)\.(\d*) ?(?:\\(?:overline|bar) ?\{? ?(\d+) ?\}?|\((\d+)\))", r"\g<1>.\2~\3\4"),
    (r"(?<!\d)(\d*)\.(\d{0,9}?)(\d{1,9}?)\3\3+ ?…", r"\1.\2~\3"),    # 0.333…            0.~3
    (r"(?<![\w.,~^_])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", "")),
    (r"(?<=\d)\{,\}(?=\d{3})", ""),                            # 1{,}000                 1000
    (r"(?<![\w.^_}])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),   # 1 1/2   1\frac{1}{2}
    (r"(?<![\w.^_}])(\d+) ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}", mixed_number),
    (r"(?<=[\d})π»]) ?≈.*", ""),                               # 1/3≈0.33                1/3
    (r"(?<![\w.\\])(\(?\d[\dA-F]*(?:\.[\dA-F]+)?\)?)_(?:\{ ?\(?(\d+|«?[a-z]+»?)\)? ?\}|(\d))",
     base_number),                                             # 101_2                 \base_{101b2}
    (r"(\d+)«°» ?(\d+)'(?: ?(\d+)'')?", r"(\1+\2/60+0\3/3600)«°»"),   # 30«°»15'   (30+15/60…)«°»
]
WORD_RULES = [
    (r"(?<=[a-z])\.(?= ?[A-Za-z^»])|(?<=»)\.(?= ?[«^])", ""),  # sq. in.^2               sq in^2
    ("(«°») ?«?([CF])»?(?![A-Za-z])", r"\1«\2»"),              # «°»C                    «°»«C»
    (r"(?<=\d) ?(?:«k» ?)?\\Omega *$", lambda m: "«kΩ»" if "k" in m[0] else "«Ω»"),
    (PHRASE, noun_phrase),                                     # 8(«pens»)               8«#pen»
    (r"(?<=[\d})π])( ?)((?:[ckm]?m|in|ft|yd|mi)(?=\^\{?\d\}?$)|[A-Za-z]{2,}(?=\.?$|[)/,;∧∨ ]))",
     bare_unit),                                               # 5 cm                    5 «cm»
    (r"(?<=»/)(h|hr|s|sec|min)(?![A-Za-z])", r"«\1»"),         # «km»/hr                 «km»/«hr»
    (rf"(?i)«({'|'.join(WORDS)})»|(?<![\\A-Za-z«-])({'|'.join(WORDS)})(?![A-Za-z»-])",
     lambda m: WORDS[(m[1] or m[2]).lower()]),                 # 3 or 4                  3 ∨ 4
    (rf"«({COMMANDS})»(?= ?[(\d\\a-zπ{{])|(?<![\\A-Za-z«])({COMMANDS})(?![A-Za-z»])", r"\\\1\2 "),
    (rf"(?<={BESIDE})[A-Za-z]{{2,3}}(?![A-Za-z])|(?<![A-Za-z\\«])[A-Za-z]{{2,3}}(?={BESIDE})",
     split_letters),                                           # e^{at}                  e^{a t}
    (r"(?<![A-Za-z\\«])(?!(?i:sq|cu|no|is|of|to|at|by|it|we|as|be|so)(?![A-Za-z]))"
     r"(?:[A-Za-z]{2}|[^\WeiouEIOU\d_][^\WeiouEIOUaA\d_]{2,3})(?![A-Za-z»])", split_letters),
    (r"\\[A-Za-z]+|«[^»]*»|[A-Za-z]{2,}", lambda m: m[0] if m[0][0] in "\\«" else f"«{m[0]}»"),
    (r"/([A-Za-z](?: [A-Za-z])+)(?![(^_])", r"/(\1)"),         # t/RC                    t/(RC)
    (r"\(? ?«mod» ?(\w+) ?\)?", r"«mod»\1"),                   # («mod»7)                «mod»7
    (r"(\d[\d.]*) ?«([^»]*)» ?∧? ?(\d[\d.]*) ?«([^»]*)»", compound),
    (r"«(?:square|sq)» ?(«\w+»)", r"\1^2"),                    # «square»«cm»            «cm»^2
    (r"«(?:cubic|cu)» ?(«\w+»)", r"\1^3"),                     # «cubic»«cm»             «cm»^3
    (PHRASE, noun_phrase),                                     # 5«apples»∧3«pears»
    ("(?:all|«all»)? ?«reals?» ?(?:«numbers?»)?", "ℝ"),        # «real»«numbers»         ℝ
    ("(?:«all» ?)?«integers?»", "ℤ"),
    ("(?:«all» ?)?«natural» ?«numbers?»", "ℕ"),
    (r"ℝ ?«except»(?: ?«for»)? ?(?:[a-z] ?= ?)?(.+)$", r"ℝ∖⦃\1⦄"),   # ℝ«except»2        ℝ∖⦃2⦄
    ("([ℝℤ]) ?-(?= ?⦃)", r"\1∖"),                              # ℝ-⦃0⦄                   ℝ∖⦃0⦄
    (rf"(^|[,;∧∨]) ?((?:«[^»]*»,? ?)+)[:=]?{VALUE}", leading_words),   # «answer»:5   5
    ("^<([^<>]*,[^<>]*)>$", r"(\1)"),                          # <1,2>                   (1,2)
    (r"⦃ ?[A-Za-z] ?(?:∈ ?ℝ)? ?[|:](.*)⦄", r"{\1}"),           # ⦃x:x>0⦄                 {x>0}
    (r"⦃ ?([A-Za-z] ?∈ ?[ℤℕℚℂ]) ?[|:](.*)⦄", r"{\1∧\2}"),      # ⦃x∈ℤ:x>0⦄               {x∈ℤ∧x>0}
    (r"\|([^|]+)\|", r"\\abs(\1)"),                            # |x|                     \abs(x)
]

@lru_cache(256)
def prepare(text, thousands=True):
    """A text in the alphabet above. thousands: 1,234 is one number, or else two."""
    def apply(rules):
        nonlocal text
        for pattern, new in rules:
            text = re.sub(pattern, new, text)

    apply(RAW_RULES)
    # unicode: raised and lowered digits, vulgar fractions, full width, invisible marks, greek
    text = re.sub("[⁰-ⁿ¹²³]+", lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + m[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFKC", text.replace("º", "°").replace("ℝ", r"\R "))
    text = "".join(str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) != "Cf")
    text = re.sub("[α-ωΓ-Ψ]", lambda m: f"\\{unicodedata.name(m[0]).split()[-1].lower()} ", text)
    text = SYMBOL.sub(lambda m: SYMBOLS[m[0]], normalise(text))
    apply(LATEX_RULES + [(TEXT, mark)] * 4 + NUMBER_RULES)     # \text in \text, outermost first
    if thousands:
        apply([(r"(?<![\w.,~^])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)", thousands_number)])
    apply(WORD_RULES)
    return SQUEEZE.sub("", re.sub(r"\s+", " ", text)).strip(" \"`").rstrip(" .,;↵\"`")

# ---------------------------------------------------------------------------- nodes
# A node is a sympy expression ("value") or matrix, or a tuple that begins with its kind:
#     ("list", "∧" or "∨", *items)     x = 1 and y = 2; 1, 2, 3; {1, 2}
#     ("tuple", "(]", *items)          a point, an interval
#     ("rel", "<≤", *parts)            x = 5, 1 < x <= 2; never > and ≥
#     ("in", name, set)                k ∈ ℤ; of any other set only the set is kept
#     ("mod", modulus, left, right)    x = 3 mod 7
#     ("set", "∪", left, right)        also ∩ and ∖
#     ("ratio", *parts)                3 : 4, the first part made 1
#     ("rows", *rows)                  a piecewise function; a row: ("tuple", "&", value, condition)

class Hopeless(ValueError):
    """Unreadable, undefined, or too big to look at."""

def load_sympy():
    """Half a second that only those pay who read: workers, and the command line."""
    global sympy, ONE, LOG_BASE, NUMBER_SETS
    import sympy
    ONE, LOG_BASE = sympy.Integer(1), symbol("base of log")
    sets = sympy.S.Reals, sympy.S.Integers, sympy.S.Naturals, sympy.S.Rationals, sympy.S.Complexes
    NUMBER_SETS = dict(zip(map(symbol, "ℝℤℕℚℂ"), sets))

def symbol(name):
    """An unknown, a «word», or one of the constants."""
    constants = {"π": sympy.pi, "e": sympy.E, "i": sympy.I, "∞": sympy.oo}
    return constants.get(name) or sympy.Symbol(name, real=True)

def kind(node):
    if isinstance(node, tuple):
        return node[0]
    if isinstance(node, sympy.MatrixBase):
        return "matrix"
    return "value"

def symbols(node):
    """The unknowns in a node."""
    if isinstance(node, tuple):
        return set().union(*map(symbols, node))
    return getattr(node, "free_symbols", set()) - {LOG_BASE, *NUMBER_SETS}

def is_number(node):
    return kind(node) == "value" and not node.free_symbols

def replace(node, values):
    """The node with symbols replaced by numbers."""
    if isinstance(node, tuple):
        return tuple(replace(part, values) for part in node)
    if hasattr(node, "xreplace"):
        return node.xreplace(values)
    return node

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
        if abs(exponent.evalf(5)) * bits > MAX_BITS:
            return huge_power(base, exponent)
        if exponent.is_Rational and exponent.q > 1 and exponent.q % 2 and base.is_negative:
            return checked((-ONE) ** exponent.p * power(-base, exponent))
    return checked(base ** exponent)

def huge_power(base, exponent):
    """4^N as a symbol "2^2N": equal to itself, and nothing else is known about it."""
    if not (base.is_Integer and exponent.is_Integer and 1 < base < 10**6):
        raise Hopeless("too big")
    result = ONE
    for prime, times in sympy.factorint(base).items():
        result *= sympy.Symbol(f"{prime}^{times * int(abs(exponent)):x}", positive=True)
    if exponent > 0:
        return result
    return 1 / result

def call(name, args):
    """A named function of numbers or formulas."""
    args = [replace(arg, {symbol("«°»"): sympy.pi / 180}) for arg in args]
    if name in ("gcd", "lcm"):
        return sympy.Integer(getattr(math, name)(*args))
    if name == "cis":
        return sympy.cos(args[0]) + sympy.I * sympy.sin(args[0])
    if name in ("factorial", "binomial"):
        if not all(arg.free_symbols or arg.is_Integer and 0 <= arg <= 20_000 for arg in args):
            raise Hopeless("too big, or no whole number")
    value = checked(getattr(sympy, FUNCTIONS.get(name, name))(*args))
    # settled when two sides meet
    if name == "log":
        return value / sympy.log(LOG_BASE)
    return value

# ---------------------------------------------------------------------------- tokens to nodes
# Takes a prepared text; gives a node, or raises Hopeless.

NAME = r"(?:[A-Za-z]|\\[A-Za-z]+ ?|«\w+»)(?:_(?:\{[^{}]*\}|\w))?'*(?:\^\{?-?1\}?)?"
ARGUMENT = r"\((?:[A-Za-z0-9, ]+|(?<=[PEfghFGr]\()[^()]*|(?<=Var»\()[^()]*)\)"
DEFINES = (rf"(?:{NAME}{ARGUMENT}|\\frac ?{{(?:d|\\partial) ?\w*}} ?{{(?:d|\\partial) ?\w+}}"
           r"|\\(?:lim|max|min|sup|inf|deg|det|dim|gcd)(?:_\{[^{}]*\})? ?[A-Za-z]?"
           r"(?:\([^()=]*\))?)="
           r"|[A-Za-z] ?\\mapsto ?")
NUMBER = r"(?=\.?\d)(\d*)\.?(\d*)(?:~(\d+))?"
SCIENTIFIC = r"[+-]?\d+(?:\.\d*)?[eE][+-]?\d{1,4}"
SIGNS = r"[+\-±](?: ?[+\-])*"
RELATION = "[=<>≤≥≠≈∈:]"
CLOSING = {"{": r"\}", "⦃": "⦄", "(": r"[)\]]", "[": r"[)\]]"}

class Reader:
    """A position in a prepared text, and one method a grammar rule:
    answer > relation > union > sum > term > factor > atom. There is no backtracking;
    anything unexpected is Hopeless, and too deep a nesting ends in Python's RecursionError."""

    def __init__(self, text):
        self.text, self.i = text, 0

    def see(self, pattern):
        return re.compile(f" ?(?:{pattern})").match(self.text, self.i)

    def take(self, pattern):
        match = self.see(pattern)
        self.i = match.end() if match else self.i
        return match

    def fail(self):
        raise Hopeless(f"cannot read {self.text[self.i:self.i + 20]!r}")

    def chain(self, operand, operators):
        """operand, operator, operand, ...: the operands, and the operators between them."""
        parts, signs = [operand()], []
        while match := self.take(operators):
            signs.append(match[0].strip())
            parts.append(operand())
        return parts, signs

    def answer(self, opening=""):
        """Relations between commas, "and", "or": a list, or the only one."""
        parts, signs = self.chain(self.relation, "(?:[,;] ?)?[∧∨](?: ?,)?|[,;]")
        if len(parts) == 1 and opening != "⦃":
            return parts[0]
        # x ≠ 1, 2 excludes both
        if kind(parts[0]) == "rel" and parts[0][1] == "≠":
            for k, part in enumerate(parts):
                parts[k] = ("rel", "≠", parts[0][2], part) if is_number(part) else part
        # x = 1, y = 2 or x = 2, y = 1 are two points; 1, 2 or 3 are three numbers
        groups = [[parts[0]]]
        for sign, part in zip(signs, parts[1:]):
            if "∨" in sign:
                groups.append([])
            groups[-1].append(part)
        equations = {*map(kind, parts)} == {"rel"} and len(set(map(len, groups))) == 1
        if equations and len(parts) > len(groups) > 1:
            parts = [("list", "∧", *group) for group in groups]
        return "list", "∨" if len(groups) > 1 else "∧", *parts

    def relation(self):
        """a < b <= c, y = 2x + 1, x in (2, 6], 4 : 9. A leading "f(x) =" or "=" is dropped."""
        self.take("[=≈]")
        self.take(DEFINES)
        parts, signs = self.chain(self.union, RELATION)
        signs = "".join(signs).replace("≈", "=")
        if match := self.take(r"«mod»(\w+)"):
            if signs == "=":
                return ("mod", read(match[1]), *parts)
            return self.fail()
        if signs == ":=:" and is_name(parts[0]):                     # V_1 : V_2 = 11 : 21
            parts, signs = parts[2:], ":"
        if signs and not signs.strip(">≥"):                          # 2 > x is x < 2
            parts, signs = parts[::-1], signs[::-1].replace(">", "<").replace("≥", "≤")
        # 2 + 3 = 5 is 5, and so is the end of x = 2 + 3 = 5
        while signs[-1:] == "=" and is_number(parts[-2]) and equal(parts[-2], parts[-1]):
            del parts[-2]
            signs = signs[:-1]
        if set(signs) == {":"}:                                      # 0 : 0 would be every ratio
            if 0 in parts:
                return self.fail()
            return ("ratio", *(part / parts[0] for part in parts))
        if signs == "∈":
            name, values = parts
            if not is_name(name) or kind(values) == "value" and values not in NUMBER_SETS:
                self.fail()
            if values in NUMBER_SETS:
                return ("in", name, values)
            return values
        # 8 = 9 says nothing about an unknown, nor does x < x
        for left, right in zip(parts, parts[1:]):
            if kind(left) == kind(right) == "value" and is_number(sympy.expand(left - right)):
                self.fail()
        if signs:
            return ("rel", signs, *parts)
        return parts[0]

    def union(self):
        parts, signs = self.chain(self.sum, "[∪∩∖]")
        for sign in signs:
            parts[:2] = [("set", sign, *parts[:2])]
        return parts[0]

    def sum(self):
        terms, signs = [], self.take(SIGNS)
        while signs or not terms:
            at, term = self.i, self.term()
            if signs:
                if "±" in signs[0]:
                    term = term * symbol(f"±{at}")
                if signs[0].count("-") % 2:
                    term = -term
            terms.append(term)
            signs = self.take(SIGNS)
        if len(terms) == 1:
            return terms[0]
        return checked(sum(terms[1:], terms[0]))

    def term(self):
        factors = [self.factor()]
        while (match := self.take(r"([*/]) ?(-?)")) or self.starts_factor():
            factor = self.factor()
            if match and match[1] == "/":
                factor = power(factor, -ONE)
            factors.append(-factor if match and match[2] else factor)
        if len(factors) == 1:
            return factors[0]
        return checked(math.prod(factors[1:], start=factors[0]))

    def starts_factor(self):
        """Does a factor follow without an operator? 2x, 2(x), 2^{3}5, 2^3 3^2; not 2 3, x2."""
        if self.see(r"[\d.]"):
            after_power = self.see(r"\d+\^") and re.search(r"\^\d+$", self.text[:self.i])
            return after_power or self.text[self.i - 1] in "})]!"
        return self.see(r"[A-Za-zπ∞({\[⟪]|«(?!mod»)|\\[A-Za-z]")

    def factor(self):
        """An atom and what stands behind it, ! and ^, or in front of it: a currency."""
        currency, node = self.take("«[$€£¥₹]»(?= ?[^ ])"), self.atom()
        while match := self.take(r"!(?![=!])|\^"):
            node = power(node, self.exponent()) if "^" in match[0] else call("factorial", [node])
        if currency:
            return node * symbol(currency[0].strip())
        return node

    def exponent(self):
        sign = self.take("[-+]")
        exponent = self.argument(r"\d+(?:\.\d+)?")                  # 2^10 is 1024, not 2^1 0
        if self.take(r"\^"):
            exponent = power(exponent, self.exponent())
        if sign and "-" in sign[0]:
            return -exponent
        return exponent

    def atom(self):
        if match := self.take(NUMBER):
            whole, part, repeating = match.groups("")
            value = sympy.Rational(int(whole + part), 10 ** len(part))
            if repeating:
                value += int(repeating) * ONE / (10 ** len(part + repeating) - 10 ** len(part))
            return value
        if match := self.take("⟪([^⟪⟫]*)⟫"):
            return block(match[1])
        if self.take("∅|⦃ ?⦄"):
            return "list", "∧"
        if match := self.take(r"[({\[⦃]"):
            opening = match[0].strip()
            node = self.answer(opening)
            closing = self.take(CLOSING[opening]) or self.fail()
            is_list = kind(node) == "list" and len(node) > 2
            if is_list and opening in "([" and kind(node[2]) != "rel":
                return "tuple", opening + closing[0].strip(), *node[2:]
            return node
        match = self.take(rf"\\({COMMANDS})(?![A-Za-z])")
        if match:
            return self.command(match[1])
        return self.name()

    def name(self):
        r"""x, x_1, \alpha, π, f(x), or «words»: a text if they stand alone, else a unit."""
        before = self.text[:self.i].rstrip()[-1:]
        text = self.see("((?: ?«[^»]*»)+)(?= ?(?:[,;=∧∨:)⦄]|$))")
        if text and before in ["", *",;=∧∨:({⦃&"]:
            self.i = text.end()
            return symbol("text " + plain(text[0]))
        match = self.take(r"([A-Za-zπ∞ℝℤℕℚℂ…]'*)|\\([A-Za-z]+)|«([^»]*)»(?! ?\()") or self.fail()
        if match[3]:                                             # a unit stands behind something
            unit = match[3] if match[3][0] == "#" else known_unit(match[3])
            if unit and before:
                return symbol(f"«{unit}»")
            return self.fail()
        name, sub = match[1] or match[2], self.take(r"_(?:\{([^{}]*)\}|\\([A-Za-z]+)|(\w))")
        name += "_" + re.sub(r"[ \\]", "", "".join(sub.groups(""))) if sub else ""
        # f(0), y(t), f(2x) and u(2x) are names; a(b + c) is a product
        is_applied = self.see(r"\(-?(?:\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+ ?|[^()]*,[^()]*)\)")
        if name in [*"ghuvyqFGHPIQ"]:
            is_applied = self.see(r"\(-?[^()+\-]*\)")
        if name in ("f", "Gamma", "zeta", "phi", "psi", "Phi", "Psi") or "'" in name:
            is_applied = self.see(r"\(")
        if is_applied and name not in "πei∞":
            name += "(" + ",".join(str(sympy.expand(part)) for part in arguments(self.atom())) + ")"
        return symbol(name)

    def command(self, name):
        if name == "frac":
            return checked(self.argument() * power(self.argument(), -ONE))
        if name == "binom":
            return call("binomial", [self.argument(), self.argument()])
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
            ends = rf"\(|\\(?:{COMMANDS})(?<!frac|sqrt)(?![a-z])"
            while self.starts_factor() and not self.see(ends):
                argument = argument * self.factor()
        if base is not None:
            return power(checked(sympy.log(argument, base)), exponent)
        return power(call(name, arguments(argument)), exponent)

    def argument(self, digits=r"\d"):
        r"""What \frac and \sqrt take: a group, a token, or so many digits."""
        match = self.take(digits)
        if match:
            return sympy.Rational(match[0].strip())
        return self.atom()

def arguments(node):
    if kind(node) in ("tuple", "list"):
        return node[2:]
    return [node]

def block(text):
    r"""What stands between \begin and \end: a system, a piecewise function, or a matrix."""
    text = re.sub(r"& ?(?=[=<>≤≥])", "", text).strip("↵ ")
    rows = [[cell.strip(" ,.;") for cell in row.split("&")] for row in text.split("↵")]
    if all(len(row) == 2 and re.search(f"{RELATION}|otherwise", row[1]) for row in rows):
        pieces = []
        for value, condition in rows:
            condition = re.sub("«(?:if|for|when|where)»", "", condition)
            pieces.append(("tuple", "&", read(value), read(condition)))
        return "rows", *pieces
    if re.search(RELATION, text):
        return read(",".join(",".join(row) for row in rows))
    return sympy.ImmutableDenseMatrix([[read(cell) for cell in row] for row in rows])

def read(text):
    """A prepared text as a node."""
    reader = Reader(text)
    node = reader.answer()
    if reader.see("$"):
        return node
    return reader.fail()

@lru_cache(256)
def readings(text):
    """The nodes a text may mean: what it reads as or None, and what only the other side can ask
    for: 1,234 as two numbers, 2e-3 as a formula."""
    first, second = prepare(text), prepare(text, thousands=False)
    nodes = []
    try:
        scientific = re.fullmatch(SCIENTIFIC, first)
        mantissa, _, exponent = first.lower().partition("e")
        nodes.append(read(mantissa) * 10 ** sympy.Integer(exponent) if scientific else read(first))
        if scientific or re.fullmatch(r"[1-9]\d*(,(0|[1-9]\d\d))+", second):
            nodes.append(read(second))
    except Exception:  # whatever untrusted text provokes
        pass
    return nodes

# ---------------------------------------------------------------------------- equal formulas
# Takes two values; tells whether they are the same number, or the same function of their symbols.

def equal(a, b):
    if a == b or not kind(a) == kind(b) == "value" or sympy.oo in (abs(a), abs(b)):
        return a == b
    if (a - b).has(LOG_BASE):  # 10 or e, but the same for both
        return any(vanishes(replace(a - b, {LOG_BASE: base})) for base in (10 * ONE, sympy.E))
    return vanishes(a - b) or double_precision(a, b) or double_precision(b, a)

def double_precision(a, b):
    """0.3333333333333333 for 1/3: 15 digits, right to the last, for what no decimal can be."""
    close = a.is_Rational and b.is_Rational and abs(a - b) * a.q < 1 and b.q < 10**6
    return close and abs(a.p) > 10**14 and pow(10, 40, a.q) == 0 != pow(10, 40, b.q)

def is_zero(number, digits=150):
    """Exactly, if it is rational; else sympy adds digits until one is not zero, or says _prec 1."""
    if number.is_Rational:
        return number == 0
    for value in number.atoms(sympy.Rational):                       # 1 - cos(10^-200) needs more
        digits += min(3000, value.p.bit_length() + value.q.bit_length())
    parts = number.evalf(2, maxn=digits).as_real_imag()
    if not all(part.is_Float or part == 0 for part in parts):
        raise Hopeless("no number")
    return all(part == 0 or part._prec == 1 for part in parts)

def vanishes(gap):
    """Is it zero wherever it is defined? A number needs no point, a rational function a few."""
    names = sorted(symbols(gap), key=str)
    if not names:
        return is_zero(gap)
    # under a root or a logarithm school and sympy disagree about negative numbers: not asked there
    inner = [part.args[0] for part in gap.atoms(sympy.log)]
    inner += [part.base for part in gap.atoms(sympy.Pow) if not part.exp.is_Integer]
    smooth, agreed = gap.is_rational_function(*names), 0
    for values in points(gap, len(names)):
        point = dict(zip(names, values))
        value = replace(gap, point)
        negative = any(part.free_symbols and replace(part, point).is_negative for part in inner)
        if negative or value.has(sympy.nan, sympy.zoo):
            continue
        if is_zero(value, 30 if agreed else 150):
            agreed += 1
        elif gap.has(sympy.I) or value.is_real is not False:         # arcsin 3 has no real value
            return False
        if smooth and agreed == 4:
            return True
    return agreed >= 3

def points(gap, count):
    """Where formulas are compared: near zero and far beyond every number in them, on both sides of
    such a number, and at whole numbers where ! or floors stand."""
    rng = Random(7)
    whole, steps = gap.has(sympy.factorial, sympy.binomial), gap.has(sympy.floor, sympy.ceiling)
    grows = whole or gap.has(sympy.exp, sympy.sinh, sympy.cosh, sympy.tanh)
    grows = grows or any(part.exp.free_symbols for part in gap.atoms(sympy.Pow))
    numbers = {part for number in gap.atoms(sympy.Rational) for part in (abs(number.p), number.q)}
    bound = (100 if count > 1 else 3000) if grows else 10**60
    numbers = sorted(number for number in numbers if number < bound)[-6:]
    far = max([9, *numbers]) * 3
    if whole or steps:
        for value in range(1, 31 if count == 1 else 7):
            yield [ONE * (value + rng.randint(0, 3) * k) for k in range(count)]
        for high in (far, 2 * far if grows else far**2):
            yield [ONE * rng.randint(far // 3, high) for _ in range(count)]
    if whole or steps and {str(name) for name in symbols(gap)} <= set("nmkjN"):
        return
    ranges = [(0, 1), (0, 9), (-9, 0), (0, far), (-far, 0), (far // 3, far)]
    ranges += [] if grows else [(-9, 400), (far, far**2), (-far**2, -far)]
    for low, high in ranges * 2:
        yield [rng.randint(low * 907 + 1, high * 907) * ONE / 907 for _ in range(count)]
    for number, sign, side in product(numbers if count == 1 else [], (1, -1), (1, -1)):
        yield [sign * number + side * ONE / 7]

# ---------------------------------------------------------------------------- equal answers
# Takes two nodes; gives the verdict.

def is_name(node):
    r"""x, x_1, AB, |AB|, AB/CD, \angle ABC, sin x: may stand before "= 5", is no part of it."""
    if kind(node) != "value" or not node.free_symbols:
        return False
    if isinstance(node, (sympy.Abs, sympy.sin, sympy.cos, sympy.tan)):
        node = node.args[0]
    factors = [1 / part if part.is_Pow else part for part in sympy.Mul.make_args(node)]
    if not all(part.is_Symbol and part.name[0].isalpha() for part in factors):
        return False
    capitals = all(part.name[0].isupper() for part in factors)
    return len(factors) == 1 or capitals or {"angle", "overline"} & set(map(str, factors))

def assigned(node):
    """(x, 5) from x = 5 or 5 = x, (y, 2x) from y = 2x; else None."""
    if kind(node) == "rel" and node[1] == "=":
        for name, value in (node[2:], node[:1:-1]):
            vector = kind(name) == kind(value) != "value"
            if (vector or is_name(name)) and not symbols(name) & symbols(value):
                return name, value

def items(node):
    """What an answer lists: the names {x}, the values [1, 2] and the items as they stand of
    x = 1, x = 2. ± has two values; k ∈ ℤ only says what k is, and k is called n."""
    signs = [name for name in symbols(node) if name.name[0] == "±"]
    whole = []
    if kind(node) == "list":
        for part in node[2:]:
            rest = tuple(other for other in node if other != part)
            if kind(part) == "in" and part[1] in symbols(rest) and not inequalities(rest):
                if str(part[2]) == "ℤ":
                    return items(replace(rest, {part[1]: symbol("n")}))
        for part in node[2:]:
            system = kind(part) == "list" and {*map(kind, part[2:])} == {"rel"}
            whole += items(part)[1] if signs or system else [part]
    else:
        for values in product((ONE, -ONE), repeat=len(signs[:5])):
            whole.append(replace(node, dict(zip(signs, values))))
    pairs = [assigned(item) for item in whole]
    names = {str(pair[0]).split("_")[0] for pair in pairs if pair}
    if len(whole) == 1 and pairs[0]:
        return names, items(pairs[0][1])[1], whole
    if len(names) > 1 and None not in pairs and node[1] == "∧":      # x = 1, y = 2 is (1, 2)
        values = [value for _, value in sorted(pairs, key=str)]
        return names, [("tuple", "()", *values)], whole
    equations = any(kind(item) == "rel" and not pair for item, pair in zip(whole, pairs))
    if equations or len(names) != 1:
        return names, whole, whole
    return names, [pair[1] if pair else item for item, pair in zip(whole, pairs)], whole

def inequalities(node):
    return any(kind(part) == "rel" and part[1] != "=" for part in node[2:])

def same(a, b):
    """The verdict on two nodes."""
    a, b = (node[2] if kind(node) == "in" else node for node in (a, b))
    if kind(a) == kind(b) == "rel" and same_relation(a, b):
        return True
    if kind(a) == kind(b) == "list" and a[1] != b[1] and inequalities(a):
        return False                                   # x > 1 and x < 2, x > 1 or x < 2
    (names, values, whole), (other_names, other_values, other_whole) = items(a), items(b)
    if unordered(whole, other_whole):
        return True
    if names and other_names and names != other_names:
        return False                                   # both x = 5 and y = 5 are 5
    if (values, other_values) != (whole, other_whole) and unordered(values, other_values):
        return True
    try:
        unknowns = [name for name in symbols(a) | symbols(b) if name.name[0] != "±"]
        return len(unknowns) <= 1 and region(a) == region(b)
    except Exception:                                  # what sympy raises is no region
        return False

def unordered(left, right):
    """The same items in any order, repetitions counted."""
    rest = list(right)
    for item in left:
        found = [k for k, other in enumerate(rest) if same_item(item, other)]
        if not found:
            return False
        del rest[found[0]]
    return not rest

def in_order(left, right):
    return len(left) == len(right) and all(map(same, left, right))

def same_item(a, b):
    for ratio, value in ((a, b), (b, a)):
        if kind(ratio) == "ratio" and kind(value) == "value":
            return len(ratio) == 3 and equal(1 / ratio[2], value)
    if kind(a) != kind(b) or kind(a) == "matrix" and a.shape != b.shape:
        return False
    if kind(a) == "matrix":
        return all(map(equal, a, b))
    if kind(a) in ("tuple", "ratio", "set"):
        return a[:2] == b[:2] and in_order(a[2:], b[2:])  # of a ratio, the first part is 1
    if kind(a) == "mod":
        return in_order(a[1:3], b[1:3]) and bool(((a[3] - b[3]) / a[1]).is_integer)
    if kind(a) == "rows":
        return unordered(a[1:], b[1:])
    if kind(a) == "in":
        return a == b
    return {"value": same_value, "rel": same_relation, "list": same}[kind(a)](a, b)

def with_unit(value):
    """5 cm as (5, cm)."""
    words = [name for name in value.free_symbols if name.name[0] == "«"]
    number, unit = value.as_independent(*words, as_Add=False) if words else (value, ONE)
    if unit.is_Add:
        return (value, ONE)
    return (number, unit)

def same_value(a, b):
    """Numbers or formulas with their units: of a number one may be missing, none may differ."""
    (a, unit_a), (b, unit_b) = with_unit(a), with_unit(b)
    both = str(unit_a * unit_b)
    missing = 1 in (unit_a, unit_b) and is_number(a) and is_number(b)
    missing = missing and not re.search("[%°]»\\*", both)
    if not (unit_a == unit_b or missing or same_things(str(unit_a), str(unit_b))):
        return False
    factor = {"«%»": ONE / 100, "«°»": sympy.pi / 180}.get(both)
    if factor is None or equal(a, b):
        return equal(a, b)
    if unit_b == 1:
        return equal(a * factor, b)
    return equal(a, b * factor)

def same_things(a, b):
    """right triangles and triangles, not right triangles and left triangles."""
    (*adjectives, noun), (*others, other_noun) = a.strip("«#»").split(), b.strip("«#»").split()
    less, more = sorted((set(adjectives), set(others)), key=len)
    return noun == other_noun and "#" in a + b and less <= more

def same_relation(a, b):
    """Part by part, or one is a constant times the other (a positive one, of an inequality)."""
    if a[1] != b[1] or symbols(a) != symbols(b):
        return False
    if in_order(a[2:], b[2:]) or a[1] in "=≠" and in_order(a[2:], b[:1:-1]):
        return True
    if len(a) > 4 or {*map(kind, a[2:] + b[2:])} != {"value"}:
        return False
    f, g = a[2] - a[3], b[2] - b[3]
    if a[1] == "=":                                                  # y = 1/x is xy = 1
        f, g = (sympy.fraction(sympy.together(side))[0] for side in (f, g))
    names = sorted(symbols(f), key=str)
    point = {name: (13 + 7 * k) * ONE / (17 + k) for k, name in enumerate(names)}
    f0, g0 = replace(f, point), replace(g, point)
    if is_zero(f0) or is_zero(g0) or not vanishes(f * g0 - g * f0):
        return False
    return a[1] in "=≠" or bool(f0 / g0 > 0)

def region(node):
    """Intervals, unions, inequalities as a sympy set; (3, 2) and x^2 >= 0 are Hopeless."""
    result, parts = sympy.S.EmptySet, node[2:] if isinstance(node, tuple) else ()
    if kind(node) == "in" or node in NUMBER_SETS:
        result = NUMBER_SETS[node[2] if parts else node]
    elif kind(node) == "tuple" and len(parts) == 2:
        result = sympy.Interval(*parts, node[1][0] == "(", node[1][1] == ")")
    elif kind(node) == "set":
        operation = {"∪": sympy.Union, "∩": sympy.Intersection, "∖": sympy.Complement}[node[1]]
        result = operation(*map(region, parts))
    elif kind(node) == "list" and {"rel", "in"} & {*map(kind, parts)}:
        result = (sympy.Intersection if node[1] == "∧" else sympy.Union)(*map(region, parts))
    elif kind(node) == "list" and len(set(parts)) == len(parts):
        result = sympy.FiniteSet(*parts)
    elif kind(node) == "rel":
        compare_by = {"<": sympy.Lt, "≤": sympy.Le, "≠": sympy.Ne, "=": sympy.Eq}
        result = sympy.S.Reals
        for case in items(node)[2]:                                  # x ≠ ±3 is two of them
            for sign, left, right in zip(case[1], case[2:], case[3:]):
                result = result.intersect(compare_by[sign](left, right).as_set())
    if isinstance(result, sympy.Range) and result.is_finite_set and len(result) < 1000:
        result = sympy.FiniteSet(*result)
    if result == sympy.S.EmptySet or result == sympy.S.Reals and kind(node) == "rel":
        raise Hopeless("degenerate")
    # equal borders become equal objects: irrational ones are rounded to 20 digits
    return result.replace(lambda x: isinstance(x, sympy.Expr) and x.is_finite and not x.is_Rational,
                          lambda x: sympy.Rational(str(x.evalf(20))))

# ---------------------------------------------------------------------------- one case
# Takes two texts; gives the verdict, without limits: a worker runs this.

def choice(text):
    """(letter, what it stands for) of a multiple-choice answer, or (None, None)."""
    text = re.sub(r"\\(?:text|math)\w* ?\{([^{}]*)\}", r" \1 ", SPACING.sub(" ", text))
    bare = re.sub(r"[{}$*\\]", "", text).strip()
    option = r"(?i)(?:(?:option|choice|answer):? )?[(\[]? ?([A-J]) ?[)\]]?[.:]?"
    if match := re.fullmatch(option, bare):
        return match[1].upper(), ""
    match = re.match(r"[ {$*]*(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:] )[ }*.:]*(.*)", text, re.DOTALL)
    if not match or re.search(r"\([a-jA-J]\)|\b[A-J]\b|\bor\b", match[3]):
        return None, None
    return match[1] or match[2], match[3].strip(" $*")

def choices(text):
    """ABD from "A, B, D", "(A) and (B) and (D)" or "ABD"; "" if it is none."""
    text = re.sub(r"\\(?:text|math)\w*|[{}$()\\\s,;&]|\band\b", "", text)
    if re.fullmatch("A?B?C?D?E?F?", text):
        return text
    return ""

def time_or_date(text):
    """9:00 am of "9 a.m.", june 20 of "June 20th"; else None."""
    text = plain(text)
    if match := re.fullmatch(r"(\d{1,2})(?: (\d\d))? ?([ap]) ?m", text):
        return f"{int(match[1])}:{match[2] or '00'} {match[3]}m"
    month = re.match(r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]* \d", text)
    if month:
        return re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", text)
    return None

def compare(prediction, gold):
    """The whole comparison: as text, as a time, as choices, and as what they read as."""
    try:
        left, right = prepare(prediction), prepare(gold)
        if left == right:
            return bool(left)
        times = time_or_date(prediction), time_or_date(gold)
        if None not in times:
            return times[0] == times[1]
        several = choices(prediction), choices(gold)
        if min(map(len, several)) > 1:
            return several[0] == several[1]
        (letter, value), (gold_letter, gold_value) = choice(prediction), choice(gold)
        if letter and gold_letter:
            either_alone = not value or not gold_value
            return letter == gold_letter and (either_alone or alike(value, gold_value))
        if value and alike(value, gold) or gold_value and alike(prediction, gold_value):
            return True
        words = "«" in left + right and not re.search(r"[\d+=<>*/^_|{}\\]", left + right)
        return words and plain(left) == plain(right) != "" or alike(prediction, gold)
    except Exception:  # whatever untrusted text provokes
        return False

def alike(prediction, gold):
    """Read both; a second reading counts where the other side can only be of its kind."""
    left, right = readings(prediction), readings(gold)
    for (k, a), (j, b) in product(enumerate(left), enumerate(right)):
        alone = k + j == 0 or kind(a) == kind(b) == "list" or not kind(a) == kind(b) == "value"
        if k + j < 2 and (alone or (a if j else b).has(sympy.E)):
            try:
                if same(a, b):
                    return True
            except Exception:  # Hopeless, or what sympy raises
                pass
    return False

# ---------------------------------------------------------------------------- the command line

def main():
    if sys.argv[1:] == ["--worker"]:
        return work()
    if len(sys.argv) != 3:
        print("usage: python reward.py RESPONSE ANSWER", file=sys.stderr)
        sys.exit(2)
    load_sympy()
    response, answer = sys.argv[1:]
    sides = {"response": extract_answer(response), "answer": extract_answer(answer) or answer}
    lines = []
    for side, text in sides.items():
        lines.append(f"{side}: {text!r:.300}")
        for node in readings(text)[:1] if text and len(text) <= MAX_CHARS else []:
            lines.append(f"    read as {node}"[:500])
    lines.append(f"reward: {reward(response, answer)}")
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:                 # a full disk, or the reader is gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: standard output cannot be written: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
