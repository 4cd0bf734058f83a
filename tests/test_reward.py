"""reward.py: what counts as the same answer, and that nothing a model writes can break, stall or trick it."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import reward
from reward import extract_answer, is_equiv, rewards

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def table(text):
    """Lines of "answer   prediction   prediction ..." as (prediction, answer) pairs, both ways round."""
    rows = [line.split("   ") for line in text.strip("\n").split("\n")]
    pairs = [(prediction, row[0]) for row in rows for prediction in row[1:]]
    return pairs + [(gold, prediction) for prediction, gold in pairs]


def wrong(cases, expected):
    return [case for case, verdict in zip(cases, reward.judge(cases)) if verdict != expected]


def read_rows(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this repository")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(code, **options):
    """A program of its own, given as text: it has no file, no __main__ guard, and no pytest around it."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          timeout=100, **options)


def test_same_answers():
    assert wrong(table(SAME), True) == []


def test_different_answers():
    assert wrong(table(DIFFERENT), False) == []


def test_families():
    assert wrong(table(FAMILIES_SAME), True) == [] and wrong(table(FAMILIES_DIFFERENT), False) == []


def test_labelled_families():
    rows = read_rows("reward_cases_2.jsonl")
    verdicts = reward.judge([(row["prediction"], row["gold"]) for row in rows])
    paid = [row for row, verdict in zip(rows, verdicts) if verdict and not row["equal"]]
    starved = [row for row, verdict in zip(rows, verdicts) if row["equal"] and not verdict]
    assert paid == [] and len(starved) <= 0.01 * len(rows), starved


def test_cheap_answers_earn_nothing():
    """Constants of ATTACKS against answer keys of GOLDS: what is paid must be in ALLOWED. All pairs
    take a minute, so it is every seventh; set ATTACK=all for all of them."""
    golds, attacks = GOLDS.split("   "), ATTACKS.replace("\n", "   ").split("   ")
    allowed = set(table(ALLOWED))
    cases = [(attack, gold) for gold in golds for attack in attacks]
    if os.environ.get("ATTACK") != "all":
        cases = cases[::7]
    paid = [case for case, verdict in zip(cases, reward.judge(cases)) if verdict]
    assert [case for case in paid if case not in allowed and case[0] != case[1]] == []


def test_labelled_cases():
    rows = read_rows("reward_cases.jsonl")
    verdicts = rewards([row["response"] for row in rows], [row["answer"] for row in rows])
    assert [row["id"] for row, verdict in zip(rows, verdicts) if verdict != row["label"]] == []


def test_gsm8k_solutions_are_right_and_their_neighbours_wrong():
    rows = read_rows("gsm8k_test.jsonl")
    solutions = [row["solution"] for row in rows]
    answers = [int(row["answer"].replace(",", "")) for row in rows]
    assert rewards(solutions, list(map(str, answers))) == [1.0] * len(rows)
    assert rewards(solutions, [str(answer + 1) for answer in answers]) == [0.0] * len(rows)
    assert reward.IDLE == [] or all(reward.cheap("7", str(answer)) is not None for answer in answers)


@pytest.mark.parametrize("text, content", [
    (r"so \boxed{5}.", "5"), (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\fbox{7}", "7"), (r"\boxed {7}", "7"), (r"\boxed 7.", "7"), (r"$\boxed7$", "7"), (r"\boxed", None), (r"\boxed .5.", ".5"),
    (r"\boxed{\boxed{7}}", "7"), (r"\boxed{ \fbox{ 7 } }", "7"), (r"\boxed{1+\boxed{2}}", r"1+\boxed{2}"),
    (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{\{1}", r"\{1"), ("\\boxed{1\n2}", "1\n2"), (r"\boxed{ }", None),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"), (r"<think>\boxed{1}</think> 2", None), ("boxed{1}", None),
    (r"\boxed{1} \boxed{2", None), (r"\boxed{1} \boxed{}", None), (r"\boxedly{1}", None), ("", None),
    (r"{ \boxed{1}", "1"), (r"} \boxed{1}}", "1"), (r"\boxed{ \boxed{1}", "1"), (None, None)])
def test_extraction(text, content):
    assert extract_answer(text) == content


def test_order_and_kinds_of_input():
    responses = [rf"\boxed{{{k}+x}}" if k % 3 else rf"\boxed{{{k}}}" for k in range(60)]
    answers = [f"x+{k - k % 2}" if k % 3 else k - k % 2 for k in range(60)]
    assert rewards(responses, answers) == [float(k % 2 == 0) for k in range(60)]
    assert rewards([], []) == []
    assert rewards([None, 5, r"\boxed{5}", r"\boxed{5}"], ["5", "5", None, ""]) == [0.0] * 4
    assert reward.reward(r"\boxed{0.5}", r"$\boxed{\frac12}$") == 1.0
    assert is_equiv(None, "5") is False and is_equiv("5", 5) is True
    with pytest.raises(ValueError, match="2 responses, but 1 answers"):
        rewards(["", ""], [""])


BOMBS = ["9^{9^{9^9}}", "((99!)!)!", r"\binom{10^{20}}{10^{19}}", "2^" * 2000 + "2", "(" * 2000 + "1" + ")" * 2000,
         "9" * 4_900 + "^2", "1e99999999", "x+" * 2400 + "x", "1," * 2400 + "2", r"\frac{1}{" * 500 + "1" + "}" * 500,
         r"e^{e^{e^{e^{9}}}}", r"\sqrt{" * 600 + "2" + "}" * 600, "(x+1)" * 900, r"\pm1" * 1000, "|" * 4000,
         r"\begin{pmatrix}1&" * 200, "0." + "12" * 2000 + "...", "½" * 3000, "10^{10^{10}}!", "x_" * 2400,
         r"(x+1)^{10^9}", r"\sqrt{2}^{10^8}", "7" * 10**6, "\ud800", "\x00", "1 " * 2400, "{" * 10**6]


def test_bombs_are_worth_nothing_and_do_not_stop_the_rest():
    responses = [rf"\boxed{{{bomb}}}" for bomb in BOMBS] + [r"\boxed{1+x}"]
    assert rewards(responses, ["91"] * len(BOMBS) + ["x+1"]) == [0.0] * len(BOMBS) + [1.0]


PIECES = r"""\frac \sqrt { } ^ _ ( ) [ ] | \{ \} , 1 2 9 99999999999 x y e i ! !! + - * / = < \le \pm \in \cup \infty
\pi \sin \log_ \ln \text{ \begin{pmatrix} \end{pmatrix} & \\ \binom \% ^\circ : ; . ... \overline{ \left km \$ ½ ²
√ 10^{10} − \boxed{ </think> ٣ 0. ~ « » ⟪ ⟫ ↵ ⦃ ⦄ ± \mid __import__('os') {0} %s ∖ ℝ""".split()


def test_fuzz_never_raises():
    rng = random.Random(5)
    texts = ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 30))) for _ in range(200)]
    texts += [bytes(rng.randrange(256) for _ in range(40)).decode("latin-1") for _ in range(50)]
    texts += ["".join(chr(rng.randrange(0x110000)) for _ in range(20)) for _ in range(50)]
    golds = [rng.choice(["5", "x^2+1", r"\{1,2\}", "(1,2]", "Monday", rng.choice(texts)]) for _ in texts]
    assert set(rewards([rf"\boxed{{{text}}}" for text in texts], golds)) <= {0.0, 1.0}
    assert all(is_equiv(text, text) for text in texts if reward.normalise(text))


def test_no_text_is_executed(tmp_path):
    target = tmp_path / "executed"
    texts = [f"__import__('os').system('touch {target}')", f"open({str(target)!r},'w')",
             f"exec(\"open('{target}','w')\")", f"Symbol('x').subs(open('{target}','w'))"]
    assert not any(reward.judge([(text, gold) for text in texts for gold in ("0", "x + 1")]))
    assert not target.exists()


def test_a_killed_or_stopped_worker_costs_no_case(monkeypatch):
    assert is_equiv("x+1", "1+x")
    for process, *_ in reward.IDLE:
        os.killpg(process, signal.SIGKILL)
    assert reward.judge([("x+1", "1+x")] * 5) == [True] * 5
    # who is stopped is replaced; the new ones get all the time that a busy machine needs
    stop = reward.stop
    monkeypatch.setattr(reward, "PATIENCE", 3)
    monkeypatch.setattr(reward, "stop", lambda worker: (stop(worker), setattr(reward, "PATIENCE", 100)))
    for process, *_ in reward.IDLE:
        os.killpg(process, signal.SIGSTOP)
    assert reward.judge([("x+2", "2+x")] * 5) == [True] * 5


def reader_of(process):
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


def test_a_worker_killed_while_it_starts_is_replaced(monkeypatch):
    killed = []

    def spawn(*args, **options):
        process = posix_spawn(*args, **options)
        if not killed:
            killed.append(process)
            os.kill(process, signal.SIGKILL)
        return process

    posix_spawn = os.posix_spawn
    monkeypatch.setattr(os, "posix_spawn", spawn)
    monkeypatch.setattr(reward, "IDLE", [])
    assert is_equiv("x+1", "1+x") and killed


FORTY_HARD = r"""
import reward, sys
reward.rewards([r"\boxed{y=(%d+x+z+w)^{200}}" % k for k in range(40)], ["y=(%d+x+z+w)^{201}" % k for k in range(40)])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_owner_in_mid_batch(how):
    """Killed or interrupted; and a forked sibling, which holds a copy of all that is open, does not matter."""
    code = FORTY_HARD.replace("import reward, sys", """
import os, reward, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
reward.is_equiv("x+1", "1+x")
def sibling():
    time.sleep(1)
    if os.fork() == 0:
        print(*[os.getpid(), *(process for process, *_ in workers)], flush=True)
        time.sleep(60)
        os._exit(0)
