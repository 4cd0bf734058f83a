"""
sampler.py - sampling from a language model in batches: the loop in which all the methods spend their time.

`model.generate` left-pads a batch, grows its cache by concatenation, and runs until the longest row is done. Here the
keys and values live in one slab in which column c of a row always holds its token c. During a call the model's
attention is replaced by one function that writes a column and attends to those before it. A sample that is done leaves
its slot to the next one. The samples are those of `generate`, in less time.

    slot      one of `rows` places in the batch, which a sample occupies until it is done
    stream    with streams=2 a slot is two rows of the model: two contexts, fed the same sampled tokens
    last      the token that a row is fed next; pos: its position, hence the column of the slab it fills
    reach     how many columns attention looks at: those of the longest row, masked for the others
    logp      log p(y_t); entropy: H[p_t]; both of the temperature-scaled, untruncated distribution, in nats

Randomness: sample j of a prompt inverts the cumulative distribution at numbers that depend on (seed, prompt, j, step)
and on nothing else. Neither `rows`, nor the order of the prompts, nor the company they keep changes a sample (as far
as float rounding permits), and no global generator is advanced.

Left out: beam search, repetition penalties, sliding windows shorter than `length`, paged or quantised caches,
speculative decoding, several GPUs. What cannot be served is refused by name, never served slightly wrong.

    python sampler.py                       how slots are refilled, and that the texts are those of generate: seconds
    python -m experiments.race              how much faster than generate
"""

import copy
import hashlib
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

# cuDNN's attention, torch's first choice on Hopper, builds a plan for every new shape, which takes a good part of a
# second. Prompts and micro-batches of ragged texts have a new shape nearly every time.
torch.backends.cuda.enable_cudnn_sdp(False)

CANDIDATES = 1024       # among so many tokens top-p looks for its nucleus, before it sorts them all


@dataclass
class Sample:
    """One continuation of one prompt. The first four fields are the result, the others are for the loop."""

    tokens: list = field(default_factory=list)      # ids, the stop token included
    logp: list = field(default_factory=list)        # nats, one a token
    entropy: list = field(default_factory=list)     # nats, one a token
    finished: bool = False                          # by a stop token
    texts: tuple = field(default=(), repr=False)    # the prompt, one tuple of ids a stream
    prompt: int = 0                                 # the number of the prompt, or of an equal one before it
    number: int = 0                                 # which sample of its prompt this is
    budget: int = 0                                 # how many tokens it may have
    done: bool = False

    def take(self, tokens, logp, entropy, stop):
        """Add new tokens up to the first stop token or the budget; what was sampled behind it is nobody's."""
        for token, a, b in zip(tokens, logp, entropy):
            if self.done:
                break
            self.tokens.append(token)
            self.logp.append(a)
            self.entropy.append(b)
            self.finished = token in stop
            self.done = self.finished or len(self.tokens) == self.budget

    def cut(self, length):
        """End it after `length` tokens, unless it has just ended there by itself, or length is None."""
        if length is None or (self.done and length == len(self.tokens)):
            return
        for numbers in (self.tokens, self.logp, self.entropy):
            del numbers[length:]
        self.finished, self.done = False, True


# ---- one token -------------------------------------------------------------------------------------------------------

def uniforms(seed, sample):
    """The numbers in [0, 1) by which a sample draws its tokens: (budget,) float32."""
    key = hashlib.sha256(repr((seed, sample.texts, sample.number)).encode())
    rng = np.random.default_rng(list(key.digest()))
    return torch.from_numpy(rng.random(sample.budget, dtype=np.float32))


def invert(p, u, block=256):
    """The first index at which the cumulative sum of p (R, V) exceeds the share u (R,) of its total -> (R, 1).

    In two levels, since a cumulative sum over a whole vocabulary is slow: which block, then where in it. By rounding
    the index may be one at which p is 0: that is for the caller to see.
    """
    R, V = p.shape
    blocks = F.pad(p, (0, -V % block)).view(R, -1, block)
    cdf = blocks.sum(-1).cumsum(-1)                                     # (R, blocks)
    target = u[:, None] * cdf[:, -1:]                                   # (R, 1)
    which = torch.searchsorted(cdf, target, right=True)
    which.clamp_(max=cdf.shape[1] - 1)
    # what the blocks before it leave of the target
    rest = target - F.pad(cdf, (1, 0)).gather(1, which)
    index = which[:, :, None].expand(R, 1, block)
    cdf = blocks.gather(1, index)[:, 0].cumsum(-1)                      # (R, block)
    place = torch.searchsorted(cdf, rest, right=True)
    return (which * block + place).clamp_(max=V - 1)


