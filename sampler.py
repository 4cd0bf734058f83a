"""Sampling from a language model in batches: the loop in which all four methods spend their time.

`model.generate` left-pads a batch, grows its cache by concatenation, and runs until the longest row is done.
Here the keys and values live in one slab in which column c of a row always holds its token c; during a call
the model's attention is replaced by one function that writes a column and attends to those before it; and a
row that is done gives its slot to the next job. The samples are those of `generate`, in less time.

    job       one sample of one prompt; it becomes one row of the result
    slot      one of `rows` places in the batch, which a job occupies until it is done
    stream    with streams=2 a slot is two rows of the model: two contexts, fed the same sampled tokens
    pos       the position of the token a row is fed, hence the column it writes
    reach     how many columns attention looks at: those of the longest live row, masked for the others
    logp      log p(y_t); entropy: H[p_t]; both of the temperature-scaled, untruncated distribution, in nats

Randomness: sample j of a prompt inverts the cumulative distribution at numbers that depend on (seed, prompt,
j, step) and on nothing else. Neither `rows`, nor the order of the prompts, nor the company they keep changes
a sample (as far as float rounding permits), and no generator is advanced.

Left out: beam search, repetition penalties, paged or quantised caches, speculative decoding, several GPUs.

    python sampler.py                  race it against generate, and prove that both say the same: a minute
    python sampler.py --device cuda    also Qwen2.5-1.5B shape in bf16 against the roofline: some minutes
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

try:    # flash attention that is told how long every row is: in torch 2.12 and later, perhaps sooner
    from torch.nn.attention.varlen import varlen_attn
    VARLEN = {"seqused_k", "scale"} <= set(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN = False


# ---- one token ---------------------------------------------------------------------------------------------

def row_key(seed, prompt, sample):
    """The int64 under which sample number `sample` of a prompt draws its uniform numbers."""
    digest = hashlib.blake2b(repr((int(seed), prompt, sample)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key, step):
    """Number `step` of splitmix64 seeded by `key` (int64 both), as a float in (0, 1).

    Products wrap, and the masks make the arithmetic >> of int64 logical. 23 bits are kept: never 0, never 1.
    """
    x = key + step * -0x61C8864680B583EB
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ (x >> 31 & 0x1FFFFFFFF)
    return ((x >> 41 & 0x7FFFFF) + 0.5) * 2.0**-23


def truncate(p, top_k, top_p):
    """Keep the top_k likeliest tokens (0: all), and of those the smallest set that holds top_p of their mass.

    p (R, V) -> p with zeros elsewhere, not renormalised.
    """
    V = p.shape[-1]
    k = min(top_k or V, V)
    if not top_k and not p.is_cuda:     # sorting a vocabulary is slow, and a nucleus is small
        k = min(512, V)
        while k < V and (p.topk(k).values.sum(-1) < top_p).any():
            k = min(8 * k, V)
    top, token = p.topk(k)
    before = top.cumsum(-1) - top                                   # mass of the likelier tokens
    mass = top.sum(-1, keepdim=True) if top_k else 1.0
    return torch.zeros_like(p).scatter_(-1, token, top * (before < top_p * mass))


def draw(logits, u, temperature, top_k=0, top_p=1.0):
    """The next tokens, and what the distribution says of them.

    logits (R, V) float32, u (R,) in (0, 1) -> token (R,) int64, logp (R,), entropy (R,). First temperature,
    then top_k, then top_p, as in Hugging Face. Temperature 0 is argmax, with logp and entropy those of 1.
    """
    log_p = (logits / temperature if temperature not in (0, 1) else logits).log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp_min(-200)).sum(-1)                  # p is 0 long before; 0 * inf is NaN
    token = logits.argmax(-1)
    if temperature:
        kept = truncate(p, top_k, top_p) if top_k or top_p < 1 else p
        cdf = kept.cumsum(-1)
        found = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_max(p.shape[-1] - 1)
        # A parallel cumsum may rise by rounding where p is 0: such a token is not in the support.
        token = torch.where(kept.gather(-1, found) > 0, found, token[:, None]).squeeze(-1)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1), entropy


# ---- the slab, and the attention that reads it -------------------------------------------------------------

def flash(k, v):
    """Whether varlen_attn can read these keys and values."""
    return VARLEN and k.is_cuda and k.dtype != torch.float32 and k.shape[3] == v.shape[3] <= 256


class Slab:
    """Keys and values: for every layer a pair of (rows, kv heads, columns, dim).

    The model is called to read prompts (`prefill`: row i of the batch fills row target[i] of the slab, from
    column 0 on) or to read a token a row (`decode`: row i fills column pos[i] and looks at `reach` columns).
    """

    def __init__(self, rows, columns):
        self.rows, self.columns, self.layers, self.varlen = rows, columns, {}, True

    def prefill(self, target):
        self.target, self.pos = target, None
        return self

    def decode(self, pos, reach):
        self.pos, self.reach, self.seen = pos, reach, {}
        return self

    def attend(self, layer, q, k, v, scale, window):
        """q (B, heads, T, dim), k and v (B, kv heads, T, dim) -> (B, T, heads, dim)."""
        if layer not in self.layers:
            self.varlen &= flash(k, v)
            self.layers[layer] = [self.room(x, self.columns) for x in (k, v)]
        keys, values = self.layers[layer]
        B, heads, T, dim = q.shape
        group = heads // k.shape[1]                                 # query heads that share one key head
        if self.pos is None:
            keys[self.target, :, :T], values[self.target, :, :T] = k, v
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            band = None         # (T, T) bool: query t may look at the columns t - window < c <= t
            if window and window < T:
                band = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
            out = F.scaled_dot_product_attention(q, k, v, band, is_causal=band is None, scale=scale)
            return out.transpose(1, 2)

        at = self.pos[:, None, None, None]
        keys.scatter_(2, at.expand_as(k), k)                        # row i, column pos[i]
        values.scatter_(2, at.expand_as(v), v)
        if (window, self.varlen) not in self.seen:                  # made once a step, shared by the layers
            self.seen[window, self.varlen] = self.spans(window) if self.varlen else self.bias(window, q.dtype)
        q = q.view(B, -1, group, dim)       # a group becomes query positions: its keys are read once
        if self.varlen:
            start, used, rows = self.seen[window, True]
            q, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, keys, values))
            out = varlen_attn(q, keys, values, rows * group, start, group, self.columns,
                              scale=scale, seqused_k=used)
            out = out.view(B, group, -1, dim).transpose(1, 2)
        else:
            keys, values = keys[:B, :, :self.reach], values[:B, :, :self.reach]
            out = F.scaled_dot_product_attention(q, keys, values, self.seen[window, False], scale=scale)
        return out.reshape(B, 1, heads, -1)

    def bias(self, window, dtype):
        """(B, 1, 1, reach), added to the scores: 0 on the columns pos - window < c <= pos, -inf elsewhere."""
        c, pos = torch.arange(self.reach, device=self.pos.device), self.pos[:, None]
        unseen = (c > pos) | (c <= pos - window) if window else c > pos
        bias = torch.zeros(unseen.shape, dtype=dtype, device=c.device).masked_fill_(unseen, -torch.inf)
        return bias[:, None, None]

    def spans(self, window):
        """The same for varlen_attn: the start of a row's columns in the flat slab, their number; and 0..B."""
        first = (self.pos + 1 - window).clamp_min(0) if window else torch.zeros_like(self.pos)
        rows = torch.arange(len(first) + 1, device=first.device, dtype=torch.int32)
        return (rows * self.columns + F.pad(first, (0, 1))).int(), (self.pos + 1 - first).int(), rows

    def room(self, like, columns):
        """Zeros (rows, kv heads, columns, dim); for varlen_attn the heads of a token lie together."""
        _, heads, _, dim = like.shape
        if self.varlen:
            return like.new_zeros(self.rows, columns, heads, dim).transpose(1, 2)
        return like.new_zeros(self.rows, heads, columns, dim)

    def grow(self, columns, spare=0):
        """Make room for `columns`. Without CUDA graphs the slab is as wide as it must be and is read whole:
        memory that comes in one piece comes twice as fast."""
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
        """Forget the last call: a NaN it left behind would get past any mask, since 0 * NaN is NaN."""
        for pair in self.layers.values():
            for x in pair:
                x.zero_()


