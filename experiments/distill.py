"""
distill.py - the model as its own teacher on its own text: the online siblings of hinted decoding.

SDFT, https://arxiv.org/abs/2601.19897, and OPSD, https://arxiv.org/abs/2601.18734. The model
answers without help. Then a teacher, the same model with the demonstration before its eyes, says at
every token of this answer what it would have written there, and the model is pulled towards that:

    L = mean over the tokens of KL(p(. | x, y_<t) || p(. | x, demonstration, y_<t))

The teacher gets no gradient. It is the model as it now is ("now"), or as it was before training
("base"). Ours: no moving average of the teacher's weights, reverse KL for both, over the whole
vocabulary. `python -m experiments.rl --arms sdft "sdft, base teaches"` trains with it; this file
has no command.
"""

import copy

import torch

import idft
from ddt import micro_batches, pad_rows
from eval import stop_ids


def response_logits(model, rows):
    """rows: (prompt ids, response ids) pairs -> the logits that foretell every token of the
    responses, (tokens, V), float32."""
    ids, mask, response = pad_rows(rows, model.device)
    logits = model(input_ids=ids, attention_mask=mask.long()).logits.float()       # (B, T, V)
    return logits[:, :-1][response[:, 1:]]


def reverse_kl(logits, teacher_logits):
    """KL(p || teacher) of every token; both (tokens, V) -> (tokens,). The teacher is detached."""
    log_p = logits.log_softmax(-1)
    log_teacher = teacher_logits.detach().log_softmax(-1)
    return (log_p.exp() * (log_p - log_teacher)).sum(-1)


def distill_step(model, teacher, optimizer, answers, lr, micro_tokens=16384):
    """One optimizer step on answers, (plain context, hinted context, the model's own tokens) each
    -> its metrics. The same for every micro_tokens."""
    count = sum(len(tokens) for _, _, tokens in answers)
    total = 0.0
    hinted_rows = [(hinted, tokens) for _, hinted, tokens in answers]
    for group in micro_batches(hinted_rows, micro_tokens):
        part = [answers[i] for i in group]
        with torch.no_grad():
            wanted = response_logits(teacher, [(hinted, tokens) for _, hinted, tokens in part])
        said = response_logits(model, [(plain, tokens) for plain, _, tokens in part])
        loss = reverse_kl(said, wanted).sum() / count
        loss.backward()
        total += loss.item()
    norm = idft.optimizer_step(model, optimizer, lr, total)
    return {"loss": total, "grad_norm": norm, "tokens": count}


def distill_steps(model, tokenizer, problems, flags, sampler, teacher="now"):
    """-> learn(batch): n own answers to every problem of a batch, learnt from in --mini_batches
    optimizer steps; it returns the tokens trained and sampled and the optimizer steps. problems
    need "hinted", the context with the demonstration. flags: of prefix_rft."""
    optimizer = idft.new_optimizer(model)
    stop = stop_ids(model, tokenizer)
    told = copy.deepcopy(model) if teacher == "base" else model
    steps = flags.steps * flags.mini_batches

    def learn(batch):
        sampler.sync(model)
        drawn = idft.draw_batch(problems, flags.batch, batch, flags.seed)
        prompts = [problem["prompt"] for problem in drawn]
        samples = sampler(prompts, flags.n, flags.max_new_tokens, stop, flags.temperature,
                          seed=flags.seed * 1_000_003 + batch)
        answers = []
        for i, sample in enumerate(samples):
            problem = drawn[i // flags.n]
            answers.append((problem["prompt"], problem["hinted"], sample.tokens))
        # As for every arm: so many optimizer steps a batch, of equally many answers.
        size = len(answers) // flags.mini_batches
        tokens = 0
        for i in range(flags.mini_batches):
            step = batch * flags.mini_batches + i
            lr = idft.learning_rate(step, steps, flags.lr)
            part = answers[i * size:(i + 1) * size]
            tokens += distill_step(model, told, optimizer, part, lr)["tokens"]
        return tokens, tokens, flags.mini_batches
    return learn