def truncate(p, top_k, top_p, candidates):
    """Keep the top_k likeliest tokens (0: all), and of those the smallest set that holds top_p of their mass.

    p (R, V) -> kept (R, k), not renormalised, 0 behind the nucleus; their ids (R, k); fits (R,) bool. Without top_k
    only the likeliest `candidates` are looked at, and a row whose nucleus is wider does not fit.
    """
    V = p.shape[1]
    k = min(top_k or candidates, V)
    top, ids = p.topk(k)
    mass = top.sum(-1, keepdim=True)                                    # (R, 1)
    if top_k or k == V:
        fits = torch.ones_like(mass, dtype=torch.bool)
    else:
        fits, mass = mass >= top_p, 1.0
    # a token is in the nucleus if the likelier ones do not fill it
    before = top.cumsum(-1) - top
    kept = top * (before < top_p * mass)
    return kept, ids, fits[:, 0]


def draw(logits, u, temperature, top_k=0, top_p=1.0, candidates=CANDIDATES):
    """The next tokens, and what the distribution says of them.

    logits (R, V) float32, u (R,) in [0, 1) -> token (R,) int64, logp (R,), entropy (R,), fits (R,) bool as above.
    First temperature, then top_k, then top_p, as in Hugging Face. Temperature 0 is argmax, with logp and entropy of 1.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp_min(-200)).sum(-1)                      # 0 * inf is NaN, and p is 0 long before
    token = logits.argmax(-1, keepdim=True)                             # (R, 1)
    fits = torch.ones_like(u, dtype=torch.bool)
    if temperature > 0:
        kept, ids = p, None
        if top_k or top_p < 1:
            kept, ids, fits = truncate(p, top_k, top_p, candidates)
        place = invert(kept, u)
        found = place if ids is None else ids.gather(-1, place)
        # where rounding led out of the support: the likeliest token
        token = torch.where(kept.gather(-1, place) > 0, found, token)
    return token[:, 0], log_p.gather(-1, token)[:, 0], entropy, fits


# ---- the slab, and the attention that reads it -----------------------------------------------------------------------

def flash_fits(q, k, v):
    """Whether the kernel of flash attention takes these queries, keys and values."""
    if not q.is_cuda or q.dtype == torch.float32:
        return False
    dim = k.shape[-1]
    recent = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return recent and v.shape[-1] == dim and dim % 8 == 0 and dim <= 256


class Slab:
    """Keys and values of `rows` texts: for every layer a pair of tensors (rows, columns, kv heads, dim).

    The model is called to read prompts (`prompts`: row i of the batch fills row target[i] of the slab, from column 0
    on) or to read a token a row (`tokens`: row i fills column pos[i] and looks at the columns up to it).
    """

    def __init__(self, rows, columns, longest):
        self.rows, self.columns = rows, columns
        self.longest = longest          # text there may be: a layer that looks less far back is refused
        self.layers = {}
        self.flash = False              # until a layer says otherwise

    def prompts(self, target):
        self.reading, self.target = True, target
        return self

    def tokens(self, pos, reach):
        self.reading, self.pos, self.reach = False, pos, reach
        self.index = torch.arange(len(pos), device=pos.device)
        self.shared = None              # what the first layer prepares for all
        return self

    def attend(self, layer, q, k, v, scale):
        """q (B, heads, T, dim), k and v (B, kv heads, T, dim) -> (B, T, heads, dim)."""
        if layer not in self.layers:
            shape = self.rows, self.columns, k.shape[1]
            self.layers[layer] = k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3])
            self.flash = flash_fits(q, k, v)
        keys, values = self.layers[layer]
        if self.reading:
            T, group = q.shape[2], q.shape[1] // k.shape[1]
            keys[self.target, :T] = k.transpose(1, 2)
            values[self.target, :T] = v.transpose(1, 2)
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            return out.transpose(1, 2)
        keys[self.index, self.pos] = k[:, :, 0]
        values[self.index, self.pos] = v[:, :, 0]
        attend = self.attend_flash if self.flash else self.attend_masked
        return attend(q, keys[:len(q)], values[:len(q)], scale)

    def attend_masked(self, q, keys, values, scale):
        """One query a row, against `reach` columns."""
        B, heads, _, dim = q.shape
        if self.shared is None:
            # added to the scores: -inf on the columns that a row has not filled
            unseen = torch.arange(self.reach, device=q.device) > self.pos[:, None]
            bias = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device)
            self.shared = bias.masked_fill_(unseen, -torch.inf)[:, None, None]
        keys = keys[:, :self.reach].transpose(1, 2)                     # (B, kv heads, reach, dim)
        values = values[:, :self.reach].transpose(1, 2)
        # the query heads that share a key head become query positions: the keys are read once
        q = q.reshape(B, keys.shape[1], -1, dim)
        out = F.scaled_dot_product_attention(q, keys, values, self.shared, scale=scale)
        return out.reshape(B, 1, heads, -1)

    def attend_flash(self, q, keys, values, scale):
        """The same by a kernel that is told how many columns each row has filled, and reads no others."""
        if self.shared is None:
            # all columns of all rows in one line: where each row starts, and how many of its columns are in use
            start = torch.arange(len(q) + 1, device=q.device, dtype=torch.int32)
            self.shared = start, start * self.columns, (self.pos + 1).int()
        start_q, start_k, used = self.shared
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)         # (B * columns, kv heads, dim)
        out = torch.ops.aten._flash_attention_forward(
            q[:, :, 0], keys, values, start_q, start_k, 1, self.columns, 0.0, False, False,
            scale=scale, seqused_k=used)[0]                             # (B, heads, dim)
        return out[:, None]

    def copy(self, source, target, columns, streams):
        """The first columns of the slots `source` into the slots `target`, index tensors both, in every layer."""
        for pair in self.layers.values():
            for x in pair:
                x = x.unflatten(0, (-1, streams))[:, :, :columns]
                x.index_copy_(0, target, x.index_select(0, source))


def slab_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, slab=None,
                   dropout=0.0, position_ids=None, is_causal=True, **others):
    """What every layer calls in place of its own attention; `slab` is a keyword of the model's call."""
    if attention_mask is not None:
        raise ValueError("attention with a mask of its own")
    if sliding_window is not None and sliding_window < slab.longest:
        raise ValueError(f"attention with a sliding window of {sliding_window}, shorter than length={slab.longest}")
    for name, option in others.items():
        if option is not None and option is not False:
            raise ValueError(f"attention with {name}")
    return slab.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("slab", slab_attention)     # a name for which transformers builds no mask