def slab_attention(module, query, key, value, attention_mask, sliding_window=None, slab=None, scaling=None,
                   **others):
    """What every layer calls in place of its own attention; `slab` is a keyword of the model's call."""
    return slab.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register("slab", slab_attention)     # a name for which transformers builds no mask


@contextmanager
def attention(model, name):
    """The model with attention `name`, in eval mode, without autocast or gradients; then all as it was."""
    training = [(m, m.training) for m in model.modules()]
    configs = {id(config): config for config in (getattr(m, "config", None) for m in model.modules())
               if hasattr(config, "_attn_implementation")}.values()
    names = [config._attn_implementation for config in configs]
    try:
        model.eval()
        for config in configs:
            config._attn_implementation = name
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for config, old in zip(configs, names):
            config._attn_implementation = old
        for module, mode in training:
            module.training = mode


def examine(model):
    """ValueError, naming the model and the cause, if the slab cannot serve it.

    First what the config and the calls of the layers say, since slightly wrong attention hides in a small
    random model. Then the proof: a few tokens read through the slab must give the model's own logits.
    """
    def refuse(cause):
        raise ValueError(f"the sampler cannot serve {type(model).__name__}: {cause}")

    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if odd := set(kinds) - {"full_attention", "sliding_attention"}:
        refuse(f"layers of type {', '.join(sorted(odd))}")
    ropes = [getattr(module, "rope_type", None) for module in model.modules()]
    ropes = {kind for rope in ropes for kind in (rope.values() if isinstance(rope, dict) else [rope])}
    if odd := ropes & {"dynamic", "longrope"}:
        refuse(f"{odd.pop()} rope, whose frequencies depend on the longest row of a batch")

    calls = []

    def watched(module, query, key, value, attention_mask, sliding_window=None, **options):
        odd = {name for name, option in options.items() if option is not None and option is not False}
        odd |= {"a mask of its own"} if attention_mask is not None else set()
        odd -= {"slab", "scaling", "dropout", "position_ids", "is_causal"}
        calls.append((module.layer_idx, sliding_window, odd))
        return slab_attention(module, query, key, value, None, sliding_window, **options)

    AttentionInterface.register("slab, watched", watched)
    rows, at = torch.arange(4, device=model.device), torch.arange(8, device=model.device).expand(4, 8)
    ids = (at * 37 + rows[:, None] * 101 + 11) % model.get_input_embeddings().num_embeddings
    with attention(model, "eager"):
        want = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    slab = Slab(4, 8)
    try:
        with attention(model, "slab, watched"):
            model(input_ids=ids[:, :-1], position_ids=at[:, :-1], use_cache=False, slab=slab.prefill(rows))
            slab.decode(at[:, -1], reach=8)
            got = model(input_ids=ids[:, -1:], position_ids=at[:, -1:], use_cache=False, slab=slab)
    except Exception as error:
        refuse(f"its attention does not go through transformers.AttentionInterface ({error})")

    layers = list(range(config.num_hidden_layers))
    if [layer for layer, _, _ in calls] != layers + layers:
        refuse("its layers are not one call each of transformers.AttentionInterface")
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    slides = [kind == "sliding_attention" for kind in kinds] or [bool(sliding) for _ in layers]
    for layer, window, odd in calls:
        if odd:
            refuse(f"attention with {', '.join(sorted(odd))}")
        if slides[layer] != (window is not None):
            refuse(f"layer {layer} attends with sliding_window={window}, against its config")
    # The median row: bf16 may send a token of one row to another expert, but a wrong model errs in every row.
    error = ((got.logits[:, -1].float() - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-6)).median()
    if not error < (1e-4 if model.device.type == "cpu" and model.dtype == torch.float32 else 5e-2):
        refuse(f"its logits through the slab are off by {error:.1e} of their size")