workers = list(reward.IDLE)
threading.Thread(target=sibling).start()
""")
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    sibling, *workers = map(int, owner.stdout.readline().split())
    try:
        begun = time.monotonic()
        owner.send_signal(how)
        owner.wait(30)
        while any(map(alive, workers)) and time.monotonic() < begun + 30:
            time.sleep(0.05)
        assert workers and not any(map(alive, workers)) and alive(sibling)
    finally:
        os.kill(sibling, signal.SIGKILL)
        owner.stdout.close()


@pytest.mark.parametrize("before, words", [
    ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", ""),
    ("sys.executable = ''", ""),
    ("atexit.register(lambda: print(reward.is_equiv('x+2', '2+x'), reward.is_equiv('x', 'y'))); print('True', 'False'); sys.exit()", ""),
    ("del os.fork; sys.modules['resource'] = None", "fork"),
    ("sys.executable = '/bin/false'", "without a worker")])
def test_owners_of_all_kinds(before, words):
    """SIGCHLD ignored, no executable, at exit; without fork or a worker one sentence, and no traceback."""
    code = f"""
import atexit, os, signal, sys
sys.path.insert(0, '.')
if 'fork' in {before!r}: {before}
import reward
if 'fork' not in {before!r}: {before}
print(reward.is_equiv('x+1', '1+x'), reward.is_equiv('x+1', '2+x'))
"""
    process = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=ROOT, text=True,
                             capture_output=True, timeout=100)
    first = process.stdout.split("\n")[0]
    assert first == ("False False" if words else "True False"), process.stderr
    assert "Traceback" not in process.stderr and "ResourceWarning" not in process.stderr
    assert process.stdout.count("True False") == 1 + ("atexit" in before) - bool(words)
    assert (words in process.stderr) if words else process.stderr == ""


def test_plain_numbers_need_no_worker_and_nan_is_no_answer():
    code = "import os, sys; del os.fork; sys.modules['resource'] = None; import reward; " \
           "print(reward.rewards([r'\\boxed{0.50}', r'\\boxed{5}'], ['1/2', '6']))"
    process = run(code)
    assert process.stdout == "[1.0, 0.0]\n" and process.stderr == ""
    assert not any(is_equiv(text, text) for text in ("nan", "NaN", r"\text{nan}"))


def test_a_starved_worker_costs_no_case():
    """The limit is the reader's processor time: a pause of twice LIMIT in mid-case changes nothing."""
    assert is_equiv("x+1", "1+x")
    process = reward.IDLE[-1][0]
    reader = reader_of(process)
    os.kill(reader, signal.SIGSTOP)
    timer = threading.Timer(2 * reward.LIMIT, os.kill, (reader, signal.SIGCONT))
    timer.start()
    assert is_equiv("x+3", "3+x") and alive(reader)
    timer.join()


def test_threads():
    cases = [[(f"x+{k}", f"{k}+x" if k % 2 else f"{k + 1}+x") for k in range(t, t + 20)] for t in range(4)]
    results = [None] * 4

    def work(t):
        results[t] = reward.judge(cases[t])

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[k % 2 == 1 for k in range(t, t + 20)] for t in range(4)]


def in_child(queue):
    queue.put(rewards([r"\boxed{x+1}", r"\boxed{x+1}"], ["1+x", "x"]))


def test_a_forked_child_has_workers_of_its_own():
    assert is_equiv("x+1", "1+x")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [1.0, 0.0]
    child.join(10)
    assert is_equiv("x+2", "2+x") and child.exitcode == 0


def test_a_notebook_and_a_lower_limit_of_memory():
    """The text is executed without a __file__, under a hard limit below MEMORY; nothing stays behind."""
    resource_limit = 900 << 20
    code = ("import resource; resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))\n"
            "scope = {{'__name__': 'cell'}}\nexec(open('reward.py').read(), scope)\n"
            "print(scope['is_equiv']('x+1', '1+x'), *[worker[0] for worker in scope['IDLE']])")
    process = run(code.format(resource_limit))
    verdict, *pids = process.stdout.split()
    assert verdict == "True" and process.stderr == "" and pids
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_import_is_light():
    process = run("import sys, reward; print(reward.is_equiv('0.50', '1/2'), 'sympy' in sys.modules, reward.IDLE)")
    assert process.stdout == "True False []\n", process.stderr


@pytest.mark.parametrize("arguments, code, words", [
    ([r"so \boxed{\frac{2}{4}}", "0.5"], 0, ["reward: 1.0", "read as 1/2"]),
    (["no box", "0.5"], 0, ["reward: 0.0"]), (["one"], 2, ["usage"])])
