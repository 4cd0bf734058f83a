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
import copy
import hashlib
import inspect
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, GenerationConfig, HfArgumentParser, Qwen2Config, Qwen2ForCausalLM

try:                                    # flash attention that takes a length for every row: torch 2.12, perhaps sooner
    from torch.nn.attention.varlen import varlen_attn
    VARLEN = {"seqused_k", "scale"} <= set(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN = False


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
    """Keep the top_k likeliest tokens (0: all), and of those the smallest set that holds top_p of their mass.

    p (R, V) -> p with zeros elsewhere, not renormalised.
    """
    V = p.shape[-1]
    k = min(top_k, V) if top_k else V
    if not top_k and not p.is_cuda:     # sorting a large vocabulary is slow, and the nucleus is small: look there first
        k = min(512, V)
        while k < V and (p.topk(k).values.sum(-1) < top_p).any():
            k = min(8 * k, V)
    top, token = p.topk(k)
    before = top.cumsum(-1) - top                                   # mass of the likelier tokens
    mass = top.sum(-1, keepdim=True) if top_k else 1.0
    return torch.zeros_like(p).scatter_(-1, token, top * (before < top_p * mass))


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


# ---- the slab, and the attention that reads it -------------------------------------------------------------------------

class Slab:
    """Keys and values: for every layer a pair of (rows, kv heads, columns, dim), column c of a row for its token c.

    The model is called either to read prompts (`prefill`: row i of the batch fills row target[i] of the slab, from
    column 0 on) or to read a token a row (`decode`: row i fills column pos[i] and looks at the first `reach` columns).
    """

    def __init__(self, rows, columns):
        self.rows, self.columns, self.layers, self.varlen = rows, columns, {}, VARLEN

    def prefill(self, target):
        self.target, self.pos = target, None
        return self

    def decode(self, pos, reach):
        self.pos, self.reach, self.seen = pos, reach, {}
        return self

    def attend(self, layer, q, k, v, scale, window):
        """q (B, heads, T, dim), k and v (B, kv heads, T, dim) -> (B, T, heads, dim)."""
        if layer not in self.layers:
            self.varlen &= k.is_cuda and k.dtype != torch.float32 and k.shape[3] == v.shape[3] <= 256
            self.layers[layer] = [self.room(x, self.columns) for x in (k, v)]
        keys, values = self.layers[layer]
        B, heads, T, _ = q.shape
        group = heads // k.shape[1]                                 # query heads that share one key head
        if self.pos is None:
            keys[self.target, :, :T], values[self.target, :, :T] = k, v
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            band = None         # (T, T) bool: query t may look at the columns t - window < c <= t
            if window and window < T:
                band = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
            return F.scaled_dot_product_attention(q, k, v, band, is_causal=band is None, scale=scale).transpose(1, 2)
        at = self.pos[:, None, None, None]
        keys.scatter_(2, at.expand_as(k), k), values.scatter_(2, at.expand_as(v), v)        # row i, column pos[i]
        if window not in self.seen:                                 # once a step for all layers with this window
            self.seen[window] = self.spans(window) if self.varlen else self.bias(window, q.dtype)
        q = q.view(B, -1, group, q.shape[3])    # a group becomes query positions: its keys are read once, not repeated
        if self.varlen:
            start, used, cu_q = self.seen[window]
            flat = [x.transpose(1, 2).flatten(0, 1) for x in (keys, values)]                # (rows * columns, ...)
            out = varlen_attn(q.transpose(1, 2).flatten(0, 1), *flat, cu_q * group, start, group, self.columns,
                              scale=scale, seqused_k=used).view(B, group, -1, v.shape[3]).transpose(1, 2)
        else:
            keys, values = keys[:B, :, :self.reach], values[:B, :, :self.reach]
            out = F.scaled_dot_product_attention(q, keys, values, self.seen[window], scale=scale)
        return out.reshape(B, 1, heads, -1)

    def bias(self, window, dtype):
        """(B, 1, 1, reach), added to the scores: 0 on the columns pos - window < c <= pos, -inf on the others."""
        c, pos = torch.arange(self.reach, device=self.pos.device), self.pos[:, None]
        unseen = (c > pos) | (c <= pos - window) if window else c > pos
        return torch.zeros(unseen.shape, dtype=dtype, device=c.device).masked_fill_(unseen, -torch.inf)[:, None, None]

    def spans(self, window):
        """The same for varlen_attn: where a row's columns start in the flat slab (B + 1), how many (B), and 0..B."""
        first = (self.pos + 1 - window).clamp_min(0) if window else torch.zeros_like(self.pos)
        rows = torch.arange(len(first) + 1, device=first.device, dtype=torch.int32)
        return (rows * self.columns + F.pad(first, (0, 1))).int(), (self.pos + 1 - first).int(), rows

    def room(self, like, columns):
        """Zeros (rows, kv heads, columns, dim). varlen_attn wants a row's tokens side by side, matmul wants a head's."""
        _, heads, _, dim = like.shape
        if self.varlen:
            return like.new_zeros(self.rows, columns, heads, dim).transpose(1, 2)
        return like.new_zeros(self.rows, heads, columns, dim)

    def grow(self, columns, spare=0):
        """Make room for `columns`. Outside CUDA graphs the slab is hardly wider than what attention reads, and is read
        whole: memory that comes in one piece comes twice as fast."""
        if columns > self.columns:
            for pair in self.layers.values():
                for i, old in enumerate(pair):
                    pair[i] = self.room(old, columns + spare)
                    pair[i][:, :, :self.columns] = old
            self.columns = columns + spare

    def copy(self, source, target, columns):
        """The first columns of the rows `source` (list) into the rows `target` (list), in every layer."""
        for pair in self.layers.values():
            for x in pair:
                x[target, :, :columns] = x[source, :, :columns]

    def clear(self):
        """Forget the last call: a NaN it left behind would get past any mask (0 * NaN is NaN)."""
        for pair in self.layers.values():
            for x in pair:
                x.zero_()


def slab_attention(module, query, key, value, attention_mask, slab=None, scaling=None, sliding_window=None, **options):
    """What every attention layer of the model calls instead of its own; `slab` is a keyword of the model's forward."""
    return slab.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register("slab", slab_attention)     # a name transformers has no mask for, so that it builds none


@contextmanager
def attention(model, name):
    """The model with the attention `name`, in eval mode, without autocast or gradients; afterwards all as it was."""
    training = [(m, m.training) for m in model.modules()]
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    names = [(c, c._attn_implementation) for c in configs.values()]
    try:
        model.eval()
        for config, _ in names:
            config._attn_implementation = name
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for config, name in names:
            config._attn_implementation = name
        for module, mode in training:
            module.training = mode


def examine(model):
    """ValueError, naming the model and the cause, if the slab cannot serve it.

    First what the config and the calls of its layers say, since slightly wrong attention hides in a small random model;
    then the proof: a few tokens read through the slab must give the logits of the model's own forward.
    """
    def refuse(cause):
        raise ValueError(f"the sampler cannot serve {type(model).__name__}: {cause}")

    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if odd := set(kinds) - {"full_attention", "sliding_attention"}:
        refuse(f"layers of type {', '.join(sorted(odd))}")
    ropes = [getattr(module, "rope_type", None) for module in model.modules()]
    if odd := {"dynamic", "longrope"} & {kind for r in ropes for kind in (r.values() if isinstance(r, dict) else [r])}:
        refuse(f"{odd.pop()} rope, whose frequencies depend on the longest row of a batch")

    at = torch.arange(8, device=model.device).expand(4, 8)
    ids = (at * 37 + at[:1, :4].T * 101 + 11) % model.get_input_embeddings().num_embeddings
    with attention(model, "eager"):
        want = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    calls = []

    def watched(module, query, key, value, attention_mask, slab=None, scaling=None, sliding_window=None, **options):
        odd = {k for k, v in options.items() if v is not None and v is not False} - {"dropout", "position_ids", "is_causal"}
        calls.append((module.layer_idx, sliding_window, odd | {"a mask of its own"} if attention_mask is not None else odd))
        return slab_attention(module, query, key, value, attention_mask, slab, scaling, sliding_window)

    AttentionInterface.register("slab, watched", watched)
    slab = Slab(4, 8)
    try:
        with attention(model, "slab, watched"):
            model(input_ids=ids[:, :-1], position_ids=at[:, :-1], use_cache=False, slab=slab.prefill(at[0, :4]))
            got = model(input_ids=ids[:, -1:], position_ids=at[:, -1:], use_cache=False, slab=slab.decode(at[:, -1], 8))
    except Exception as error:
        refuse(f"its attention does not go through transformers.AttentionInterface ({error})")
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    slides = [kind == "sliding_attention" for kind in kinds] or [bool(slides)] * config.num_hidden_layers
    if [layer for layer, _, _ in calls] != 2 * list(range(config.num_hidden_layers)):
        refuse("not every layer is one call of transformers.AttentionInterface")
    for layer, window, odd in calls:
        if odd:
            refuse(f"attention with {', '.join(odd)}")
        if slides[layer] != (window is not None):
            refuse(f"layer {layer} attends with sliding_window={window}, against its config")
    # The median row: a mixture of experts in bf16 may route a token of one row differently, a wrong model errs in all.
    error = ((got.logits[:, -1].float() - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-6)).median()
    if not error < (1e-4 if model.device.type == "cpu" and model.dtype == torch.float32 else 5e-2):
        refuse(f"its logits through the slab are off by {error:.1e} of their size")


# ---- the sampler ---------------------------------------------------------------------------------------------------------

@dataclass
class Samples:
    tokens: torch.Tensor    # (R, T) int64, 0 outside the mask; T is the longest row
    mask: torch.Tensor      # (R, T) bool, True on sampled tokens, the stop token included
    logp: torch.Tensor      # (R, T) float32, nats
    entropy: torch.Tensor   # (R, T) float32, nats
    finished: torch.Tensor  # (R,) bool, stopped by a stop token

    def lists(self):
        """The sampled tokens as R ragged lists."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.mask.sum(-1).tolist())]


class Sampler:
    """Samples from a decoder-only Hugging Face model, `rows` jobs at a time, each up to `length` tokens with its prompt.

    The model is used as it is, so its weights may change between calls. With `dtype` the sampler keeps a twin of the
    model in that precision (bf16 beside float32 training weights), as of the last `sync`. On CUDA a decode step is
    replayed from a graph; set `graphs` to None for eager steps. ValueError for a model the slab cannot serve.
    """

    def __init__(self, model, rows=64, length=2048, streams=1, dtype=None):
        if dtype not in (None, model.dtype):    # parameters only: rotary frequencies must stay float32
            memo = {id(p): torch.nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()}
            model = copy.deepcopy(model, memo)
        examine(model)
        rotary = any("inv_freq" in name for name, _ in model.named_buffers())
        if not rotary:                          # a table of positions ends
            length = min(length, getattr(model.config, "max_position_embeddings", length))
        self.model, self.rows, self.length, self.streams = model, rows, length, streams
        self.storage = None                     # where the weights were when the graphs were captured
        self.graphs = {} if model.device.type == "cuda" else None
        self.every = 8 if model.device.type == "cuda" else 4        # tokens between two looks of the host

    def sync(self, model):
        """Copy the weights of `model` into the twin, in place, so that captured graphs stay valid."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters()):
                if mine is not theirs:
                    mine.copy_(theirs)

    def __call__(self, prompts, n=1, max_new_tokens=256, stop=None, temperature=1.0, top_k=0, top_p=1.0, seed=0,
                 combine=None, halt=None):
        """Sample n continuations of every prompt -> Samples; row r belongs to prompt r // n.

        prompts         token-id lists, ragged; with streams=2 pairs of them, both fed the same sampled tokens
        max_new_tokens  an int, or one a prompt
        stop            token ids that end a row (None: the model's own EOS)
        temperature     0 is greedy; top_k=0 and top_p=1 switch truncation off
        combine         (logits (R, streams, V), last (R,) token fed last, step (R,) tokens sampled so far, state (R,)
                        int64, 0 for a fresh row) -> (log-probs (R, V), need not be normalised; new state)
        halt            tokens sampled so far (list) -> length to cut the row to, or None; asked every few tokens
        ValueError for what cannot be sampled, naming the row.
        """
        if not (n >= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(f"cannot sample with n={n}, temperature={temperature}, top_k={top_k}, top_p={top_p}")
        if self.streams > 1 and combine is None:
            raise ValueError(f"{self.streams} streams need a `combine` to make one distribution of them")
        if stop is None:
            stop = self.model.generation_config.eos_token_id
        stop = [stop] if isinstance(stop, int) else list(stop or ())
        jobs = self.plan(prompts, n, max_new_tokens, seed)
        with attention(self.model, "slab"):
            self.prepare(jobs)
            return self.run(jobs, self.tensor(stop), (temperature, top_k, top_p), combine, halt)

    def tensor(self, values, dtype=torch.long):
        return torch.tensor(values, dtype=dtype, device=self.model.device)

    def plan(self, prompts, n, max_new_tokens, seed):
        """Check the prompts and make of them one job (texts, budget, key) a row; texts holds a tuple of ids a stream."""
        if not len(prompts):
            raise ValueError("no prompts to sample from")
        budgets = list(max_new_tokens) if hasattr(max_new_tokens, "__len__") else [max_new_tokens] * len(prompts)
        if len(budgets) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(budgets)} values of max_new_tokens")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        jobs, times = [], {}
        for i, (prompt, budget) in enumerate(zip(prompts, budgets)):
            texts = tuple(tuple(map(int, text)) for text in (prompt if self.streams > 1 else [prompt]))
            where = f"row {i * n} (prompt {i})"
            if len(texts) != self.streams or not all(texts):
                raise ValueError(f"{where} is empty" if self.streams == 1 else
                                 f"{where} needs {self.streams} prompts, none of them empty")
            if not all(0 <= token < vocabulary for text in texts for token in (min(text), max(text))):
                raise ValueError(f"{where} has a token id outside the vocabulary of {vocabulary}")
            need = max(map(len, texts)) + budget
            if need > self.length or budget < 0:
                raise ValueError(f"{where}: a prompt of {need - budget} and {budget} new tokens do not fit "
                                 f"length={self.length}")
            for _ in range(n):
                sample = times[texts] = times.get(texts, -1) + 1    # a prompt listed twice gets other samples
                jobs.append((texts, budget, row_key(seed, texts, sample)))
        return jobs

    def prepare(self, jobs):
        """Memory for a call. CUDA graphs need theirs at fixed addresses: it stays, and so do they while the weights do."""
        slots = min(self.rows, len(jobs))
        if self.graphs is None:
            self.slab = Slab(slots * self.streams, 0)
        elif (storage := [p.data_ptr() for p in self.model.parameters()]) == self.storage:
            return self.slab.clear()
        else:
            self.storage, self.graphs, slots = storage, {}, self.rows
            self.slab = Slab(slots * self.streams, self.length)
        self.last, self.pos = self.tensor([[[0] * self.streams] * slots] * 2)           # (slots, streams) each

    def run(self, jobs, stop, how, combine, halt):
        """The loop: decode a few tokens, see who is done, refill the slots or shrink the batch."""
        shape = len(jobs), max(budget for _, budget, _ in jobs) + self.every            # room for rows that overrun
        out = [torch.zeros(shape, dtype=dtype, device=stop.device) for dtype in (torch.long, torch.float, torch.float)]
        length, finished = [0] * len(jobs), [False] * len(jobs)
        queue = [r for r, (_, budget, _) in enumerate(jobs) if budget][::-1]
        busy = [queue.pop() for _ in range(min(self.rows, len(queue)))]                 # slot -> job
        self.held = [None] * self.rows * self.streams                                   # row of the slab -> prompt
        self.state = self.tensor([0] * len(busy))
        self.load(jobs, dict(enumerate(busy)))
        while busy:
            ahead = min(self.every, max(jobs[r][1] - length[r] for r in busy))
            reach = min(self.length, max(max(map(len, jobs[r][0])) + length[r] for r in busy) + ahead)
            self.slab.grow(reach, spare=max(28, reach // 8))
            rows, start, key = self.tensor([[r, length[r], jobs[r][2]] for r in busy]).T
            step = start + torch.arange(ahead, device=stop.device)[:, None]             # (ahead, B)
            u = uniform(key, step)
            block = [self.advance(reach, step[i], u[i], how, combine) for i in range(ahead)]
            for x, values in zip(out, zip(*block)):
                x[rows, step] = torch.stack(values)
            tokens = torch.stack([token for token, *_ in block])
            clear = ((tokens[..., None] == stop).any(-1).cumsum(0) == 0).sum(0).tolist()     # tokens before a stop:
            for r, count in zip(busy, clear):                                           # the one wait for the device
                left = min(ahead, jobs[r][1] - length[r])
                finished[r] = count < left
                length[r] += min(count + 1, left)
            done = [slot for slot, r in enumerate(busy) if finished[r] or length[r] == jobs[r][1]]
            if halt:
                for slot, text in enumerate(out[0][busy, :max(length[r] for r in busy)].tolist()):
                    r = busy[slot]
                    cut = halt(text[:length[r]])
                    if cut is not None and (cut < length[r] or slot not in done):
                        length[r], finished[r] = cut, False
                        done.append(slot)
            self.refill(jobs, sorted(set(done)), busy, queue)
        lengths = self.tensor(length)
        mask = torch.arange(max(length), device=stop.device) < lengths[:, None]
        tokens, logp, entropy = (x[:, :max(length)] * mask for x in out)
        return Samples(tokens, mask, logp, entropy, self.tensor(finished, torch.bool))

    def refill(self, jobs, done, busy, queue):
        """Give the slots that are done to jobs of the queue; with none left, move the last slots into the holes."""
        fill = {slot: queue.pop() for slot in done[:len(queue)]}
        for slot, r in fill.items():
            busy[slot] = r
        if fill:
            self.load(jobs, fill)
        holes = done[len(fill):]
        B = len(busy) - len(holes)
        tail = [slot for slot in range(B, len(busy)) if slot not in holes]
        holes = holes[:len(tail)]
        if tail:
            self.slab.copy(*([slot * self.streams + i for slot in slots for i in range(self.streams)]
                             for slots in (tail, holes)), int(self.pos[tail].max()))
            for x in (self.last, self.pos, self.state):
                x[holes] = x[tail]
            for hole, slot in zip(holes, tail):
                busy[hole] = busy[slot]
        del busy[B:]
        self.state = self.state[:B]

    def load(self, jobs, fill):
        """Put jobs into slots (fill: slot -> job). A prompt the slab already holds is copied, a new one is read once."""
        home = {text: row for row, text in enumerate(self.held) if text and row // self.streams not in fill}
        fresh, copies = {}, []
        for slot, r in fill.items():
            for stream, text in enumerate(jobs[r][0]):
                row = slot * self.streams + stream
                self.held[row] = text
                if text in home:
                    copies.append((home[text], row))
                else:
                    home[text] = fresh[text] = row
        longest = max(len(text) for r in fill.values() for text in jobs[r][0])
        self.slab.grow(longest)
        self.read(fresh)
        if copies:
            self.slab.copy(*map(list, zip(*copies)), longest - 1)
        slots = self.tensor(list(fill))
        self.last[slots] = self.tensor([[text[-1] for text in jobs[r][0]] for r in fill.values()])
        self.pos[slots] = self.tensor([[len(text) - 1 for text in jobs[r][0]] for r in fill.values()])
        self.state[slots] = 0

    def read(self, fresh, at_once=8192):
        """Prefill prompts (text -> row of the slab), right-padded, about `at_once` tokens at a time.

        All but the last token of each: that one is the first input of `advance`, so there is one way to sample.
        """
        todo = sorted((text for text in fresh if len(text) > 1), key=len)
        while todo:
            width = len(todo[-1]) - 1
            batch = [todo.pop() for _ in range(min(len(todo), max(1, at_once // width)))]
            ids = self.tensor([text[:-1] + (0,) * (width + 1 - len(text)) for text in batch])
            at = torch.arange(width, device=ids.device).expand(ids.shape)
            slab = self.slab.prefill(self.tensor([fresh[text] for text in batch]))
            self.model.base_model(input_ids=ids, position_ids=at, use_cache=False, slab=slab)

    def advance(self, reach, step, u, how, combine):
        """One token (B,) for every live slot, with its logp and entropy. Nothing here waits for the device."""
        B = len(u)
        last, pos = self.last[:B], self.pos[:B]
        logits = (self.forward(B, self.slab.columns) if self.graphs is None else self.replay(B, reach)).float()
        if combine:
            logits, self.state = combine(logits, last[:, 0].clone(), step, self.state)
        else:
            logits = logits[:, 0]
        token, logp, entropy = draw(logits, u, *how)
        last.copy_(token[:, None].expand_as(last))                  # every stream is fed the sampled token
        pos.add_(1).clamp_(max=self.length - 1)                     # a row past its end must stay inside the slab
        return token, logp, entropy

    def forward(self, B, reach):
        """Logits (B, streams, V) of the tokens that follow `last`."""
        ids, pos = self.last[:B].view(-1, 1), self.pos[:B].view(-1, 1)
        slab = self.slab.decode(pos[:, 0], reach)
        return self.model(input_ids=ids, position_ids=pos, use_cache=False, slab=slab).logits.view(B, self.streams, -1)

    def replay(self, B, reach):
        """`forward` from a CUDA graph, captured for a few batch sizes (and reaches, without varlen_attn) in one pool."""
        size = min(self.rows, max(8, 1 << (B - 1).bit_length()))
        reach = self.length if self.slab.varlen else min(self.length, max(256, 1 << (reach - 1).bit_length()))
        if (size, reach) not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):       # warm up; doing a step twice writes the same keys to the same column
                self.forward(size, reach)
            torch.cuda.current_stream().wait_stream(side)
            pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self.forward(size, reach)
            self.graphs[size, reach] = graph, logits
        graph, logits = self.graphs[size, reach]
        graph.replay()
        return logits[:B]


# ---- the race ----------------------------------------------------------------------------------------------------------

def generate(model, prompts, n, new, stop, rows=64, **sampling):
    """The baseline: `model.generate` on left-padded batches of `rows` -> sampled rows, cut after their stop token."""
    sampling = sampling or dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    jobs, out = [prompt for prompt in prompts for _ in range(n)], []
    for i in range(0, len(jobs), rows):
        batch = jobs[i:i + rows]
        width = max(map(len, batch))
        ids, real = (torch.tensor([[0] * (width - len(p)) + row(p) for p in batch], device=model.device)
                     for row in (list, lambda p: [1] * len(p)))
        got = model.generate(ids, attention_mask=real, max_new_tokens=new, eos_token_id=list(stop) or None, **sampling)
        for row in got[:, width:].tolist():
            out.append(row[:next((t + 1 for t, token in enumerate(row) if token in stop), new)])
    return out


def random_model(device, dtype=torch.float32, **shape):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).to(device, dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def seconds(f):
    """Run f with the device drained before and after -> (wall seconds, result)."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = f()
    wait()
    return time.perf_counter() - start, result


def race(device, rounds=2):
    """Tokens a second of generate and of the sampler, alternated in one process, and the proof that both say the same."""
    model = random_model(device, vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=2)
    g = torch.Generator().manual_seed(0)
    stop = range(128)                           # random weights hit one in 32 steps or so: ragged ends

    def prompts(count, low, high):
        lengths = torch.randint(low, high + 1, (count,), generator=g).tolist()
        return [torch.randint(128, 4096, (length,), generator=g).tolist() for length in lengths]

    cases = {"1 row": (prompts(1, 32, 32), 1, 48, ()), "64 equal rows": (prompts(64, 32, 32), 1, 48, ()),
             "192 ragged prompts and ends": (prompts(192, 8, 48), 1, 128, stop),
             "8 prompts of 900 tokens, n = 8": (prompts(8, 900, 900), 8, 24, ())}
    sampler = Sampler(model, rows=64, length=1024)
    runners = {"generate": lambda *case: generate(model, *case),
               "sampler": lambda texts, n, new, stop: sampler(texts, n, new, stop).lists()}
    print(f"{'tokens a second':32}{'generate':>10}{'sampler':>10}{'ratio':>8}")
    for name, case in cases.items():
        best = dict.fromkeys(runners, 0.0)
        for _ in range(rounds):
            for who, run in runners.items():
                spent, rows = seconds(lambda: run(*case))
                best[who] = max(best[who], sum(map(len, rows)) / spent)
        print(f"{name:32}{best['generate']:10.0f}{best['sampler']:10.0f}{best['sampler'] / best['generate']:8.1f}", flush=True)

    texts = prompts(12, 1, 40)
    alone = [generate(model, [text], 1, 24, stop, do_sample=False)[0] for text in texts]
    same = Sampler(model, rows=5, length=1024)(texts, max_new_tokens=24, stop=stop, temperature=0.0).lists() == alone
    print(f"greedy, 12 ragged prompts on 5 rows: {'identical to' if same else 'DIFFERENT FROM'} generate row by row")


def roofline(device, batches=(64, 256, 512), contexts=(1024, 4096)):
    """Decode speed at Qwen2.5-1.5B shape in bf16 against `generate` and against what the memory allows.

    A step must read the weights once and the live keys and values once; divided by the bandwidth of a plain copy,
    measured here, that is the least time it can take. Steps are timed as differences, so that reading prompts drops out.
    """
    model = random_model(device, torch.bfloat16, vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                         num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)
    a, b = (torch.zeros(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * a.numel() / min(seconds(lambda: b.copy_(a))[0] for _ in range(10))
    del a, b
    weights, token = sum(2 * p.numel() for p in model.parameters()), 2 * 2 * 28 * 2 * 128      # bytes, bytes of KV a token
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, "
          f"weights {weights / 1e9:.2f} GB, KV {token / 1e3:.1f} kB a token, varlen_attn {'yes' if VARLEN else 'no'}")
    print(f"{'batch':>6}{'context':>9}{'tokens/s':>10}{'ms/step':>9}{'roofline':>10}{'generate ms':>13}{'ratio':>7}")
    for context in contexts:
        for batch in batches:
            prompt = [torch.randint(1000, 150000, (context - 64,), generator=torch.Generator().manual_seed(0)).tolist()]
            try:
                sampler = Sampler(model, rows=batch, length=context + 64)
                ours = lambda new: seconds(lambda: sampler(prompt, batch, new, ()))[0]
                ours(16)                                            # captures the graph
                step = (min(ours(128) for _ in range(2)) - min(ours(16) for _ in range(2))) / 112
                least = (weights + batch * context * token) / bandwidth
                print(f"{batch:6}{context:9}{batch / step:10.0f}{1e3 * step:9.2f}{least / step:10.0%}", end="", flush=True)
                del sampler
                theirs = lambda new: seconds(lambda: generate(model, prompt, batch, new, (), rows=batch))[0]
                theirs(2)
                slow = (theirs(18) - theirs(2)) / 16
                print(f"{1e3 * slow:13.2f}{slow / step:7.1f}")
            except torch.OutOfMemoryError:
                print("  out of memory")
            torch.cuda.empty_cache()


@dataclass
class Flags:
    device: str = field(default="cpu", metadata={"help": "cpu: the race against generate; cuda: also the roofline",
                                                 "choices": ["cpu", "cuda"]})


if __name__ == "__main__":
    parser = HfArgumentParser(Flags)
    flags, = parser.parse_args_into_dataclasses()
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA GPU that torch can use")
    torch.set_num_threads(1)
    race(flags.device)
    if flags.device == "cuda":
        roofline(flags.device)