@contextmanager
def attention(model, name):
    """The model with attention `name`, in eval mode, without autocast or gradients; then all as it was."""
    config = model.config.get_text_config()
    old = config._attn_implementation
    training = [module for module in model.modules() if module.training]
    try:
        config._attn_implementation = name
        model.eval()
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        config._attn_implementation = old
        for module in training:
            module.training = True


def examine(model, length):
    """ValueError, naming the model and the cause, if the slab cannot serve it.

    First what short texts cannot show. Then the proof: tokens read through the slab must give the model's own logits.
    """
    def refuse(cause):
        raise ValueError(f"the sampler cannot serve {type(model).__name__}: {cause}")

    config = model.config.get_text_config()
    for kind in getattr(config, "layer_types", None) or []:
        if kind not in ("full_attention", "sliding_attention"):
            refuse(f"layers of type {kind}")
    for module in model.modules():
        rope = str(getattr(module, "rope_type", None))
        if "dynamic" in rope or "longrope" in rope:
            refuse(f"{rope} rope, whose frequencies depend on the longest row of a batch")
    window = getattr(config, "sliding_window", None)
    if window and window < length and getattr(config, "use_sliding_window", True):
        refuse(f"a sliding window of {window}, shorter than length={length}")

    # four texts of eight tokens: the logits behind the last one by the model alone ...
    rows = torch.arange(4, device=model.device)
    at = torch.arange(8, device=model.device).expand(4, 8)
    ids = (at * 37 + rows[:, None] * 101 + 11) % model.get_input_embeddings().num_embeddings
    with attention(model, "eager"):
        want = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    # ... and through the slab, seven tokens as a prompt and one alone
    slab = Slab(4, 8, length)
    try:
        with attention(model, "slab"):
            slab.prompts(rows)
            model(input_ids=ids[:, :7], position_ids=at[:, :7], use_cache=False, slab=slab)
            slab.tokens(at[:, 7], 8)
            got = model(input_ids=ids[:, 7:], position_ids=at[:, 7:], use_cache=False, slab=slab)
    except Exception as error:
        refuse(f"{error} (its layers must attend through transformers.AttentionInterface)")
    if sorted(slab.layers) != list(range(config.num_hidden_layers)):
        refuse("not all of its layers attend through transformers.AttentionInterface")
    # the median row: bf16 may send a token of one row to another expert, but a wrong model errs in every row
    error = (got.logits[:, -1].float() - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-6)
    error = error.median().item()
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    if not error < (1e-4 if exact else 5e-2):
        refuse(f"its logits through the slab are off by {error:.1e} of their size")