def test_command_line(arguments, code, words):
    command = [sys.executable, str(ROOT / "reward.py"), *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    output = process.stdout + process.stderr
    assert process.returncode == code and all(word in output for word in words) and "Traceback" not in output


GOLDS = r"0   1   3   \frac12   x   y=2x+1   (3,2)   [0,\infty)   x>2   \{1,2\}   \emptyset   3:4   A   \text{no solution}"
ATTACKS = r"""0   1   -1   2   3   5   10   12   100   x   y   n   x=x   x<x   x\ne x   x>x   x\le x   x-x=0   0=0
1=1   0<1   x^2\ge 0   x^2<0   x+y=x+y   (-\infty,\infty)   (\infty,-\infty)   \mathbb{R}
\emptyset   \{\}   \{\emptyset\}   ()   []   {}   \{0\}   0:0   1:0   0:1   5:0   1:1   12:00
\infty   -\infty   \infty-\infty   \frac{\infty}{\infty}   1/\infty   0\cdot\infty   1/0   0/0   0^0
nan   NaN   inf   oo   zoo   None   null   undefined   \text{undefined}   \text{no solution}
\text{DNE}   \text{all real numbers}   \text{any number}   \text{the answer}   \text{answer}
\text{correct}   \text{true}   true   yes   no   A   B   C   D   E   (A)   \text{(A) or (B)}
A,B,C,D   \text{A or B}   \text{all of the above}   \text{none}   \pm 1   \pm x   \ldots   ...   ?
*   1,2,3,4,5   1\text{ or }2\text{ or }3   \{1,2,3,\ldots\}   1,2,\ldots   [0,1]   (0,1)
[0,\infty)   x>0   x\in\mathbb{R}   x=1\text{ or }x=2   x\ge0   -x\le x   \text{not }1
\text{at least }1   \text{about }5   5\text{ or more}   1\text{ to }10   [1,10]   1<x<10   \text{cm}
\text{apples}   \%   ^\circ   \$   \text{units}   3\text{ dozen}   \text{half of }6   \text{twice }3
\text{square root of }9   3\text{ squared}   \text{one}   \text{three}   0\text{ apples}
0\text{ wrong}   \sin 0   \log 1   \ln 1   e^0   x^0   0x   0\cdot x   x/x   1^x   (-1)^2   |x|-|x|
\sqrt{0}   \lfloor x\rfloor-\lfloor x\rfloor   \max(0,1)   \gcd(0,0)   0!   \binom{0}{0}
\begin{pmatrix}\end{pmatrix}   \begin{pmatrix}0\end{pmatrix}   \begin{pmatrix}x\\y\end{pmatrix}
(x,y)   (a,b)   (3,2)   x=y   y=x   a=b   f(x)   f(x)=f(x)   y=f(x)   10^{10^{10}}   9^{9^{9^9}}
((9!)!)!   10^{-400}   e^{-1000}   1-\cos(10^{-200})   10^{-10^{10}}   \epsilon   +C   C   x+C
\text{NaN}   i   \sqrt{-1}   i^i   \sin x>2   \sin x<2   2<x<1   [2,1]   [5,5]   (5,5)   x\ne0
(-\infty,0)\cup(0,\infty)   \mathbb{Z}   \mathbb{N}   x\in\emptyset   x\in x   1\in\{1\}   1=x=2
x=1=2   0.999...   0.\overline{9}   1.000000000000001   |   \frac{}{}   \sqrt{}   ^   _   =   <
\boxed{}   \text{}   \\   \{x\}   \{x|x\}   \{x:x=x\}   x:x   x:y   a:a   1:x   -0   +0   0.0   00
\text{or}   \text{and}   \lor   \land   ∅   ∞   ½   ﹣1   x'   \therefore   \approx 1   x\approx x
1\approx x"""
ALLOWED = r"""
A   (A)
\{1,2\}   x=1\text{ or }x=2
0   x-x=0   0=0   \{0\}   0\text{ apples}   \sin 0   \log 1   \ln 1   0x   0\cdot x   |x|-|x|   \sqrt{0}   -0   +0   0.0   00
0   \gcd(0,0)   \lfloor x\rfloor-\lfloor x\rfloor
1   1=1   1:1   e^0   x^0   x/x   1^x   (-1)^2   \max(0,1)   0!   \binom{0}{0}   0.999...   0.\overline{9}   x:x   a:a   \approx 1   1\approx x
3   3\text{ squares}   \text{square root of }9
\frac12   ½
x   y=x   \{x\}   \{x|x\}
[0,\infty)   x\ge0   -x\le x
\emptyset   \{\}   ∅   x\in\emptyset
"""

SAME = r"""
1048576   1,048,576   1{,}048{,}576   1 048 576   1\,048\,576   1,\!048,\!576
12345.67   12,345.67
5   5.   |-5|   \left|-5\right|   \lvert -5\rvert   |3+4i|   5\text{ cm}   5 cm   5~\text{cm}   5\ \mathrm{cm}   5 \text{ cm}^2   \$5   \$5.00   $5   $\$5$   \text{\$}5   5\text{ USD}   €5   5\text{ apples}   5 apples   \text{5 apples}   5 \text{ ways}   x = 5 \text{ cm}   x=5   5=x   x_1=5   AB=5   |AB| = 5   f(2)=5   \text{Total}=5   x=2+3=5   2+3=5   \{5\}   𝟓   5​   \text{The answer is } 5   \text{Answer: }5   The answer is 5.   = 5   \approx 5   \therefore 5   5 \quad   5\\   5 \; \text{m}   \left. 5 \right.   ￥5   \overline{AB}=5   5\text{ cm.}
0.5   .5   5\times10^{-1}   ½   \sin(\pi/6)   n=\frac12   1/3+1/6   \log_{4}2
1/2   0.50   \sin(30^\circ)   \sin 30°   \sin\frac{\pi}{6}   1／2
7   +7   007   \max(3,7)   7 \text{ ways}   7 \text{ people}   7\text{ units}   \boxed{x=7}   x \approx 7   x=7.0
0   -0   e^{i\pi}+1
12   $12$   \(12\)   \[12\]   \text{12}   \mathrm{12}   \mathbf{12}   \textbf{12}   {12}   (12)   12.   \,12\,   \boxed{12}   \displaystyle 12   3\cdot 4   3*4   £12   12 \text{ pounds}   12\text{ km/h}   \text{Area} = 12 \text{ cm}^2   A = 12   3×4   \mbox{12}   \ 12   12\;   \left(12\right)   \{12\}   [ABC]=12   \text{The area is }12   \text{area} = 12\text{ cm}^2   \operatorname{lcm}(4,6)   \text{lcm}(4,6)
1200   1.2e3   1.2\times10^{3}   1.2 \cdot 10^3   1.2*10^3   1.2 × 10³
\frac{3}{2500}   1.2\times 10^{-3}
1000   10^{3}   1 000
1{,}000   10^3
3   3.0   3.000   12 \div 4   e^{\ln 3}   \log_2 8   \log_{2}{8}   \log_{2}(8)   \log_2(8)   \log_{10} 1000   \log 1000   \lg 1000   \log_28   \frac{\ln 8}{\ln 2}   \lfloor 3.7 \rfloor   3\text{ hours}   6÷2   ٣   \left\lfloor \frac{7}{2}\right\rfloor   \log_ 2 8   3\text{h}   \ln(e^3)   \lfloor\pi\rfloor   \min\{3,4\}
1   \log_2 3\cdot\log_3 2   0!   \binom{10}{0}   100\%   \sqrt[2025]{1}   \log_{10}2+\log_{10}5
2/3   0.6666666666666666   0.6666666666666667   \frac{1/2}{3/4}   ⅔
7/3   2.3333333333333335
\frac34   \tfrac{3}{4}   \frac{NO}{BO}=\frac34   AB/CD=0.75
0.75   \dfrac34   \frac{3}4   \frac3{4}   \frac 3 4   ¾
-0.75   \frac{3}{-4}   −¾
\frac74   1\frac{3}{4}
7/4   1 3/4   1 \frac{3}{4}   1\,\frac{3}{4}   1\frac34
1.75   1\dfrac{3}{4}   1¾
-2.5   -2\frac{1}{2}
2.5   2½   2\frac{1}{2}\text{ hours}
\frac13   ⅓   33\frac{1}{3}\%   \frac{1}{3}\text{ cm}   P(A)=\frac13   \frac13 \approx 0.33   a = \frac{1}{3}
5/12   \frac{\frac{1}{2}+\frac{1}{3}}{2}
\frac{2}{3}   1-\frac{1}{3}
\pi/6   \frac{\pi}{6}   \arcsin\frac{1}{2}   \sin^{-1}(1/2)
1024   2^{10}   2^10   2**10
720   6!   5!\cdot 6   (3!)!
90   \frac{10!}{8!}   90°
10   10\mbox{ cm}   10\hbox{ cm}   10\textrm{ cm}   10\mathrm{~cm}   10~\mathrm{cm}^{2}   BC = 10
120   \tbinom{10}{3}   5！
13   3\times4+1
14   2(3+4)   2[3+4]   (2)(7)   17-3
4   \sqrt{16}   \sqrt16   sqrt(16)   √16   √(16)   \sqrt{2}\sqrt{8}   8^{2/3}   \lceil 3.2 \rceil
2   \sqrt[4]{16}   16^{0.25}   \ln(e^2)   \sec 60^\circ   \csc 30^\circ   ∛8   \sqrt{2}^2   (\sqrt{2})^{2}   2\text{ boxes}   \sqrt{\sqrt{16}}   \log_3 9   \alpha=2   \sqrt[3]{5\sqrt{2}+7}-\sqrt[3]{5\sqrt2-7}
-2   \sqrt[3]{-8}   (-8)^{1/3}   \log_5\frac{1}{25}
\sqrt3   \frac{\sqrt{12}}{2}
2\sqrt{3}   \frac{6}{\sqrt{3}}   2√3
\sqrt{45}   3\sqrt{5}   3 \sqrt 5
3\sqrt{5}   3√5
\frac{\sqrt 6}{2}   \sqrt{6}\cdot\frac{1}{2}
2\pi   2π   2pi   2\pi\text{ cm}   ２π
4\pi/3   \frac{4}{3}\pi
\frac43\pi   4π/3
3\ln 2   \ln 8
-\ln 2   \ln\frac{1}{2}
\log 2+\log 3   \log 6
\frac{1}{\log_2 3}   \log_3 2
6   \gcd(12,18)   2·3   6 \text{ inches}   \log_{2}32+\log_2 2   m=\frac{12}{2}   \gcd(-12,18)   \lcm(2,3)   \gcd(10^{30},6\cdot 7^{20})+4
\frac12   \sin 30^\circ   \log_9 3   \sin\left(\frac{5\pi}{6}\right)
-1   \cos\pi   e^{i\pi}   i^2
\frac{\pi}{4}   \tan^{-1} 1   \arctan 1   45^\circ   \frac{\pi}{4}\text{ radians}   4\arctan\frac15-\arctan\frac1{239}
\pi/4   \operatorname{arctan}(1)   \mathrm{arctan}(1)   \frac{\pi}{4}\text{ rad}
\frac{1+\sqrt5}{4}   \cos 36^\circ
\frac{\sqrt6-\sqrt2}{4}   \sin 15^\circ
2i   \sqrt{-4}   (1+i)^2
i   \sqrt{-1}   \frac{1+i}{1-i}   \mathrm{i}   e^{\pi i/2}
-i   \frac{1}{i}   i^3
\frac{1}{2}+\frac{\sqrt3}{2}i   e^{i\pi/3}
\frac{1+i\sqrt3}{2}   e^{\frac{i \pi}{3}}
1+4^{500}   2^{1000}+1
100 \cdot 99!   100!
\frac{1}{2004!}   \frac{2005}{2005!}
5\ \mathrm{cm^2}   5\,\text{cm}^2
5\text{ cm}^2   5 \text{ cm²}
25   25\text{ square units}   25\text{ sq. units}   25^\circ\text{C}   25\%   25\text{ percent}   25\text{%}
9.8   9.8\text{ m/s}^2   9.8 \frac{\text{m}}{\text{s}^2}   9.8\text{ m s}^{-2}   9.8\ \mathrm{m\cdot s^{-2}}
60 \text{ miles per hour}   60 \text{ mph}
60   60\text{ miles/hour}   \angle ABC=60^\circ   60^{ \circ }   60\,^\circ   60\degree   60\text{°}   60^\circ\mathrm{C}   60 ^\circ F
5 \text{ dollars}   \$5
5 euros   5€
75   75\text{ cents}
45   45^\circ   45 degrees   45\textdegree   45º   m\angle A = 45^\circ   \sqrt{2025}
0.25   25\%   25\,\%
\frac14   25\%
25\%   25%
16\pi   16\pi\text{ cm}^3
12 \text{ kilometers per hour}   12\text{ km/h}
100   100 \text{ students}   100\%
8   8\text{ years old}   8 years
x+x   2x
2x   2*x   \sqrt[3]{8x^3}
x^2+x   x(x+1)
a(b+c)   ab+ac
x+1   \frac{x^2-1}{x-1}   𝑥+1
\frac{5x}{6}   \frac{x}{2}+\frac{x}{3}
\sqrt{x}   x^{1/2}
|x|   \sqrt{x^2}
2\ln x   \ln x^2
\ln x+\ln y   \ln(xy)
\frac{1}{e^x}   e^{-x}
2\cdot 2^n   2^{n+1}
n(n-1)   \frac{n!}{(n-2)!}
n(n+1)   n^2+n
\frac{\sin x}{\cos x}   \tan x
1+\tan^2 x   \sec^2 x
\frac12\sin 2\theta   \sin\theta\cos\theta
\sin\theta   \sin θ
a_{n}   a_n
a_{n + 1}   a_{n+1}
(x-1)(x+1)   P(x)=x^2-1
\frac{x-1}{2}   f^{-1}(x)=\frac{x-1}{2}
2y=4x+2   y=2x+1
y=-\frac{2}{3}x+2   2x+3y=6
x=5   5
x=5.0   x = 5
\frac{\pi}{3}   \theta=\frac{\pi}{3}   60^\circ
x^2+y^2-4x+2y-4=0   (x-2)^2+(y+1)^2=9
\frac{bh}{2}   \frac{1}{2}bh
A=r^2\pi   A=\pi r^2
(x^2+2x+1)^{50}   (x+1)^{100}
x^2+1   x**2+1
(x+1)/2   \frac{x+1}{2}
\frac34 x^2   \frac{3x^2}{4}   3/4 x^2
v   \mathbf{v}
\lambda \cdot \lambda   \lambda^2
6^x   2^{x}3^{x}
(0.5,3)   (\frac12,3)
(1,2,3.0)   (1,2,3)
(1,2)   (x,y)=(1,2)   x=1,y=2   x=1\text{ and }y=2   x\in(1,2)   x>1\text{ and }x<2   \{x: 1<x<2\}   \{x | 1<x<2\}   （1，2）   \bigl(1,2\bigr)   \Big(1,2\Big)   <1,2>   \langle 1,2\rangle
(3,4),(1,-2)   (1,-2) \text{ and } (3,4)
\{3,2,1\}   \{1,2,3\}
\{2,1\}   \left\{1,2\right\}   \lbrace 1,2\rbrace
2,1   1,2   x=1, x=2   x=1,2
1,2   1 \text{ and } 2   1\text{ or }2   1;2   x=1\text{ or }x=2   x=1 or x=2   {1，2}
3,2,1   1, 2, \text{ and } 3   1, 2, and 3
x=2, x=1   x = 1, 2
\{1,2\}   x \in \{1,2\}
\pm3   x=\pm 3
\pm 3   ±3   +3,-3
-\sqrt2,\sqrt2   \pm\sqrt{2}
-1,1,3   \pm1,3
\{-1,1\}   \{\pm 1\}
\left[1,2\right)   [1,2)
1 <= x <= 2   [1,2]
2\ge x\ge 1   [1,2]
x < 1   (-\infty,1)
1<x   (1,\infty)   x>1
x>1   (1,+\infty)   2x>2   -x<-1   x-1>0
x\ge1   x\in[1,\infty)
(-\infty,1)\cup(2,\infty)   x \in (-\infty,1)\cup(2,\infty)   (2,\infty)\cup(-\infty,1)   (-∞,1)∪(2,∞)
(5,6)\cup(1,2)\cup(2,3)   (1,2)\cup(2,3)\cup(5,6)
(0,2]\cup[-2,0)   [-2,0)\cup(0,2]
(-\infty,\infty)   \mathbb{R}   x \in \mathbb{R}
\mathbb{R}   \R   \text{all real numbers}
(-\infty,0)\cup(0,\infty)   \mathbb{R}\setminus\{0\}   x\ne 0
\mathbb{R}\setminus\{0\}   x\neq 0
(-2,2)   |x|<2   x^2<4
|x|<2   -2<x<2
y\ge x   x\le y
y<1-x   x+y<1
\emptyset   ∅   \{ \}
\begin{pmatrix}1&2\\3&4\end{pmatrix}   \begin{pmatrix}1&2\\3&4\\\end{pmatrix}   \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
\begin{pmatrix}1\\2\end{pmatrix}   \left[\begin{array}{c}1\\2\end{array}\right]   \begin{matrix}1\\2\end{matrix}   \frac12\begin{pmatrix}2\\4\end{pmatrix}   \begin{pmatrix}x\\y\end{pmatrix}=\begin{pmatrix}1\\2\end{pmatrix}   A=\begin{pmatrix}1\\2\end{pmatrix}   \mathbf{v}=\begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1/2&-\sqrt{3}/2\\\sqrt{3}/2&1/2\end{pmatrix}   \begin{pmatrix}\frac{1}{2}&-\frac{\sqrt3}{2}\\[4pt]\frac{\sqrt3}{2}&\frac12\end{pmatrix}
\langle 1, 2 \rangle   \langle 1,2\rangle
3:4   6:8   3\colon 4   \frac{3}{4}
101_{2}   101_2
101_2   (101)_2   101_{(2)}
\infty   +\infty   ∞   infinity
Yes   \text{yes}   \textit{yes}
yes   Yes.   \textbf{Yes}   \mathrm{Yes}   ``yes''   "yes"
even   \text{ even }
\text{blue and red}   red and blue
no solution   \text{no solution}
\text{B}   B
B   \textbf{(B)}   (B)   B.   [B]   \mathrm{B}   \boxed{B}   (B) 12   B: 12   B) 12   \textbf{(B)}\ 12   \text{(B) } 12   \textbf{B}   \text{Option B}
A, C   A,C   \text{A and C}
undefined   \text{undefined}
DNE   \text{DNE}
-5   －５   –5   -\$5   5i\cdot i
x^2   x²   x\cdot x   xx
1+x^2   x²+1
x_1   x₁
0.01   10⁻²
256   2⁸
\frac{\pi}{2}   ½π   π/2
3.5   ３．５   \frac{7}{2}\text{ units}
5/3   1⅔
7/8   7⁄8
\frac{x^3}{3}+C   \frac{1}{3}x^3 + C
\frac{-1}{2}   -\frac{1}{2}
0.3   0.1+0.2   0.1*3
1000000000000000000000000000000   10^{30}
\frac{1}{998001}   1/998001
7654321   7.654321e6   7.654321\times10^{6}
-12   \mathbf{-12}   \text{-12}   - 12   -\,12
\frac79   \dfrac{ 7 }{ 9 }   \dfrac 79   \frac{7}{9}.   7 / 9   7\,/\,9   {7}/{9}   (7)/(9)   \frac{+7}{9}
7/9   \tfrac79   \sfrac{7}{9}   \nicefrac{7}{9}
\frac{7x}{9}   \frac{7}{9}x   7x/9
\frac{33}{8}   4\tfrac18   4\,\tfrac{1}{8}   4 + \frac{1}{8}   4\;\frac{1}{8}   4⅛
4\frac18   4.125
18 kilometres   18\text{km}
18   \text{18 km}   \text{18} \text{ km}   18 \, \text{km/h}   18\ \text{km}\cdot\text{h}^{-1}   18\text{ g/cm}^3   18\text{ N}   18\text{ J}   $18$ km   $18 \text{ km}$   18\mathrm{\ km}   18 \mathrm{\,km}
18\ \mathrm{m}^2   18\text{ square meters}
18\text{ cm}^3   18\text{ cubic centimeters}
40.0   40\%
\frac{2}{5}   40 \%
3.75   \$ 3.75   3.75\$   \text{\$3.75}   \$\frac{15}{4}
5\text{ meters}   5\text{ m}
5\text{ seconds}   5\text{ s}
1\text{ ft}   1\text{ foot}
\sqrt{25\cdot2}   \sqrt{50}
2\sqrt[3]{2}   \sqrt[3]{16}
\sqrt2   2^{1/2}   2^{0.5}   x = \sqrt{2}   \max(1,\sqrt2)   \min\{\sqrt2,2\}
\frac{\sqrt2}{2}   2^{-\frac12}   √2/2
\sqrt2+\sqrt3   \sqrt{5+2\sqrt{6}}
\frac{1+\sqrt5}{2}   \sqrt[3]{2+\sqrt5}   (√5+1)/2
\ln 6   \ln 2 + \ln 3
9   e^{2\ln 3}   f(3) = 9   3\text{ squared}   3\text{ times }3
\frac1e   e^{-1}
42   7! / 5!
121   5!+1
0.00015   1.5\cdot10^{-4}   1.5 × 10^-4   1.5e-4   1.5E-04
-3+2x   2x-3
2x-3   2(x-\frac32)
(x+3)^{2}   x^{2}+6x+9
p^{-1}+q^{-1}   \frac{p+q}{pq}
3x-y=4   6x-2y=8   x=\frac{y+4}{3}   y+4=3x
y=3x-4   3x-y-4=0   -3x+y=-4   \frac{y}{3x-4}=1
t^2   g(t) = t\cdot t
a+b   h(a,b)=a+b
\sin^2 t   1-\cos^2 t   (\sin t)^2   \sin^{2}{t}
2\cos^2 t-1   \cos(2t)
\sec^2 t   \tan^2 t+1
-3i+2   2 - 3i
2-3i   2-3\mathrm{i}   \frac{5-i}{1+i}
1-3i   (2-i)(1-i)
-\frac12   \cos 120^\circ
\sqrt{3}   \tan 60^\circ
1^\circ   \pi/180
(3,-5)   ( 3 , -5 )   \left( 3, -5 \right)   (3.0,-5)   (6/2,-5)   (x,y) = (3,-5)   x=3, y=-5   （3，−5）
\left\langle 3, -5 \right\rangle   \langle3,-5\rangle
8,9   \{9, 8\}   x=8\text{ and }x=9   x=8,9   x \in \{8,9\}   x_1=8,x_2=9   x=8\lor x=9   x=8 \text{, } x=9   ｛8，9｝
\{8,9\}   8,9   8 and 9   x=8 \text{ or } x=9
8, 9   x_1 = 9, \quad x_2 = 8   x = 8 \quad\text{or}\quad x = 9
\pm 9   9\text{ or }-9
\frac{1}{\sqrt3},-\frac{1}{\sqrt3}   \pm\frac{\sqrt3}{3}
2i,-2i   \pm2i
(1,2),(-1,2)   (\pm 1, 2)
(2,6]   6\ge x>2   2<y\le 6   x>2 \text{ and } x\le 6   \{x \mid 2<x\le 6\}   \left\{x : 2<x\le 6\right\}   \left\{x\in\mathbb{R}: 2<x\le 6\right\}   x ∈ (2,6]   2＜x≤6
(2^{1/2},\pi)   (\sqrt2,\pi)
(-\infty,2)   x<2
[-2, +\infty)   x \ge -2
(-\infty,-2]\cup[2,\infty)   x\ge 2 \text{ or } x\le -2   |x|\ge 2
x\in(-\infty,-2]\cup[2,\infty)   x\le-2\text{ or }x\ge2
\{\}   \varnothing
\left(\begin{matrix}4\\5\end{matrix}\right)   \begin{bmatrix}4\\5\end{bmatrix}
\begin{pmatrix}1&0\\0&1\end{pmatrix}   \left[\begin{array}{cc} 1 & 0 \\ 0 & 1 \end{array}\right]
\begin{bmatrix} a & b \\ c & d\end{bmatrix}   \begin{pmatrix} a & b \\ c & d\end{pmatrix}
3:11   3 : 11   6:22   \frac{3}{11}
Saturday   \mathrm{Saturday}   Saturday!   \text{ Saturday }   (Saturday)
isosceles triangle   \text{isosceles}\ \text{triangle}   isosceles~triangle
\text{Bob and Alice}   \text{Alice and Bob}
A   A)   \text{A.}   \text{A)}   [A]   **A**   {\bf A}   \textbf{A.}   \boxed{A}   \text{Choice A}   (A)\ 5   Ａ   Ⓐ
\text{A}   A.
E   \text{E}
2√3   √12
x^4   x⁴
-9,9   ±9
\beta+\alpha   α+β
\frac{3}{2}\pi   \frac{3\pi}{2}
\frac{3}{\sqrt{2}}   \frac{3\sqrt{2}}{2}
\frac{1}{\sqrt{10}}   \sqrt{10}/10
\frac{1+\sqrt3}{2}   \frac{1}{2}(1+\sqrt{3})
x^3-x^2+x-1   (x^2+1)(x-1)
(2-x)(2+x)   -x^2+4
3x^2-6x+1   3(x-1)^2-2
\frac{2n^3+3n^2+n}{6}   n(n+1)(2n+1)/6
(-1)^{n}   (-1)^n
-(-1)^n   (-1)^{n+1}
xe^x+e^x   e^{x}(x+1)
x e^{x}   xe^x
\tan^{-1}(x)   \arctan(x)
\arcsin x   \sin^{-1}x
\cos(x)+\sin(x)   \sin x+\cos x
\sin x   \tan x \cos x   \cos\left(x-\frac{\pi}{2}\right)
\sin(-x)   -\sin x
\sin(x)/x   \frac{\sin x}{x}
v u^2   u^2v
y=\frac{x^2}{4}   x^2=4y
y = \frac14 x^2   x^2 = 4y
9(x-1)^2+4y^2=36   \frac{(x-1)^2}{4}+\frac{y^2}{9}=1
r = 2\cos \theta   r=2\cos\theta
x^3-1   P(x) = x^3 - 1
\frac{n^2+n}{2}   S_n=\frac{n(n+1)}{2}
\{0,1\}   x=0,x=1
(0,1)   x=0 \text{ and } y=1   0<t<1
(3,4,5)   (a,b,c)=(3,4,5)   a=3,b=4,c=5
(0,0),(1,1)   \{(0,0),(1,1)\}   (x,y)=(0,0),(1,1)   (x,y)=(0,0)\text{ or }(x,y)=(1,1)
(1,1),(0,0)   (0,0) \text{ and } (1,1)
(0.5,-0.75)   \left(\frac{1}{2},-\frac{3}{4}\right)
-1\pm 2i   x=-1\pm2i
-\frac12+\frac{\sqrt3}{2}i, -\frac12-\frac{\sqrt3}{2}i   \frac{-1\pm i\sqrt3}{2}
\{2,3,5,7\}   2,3,5,7
7,5,3,2   2, 3, 5, and 7
(0,\infty)   x>0
[0,\infty)   t\ge 0
|x|<1   (-1,1)   x\in(-1,1)
|x|>1   (-\infty,-1)\cup(1,\infty)
x<-1\text{ or }x>1   (-\infty,-1)\cup(1,\infty)
(0,3) \cup (-3,0)   (-3,0)\cup(0,3)
\{2\}\cup[0,1]   [0,1]\cup\{2\}
x>2   2x-4>0
x\le2   3x+1\le 7
b>a   a<b
c\ge b\ge a   a \le b \le c
\begin{pmatrix} 1/5 & 2/5 \\ 0 & 1 \end{pmatrix}   \frac{1}{5}\begin{pmatrix} 1 & 2 \\ 0 & 5 \end{pmatrix}
x=1,y=2   \begin{cases}x=1\\y=2\end{cases}
4:6   2:3
1011_2   1011_{(2)}
1.5   \$1.50   150\%
12000   \$ 12,000
0.035   3.5 \text{ percent}
72\text{ square inches}   72\text{ in}^2
72   72\ \text{in.}^2   72\text{ in.}
9.8\,\mathrm{m/s^2}   9.8\,\mathrm{m\,s^{-2}}
20   20\mathrm{kg}   20 \operatorname{cm}
\frac\pi2   \frac{\pi}{2}\text{ radians}
30,60,90   30^\circ, 60^\circ, 90^\circ
\{30,60\}   \{30^\circ,60^\circ\}
12,15   12\ \text{and}\ 15   12, \text{and } 15
TRUE   \text{True}.
A,C   \text{(A) and (C)}
C   \text{C})   \mathbf{C}   \mathbf{(C)}   \text{Choice (C)}   \text{Answer: C}   C: 5 apples   \mathrm{(C)}\ 15   \text{C. } 15   \text{(C)}~15
\text{neither}   neither
not enough information   \text{Not enough information}
3,2   \text{2 and 3}
32   \frac{2^{2025}}{2^{2020}}
9900   \frac{100!}{98!}
10^{-10}   0.1^{10}
0.14285714285714286   1/7
0.0001   1e-4
121932631112635269   123456789 \times 987654321
\frac{-1+\sqrt5}{4}   \sin 18^\circ
(\ln x)^2   \ln^2 x
\max(b,a)   \max(a,b)
\sqrt{3}i   i\sqrt{3}
e^{i\theta}   \cos\theta+i\sin\theta
\frac{1+i}{\sqrt2}   \sqrt{i}
32349   32,\! 349
11111111   11,\! 111,\! 111
\sinh^{-1} x   \operatorname{arcsinh} x   \operatorname{arsinh}(x)   \text{arcsinh}(x)
h_\theta   h_{\theta}
28   28 pct   28\%   28\ (\text{cm})   28 (cm)
\yen 50   50   ¥50
11:21   V_1:V_2=11:21   22:42
2x+1   y=2x+1   A=1+2x
\begin{pmatrix}7\\15\end{pmatrix}   \begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1\\3\end{pmatrix}
9720000   2^6 3^5 5^4
-3   \text{negative }3   \text{minus }3
"""

DIFFERENT = r"""
1048576   1,048,591   1.048.576
21   12
1/3   0.33   0.333   1/2
\frac{1}{3}   0.3333333
2/3   0.667
\sqrt2   1.41   \sqrt2+10^{-60}
\sqrt{2}   1.414213562   1.4142135623730951
\pi   3.14   3.14159265358979   22/7   3.141592653589793
e   2.718
\frac{1+\sqrt5}{2}   1.618
0.50001   0.5
\frac{1}{2}   1\frac12
11/2   1\frac12   1 1/2   1½
\frac{2}{3}   2\frac{1}{3}
-\frac12   -1\frac12
1.2\times 10^4   1.2\times 10^3
120   1.2e3
0   10^{-20}   10^{-100}\pi   10^{-400}\sqrt2   \emptyset   \text{no solution}   undefined   null   \sqrt{}   {}   ()
0   )   exit()   10^{-10^{10}}   2^{-99999999}   e^{-10^9}   \frac{1}{10^{10^{10}}}   \sin(10^{10^{10}})   y=3x-4
0   10^{-300}   0.0000000000001   __import__('os').system('touch x')   import os; os.system("ls")   quit()
0   sys.exit(0)   1e-400
1   1+10^{-50}   1.0000001   0.999999   i   xy=1   1,1   1,2   \infty   exec("1")   True   \sqrt{\sqrt{\sqrt{2}}}
1   1+10^{-15}   1.000000000000001   0.999999999999999   0.9999999999999999   1 if True else 0
\pi\cdot10^{200}   \pi\cdot 10^{200}+1
\frac{1}{2006!}   \frac{1}{2004!}
2006!   2004!
2^{100}+1   2^{100}
123456789012345679   123456789012345678
100000000000000000000   99999999999999999999
262537412640768744   e^{\pi\sqrt{163}}
24   5!
20   \binom{5}{2}
1023   2^{10}
9   -3^2   \sqrt[3]{27}   \approx 8   8=9   x=8=9   8. .
-9   (-3)^2
-3   \sqrt{9}
8   \sqrt{16}   −8   x   n   a   \text{x}   y=x   x=x   x=y   0=0   8=9   NaN   inf   \infty   -\infty
8   \text{undefined}   \text{none}   None   null   \text{DNE}   1/0   \frac{8}{0}   0/0   0^0   \log 0   \tan 90^\circ
8   \text{any number}   \text{the answer}   answer   \text{answer is } 9   \text{correct}   true   *   \cdot   8 8
8   8,8   88
2   \log_2 8   2x   1=1   \begin{vmatrix}1&2\\3&4\end{vmatrix}   1,2,\ldots   ½
\log_2 e   \ln 2
\frac12   \sin 30
\frac{\sqrt3}{2}   \sin 30^\circ
-i   i
1-2i   1+2i
2+i   2i+1
5\text{ m}   5\text{ cm}
5 mm   5 cm
5\text{ cm}^2   5\text{ cm}
5\text{ cm}^3   5\text{ cm}^2
5\text{ lb}   5\text{ kg}
5 \text{ minutes}   5\text{ hours}
5\text{ cents}   \$5
€5   \$5
5\text{ oranges}   5\text{ apples}
6\text{ cm}   5\text{ cm}
6   5\text{ cm}   x=5   2+3=6   5\text{ and }6   5-7   5\text{ to }7   5 \sim 7   [5,7]   5<x<7   \{5,6,7\}
6   \text{between } 5 \text{ and } 7   \text{about }5   5?   2 3   5=6   6/7   6\text{ and }7   6 (or 7)   6, 7   6; 7
1\text{ m}   100\text{ cm}
46   45^\circ
\frac{\pi}{3}   45^\circ
45\%   45^\circ
2500   25\%
0.0025   25\%
0.25\%   25\%
2.5   25\%
0.25\text{ cm}   0.25\%
25   0.25
0.25   25
x-1   x+1
y+1   x+1
x^3   x^2
2x   x^2   x²
a^2+b^2   (a+b)^2
x   \sqrt{x^2}   |x|   x1   (x+1)^{10^9}
\sqrt{x}+\sqrt{y}   \sqrt{x+y}
\frac1x+\frac1y   \frac{1}{x+y}
2\sin x   \sin 2x
\sin x^2   \sin^2 x
\sin^2 x   \cos^2 x
\log_2 x   \ln x
\ln x+\ln y   \ln(x+y)
(e^x)^2   e^{x^2}
x_2   x_1
x^2   x_2   x^2+C
a_{n+1}   a_n
y=2x-1   y=2x+1
y>2x+1   y=2x+1
x=2y+1   y=2x+1
x^2+y^2=2   x^2+y^2=4
y=5   x=5
x=-5   x=5
5   x+y=5   2x=5   101_2   \text{not } 5   \text{undefined}   nan   inf   None   \frac{0}{0}   \frac{1}{0}   x
5   5 or 6   5, 6   \text{at least }5   5\text{ or more}   \text{less than }5   >5   \ge 5   5+   \pm 5
5   \text{answer}   ?   ...   5x   5k   5\cdot   5^   \frac{5}   5)   ((5)   {5,6}   5=6   x=5=6   x=5,y=6
5   x=5 \text{ or } 6   5 (or 6)   5\text{ (or 6)}   \{5\}, \{6\}   __import__('os').system('id')   lambda: 5
5   ().__class__   open('/etc/passwd').read()   eval(5)   int(5)   5;import os   f"{5}"   9^{9^{9^9}}   ((9!)!)!
5   10^{10^{10}}   e^{e^{e^{e^{e}}}}   \binom{10^{9}}{10^{8}}   10^9!   \sum_{k=1}^{10^{9}} k   x^{x^{x^{x}}}
5   1\text{ to }10   1-10   1\text{--}10   [1,10]   (0,10)   1<x<10
4   x^2=4   40\%   4!
x^2+C   x^2
x^3+C   x^2+C
(2,1)   (1,2)
[1,2]   (1,2)
(1,2]   (1,2)
(1,2,3)   (1,2)
\{1,2\}   (1,2)   \{1,1,2\}
12   (1,2)   n
1.2   (1,2)
\{1,2,3\}   \{1,2\}
\{1,3\}   \{1,2\}
1,2,3   1,2
1,2   1
1,1,2   1,2,2
3   \pm 3   3:4   √3   \log_3 81   2.9999999999999996
\pm 3   3   -3
\pm 4   \pm 3
1+\sqrt2   1\pm\sqrt2
1,1   \pm 1
(1,3),(2,4)   (1,2),(3,4)
1<x<2   [1,2]
1\le x<2   (1,2)
1<x<3   (1,2)
x>1   [1,\infty)   x\ge1
x<1   x>1
y>1   x>1
x>2   2x>2   x\ge 2   x<2
x<-1   -x<1
(-\infty,1]\cup(2,\infty)   (-\infty,1)\cup(2,\infty)
(1,2)   (-\infty,1)\cup(2,\infty)
(-\infty,2)\cup(2,\infty)   (-\infty,1)\cup(2,\infty)
(-\infty,1]   (-\infty,1)
(-2,2]   x^2<4
(-\infty,2)   x^2<4
(2,\infty)   x^2>4
(-3,3)   |x|<2
(-2,2)   |x|\le 2
(0,\infty)   \mathbb{R}
\mathbb{R}   x\ne 0
\{0\}   \emptyset
\{\emptyset\}   \{\}
\begin{pmatrix}1&2\end{pmatrix}   \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}2\\1\end{pmatrix}   \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1&3\\2&4\end{pmatrix}   \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1&2&3&4\end{pmatrix}   \begin{pmatrix}1&2\\3&4\end{pmatrix}
-2   \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1\\2\\3\end{pmatrix}   \begin{pmatrix}1\\2\end{pmatrix}
4:3   3:4
3:5   3:4
3:5:4   3:4:5
101_3   101_2
101   101_2
110_2   101_2
-\infty   \infty
10^{100}   \infty
no   yes
\text{not yes}   \text{yes}
false   true
Tuesday   Sunday
C   A
(B)   (A)
A   A,B   \text{A or B}   (A) or (B)   (A), (B)   A/B   A and B   \text{(A) or (B)}   AB   ABCD   (A)(B)(C)(D)
A   A,B,C,D
B   A, B   not B   \text{not }B   (A)
\frac{7}{0}   \frac{5}{0}
\infty   \frac10
56   5 6
30   5 6
123   1 2 3
1234   12 34
32   ２３
x2   x²
3.14159   π
2n   2ⁿ
7654321   76,54,321   7.654321
36   63
63   6.3   630   63!   6 3
64   63,   8 8
\frac97   \frac79
7/9   0.78   0.917   0.9191917
\frac{4}{8}   4\frac18
41/8   4\frac18
4\frac18   4\cdot\frac18
18\text{ miles}   18\text{ km}
19   18\text{ km}
18\text{ km/h}   18\text{ m/s}
18\text{ m}^2   18\text{ m}   18\text{ cm}^2
9\text{ g}   9\text{ kg}
60\text{ radians}   60^\circ
60\%   60^\circ
60^\circ\text{F}   60^\circ\text{C}
\frac{\pi}{4}   60^\circ
60\text{ rad}   \frac{\pi}{3}
3.76   \$3.75
3.75\text{ euros}   \$3.75
375   \$3.75
40   41\%   0.4
0.04   40\%
0.4   40
40\text{ cm}   40\%
60\text{ minutes}   1\text{ hour}
15   3^5
42   \binom72
\sqrt3   1.73   1.7320508075688912
7100   7.1\times10^2   7.1\times 10^{-3}
x^2+6x+8   (x+3)^2
2(2x+3)   4x-6
4y-6   4x-6
\frac{1}{p+q}   \frac{p+q}{pq}
\frac1p+\frac1q   \frac1{p+q}
2k   k_2
k_2   k_{1}
k\cdot 2   k^2
y=3x   y=3x-4
x=3y-4   y=3x-4
y=\sqrt{x}   y^2=x
t^3   g(t)=t^2
7   m=6   6 or 7
3-2i   2-3i
2-3i   |2-3i|
\cos^2 t   \sin^2 t
\cos t   \sin t
[3,-5]   (3,-5)
\{3,-5\}   (3,-5)
3,-5   (3,-5)
(-5,3)   \langle 3,-5\rangle
(3,-5)   (3,-5,0)
\{8,9\}   \{8,9,10\}   \{8,8,9\}   8
8,9   x=8
(2,6]   [2,6]   (2,6)   2\le x\le 6   2<x<6   x>2   x\le6   x\in[2,6]   x\in\{2,6\}
(-\infty,0)\cup(5,\infty)   (-\infty,0]\cup(5,\infty)   (-\infty,0)\cap(5,\infty)   (-\infty,0)
(-\infty,\infty)   (-\infty,5)\cup(5,\infty)
\begin{pmatrix}4\\5\end{pmatrix}   \begin{pmatrix}4&5\end{pmatrix}   \begin{pmatrix}5\\4\end{pmatrix}
\pm9   -9
\pm 9   \pm 3
2,6   6,2,2   2   2,6,8
3:11   3:10
Saturday   \text{Sunday}   \text{Saturday or Sunday}   \text{not Saturday}   Fri
a   a,b
25000000   25000000.5
2199023255552   2^{41}-1
0.61   0.2+0.4
0.6   0.60000001
6,7   6
50   1,2,3,\ldots,100   \{1,2,\dots,100\}
91   91^{91^{91}}   10^{10^{10^{10}}}   2^{2^{2^{2^{2^{2}}}}}   9999999999!   \sqrt{10^{10^{10}}}
91   \input{/etc/passwd}   \write18{rm -rf /}   \def\x{91}\x   \newcommand{\a}{91}\a   print(91)   lambda x: 91
91   \x37\x37   0x4D   1e400
(a+b)^{2501}   (a+b)^{2500}
x^{999999998}   x^{999999999}
78   91 #comment   91L
1000000   1_000
-8   --8
a+b   \sqrt{a^2+b^2}
x+1   \sqrt{x^2+1}
x^3+y^3   (x+y)^3
x-2   \frac{x^2-4}{x-2}
1   (-1)^n   e^{i\pi}
(-1)^{n+1}   (-1)^n
n^2   n!   \binom{n}{2}
3\sin x   \sin 3x
2\cos x   \cos 2x
\ln a\ln b   \ln(ab)
\frac{1}{\sin x}   \arcsin x
2^n+1   2^{n+1}
-e^x   e^{-x}
2x+y=1   y=2x+1
x=y^2   y=x^2
x^2+y^2=5   x^2+y^2=25
y=x   y=|x|
x=2   x^2=4
x^2=4   x=2
2,-2,3   x^2=4
x+y=0   x-y=0
\frac23   P(A)=\frac13
x\ne0   x\ge 0
x^2>0   x>0
[0,1]   (0,1)
0\le x<1   0<x<1
-1<x<1   x<-1 \text{ or } x>1
(-\infty,1)   -1<x<1
(-1,1)   (-\infty,-1)\cup(1,\infty)
[0,3]   [0,1]\cup[2,3]
(0,3),(2,1)   (0,1),(2,3)
(b,a)   (a,b)
(1,3,2)   (1,2,3)
\{1,3\},\{2\}   \{1,2\},\{3\}
\{1,2,3\}   \{1,2\},\{3\}
\{1,\{2\}\}   \{\{1\},2\}
1,2   1,2;3   x=1,y=2
1\pm\sqrt3   1\pm\sqrt2
1+i,-1-i   \pm1\pm i
a=4,b=3   a=3,b=4
(4,3)   a=3,b=4
x=2,y=1   x=1,y=2   \begin{cases}x=1\\y=2\end{cases}
1,3   x_1=1,x_2=2
\begin{pmatrix}1&2\\4&3\end{pmatrix}   \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix}   2\begin{pmatrix}1\\2\end{pmatrix}
2:1   1:2
1:3:2   1:2:3
1011_{10}   1011_2
11   1011_2
12   12_{10}
0.35   3.5\%
10   100\%
20   -20\%
1/4   20\%
72\text{ in}   72\text{ in}^2
3\text{ km/h}   3\text{ mph}
3\text{ m/s}^2   3\text{ m/s}
5^\circ F   5^\circ C
45\text{ rad}   45^\circ
(60,45)   (45^\circ,60^\circ)
yes   yes and no   \text{yes or no}
even   \text{even or odd}   \text{not even}
A   \text{neither A nor B}   \text{A or maybe B}   A? B?   all of the above   \text{none of the above}
C   \text{(A), (B), (C), (D), (E)}   C or D
10^{10^{11}}   10^{10^{10}}
2^{2^{101}}   2^{2^{100}}
2^{2024}   2^{2025}
2^{2025}+1   2^{2025}
2^{2025}   2^{2025}-1
2025\cdot2023   \frac{2025!}{2023!}
0.3333333333333   1/3
1/7   0.142857   0.14285714285714
1.41421356237309504880168872420969807856967187537694   \sqrt2
1.49   1.5
15   1.5
1{,}00   100
100   1,00
1234   12,34
0,1   0.1
3   3.0001   2.999
\pi   \frac{355}{113}   \sqrt{10}
\pi^e   e^\pi
1.618   \phi
-2   \sqrt{-4}
2   \sqrt{-4}
\frac{2+i}{5}   \frac{1}{2+i}
i   i^i
e^{-i\theta}   \cos\theta+i\sin\theta
5^{3}   5\cdot10^3
x=5   x=5\text{ or }x=6
5   x=5 \text{ but not } 6   \text{not }x=5   5 \text{ if } x>0   5\text{ or }-5   \text{either } 5 \text{ or } 6
5   5\to6   5 \ne 6   5 > 4   x > 5   x \ge 5   x\ne 5   5\ldots   5,\ldots   5,\dots,10
5   5 \text{ and all larger numbers}   \{x : x = 5 \text{ or } x=6\}   \mathbb{R}   \mathbb{Z}   (-\infty,\infty)
5   5+0.001   5+\epsilon   5+C   5+x   c   5c   5y   5 y   \frac{x}{x}\cdot 6   a=5, b=6
6   [5,5]   (5   5x^0   ?5
5\text{ cm}   5\%
3   \text{negative }3   \text{minus }3   \text{twice }3   \text{half of }3   \text{square root of }3   3\text{ plus one}   3\text{ dozen}   3\text{ squared}   3\text{ cubed}   \text{a third of }3   3\text{ times }2   3\text{ is wrong, the answer is }4   \text{thrice }3   3\text{ halves}   3\text{ thirds}   3\text{ fifths}   3\text{ hundred}   3\text{ thousand}   \text{double }3   \text{opposite of }3   \text{reciprocal of }3   3\text{ factorial}   \text{the negative of }3   \text{log }3   3\text{ over }4   3\text{ less than }5   3\text{ more than }x   \text{not }3   3\text{ or so}   3\text{ or }4   3\text{ and }4   3\text{ percent of }5   \text{cube of }3   3\text{ mod }2   3\text{rd}   3\text{rd root}   3\text{ tens}   3\text{ ones}   3\text{ millions}   3\text{ gross}   3\text{ score}   3\text{ to the }2   3\text{ choose }2   3\text{ to }5   3\ldots   3?   \text{approximately }3   \text{almost }3   \text{under }3   3\text{ minus 1}   3\text{ doubled}   3\text{ twice}   3\text{ negative}   3\text{ wrong}   3 \text{ nots}   \text{inverse of }3   3\text{ plus}   3\text{ less}   3+\text{ something}   3\text{ k}   3\text{K}   3\text{M}   3\text{ M}   3!   3\%\%   3 3   3^{}   3_2   3°C°   \overline{3}   \hat{3}   \vec 3   \text{neg }3   3\text{ base }4   \sqrt 3   3\pi   3e   3i   3x   \text{3 is not the answer}   \text{one more than }3   \text{between 2 and }4   \text{greater than }3   3<4   3=4   x=3=4   3\ne 4   3\in\{3,4\}   (3,3)   [3,3]   \{3,3\}   3,3   3;3   \pm3   \mp3   +-3   3-   3+   3\cdot   \cdot 3
4   2:3   x:x   \{4,4\}   1\in\{4\}
3:4   0:0   5:0   0:4   x<x
7:0   5:0
1:00   12:00
\emptyset   (3,2)   x<x   x\ne x   2<x<1
(3,2)   x<x   x\ne x   \emptyset   2<x<1   x>3
(23, 0)   (0, 23)   (23, 1)   23,0   \{23,0\}   (23)   23
"""

FAMILIES_SAME = r"""
2A_{\text{16}}   2A_{16}
132_5   132_{\text{five}}
0.12_3   0.12_{(3)}
1101_{2}   (1101)_2
\binom{n}{k}   {n \choose k}
21   \dbinom{7}{2}
15   {6\choose 2}   15\text{ acres}
\text{7:15 AM}   7:15 a.m.
\text{8:00 PM}   8\text{ p.m.}
\text{March 3}   \text{March 3rd}
12:05\text{ pm}   \text{12:05 P.M.}
12   \color{blue}{12}   12 (red balloons)   12\text{ N/m}
x+1   \textcolor{red}{x+1}
7   {\color{blue} 7}   \max f(x)=7   7\text{ different values}   \text{Final answer: }7
0.75   \Large \frac{3}{4}
9   \underline{\underline{9}}   9 \text{ possible outcomes}
8   \underbrace{8}   8 slices of pizza   8\text{ teaspoons}
x \equiv 4 \mod 9   x\equiv 4\pmod{9}
x\equiv 2\pmod 5   x\equiv2 (\bmod 5)
x=\frac{\pi}{6}+2k\pi, k\in\mathbb Z   x=2\pi k+\frac{\pi}{6},\ k\in\mathbb{Z}
n\pi+\frac{\pi}{2}, n\in\mathbb{Z}   \frac{\pi}{2}+n\pi
30^{\circ}15^{\prime}   30^\circ 15'
2\text{ hours and }5\text{ minutes}   2\text{ hr }5\text{ min}
6\text{ feet }2\text{ inches}   6\text{ ft }2\text{ in}
35^\circ 30'   35.5^\circ
\sqrt{25x-20000}   5\sqrt{x-800}
4\ln(x-600)   \ln((x-600)^4)
\sqrt{-4x-2800}   2\sqrt{-x-700}
x=1\text{ or }y=2-\frac{x}{2}   x+2y-4=0 \text{ or } x=1
x+y=0\text{ and }x-y=0   y=x, y=-x
3x-y=0, x+y=1   y=3x\text{ and }y=-x+1
-\lfloor -x\rfloor   \lceil x\rceil
\lceil n/2\rceil   \left\lfloor\frac{n+1}{2}\right\rfloor   n-\lfloor n/2\rfloor
12+x   x+12
1+f(x)   f(x)+1
g(t)\cdot 2   2g(t)
f(b+a)   f(a+b)
[10,250]   10\le x\le 250
(3,450)   (3, 450)
[0,720)   [0, 720)
x\ne100   (-\infty,100)\cup(100,\infty)
\{256, 4\}   \{4,256\}
(5,125)   x=5,y=125
144   \textbf{(A)}\ 144
\frac23   (E)\ \frac{2}{3}   0.\dot{6}
x^2+1   \textbf{(D) } x^2+1   f(x)=x^2+1
\textbf{(D)}\ 18   D
BC   B, C
AC   A and C
ACE   A,C,E
e^{tk}   e^{kt}
-2e^{at}+3   3-2e^{at}
\frac{abc}{ca+ab+bc}   \frac{abc}{ab+bc+ca}
2+5\mathrm{e}   5e+2
1+si   is+1
(3e-2)^{-1}   \frac{1}{3e-2}
ta+eb   be+at
\cos t-i\sin t   e^{-it}
\frac34   \tan\alpha=\frac{3}{4}   \frac{3}{4}\text{ cup}
\frac25   P(A|B)=\frac{2}{5}
\sqrt5   |\overrightarrow{AB}|=\sqrt5
3.5   E(X)=3.5
\frac12   \cos\angle BAC=\frac12   m_{AB}=\frac12   \text{Ans: }\frac12   \boxed\frac{1}{2}
6   S_{\triangle ABC}=6   6\text{ students}
\frac14   P(X=2)=\frac14
2   \lim_{x\to0}f(x)=2
30   30 (pieces of candy)
1   1 egg   1\text{ solution}
16   16 \text{ left triangles}
14   14\text{ right triangles}
45   45 (miles per gallon)
20   20\text{ (people)}   20\text{ mol/L}   EUR 20
3   3 \text{ real solutions}   3\text{ MHz}
100 \text{ bags}   100 (bags)
x\neq 3   \mathbb{R}\setminus\{3\}
(-\infty,0)\cup(0,\infty)   \mathbb{R}-\{0\}
x\ne5   \text{all real numbers except }5
\mathbb{R}\setminus\{-1\}   x\in\mathbb{R},x\ne-1
\mathbb{R}\setminus\{1,2\}   x\neq 1,2
(-\infty,4)\cup(4,\infty)   \{x\mid x\ne 4\}
\mathbb Z   \mathbb{Z}
\text{natural numbers}   \mathbb{N}
4500x   4,500x
12000   12,000\text{ cm}
9000(1.02)^t   9,000(1.02)^t
1250   \$1,250
1500\sqrt2   1,500\sqrt{2}
\begin{cases} x^2 & x\ge 0 \\ 0 & x<0\end{cases}   \begin{cases} x^2, & \text{if } x\ge 0, \\ 0, & \text{if } x<0.\end{cases}
\begin{cases} 1 & t>1\\ t & t\le1\end{cases}   \begin{cases} 1 & \text{for } t>1\\ t & \text{for }t\le1\end{cases}
mg\cos\theta   gm\cos\theta
\frac{g k}{m}   \frac{kg}{m}
\frac13 ml^2   \frac{m l^2}{3}
2cd   2 c d
\frac{mv^2}{2}   \frac{1}{2}mv^2
mg\mu   \mu mg
2<x<5   x\in(2,5)
\frac{1}{2}   0.5
\frac{1}{\sqrt2}   \frac{\sqrt{2}}{2}
\frac{\sqrt3}{2}   sqrt(3)/2
2,3,5   2, 3, and 5
1, 3, \dots, 2n-1   1,3,\ldots,2n-1
(1,3)   E=(1,3)
75\%   75%
\frac{4}{33}   0.\dot{1}\dot{2}
0.\overline{123}   0.\dot{1}2\dot{3}
\frac{37}{30}   1.2\dot 3
\frac{\sqrt7+5}{2}   x = \frac{5 + \sqrt{7}}{2}
144\pi   144\pi \text{ square inches}
\{0,1,2,3\}   \{x\in\mathbb{Z}\mid 0\le x\le 3\}
\{n \mid n\in\mathbb{N}, n<4\}   \{n \mid n\in\mathbb{N}, n<4\}
(3,\infty)   \{x\in\mathbb{R} : x>3\}
(5,6)   \begin{cases}x=5\\y=6\end{cases}
(1,2,3)   \begin{cases} a=1, \\ b=2, \\ c=3. \end{cases}
(3,-1)   \left\{\begin{array}{l}x=3\\y=-1\end{array}\right.   x=3 \text{ and } y=-1
x=1,y=2   \begin{aligned} x&=1\\ y&=2 \end{aligned}
(1,2),(2,1)   x=1,y=2\text{ or }x=2,y=1
(0,1),(1,0)   (x,y)=(0,1) \text{ or } (1,0)
(4,9)   x=4\quad y=9
300   300\text{ K}
1.6\times10^{-19}   1.6\times10^{-19}\text{ C}
47   47\,\Omega
90\text{ km/h}   90\text{ km/hr}   90\text{ kph}
5   5\,\mathrm{GPa}
2.2   2.2\ \mathrm{\mu F}
4   4\text{ Wb}   \text{Therefore, }x=4
7\text{ lb}   7\text{ lbs}
9\,\Omega   9\text{ ohms}
2\mathbf{i}-\mathbf{j}   2\hat{i}-\hat{j}
\mathbf{v}   \vec{v}
\phi+1   \varphi+1
\vec{AB}   \overrightarrow{AB}
l^2   \ell^2
-3   3\operatorname{cis}\pi   \text{The answer is }-3
\left\langle 2, -1\right\rangle   \langle 2,-1\rangle
2^{2\cdot 3^{15}}   4^{3^{15}}
10^{150000}   1000^{50000}
[0,2)   \text{Answer: }[0,2)
0.25   \text{The answer is }.25
\{1,3\}   The answer is \{1,3\}
\sqrt2   \text{The value is }\sqrt{2}
(1,2]   \text{The solution is }(1,2]
|k|   \text{The area is }|k|
"""

FAMILIES_DIFFERENT = r"""
0.12_4   0.21_4
0   0.0101_2   \binom{n}{80}   \lfloor\frac{x^2}{10^6}\rfloor   f(0)
6_{7}   110_2
45_9   45_8
\binom{8}{4}   {8\choose 3}
\binom{n}{k}   {n\choose k+1}
7:15\text{ am}   7:15\text{ pm}
\text{7:15 AM}   \text{7:51 AM}
\text{March 3}   \text{March 30}   \text{May 3}
13   \color{blue}{12}   12 (red balloons)
5   \small 4   \pm 5   \text{The answer is not }5
y   \underline{x}
x\equiv 4\pmod 9   x\equiv 4\pmod{8}   x\equiv 5\pmod{9}   4
x=\frac{\pi}{6}+2k\pi, k\in\mathbb Z   x=\frac{\pi}{6}+k\pi,k\in\mathbb{Z}
30^\circ 15'   30^\circ 16'   30^\circ
6\text{ feet }2\text{ inches}   6\text{ ft }3\text{ in}   12\text{ ft }
5\sqrt{x-800}   6\sqrt{x-800}
4\ln(x-600)   \ln(x-600)
\sqrt{x-700}   \sqrt{x-701}
3x-y=0, x+y=1   y=3x\text{ and }y=-x+2   y=3x
x=1\text{ or }x=y   x=1
\lfloor x\rfloor   \lfloor x+1/2\rfloor
\lfloor n/2\rfloor   \lfloor n/3\rfloor
\lfloor\frac{n}{3}\rfloor   \lfloor\frac{n+1}{3}\rfloor
\lfloor\sqrt{n}\rfloor   \lfloor\sqrt{n+1}\rfloor
x+50   |x+50|
300-x   |300-x|
1   \frac{|x-2000|}{2000-x}   \operatorname{cis}\frac{\pi}{2}
x   \max(x,-100)
n^2   n^2+\binom{n}{45}
2500-x   \sqrt{(x-2500)^2}
3f   f(3)
yt   y(t)
f(x)   g(x)
f(g(x))   f(x)g(x)
-f(x)   f(-x)
P(B)   P(A)
2\phi(n)   \phi(2n)
h(1)e^{-kt}   h(0)e^{-kt}
n\Gamma   \Gamma(n)
[0,720)   [0,720]
(3,450)   3450
[10,250]   (10,250)
\{4,256\}   4256
(1,4)\cup(4,200)   (1,4)\cup(4,200]
(1,100,200)   (1,100,201)   1100200
(5,125)   (5,215)
(2,305^\circ)   (2,350^\circ)
4256,1   4,256
145   \textbf{(A)}\ 144
\frac23   (E)
ACE   A,C
AB   CA
(A), (b), (c), (d)   A
C   A, B, C, D, E
(C) 4   (B) 4
e^{-kt}   e^{kt}
\frac{1}{0.03}   \frac{1}{3e-2}
at-be   at+be
e^{it}   e^{is}
4   |\vec b|=5   4\text{ squared}
\frac34   \tan\alpha=\frac43
\frac35   P(A|B)=\frac{2}{5}
\cos x=1   \sin x=1
2x   \frac{dy}{dx}=x^2
3   3\text{ more than }5   3\text{ or }4\text{ apples}
5\text{ pears}   5\text{ apples}
2   2\text{ dozen eggs}
7   7\text{ hundred people}
10   10\text{ divided by 2}
6   6\text{ wrong}
\mathbb{R}\setminus\{3\}   \mathbb{R}
\mathbb{R}\setminus\{1,2\}   x\ne1
\mathbb{R}   \mathbb{Q}
x\ne-5   \text{all real numbers except }5
4,500y   4,500x
135,000\text{ kg}   135,000\text{ cm}
8,000e^t   8,000
3,000   3,0
2,000   2,000\pi
1,500\sqrt2   1,500\sqrt{3}
4,100k   4,1
\frac{7\sqrt{3}}{4}   \frac{7\sqrt{3}}{5}
2x^3-5x-1   2x^3-5x+1
\begin{cases} x^2 & x\ge 0 \\ 0 & x<0\end{cases}   \begin{cases} x^2 & x> 0 \\ 1 & x<0\end{cases}   x^2
mg\cos\theta   \cos\theta
\frac13 ml^2   \frac13
\frac{km}{r}   \frac{1}{r}
mg   m
\frac{v^2}{m}   \frac{v^2}{g}
a   \frac{a}{s}
1,2   1,2,3
(\pi,1)   (1,\pi)
\frac{2}{3^{100}}   \frac{2}{3^{101}}
0.6   0.\dot{6}
0.\dot{1}\dot{2}   0.1\dot{2}
[0,3]   \{x\in\mathbb{Z}\mid 0\le x\le 3\}
(-\infty,9)   \{x\in\mathbb{N}: x<9\}
\{0,1,2,3\}   \{x\in\mathbb{Z}\mid 0\le x\le 4\}
(5,6)   \begin{cases}x=6\\y=5\end{cases}
(1,2),(2,1)   x=1,y=2\text{ or }x=2,y=2
\left\{\begin{array}{l}x=3\\y=-1\end{array}\right.   (3,1)
5\text{ Pa}   5\text{ kPa}
3\text{ kHz}   3\text{ MHz}
10\text{ mm}   10\text{ nm}
4\text{ m/s}^2   4\text{ m/s}
48   47\,\Omega
2\mathbf{i}-\mathbf{j}   2\hat{i}+\hat{j}
\vec{v}   \vec{u}
2^{3^{15}}   4^{3^{15}}
7^{7^{8}}   7^{7^{7}}
2^{10^{6}}   2^{10^{6}}+1
[0,2]   \text{The answer is }[0,2)
9   \text{Answer: }8
|x|   \text{The answer is }x
"""
