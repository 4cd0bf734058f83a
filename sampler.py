"""Sampling from a language model, batched: the loop all four methods spend their time in.

`model.generate` left-pads a batch, grows a cache by concatenation, and runs until its longest row is done. Here keys
and values live in one preallocated slab (row, head, column, dim) where column c always holds token c of the row; the
model's attention is replaced for the length of a call by one function that writes a column and attends to the columns
before it; and a row that is done hands its slot to the next job. The samples are the same, the speed is not:
`python sampler.py` runs the race.

    slot      one of `rows` places in the batch; a job (one sample of one prompt) occupies it until it is done
    stream    with streams=2 a slot is two rows of the model, two contexts that are fed the same sampled tokens
    pos       the column a row writes next = the position of the token it is fed
    reach     the columns attention looks at: the longest live row, masked row by row
    logp      log p(y_t), entropy: H[p_t], both of the temperature-scaled, untruncated distribution, in float32

Randomness: sample j of a prompt is drawn by inverting the cumulative distribution at uniform numbers that depend only
on (seed, prompt, j, step). So neither `rows`, nor the order of the prompts, nor the company they keep changes a sample
(up to float rounding), and no generator is advanced.

Left out: beam search, repetition penalties, paged attention, speculative decoding, more than one GPU.

    python sampler.py                    the race against generate, and the proof that both say the same
    python sampler.py --device cuda      the same at 1.5B shape, with the roofline
"""
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface


# ---- one token -------------------------------------------------------------------------------------------------------

def mix64(x):
    """Hash int64 -> int64, the finalizer of splitmix64 (Steele et al. 2014). Products wrap; >> is made logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(key, step):
    """One number in (0, 1) per row from its key (R,) and step (R,), both int64; 23 bits, so never 0 nor 1."""
    bits = mix64(key + step * -0x61C8864680B583EB) >> 41 & 0x7FFFFF
    return (bits + 0.5) * 2.0**-23


def row_key(seed, prompt, sample):
    """The 64-bit name under which sample number `sample` of a prompt draws its uniform numbers."""
    digest = hashlib.blake2b(repr((seed, prompt, sample)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def truncate(p, top_k, top_p):
    """Zero what is outside the k likeliest tokens, then outside the smallest set of them holding top_p. p (R, V)."""
    top, token = p.topk(min(top_k, p.shape[-1]) if top_k else p.shape[-1])
    before = top.cumsum(-1) - top                                   # mass of the likelier tokens
    kept = before < top_p * top.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, token, top * kept)


def draw(logits, u, temperature, top_k=0, top_p=1.0):
    """Next tokens and what the distribution said of them.

    logits (R, V) float32 and u (R,) -> token (R,) int64, logp (R,), entropy (R,). Temperature 0 takes the argmax; its
    logp and entropy are those at temperature 1. top_k, then top_p, after temperature: the order of Hugging Face.
    """
    log_p = (logits / temperature if temperature not in (0, 1) else logits).log_softmax(-1)
    p = log_p.exp()
    entropy = torch.special.entr(p).sum(-1)                         # -p ln p, 0 at p = 0
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = (truncate(p, top_k, top_p) if top_k or top_p < 1 else p).cumsum(-1)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        token = token.clamp_max(p.shape[-1] - 1)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1), entropy


# ---- the slab and the attention that owns it ---------------------------------------------------------------------------

class Slab:
    """Keys and values of all rows, one pair of (rows, kv heads, columns, dim) a layer, and where to write next.

    `rows` (B,) says which row of the slab each row of the batch is. While `pos` is None the model reads a prompt from
    column 0 on (prefill); otherwise it reads one token per row, at column pos (B,), and looks at `reach` columns.
    """

    def __init__(self, rows, columns):
        self.shape = rows, columns
        self.layers = {}                                            # layer -> (keys, values), made when first seen
        self.rows = self.pos = self.reach = None
        self.masks = {}

    def attend(self, layer, q, k, v, scale, window):
        """q (B, heads, T, dim), k and v (B, kv heads, T, dim) -> (B, T, heads, dim)."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_zeros(self.shape[0], x.shape[1], self.shape[1], x.shape[3]) for x in (k, v)]
        keys, values = self.layers[layer]
        B, H, T, D = q.shape
        group = H // k.shape[1]                                     # query heads that share one key head
        if self.pos is None:
            keys[self.rows, :, :T], values[self.rows, :, :T] = k, v
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            mask = self.band(T, window, q.device) if window and window < T else None
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale).transpose(1, 2)
        keys[self.rows, :, self.pos], values[self.rows, :, self.pos] = k[:, :, 0], v[:, :, 0]
        keys, values = keys[:B, :, :self.reach], values[:B, :, :self.reach]
        q = q.view(B, -1, group, D)      # a group's heads become queries: K and V are read once, never repeated
        out = F.scaled_dot_product_attention(q, keys, values, self.live(window, q.device), scale=scale)
        return out.reshape(B, 1, H, -1)

    def band(self, T, window, device):
        """(T, T) bool: query t may look at columns t - window < c <= t."""
        t = torch.arange(T, device=device)
        return (t <= t[:, None]) & (t > t[:, None] - window)

    def live(self, window, device):
        """(B, 1, 1, reach) bool: the columns each row may look at; made once a step, shared by the layers."""
        if window not in self.masks:
            c = torch.arange(self.reach, device=device)
            mask = c <= self.pos[:, None]
            if window:
                mask &= c > self.pos[:, None] - window
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def prefill(self, rows):
        self.rows, self.pos = rows, None
        return self

    def decode(self, rows, pos, reach):
        self.rows, self.pos, self.reach, self.masks = rows, pos, reach, {}
        return self

    def copy(self, source, target, columns):
        """The first columns of rows `source` (list) into rows `target` (list), in every layer."""
        for pair in self.layers.values():
            for x in pair:
                x[target, :, :columns] = x[source, :, :columns]