# ---- the sampler -------------------------------------------------------------------------------------------

@dataclass
class Samples:
    """R rows, row r a sample of prompt r // n; T is the longest."""
    tokens: torch.Tensor    # (R, T) int64
    mask: torch.Tensor      # (R, T) bool, True on sampled tokens, the stop token included; elsewhere all is 0
    logp: torch.Tensor      # (R, T) float32, nats
    entropy: torch.Tensor   # (R, T) float32, nats
    finished: torch.Tensor  # (R,) bool, stopped by a stop token

    def lists(self):
        """The sampled tokens as R ragged lists."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.mask.sum(-1).tolist())]


@dataclass
class Job:
    row: int                # of the result
    texts: tuple            # the prompt of every stream, a tuple of token ids each
    budget: int
    key: int                # of its uniform numbers
    length: int = 0         # tokens sampled so far
    finished: bool = False  # by a stop token
    done: bool = False


class Sampler:
    """Samples from a decoder-only Hugging Face model, `rows` jobs at a time, of up to `length` tokens each.

    The model is used as it is, so its weights may change between calls. With `dtype` the sampler keeps a twin
    in that precision (bf16 beside float32 training weights), as of the last `sync`. On CUDA a decode step is
    replayed from a graph; graphs = None turns that off. ValueError for a model the slab cannot serve.
    """

    def __init__(self, model, rows=64, length=2048, streams=1, dtype=None):
        if dtype not in (None, model.dtype):    # the parameters only: rotary frequencies must stay float32
            cast = lambda p: torch.nn.Parameter(p.detach().to(dtype), requires_grad=False)
            model = copy.deepcopy(model, {id(p): cast(p) for p in model.parameters()})
        examine(model)
        if not any("inv_freq" in name for name, _ in model.named_buffers()):    # positions come from a table
            length = min(length, getattr(model.config, "max_position_embeddings", length))
        self.model, self.rows, self.length, self.streams = model, rows, length, streams
        self.every = 8 if model.device.type == "cuda" else 4        # tokens between two looks of the host
        self.graphs = {} if model.device.type == "cuda" else None
        self.storage = None                     # where the weights were when the graphs were captured

    def sync(self, model):
        """Copy the weights of `model` into the twin, in place, so that captured graphs stay valid."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters()):
                if mine is not theirs:
                    mine.copy_(theirs)

    def __call__(self, prompts, n=1, max_new_tokens=256, stop=None, temperature=1.0, top_k=0, top_p=1.0,
                 seed=0, combine=None, halt=None):
        """Sample n continuations of every prompt -> Samples; row r belongs to prompt r // n.

        prompts         ragged lists of token ids; with streams=2 pairs of them, fed the same sampled tokens
        max_new_tokens  an int, or one for every prompt
        stop            ids of the tokens that end a row; None: the model's own EOS
        temperature     0 is greedy; top_k=0 and top_p=1 truncate nothing
        combine         (logits (R, streams, V), last (R,) the token fed, step (R,) tokens sampled so far,
                        state (R,) int64, 0 for a fresh row) -> log-probs (R, V), normalised or not; new state
        halt            (list of tokens sampled so far) -> the length to cut the row to, or None to go on;
                        asked every few tokens, and a row it cuts is not finished
        ValueError, naming the row, for what cannot be sampled.
        """
        if not (n >= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(f"cannot sample with {n=}, {temperature=}, {top_k=}, {top_p=}")
        if self.streams > 1 and combine is None:
            raise ValueError(f"{self.streams} streams need a `combine` to make one distribution of them")
        if stop is None:
            stop = getattr(self.model.generation_config, "eos_token_id", None)
        stop = [stop] if isinstance(stop, int) else list(stop or ())
        jobs = self.plan(prompts, n, max_new_tokens, seed)
        with attention(self.model, "slab"):
            self.prepare(jobs)
            return self.run(jobs, self.tensor(stop), (temperature, top_k, top_p), combine, halt)

    def tensor(self, values, dtype=torch.long):
        return torch.tensor(values, dtype=dtype, device=self.model.device)

    def plan(self, prompts, n, max_new_tokens, seed):
        """Check the request and make a list of jobs of it."""
        if not len(prompts):
            raise ValueError("no prompts to sample from")
        budgets = max_new_tokens if hasattr(max_new_tokens, "__len__") else [max_new_tokens] * len(prompts)
        if len(budgets) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(budgets)} values of max_new_tokens")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        jobs, times = [], {}
        for i, (prompt, budget) in enumerate(zip(prompts, budgets)):
            where = f"row {i * n} (prompt {i})"
            texts = tuple(tuple(map(int, text)) for text in (prompt if self.streams > 1 else [prompt]))
            if len(texts) != self.streams or not all(texts):
                raise ValueError(f"{where} is empty" if self.streams == 1 else
                                 f"{where} needs {self.streams} prompts, none of them empty")
            if not all(0 <= token < vocabulary for text in texts for token in (min(text), max(text))):
                raise ValueError(f"{where} has a token id outside the vocabulary of {vocabulary}")
            longest = max(map(len, texts))
            if budget < 0 or longest + budget > self.length:
                raise ValueError(f"{where}: {longest} tokens and {budget} new ones do not fit "
                                 f"length={self.length}")
            for _ in range(n):
                sample = times[texts] = times.get(texts, -1) + 1    # a prompt listed twice goes on counting
                jobs.append(Job(len(jobs), texts, int(budget), row_key(seed, texts, sample)))
        return jobs

    def prepare(self, jobs):
        """Memory for a call. What CUDA graphs read and write, weights included, must stay where it is."""
        slots = min(self.rows, len(jobs))
        if self.graphs is None:
            self.slab = Slab(slots * self.streams, 0)
        elif (storage := [p.data_ptr() for p in self.model.parameters()]) == self.storage:
            return self.slab.clear()
        else:
            self.storage, self.graphs, slots = storage, {}, self.rows
            self.slab = Slab(slots * self.streams, self.length)
        self.last, self.pos = self.tensor([[[0] * self.streams] * slots] * 2)       # each (slots, streams)

    def run(self, jobs, stop, how, combine, halt):
        """The loop: sample a few tokens, see who is done, refill the slots or shrink the batch."""
        shape = len(jobs), max(job.budget for job in jobs) + self.every     # some rows run past their end
        out = [self.tensor(0, kind).repeat(shape) for kind in (torch.long, torch.float, torch.float)]
        queue = [job for job in jobs[::-1] if job.budget]
        busy = [queue.pop() for _ in range(min(self.rows, len(queue)))]     # slot -> job
        self.held = [None] * self.rows * self.streams                       # row of the slab -> its prompt
        self.state = self.tensor([0] * len(busy))
        self.load(dict(enumerate(busy)))
        while busy:
            ahead = min(self.every, max(job.budget - job.length for job in busy))
            reach = max(len(text) + job.length for job in busy for text in job.texts) + ahead
            reach = min(reach, self.length)
            self.slab.grow(reach, spare=max(28, reach // 8))
            rows, length, key = self.tensor([[job.row, job.length, job.key] for job in busy]).T
            step = length + torch.arange(ahead, device=stop.device)[:, None]        # (ahead, B)
            u = uniform(key, step)
            block = [self.advance(reach, step[i], u[i], how, combine) for i in range(ahead)]
            for x, values in zip(out, zip(*block)):
                x[rows, step] = torch.stack(values)
            tokens = torch.stack([token for token, *_ in block])
            stopped = (tokens[..., None] == stop).any(-1).cumsum(0) > 0     # at this token or before it
            for job, before in zip(busy, (~stopped).sum(0).tolist()):       # here the host waits
                left = min(ahead, job.budget - job.length)
                job.finished = before < left
                job.length += min(before + 1, left)
                job.done = job.finished or job.length == job.budget
            if halt:
                for job, text in zip(busy, out[0][rows, :max(job.length for job in busy)].tolist()):
                    cut = halt(text[:job.length])
                    if cut is not None and (cut < job.length or not job.done):
                        job.length, job.finished, job.done = cut, False, True
            self.refill(busy, queue)

        length, finished = self.tensor([[job.length, job.finished] for job in jobs]).T
        mask = torch.arange(max(job.length for job in jobs), device=stop.device) < length[:, None]
        tokens, logp, entropy = (x[:, :mask.shape[1]].masked_fill(~mask, 0) for x in out)
        return Samples(tokens, mask, logp, entropy, finished.bool())

    def refill(self, busy, queue):
        """Give the slots that are done to the queue; when it is empty, move the last slots into the holes."""
        done = [slot for slot, job in enumerate(busy) if job.done]
        fill = {slot: queue.pop() for slot in done[:len(queue)]}
        for slot, job in fill.items():
            busy[slot] = job
        self.load(fill)
        holes = done[len(fill):]
        B = len(busy) - len(holes)
        tail = [slot for slot in range(B, len(busy)) if not busy[slot].done]
        holes = holes[:len(tail)]
        if tail:
            source, target = ([slot * self.streams + i for slot in slots for i in range(self.streams)]
                              for slots in (tail, holes))
            self.slab.copy(source, target, int(self.pos[tail].max()))
            for x in (self.last, self.pos, self.state):
                x[holes] = x[tail]
            for hole, slot in zip(holes, tail):
                busy[hole] = busy[slot]
        del busy[B:]
        self.state = self.state[:B]

    def load(self, fill):
        """Put jobs into slots (slot -> job). A prompt the slab holds is copied, a new one is read, once."""
        if not fill:
            return
        home = {text: row for row, text in enumerate(self.held) if text and row // self.streams not in fill}
        fresh, source, target = {}, [], []
        for slot, job in fill.items():
            for row, text in enumerate(job.texts, slot * self.streams):
                self.held[row] = text
                if text in home:
                    source.append(home[text])
                    target.append(row)
                else:
                    home[text] = fresh[text] = row
        longest = max(len(text) for job in fill.values() for text in job.texts)
        self.slab.grow(longest)
        self.read(fresh)
        if source:
            self.slab.copy(source, target, longest - 1)
        slots = self.tensor(list(fill))
        self.last[slots] = self.tensor([[text[-1] for text in job.texts] for job in fill.values()])
        self.pos[slots] = self.tensor([[len(text) - 1 for text in job.texts] for job in fill.values()])
        self.state[slots] = 0

    def read(self, fresh, at_once=8192):
        """Prefill prompts (text -> row of the slab), right-padded, about `at_once` tokens at a time.

        All but their last tokens: those are the first input of `advance`, so there is one way to sample.
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
        """A token for every live slot: token, logp, entropy, each (B,). Nothing here waits for the device."""
        B = len(u)
        last, pos = self.last[:B], self.pos[:B]
        logits = self.forward(B, self.slab.columns) if self.graphs is None else self.replay(B, reach)
        logits = logits.float()                                     # (B, streams, V)
        if combine:
            logits, self.state = combine(logits, last[:, 0].clone(), step, self.state)
        else:
            logits = logits[:, 0]
        token, logp, entropy = draw(logits, u, *how)
        last.copy_(token[:, None].expand_as(last))                  # every stream is fed the sampled token
        pos.add_(1).clamp_(max=self.length - 1)                     # past its end a row must stay in the slab
        return token, logp, entropy

    def forward(self, B, reach):
        """Logits (B, streams, V) of the tokens after `last`."""
        ids, pos = self.last[:B].view(-1, 1), self.pos[:B].view(-1, 1)
        slab = self.slab.decode(pos[:, 0], reach)
        out = self.model(input_ids=ids, position_ids=pos, use_cache=False, slab=slab)
        return out.logits.view(B, self.streams, -1)

    def replay(self, B, reach):
        """`forward` from a CUDA graph: one for each of a few batch sizes, and reaches without varlen_attn."""
        size = min(self.rows, max(8, 1 << (B - 1).bit_length()))
        reach = self.length if self.slab.varlen else min(self.length, max(256, 1 << (reach - 1).bit_length()))
        if (size, reach) not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):       # warm up; a step done twice writes the same keys twice
                self.forward(size, reach)
            torch.cuda.current_stream().wait_stream(side)
            pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool):
                    logits = self.forward(size, reach)
            except RuntimeError:                # a model whose step waits for the device cannot be captured
                self.graphs = None
                return self.forward(B, self.slab.columns)
            self.graphs[size, reach] = graph, logits
        graph, logits = self.graphs[size, reach]
        graph.replay()
        return logits[:B]


# ---- the race ----------------------------------------------------------------------------------------------

def generate(model, prompts, n, new, stop, rows=64, **sampling):
    """The baseline: `model.generate` on left-padded batches -> sampled rows, cut after their stop token."""
    sampling = sampling or dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    jobs, out = [prompt for prompt in prompts for _ in range(n)], []
    for i in range(0, len(jobs), rows):
        batch = jobs[i:i + rows]
        width = max(map(len, batch))
        ids, real = (torch.tensor([[0] * (width - len(p)) + row(p) for p in batch], device=model.device)
                     for row in (list, lambda p: [1] * len(p)))
        got = model.generate(ids, attention_mask=real, max_new_tokens=new, eos_token_id=list(stop) or None,
                             **sampling)
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
    """Tokens a second of generate and of the sampler, alternated; and the proof that both say the same."""
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
        slow, fast = best.values()
        print(f"{name:32}{slow:10.0f}{fast:10.0f}{fast / slow:8.1f}", flush=True)

    texts = prompts(12, 1, 40)
    alone = [generate(model, [text], 1, 24, stop, do_sample=False)[0] for text in texts]
    five = Sampler(model, rows=5)(texts, max_new_tokens=24, stop=stop, temperature=0.0).lists()
    verdict = "identical to" if five == alone else "DIFFERENT FROM"
    print(f"greedy, 12 ragged prompts on 5 rows: {verdict} generate row by row")


def roofline(device, batches=(64, 256, 512), contexts=(1024, 4096)):
    """Decode speed at Qwen2.5-1.5B shape in bf16 against `generate` and against what the memory allows.

    A step must read the weights once and the live keys and values once; divided by the bandwidth of a plain
    copy, measured here, that is the least time it can take. Differences of two lengths leave the prefill out.
    """
    model = random_model(device, torch.bfloat16, vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                         num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                         tie_word_embeddings=True)
    a, b = (torch.zeros(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * a.numel() / min(seconds(lambda: b.copy_(a))[0] for _ in range(10))
    del a, b
    weights = sum(2 * p.numel() for p in model.parameters())
    token = 2 * 28 * 2 * 128 * 2                # bytes: keys and values, layers, kv heads, dim, bf16
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, "
          f"weights {weights / 1e9:.2f} GB, KV {token / 1e3:.1f} kB a token, varlen_attn: {VARLEN}")
    print(" batch  context  tokens/s  ms/step  roofline  generate ms  ratio")
    for context in contexts:
        for batch in batches:
            prompt = [[(7919 * i) % 150000 for i in range(context - 64)]]
            try:
                sampler = Sampler(model, rows=batch, length=context + 64)
                ours = lambda new: seconds(lambda: sampler(prompt, batch, new, ()))[0]
                ours(16)                                            # captures the graph
                step = (min(ours(128) for _ in range(2)) - min(ours(16) for _ in range(2))) / 112
                least = (weights + batch * context * token) / bandwidth
                print(f"{batch:6}{context:9}{batch / step:10.0f}{1e3 * step:9.2f}", end="")
                print(f"{least / step:10.0%}", end="", flush=True)
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
    device: str = field(default="auto", metadata={"choices": ["auto", "cpu", "cuda"],
                                                  "help": "cpu: the race; cuda: the race and the roofline"})


if __name__ == "__main__":
    parser = HfArgumentParser(Flags)
    device = parser.parse_args_into_dataclasses()[0].device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device cuda: torch finds no CUDA GPU on this machine; use --device cpu\n")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    race(device)
    if device == "cuda":
        roofline(device)
