"""
preference.py - DPO and SimPO, the offline RL that the second paper measures itself against.

DPO, Rafailov et al., https://arxiv.org/abs/2305.18290. SimPO, Meng et al.,
https://arxiv.org/abs/2405.14734. Both learn from pairs, a right and a wrong answer y_w, y_l to the
same problem, and raise the first against the second:

    DPO      -log sigma(beta [log p(y_w)/p_ref(y_w) - log p(y_l)/p_ref(y_l)])    p_ref: the base
    SimPO    -log sigma(beta log p(y_w)/|y_w| - beta log p(y_l)/|y_l| - gamma)   no reference

Defaults: beta 0.1 for DPO, the original's; beta 2 and gamma / beta 0.5 for SimPO, from its authors'
advice of 2 to 2.5 (later 10) and of a ratio of 0.25 to 0.5.

The pairs here: y_l is a wrong answer that the base wrote itself (T = 1), y_w the demonstration or,
where the base found one, a right answer of its own. Left out: iterating, SFT terms, other margins.
`python -m experiments.losses` trains with them; this file has no command.
"""

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from ddt import micro_batches, response_stats
from eval import InputError, stop_ids
from idft import optimizer_step
from reward import rewards


# ---- the losses ---------------------------------------------------------------------------------

def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1):
    """All (pairs,): log p of the whole right and wrong answers under the policy and under the
    frozen reference, in nats -> the loss of every pair (pairs,)."""
    gain = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -logsigmoid(beta * gain)


def simpo_loss(chosen, rejected, chosen_length, rejected_length, beta=2.0, ratio=0.5):
    """chosen, rejected (pairs,): log p of the whole answers, in nats; the lengths in tokens
    -> the loss of every pair (pairs,). The margin gamma is ratio * beta."""
    gain = chosen / chosen_length - rejected / rejected_length
    return -logsigmoid(beta * gain - ratio * beta)


# ---- the pairs ----------------------------------------------------------------------------------

def make_pairs(sampler, model, tokenizer, problems, n, max_new_tokens, seed):
    """Sample n answers to every problem (as from prefix_rft.prepare_problems) -> pairs (prompt ids,
    right ids, wrong ids), and how many tokens were sampled.

    Every wrong answer that ended makes one pair, with a right one drawn at random from the
    demonstrations and the base's own right answers. InputError if there is no pair."""
    sampler.sync(model)
    prompts = [problem["prompt"] for problem in problems]
    samples = sampler(prompts, n, max_new_tokens, stop_ids(model, tokenizer), seed=seed)

    rng = np.random.default_rng((seed, 2))
    pairs = []
    for i, problem in enumerate(problems):
        # Sort the n answers to this problem.
        answers = [sample.tokens for sample in samples[i * n:(i + 1) * n] if sample.finished]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right, wrong = list(problem["demos"]), []
        for answer, score in zip(answers, rewards(texts, [problem["answer"]] * len(texts))):
            if score == 1:
                right.append(answer)
            else:
                wrong.append(answer)
        # Every wrong one meets a right one.
        if right:
            for answer in wrong:
                chosen = right[rng.integers(len(right))]
                pairs.append((problem["prompt"], chosen, answer))
    if not pairs:
        raise InputError("no problem has a right and a wrong answer: there is nothing to compare")
    return pairs, sum(len(sample.tokens) for sample in samples)


def pair_tokens(pairs):
    """How many tokens the answers of pairs hold."""
    return sum(len(right) + len(wrong) for _, right, wrong in pairs)


def answer_logp(model, pairs, micro_tokens):
    """log p of the whole right and of the whole wrong answers -> (pairs,), (pairs,)."""
    # Right and wrong alternate: the answers of a pair are neighbours.
    rows = []
    for prompt, right, wrong in pairs:
        rows += [(prompt, right), (prompt, wrong)]
    logp, _ = response_stats(model, rows, micro_tokens=micro_tokens)       # (tokens,)
    parts = logp.split([len(answer) for _, answer in rows])
    sums = torch.stack([part.sum() for part in parts])                     # (2 * pairs,)
    return sums[0::2], sums[1::2]


def reference_logp(model, pairs, micro_tokens):
    """The same under the model as it is now, without gradients: DPO's reference, read once. A list
    of (right, wrong), a pair each."""
    with torch.no_grad():
        chosen, rejected = answer_logp(model, pairs, micro_tokens)
    return list(zip(chosen.tolist(), rejected.tolist()))


# ---- one optimizer step -------------------------------------------------------------------------

def preference_step(model, optimizer, pairs, reference, lr, micro_tokens, loss="dpo"):
    """One optimizer step on pairs, the same for every micro_tokens -> its metrics. reference: as
    from reference_logp, which SimPO does not read."""
    known = torch.tensor(reference, device=model.device)                   # (pairs, 2)
    sizes, rows = [], []
    for prompt, right, wrong in pairs:
        sizes.append((len(right), len(wrong)))
        rows.append((prompt, right + wrong))
    sizes = torch.tensor(sizes, device=model.device)                       # (pairs, 2)

    # Gradients add up over micro-batches; each is divided by the pairs of the whole step.
    total = 0.0
    for group in micro_batches(rows, micro_tokens):
        chosen, rejected = answer_logp(model, [pairs[i] for i in group], micro_tokens)
        if loss == "dpo":
            losses = dpo_loss(chosen, rejected, known[group, 0], known[group, 1])
        else:
            losses = simpo_loss(chosen, rejected, sizes[group, 0], sizes[group, 1])
        part = losses.sum() / len(pairs)
        part.backward()
        total += part.item()
    norm = optimizer_step(model, optimizer, lr, total)
    return {"loss": total, "grad_norm": norm, "tokens": pair_tokens(pairs)}