def slab_attention(module, query, key, value, attention_mask, slab=None, scaling=None, sliding_window=None, **options):
    return slab.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register("slab", slab_attention)     # a name transformers knows no mask for: it then builds none


@contextmanager
def slab_mode(model):
    """The model in eval mode, without autocast, with our attention; afterwards everything as it was."""
    training = {m: m.training for m in model.modules()}
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    attention = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    try:
        model.eval()
        for config, _ in attention:
            config._attn_implementation = "slab"
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for config, name in attention:
            config._attn_implementation = name
        for module, mode in training.items():
            module.training = mode


# ---- the sampler ---------------------------------------------------------------------------------------------------------

@dataclass
class Samples:
    tokens: torch.Tensor    # (R, T) int64, 0 outside the mask
    mask: torch.Tensor      # (R, T) bool, True on sampled tokens, the stop token included
    logp: torch.Tensor      # (R, T) float32
    entropy: torch.Tensor   # (R, T) float32, nats
    finished: torch.Tensor  # (R,) bool, stopped by a stop token

    def lists(self):
        return [row[mask].tolist() for row, mask in zip(self.tokens, self.mask)]


class Sampler:
    """Samples from any decoder-only Hugging Face model, `rows` at a time, up to `length` tokens of prompt and answer.

    The weights may change between calls. ValueError if the model has parts the slab cannot serve.
    """

    def __init__(self, model, rows=64, length=2048, streams=1):
        self.model, self.rows, self.length, self.streams = model, rows, length, streams
        self.slab = Slab(rows * streams, length)
        self.every = 4

    def __call__(self, prompts, n=1, max_new_tokens=256, stop=None, temperature=1.0, top_k=0, top_p=1.0, seed=0,
                 combine=None, halt=None):
        """n samples of every prompt -> Samples; row r belongs to prompt r // n."""
        if stop is None:
            stop = self.model.generation_config.eos_token_id or ()
        stop = torch.tensor([stop] if isinstance(stop, int) else list(stop), dtype=torch.long, device=self.model.device)
        jobs = self.plan(prompts, n, max_new_tokens, seed)
        with slab_mode(self.model):
            return self.run(jobs, stop, (temperature, top_k, top_p), combine, halt)

    def plan(self, prompts, n, max_new_tokens, seed):
        """One job (texts, budget, key) a row; texts is one tuple of token ids a stream."""
        if not len(prompts):
            raise ValueError("no prompts to sample from")
        budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if len(budgets) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(budgets)} values of max_new_tokens")
        jobs, seen = [], {}
        for i, (prompt, budget) in enumerate(zip(prompts, budgets)):
            texts = tuple(tuple(map(int, p)) for p in (prompt if self.streams > 1 else [prompt]))
            where = f"row {i * n} (prompt {i})"
            if len(texts) != self.streams or not all(texts):
                raise ValueError(f"{where}: needs {self.streams} non-empty list(s) of token ids")
            if (need := max(map(len, texts)) + budget) > self.length:
                raise ValueError(f"{where}: {need} tokens of prompt and answer do not fit length={self.length}")
            for _ in range(n):
                seen[texts] = seen.get(texts, -1) + 1
                jobs.append((texts, budget, row_key(seed, texts, seen[texts])))
        return jobs

    def run(self, jobs, stop, how, combine, halt):
        device, S = self.model.device, min(self.rows, len(jobs))
        T = max(budget for _, budget, _ in jobs)
        new = lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=device)
        # One value a slot; the sampled tokens so far in out. Column T of it takes what dead rows keep on writing.
        self.last, self.pos = new(S, self.streams), new(S, self.streams)
        self.key, self.step, self.budget, self.state = new(S), new(S), new(S), new(S)
        self.alive, self.finished = new(S, dtype=torch.bool), new(S, dtype=torch.bool)
        self.out = [new(S, T + 1), new(S, T + 1, dtype=torch.float32), new(S, T + 1, dtype=torch.float32)]
        self.held = [None] * S * self.streams                       # the prompt in each row of the slab
        result = Samples(new(len(jobs), T), new(len(jobs), T, dtype=torch.bool), *(
            new(len(jobs), T, dtype=torch.float32) for _ in range(2)), new(len(jobs), dtype=torch.bool))

        queue = [r for r, job in enumerate(jobs) if job[1] > 0][::-1]
        busy = [queue.pop() for _ in range(min(S, len(queue)))]     # slot -> row of the result
        self.load(jobs, dict(enumerate(busy)))
        steps, looked = [0] * S, [0] * S
        while busy:
            reach = max(max(map(len, jobs[r][0])) + s for r, s in zip(busy, steps))
            ahead = min(self.every, max(jobs[r][1] - s for r, s in zip(busy, steps)))
            for i in range(ahead):
                self.advance(len(busy), reach + i, stop, how, combine)
            steps = self.step[:len(busy)].tolist()                  # the host sync
            alive = self.alive[:len(busy)].tolist()
            if halt:
                for slot, s in enumerate(steps):
                    cut = halt(self.out[0][slot, :s].tolist())
                    if cut is not None and (cut < s or alive[slot]):
                        alive[slot], steps[slot] = False, cut
                        self.finished[slot] = False
            done = [slot for slot, live in enumerate(alive) if not live]
            if done:
                self.release(result, done, [busy[slot] for slot in done], [steps[slot] for slot in done])
                fill = {}
                for slot in done[:len(queue)]:
                    busy[slot] = fill[slot] = queue.pop()
                    steps[slot] = 0
                if fill:
                    self.load(jobs, fill)
                if len(fill) < len(done):
                    self.shrink(done[len(fill):], busy, steps)
        width = int(result.mask.sum(-1).max())
        for name in ("tokens", "mask", "logp", "entropy"):
            setattr(result, name, getattr(result, name)[:, :width].contiguous())
        return result

    def load(self, jobs, fill):
        """Put jobs into slots: fill maps slot -> job. A prompt already in the slab is copied, others are prefilled."""
        home = {text: row for row, text in enumerate(self.held) if text and row // self.streams not in fill}
        fresh, copies = {}, []
        for slot, r in fill.items():
            for stream, text in enumerate(jobs[r][0]):
                row = slot * self.streams + stream
                self.held[row] = text
                if text in home:
                    copies.append((home[text], row, len(text)))
                else:
                    home[text] = fresh[text] = row
        self.prefill(fresh)
        if copies:
            source, target, columns = zip(*copies)
            self.slab.copy(list(source), list(target), max(columns) - 1)
        slots = torch.tensor(list(fill), device=self.model.device)
        put = lambda x: torch.tensor(x, device=self.model.device)
        self.last[slots] = put([[text[-1] for text in jobs[r][0]] for r in fill.values()])
        self.pos[slots] = put([[len(text) - 1 for text in jobs[r][0]] for r in fill.values()])
        self.budget[slots] = put([jobs[r][1] for r in fill.values()])
        self.key[slots] = put([jobs[r][2] for r in fill.values()])
        self.step[slots] = self.state[slots] = 0
        self.alive[slots], self.finished[slots] = True, False

    def prefill(self, fresh, tokens=8192):
        """Read all but the last token of prompts (text -> row of the slab), right-padded, `tokens` at a time."""
        todo = sorted((text for text in fresh if len(text) > 1), key=len)
        while todo:
            width = len(todo[-1]) - 1
            now, todo = todo[-max(1, tokens // width):], todo[:-max(1, tokens // width)]
            ids = torch.tensor([text[:-1] + (0,) * (width - len(text) + 1) for text in now], device=self.model.device)
            rows = torch.tensor([fresh[text] for text in now], device=self.model.device)
            self.model.base_model(input_ids=ids, position_ids=torch.arange(width, device=ids.device).expand(ids.shape),
                                  use_cache=False, slab=self.slab.prefill(rows))

    def advance(self, B, reach, stop, how, combine):
        """One token for the first B slots; nothing here waits for the device."""
        last, pos, step, alive = self.last[:B], self.pos[:B], self.step[:B], self.alive[:B]
        rows = torch.arange(B * self.streams, device=last.device)
        slab = self.slab.decode(rows, pos.flatten(), reach)
        logits = self.model(input_ids=last.view(-1, 1), position_ids=pos.view(-1, 1), use_cache=False, slab=slab).logits
        logits = logits.float().view(B, self.streams, -1)
        if combine:
            logits, self.state[:B] = combine(logits, last[:, 0], step, self.state[:B])
        else:
            logits = logits[:, 0]
        values = draw(logits, uniform(self.key[:B], step), *how)
        for out, value in zip(self.out, values):
            out[rows[:B], step] = value
        stopped = (values[0][:, None] == stop).any(-1) & alive
        last.copy_(values[0][:, None].expand_as(last))
        step += alive
        pos += alive[:, None]
        self.finished[:B] |= stopped
        alive &= ~stopped & (step < self.budget[:B])

    def release(self, result, slots, rows, lengths):
        T = result.tokens.shape[1]
        mask = torch.arange(T, device=self.last.device) < torch.tensor(lengths, device=self.last.device)[:, None]
        result.mask[rows] = mask
        for x, out in zip((result.tokens, result.logp, result.entropy), self.out):
            x[rows] = out[slots, :T].masked_fill(~mask, 0)
        result.finished[rows] = self.finished[slots]

    def shrink(self, holes, busy, steps):
        """The queue is empty: move the last live slots into the holes and forget the tail."""
        B = len(busy) - len(holes)
        tail = [slot for slot in range(B, len(busy)) if slot not in set(holes)]
        holes = [slot for slot in holes if slot < B]
        for hole, slot in zip(holes, tail):
            busy[hole], steps[hole] = busy[slot], steps[slot]
        del busy[B:], steps[B:]
        if tail:
            rows = lambda slots: [slot * self.streams + s for slot in slots for s in range(self.streams)]
            self.slab.copy(rows(tail), rows(holes), int(self.pos[tail].max()))
            for x in (self.last, self.pos, self.key, self.step, self.budget, self.state, self.alive, self.finished,
                      *self.out):
                x[holes] = x[tail]