# ---- the slots -------------------------------------------------------------------------------------------------------

class Slots:
    """What a call keeps on the device: the places of a batch, those in use first. A slot is `streams` rows."""

    def __init__(self, model, slots, streams, slab, steps):
        device = model.device
        self.model, self.streams, self.slab = model, streams, slab
        self.last = torch.zeros(slots, streams, dtype=torch.long, device=device)
        self.pos = torch.zeros(slots, streams, dtype=torch.long, device=device)
        self.step = torch.zeros(slots, dtype=torch.long, device=device)     # tokens sampled so far
        self.state = torch.zeros(slots, dtype=torch.long, device=device)    # what `combine` remembers
        self.u = torch.zeros(slots, steps, device=device)                   # the random numbers
        self.candidates = CANDIDATES
        self.graphs = {}                        # number of slots -> CUDA graph, the logits it writes

    def fill(self, busy, fresh, seed):
        """Put samples into the slots behind the busy ones. A prompt the slab holds is copied, a new one read, once."""
        home = {sample.prompt: slot for slot, sample in enumerate(busy)}
        unread, source, target = [], [], []
        for slot, sample in enumerate(fresh, len(busy)):
            if sample.prompt in home:
                source.append(home[sample.prompt])
                target.append(slot)
            else:
                home[sample.prompt] = slot
                rows = range(slot * self.streams, (slot + 1) * self.streams)
                unread += zip(sample.texts, rows)
            # the last token of a prompt is the first input of `advance`: there is one way to sample
            self.last[slot] = self.index([text[-1] for text in sample.texts])
            self.pos[slot] = self.index([len(text) - 1 for text in sample.texts])
            self.step[slot] = 0
            self.state[slot] = 0
            self.u[slot, :sample.budget] = uniforms(seed, sample)
        self.read(unread)
        if source:
            longest = max(len(text) for sample in fresh for text in sample.texts)
            self.slab.copy(self.index(source), self.index(target), longest, self.streams)

    def index(self, numbers):
        return torch.tensor(numbers, device=self.pos.device)

    def read(self, unread, at_once=8192):
        """Prefill texts but for their last tokens, about `at_once` tokens at a time: a list of (text, row)."""
        unread = [(text[:-1], row) for text, row in unread if len(text) > 1]
        unread.sort(key=lambda pair: len(pair[0]), reverse=True)
        while unread:
            count = max(1, at_once // len(unread[0][0]))
            texts, rows = zip(*unread[:count])
            del unread[:count]
            ids = pad_sequence([self.index(text) for text in texts], batch_first=True)
            at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            slab = self.slab.prompts(self.index(rows))
            self.model.base_model(input_ids=ids, position_ids=at, use_cache=False, slab=slab)

    def advance(self, B, ahead, reach, how, combine):
        """`ahead` tokens for the first B slots -> tokens, logp, entropy, each a list of B lists of `ahead`."""
        last, pos, step, state = self.last[:B], self.pos[:B], self.step[:B], self.state[:B]
        before = last.clone(), pos.clone(), step.clone(), state.clone()
        block = []
        for _ in range(ahead):                  # nothing in this loop waits for the device
            logits = self.logits(B, reach).float()                      # (B, streams, V)
            if combine:
                logits, state[:] = combine(logits, last[:, 0], step, state)
            else:
                logits = logits[:, 0]
            u = self.u[:B].gather(1, step[:, None])[:, 0]
            block.append(draw(logits, u, *how, self.candidates))
            token = block[-1][0]
            last[:] = token[:, None]            # every stream is fed the sampled token
            pos += 1
            step += 1
        tokens, logp, entropy, fits = (torch.stack(part, 1) for part in zip(*block))        # (B, ahead)
        if fits.all():
            return tokens.tolist(), logp.tolist(), entropy.tolist()
        # a nucleus was wider than the candidates: back to where we were, and from now on all tokens are sorted
        self.candidates = logits.shape[-1]
        for x, old in zip((last, pos, step, state), before):
            x.copy_(old)
        return self.advance(B, ahead, reach, how, combine)

    def close_ranks(self, busy, columns):
        """Move the last samples that go on into the slots of those that are done -> the samples that go on."""
        B = sum(not sample.done for sample in busy)
        holes = [slot for slot in range(B) if busy[slot].done]
        tail = [slot for slot in range(B, len(busy)) if not busy[slot].done]
        if holes:
            for hole, slot in zip(holes, tail):
                busy[hole] = busy[slot]
            target, source = self.index(holes), self.index(tail)
            self.slab.copy(source, target, columns, self.streams)
            for x in (self.last, self.pos, self.step, self.state, self.u):
                x.index_copy_(0, target, x.index_select(0, source))
        self.pos[B:] = 0                        # a graph steps free slots along: they shall read one column
        return busy[:B]

    def logits(self, B, reach):
        """Logits (B, streams, V) of the tokens after `last`."""
        # a graph fixes how much attention reads: it needs the kernel that reads what each row has filled
        if not self.slab.flash:
            return self.forward(B, reach)
        size = min(len(self.last), max(8, 1 << (B - 1).bit_length()))       # the next power of two
        if size not in self.graphs:
            self.graphs[size] = self.capture(size)
        graph, logits = self.graphs[size]
        if graph is None:
            return self.forward(B, reach)
        graph.replay()
        return logits[:B]

    def forward(self, B, reach):
        ids, pos = self.last[:B].view(-1, 1), self.pos[:B].view(-1, 1)
        slab = self.slab.tokens(pos[:, 0], reach)
        out = self.model(input_ids=ids, position_ids=pos, use_cache=False, slab=slab)
        return out.logits.view(B, self.streams, -1)

    def capture(self, size):
        """Record `forward` as a graph -> graph, the logits it writes; None, None for a model that cannot be."""
        self.forward(size, self.slab.columns)   # warm up; a step done twice writes the same keys twice
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits = self.forward(size, self.slab.columns)
            return graph, logits
        except RuntimeError as error:
            # leaving a broken capture raises anew: what went wrong first is its context
            for cause in (error, error.__context__):
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause
            warnings.warn(f"no CUDA graph of {type(self.model).__name__}, its kernels are launched singly: {error}")
            return None, None
        finally:
            torch.cuda.set_stream(stream)       # a capture that failed leaves its own stream current


# ---- the sampler -----------------------------------------------------------------------------------------------------

class Sampler:
    """Samples from a decoder-only Hugging Face model, `rows` samples at a time, texts of up to `length` tokens.

    The model is used as it is, so its weights may change between calls. With `dtype` the sampler keeps a twin in that
    precision (bf16 beside float32 training weights), as of the last `sync`. ValueError for a model the slab cannot
    serve.
    """

    def __init__(self, model, rows=64, length=2048, streams=1, dtype=None):
        if dtype not in (None, model.dtype):
            # the parameters only: rotary frequencies must stay float32
            model = copy.deepcopy(model).requires_grad_(False)
            for p in model.parameters():
                p.data = p.data.to(dtype)
        if not any("inv_freq" in name for name, _ in model.named_buffers()):
            # positions come from a table
            length = min(length, getattr(model.config, "max_position_embeddings", length))
        examine(model, length)
        self.model, self.rows, self.length, self.streams = model, rows, length, streams
        self.every = 32 if model.device.type == "cuda" else 4           # tokens between two looks of the host

    def sync(self, model):
        """Copy the weights of `model` into the twin."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters()):
                mine.copy_(theirs)

    def __call__(self, prompts, n=1, max_new_tokens=256, stop=None, temperature=1.0, top_k=0, top_p=1.0, seed=0,
                 combine=None, halt=None):
        """Sample n continuations of every prompt -> list of Sample; number r belongs to prompt r // n.

        prompts         ragged lists of token ids; with streams=2 pairs of them, fed the same sampled tokens
        max_new_tokens  an int, or one for every prompt
        stop            ids of the tokens that end a sample; None: the model's own EOS
        temperature     0 is greedy; top_k=0 and top_p=1 truncate nothing
        combine         (logits (R, streams, V), last (R,) the token fed, step (R,) tokens sampled so far, state (R,)
                        int64, 0 at first) -> log-probs (R, V), normalised or not; the new state (R,)
        halt            (list of tokens sampled so far) -> the length to cut the sample to, or None to go on; asked
                        after every `every` tokens, and a sample it cuts is not finished
        ValueError, naming the prompt, for what cannot be sampled.
        """
        if not (n >= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(f"cannot sample with {n=}, {temperature=}, {top_k=}, {top_p=}")
        if self.streams > 1 and combine is None:
            raise ValueError(f"{self.streams} streams need a `combine` to make one distribution of them")
        if stop is None:
            stop = self.model.generation_config.eos_token_id
            stop = stop if isinstance(stop, list) else [stop]
        samples = self.plan(prompts, n, max_new_tokens)
        with attention(self.model, "slab"):
            self.run(samples, set(stop), (temperature, top_k, top_p), seed, combine, halt)
        return samples

    def plan(self, prompts, n, max_new_tokens):
        """Check the request and make a list of empty samples of it."""
        if len(prompts) == 0:
            raise ValueError("no prompts to sample from")
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(prompts)
        if len(max_new_tokens) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(max_new_tokens)} values of max_new_tokens")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        samples, known, count = [], {}, Counter()
        for i, (prompt, budget) in enumerate(zip(prompts, max_new_tokens)):
            texts = tuple(map(tuple, prompt)) if self.streams > 1 else (tuple(prompt),)
            if len(texts) != self.streams:
                raise ValueError(f"prompt {i} needs {self.streams} texts, one a stream")
            for text in texts:
                if len(text) == 0:
                    raise ValueError(f"prompt {i} is empty")
                if min(text) < 0 or max(text) >= vocabulary:
                    raise ValueError(f"prompt {i} has a token id outside the vocabulary of {vocabulary}")
                if budget < 0 or len(text) + budget > self.length:
                    raise ValueError(f"prompt {i}: {len(text)} tokens and {budget} new ones do not fit "
                                     f"length={self.length}")
            # a prompt listed twice goes on counting
            first = known.setdefault(texts, i)
            for _ in range(n):
                samples.append(Sample(texts=texts, prompt=first, number=count[first], budget=budget))
                count[first] += 1
        return samples

    def run(self, samples, stop, how, seed, combine, halt):
        """The loop: fill the free slots, sample a few tokens, hand them out, close the ranks."""
        count = min(self.rows, len(samples))
        columns = max(len(text) + sample.budget for sample in samples for text in sample.texts)
        steps = max(sample.budget for sample in samples)
        slab = Slab(count * self.streams, columns, self.length)
        slots = Slots(self.model, count, self.streams, slab, steps)
        queue = [sample for sample in samples if sample.budget > 0]
        busy = []                               # slot -> sample
        while queue or busy:
            fresh = queue[:count - len(busy)]
            if fresh:
                del queue[:len(fresh)]
                slots.fill(busy, fresh, seed)
                busy += fresh

            # no further than the first budget ends
            ahead = min(self.every, min(sample.budget - len(sample.tokens) for sample in busy))
            reach = ahead + max(len(text) + len(sample.tokens) for sample in busy for text in sample.texts)
            block = slots.advance(len(busy), ahead, reach, how, combine)
            for sample, *numbers in zip(busy, *block):
                sample.take(*numbers, stop)
                if halt:
                    sample.cut(halt(sample.tokens))
            busy = slots.close_ranks(busy, reach)
