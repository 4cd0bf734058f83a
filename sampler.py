"""
sampler.py - sampling from a language model in batches: the loop in which all the methods spend their time.

`model.generate` left-pads a batch, grows its cache by concatenation, and runs until the longest row is done. Here the
keys and values live in one slab in which column c of a row always holds its token c. During a call the model's
attention is replaced by one function that writes a column and attends to those before it. A sample that is done leaves
its slot to the next one. The samples are those of `generate`, in less time.

    slot      one of `rows` places in the batch, which a sample occupies until it is done
    stream    with streams=2 a slot is two rows of the model: two contexts, fed the same sampled tokens
    last      the token that a row is fed next
    pos       its position, hence the column of the slab it fills
    reach     how many columns attention looks at: those of the longest row, masked for the others
    logp      log p(y_t); entropy: H[p_t]; both of the temperature-scaled, untruncated distribution, in nats

Randomness: sample j of a prompt inverts the cumulative distribution at numbers that depend on (seed, prompt, j, step)
and on nothing else. Neither `rows`, nor the order of the prompts, nor the company they keep changes a sample (as far
as float rounding permits), and no global generator is advanced.

Left out: beam search, repetition penalties, sliding windows shorter than `length`, paged or quantised caches,
speculative decoding, several GPUs. What cannot be served is refused by name, never served slightly wrong.

    python sampler.py                       what the slots do, and that the texts are those of generate: seconds
    python -m experiments.race              how much faster than generate
"""

import copy
import hashlib
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

# cuDNN's attention, torch's first choice on Hopper, builds a plan for every new shape, for a large part of a second;
# prompts and micro-batches of ragged texts have a new shape nearly every time.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass
class Sample:
    """One continuation of one prompt. Above the line what the caller wants, below it what the loop needs."""

    tokens: list = field(default_factory=list)      # sampled ids, the stop token included
    logp: list = field(default_factory=list)        # nats, one a token
    entropy: list = field(default_factory=list)     # nats, one a token
    finished: bool = False                          # by a stop token
    # ----
    texts: list = field(default_factory=list, repr=False)   # the prompt of every stream
    keys: list = field(default_factory=list, repr=False)    # a fingerprint of every text
    number: int = 0                                 # which sample of its prompt this is
    budget: int = 0                                 # tokens it may have
    done: bool = False


# ---- one token -------------------------------------------------------------------------------------------------------

def fingerprint(text):
    """An int for an array of token ids, the same on every machine and in every process."""
    digest = hashlib.blake2b(text.tobytes(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def uniforms(seed, keys, number, budget):
    """The numbers in [0, 1) by which sample `number` of a prompt draws its tokens: (budget,) float32."""
    rng = np.random.default_rng([seed % 2**63, *keys, number])
    return torch.from_numpy(rng.random(budget, dtype=np.float32))


def invert(p, u, block=256):
    """Where the cumulative sum of p (R, V) passes the share u (R,) of its total -> index (R,).

    In two levels, since a cumulative sum over a whole vocabulary is slow: first which block, then where in it.
    Rounding may lead past the end of p, or to a place where p is 0: that is for the caller to see.
    """
    p = F.pad(p, (0, -p.shape[-1] % block))
    p = p.view(len(p), -1, block)                                       # (R, blocks, block)
    cdf = p.sum(-1).cumsum(-1)                                          # (R, blocks)
    target = u[:, None] * cdf[:, -1:]                                   # (R, 1)
    which = torch.searchsorted(cdf, target, right=True)
    which = which.clamp_max(cdf.shape[-1] - 1)
    # what is left of the target, inside its block
    target = target - F.pad(cdf, (1, 0)).gather(-1, which)
    inside = p.gather(1, which[..., None].expand(-1, 1, block))[:, 0]   # (R, block)
    place = torch.searchsorted(inside.cumsum(-1), target, right=True)
    return (which * block + place.clamp_max(block - 1)).squeeze(-1)


CANDIDATES = 1024       # among so many tokens top-p looks for its nucleus before it sorts them all


def truncate(p, top_k=0, top_p=1.0, candidates=CANDIDATES):
    """Keep the top_k likeliest tokens (0: all), and of those the smallest set that holds top_p of their mass.

    p (R, V) -> kept (R, k), not renormalised, zeros behind the nucleus; their ids (R, k); fits (R,) bool. Without
    top_k only the likeliest `candidates` are sorted: where they do not hold top_p, the row does not fit.
    """
    k = min(top_k or candidates, p.shape[-1])
    top, ids = p.topk(k)
    mass = top.sum(-1, keepdim=True)                                    # (R, 1)
    fits = (mass[:, 0] >= top_p) | bool(top_k) | (k == p.shape[-1])
    # a token is kept if the likelier ones do not yet hold the share
    before = top.cumsum(-1) - top
    whole = mass if top_k else 1.0
    return top * (before < top_p * whole), ids, fits


def draw(logits, u, temperature, top_k=0, top_p=1.0, candidates=CANDIDATES):
    """The next tokens, and what the distribution says of them.

    logits (R, V) float32, u (R,) in [0, 1) -> token (R,) int64, logp (R,), entropy (R,), fits (R,) bool of `truncate`.
    First temperature, then top_k, then top_p, as in Hugging Face. Temperature 0 is argmax, with logp and entropy of 1.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp_min(-200)).sum(-1)                      # p is 0 long before; 0 * inf is NaN
    token = logits.argmax(-1)
    fits = torch.ones_like(token, dtype=torch.bool)

    if temperature > 0:
        if top_k or top_p < 1:
            kept, ids, fits = truncate(p, top_k, top_p, candidates)
            place = invert(kept, u).clamp_max(kept.shape[-1] - 1)[:, None]
            found, mass = ids.gather(-1, place), kept.gather(-1, place)
        else:
            found = invert(p, u).clamp_max(p.shape[-1] - 1)[:, None]
            mass = p.gather(-1, found)
        # rounding led out of the support: the likeliest token instead
        token = torch.where(mass > 0, found, token[:, None])[:, 0]
    return token, log_p.gather(-1, token[:, None])[:, 0], entropy, fits


# ---- the slab, and the attention that reads it -----------------------------------------------------------------------

def flash_fits(q, k, v):
    """Whether the flash attention kernel takes these queries, keys and values."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    dim = k.shape[-1]
    modern = torch.cuda.get_device_capability(q.device)[0] >= 8
    return modern and dim == v.shape[-1] and dim % 8 == 0 and dim <= 256


class Slab:
    """Keys and values of `rows` texts: for every layer a pair of tensors (rows, columns, heads, dim).

    The model is called either to read prompts (`prompts`: row i of the batch fills row target[i] of the slab, from
    column 0 on) or to read a token a row (`tokens`: row i fills column pos[i] and looks at the columns before it).
    """

    def __init__(self, rows, columns, longest=None):
        self.rows, self.columns = rows, columns
        self.longest = longest or columns       # text: a layer that looks less far back is refused
        self.layers = {}
        self.flash = False

    def prompts(self, target):
        self.target, self.pos = target, None
        return self

    def tokens(self, pos, reach):
        """Prepare what all layers of this step share."""
        B, device = len(pos), pos.device
        self.pos, self.reach = pos, reach
        self.index = torch.arange(B, device=device)
        if self.flash:
            # row i of the slab starts at i * columns of all its columns in one line, and pos + 1 of them are used
            self.start_q = torch.arange(B + 1, device=device, dtype=torch.int32)
            self.start_k = self.start_q * self.columns
            self.used = (pos + 1).int()
        else:
            # added to the scores: -inf on the columns that row i has not filled
            unseen = torch.arange(reach, device=device) > pos[:, None]
            self.bias = torch.zeros(B, 1, 1, reach, device=device)
            self.bias.masked_fill_(unseen[:, None, None], -torch.inf)
        return self

    def attend(self, layer, q, k, v, scale):
        """q (B, heads, T, dim), k and v (B, kv heads, T, dim) -> (B, T, heads, dim)."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_zeros(self.rows, self.columns, x.shape[1], x.shape[3]) for x in (k, v)]
            self.flash = flash_fits(q, k, v)
        keys, values = self.layers[layer]
        if self.pos is None:
            T = q.shape[2]
            keys[self.target, :T] = k.transpose(1, 2)
            values[self.target, :T] = v.transpose(1, 2)
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
        keys[self.index, self.pos] = k[:, :, 0]
        values[self.index, self.pos] = v[:, :, 0]
        if self.flash:
            return self.attend_flash(q, keys, values, scale)
        return self.attend_masked(q, keys, values, scale)

    def attend_masked(self, q, keys, values, scale):
        """One query a row against `reach` columns. The query heads that share a key head become query positions, so
        that the keys are read once."""
        B, heads, _, dim = q.shape
        keys = keys[:B, :self.reach].transpose(1, 2)                    # (B, kv heads, reach, dim)
        values = values[:B, :self.reach].transpose(1, 2)
        q = q.view(B, keys.shape[1], -1, dim)
        out = F.scaled_dot_product_attention(q, keys, values, self.bias.to(q.dtype), scale=scale)
        return out.reshape(B, 1, heads, -1)

    def attend_flash(self, q, keys, values, scale):
        """The same by the kernel that is told how many columns every row uses, and reads no others."""
        B = len(q)
        out = torch.ops.aten._flash_attention_forward(
            q[:, :, 0], keys[:B].flatten(0, 1), values[:B].flatten(0, 1), self.start_q, self.start_k,
            1, self.columns, 0.0, False, False, scale=scale, seqused_k=self.used)[0]        # (B, heads, dim)
        return out[:, None]

    def copy(self, source, target, columns):
        """The first columns of the rows `source` into the rows `target`, index tensors both, in every layer."""
        for pair in self.layers.values():
            for x in pair:
                part = x[:, :columns]
                part.index_copy_(0, target, part.index_select(0, source))

    def clear(self):
        """Forget the last call: a NaN it left behind would get past any mask, since 0 * NaN is NaN."""
        for keys, values in self.layers.values():
            keys.zero_()
            values.zero_()


# what a layer may hand to its attention without changing it: the scale is used, dropout is off, causal it is
HARMLESS = {"dropout", "position_ids", "is_causal"}


def slab_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, slab=None, **options):
    """What every layer calls in place of its own attention; `slab` is a keyword of the model's call."""
    if attention_mask is not None:
        raise ValueError("attention with a mask of its own")
    if sliding_window is not None and sliding_window < slab.longest:
        raise ValueError(f"attention with a sliding window of {sliding_window}, shorter than length={slab.longest}")
    for name, option in options.items():
        if name not in HARMLESS and option is not None and option is not False:
            raise ValueError(f"attention with {name}")
    return slab.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("slab", slab_attention)     # a name for which transformers builds no mask


@contextmanager
def attention(model, name):
    """The model with attention `name`, in eval mode, without autocast or gradients; then all as it was."""
    training, names = [], []
    for module in model.modules():
        training.append((module, module.training))
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            names.append((config, config._attn_implementation))
    try:
        model.eval()
        for config, _ in names:
            config._attn_implementation = name
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for config, old in names:
            config._attn_implementation = old
        for module, mode in training:
            module.training = mode


def examine(model, length):
    """ValueError, naming the model and the cause, if the slab cannot serve it.

    First what short texts cannot show. Then the proof: tokens read through the slab must give the model's own logits.
    """
    def refuse(cause):
        raise ValueError(f"the sampler cannot serve {type(model).__name__}: {cause}")

    config = model.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if odd:
        refuse(f"layers of type {', '.join(sorted(odd))}")
    for module in model.modules():
        rope = str(getattr(module, "rope_type", ""))
        if "dynamic" in rope or "longrope" in rope:
            refuse(f"{rope} rope, whose frequencies depend on the longest row of a batch")
    window = getattr(config, "sliding_window", None)
    if window and window < length and getattr(config, "use_sliding_window", True):
        refuse(f"a sliding window of {window}, shorter than length={length}")

    # four texts of eight tokens: the model's own logits behind the last one ...
    rows = torch.arange(4, device=model.device)
    at = torch.arange(8, device=model.device).expand(4, 8)
    ids = (at * 37 + rows[:, None] * 101 + 11) % model.get_input_embeddings().num_embeddings
    with attention(model, "eager"):
        want = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    # ... and those through the slab: seven tokens as a prompt, one alone
    slab = Slab(4, 8, longest=length)
    try:
        with attention(model, "slab"):
            model(input_ids=ids[:, :-1], position_ids=at[:, :-1], use_cache=False, slab=slab.prompts(rows))
            slab.tokens(at[:, -1], reach=8)
            got = model(input_ids=ids[:, -1:], position_ids=at[:, -1:], use_cache=False, slab=slab)
    except Exception as error:
        refuse(f"{error} (its attention must go through transformers.AttentionInterface)")
    if sorted(slab.layers) != list(range(config.num_hidden_layers)):
        refuse("not all of its layers attend through transformers.AttentionInterface")

    # the median row: bf16 may send a token of one row to another expert, but a wrong model errs in every row
    error = (got.logits[:, -1].float() - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-6)
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    if not error.median() < (1e-4 if exact else 5e-2):
        refuse(f"its logits through the slab are off by {error.median():.1e} of their size")


# ---- the sampler -----------------------------------------------------------------------------------------------------

class Sampler:
    """Samples from a decoder-only Hugging Face model, `rows` samples at a time, texts of up to `length` tokens.

    The model is used as it is, so its weights may change between calls. With `dtype` the sampler keeps a twin in that
    precision (bf16 beside float32 training weights), as of the last `sync`. On CUDA a step is replayed from a graph;
    graphs = None turns that off. ValueError for a model the slab cannot serve.
    """

    def __init__(self, model, rows=64, length=2048, streams=1, dtype=None):
        if dtype not in (None, model.dtype):
            # the parameters only: rotary frequencies must stay float32
            model = copy.deepcopy(model)
            for p in model.parameters():
                p.requires_grad_(False)
                p.data = p.data.to(dtype)
        if not any("inv_freq" in name for name, _ in model.named_buffers()):
            # positions come from a table
            length = min(length, getattr(model.config, "max_position_embeddings", length))
        examine(model, length)
        self.model, self.rows, self.length, self.streams = model, rows, length, streams
        on_gpu = model.device.type == "cuda"
        self.every = 32 if on_gpu else 4        # tokens between two looks of the host
        self.graphs = {} if on_gpu else None    # (batch size, reach) -> graph, the logits it writes
        self.addresses = None                   # where the weights were when the graphs were captured

    def sync(self, model):
        """Copy the weights of `model` into the twin, in place, so that captured graphs stay valid."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters()):
                if mine is not theirs:
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
                        every few tokens (`every`), and a sample it cuts is not finished
        ValueError, naming the prompt, for what cannot be sampled.
        """
        if not (n >= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(f"cannot sample with {n=}, {temperature=}, {top_k=}, {top_p=}")
        if self.streams > 1 and combine is None:
            raise ValueError(f"{self.streams} streams need a `combine` to make one distribution of them")
        if stop is None:
            stop = getattr(self.model.generation_config, "eos_token_id", None)
        if stop is None or isinstance(stop, int):
            stop = [] if stop is None else [stop]
        samples = self.plan(prompts, n, max_new_tokens)
        with attention(self.model, "slab"):
            self.prepare(samples)
            self.run(samples, set(stop), (temperature, top_k, top_p), seed, combine, halt)
        return samples

    def plan(self, prompts, n, max_new_tokens):
        """Check the request and make a list of empty samples of it."""
        if len(prompts) == 0:
            raise ValueError("no prompts to sample from")
        budgets = max_new_tokens
        if not hasattr(max_new_tokens, "__len__"):
            budgets = [max_new_tokens] * len(prompts)
        if len(budgets) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(budgets)} values of max_new_tokens")
        vocabulary = self.model.get_input_embeddings().num_embeddings

        samples, count = [], {}
        for i, (prompt, budget) in enumerate(zip(prompts, budgets)):
            texts = list(prompt) if self.streams > 1 else [prompt]
            texts = [np.array(text, dtype=np.int64) for text in texts]
            if len(texts) != self.streams:
                raise ValueError(f"prompt {i} needs {self.streams} texts, one a stream")
            for text in texts:
                if len(text) == 0:
                    raise ValueError(f"prompt {i} is empty")
                if text.min() < 0 or text.max() >= vocabulary:
                    raise ValueError(f"prompt {i} has a token id outside the vocabulary of {vocabulary}")
                if budget < 0 or len(text) + budget > self.length:
                    raise ValueError(f"prompt {i}: {len(text)} tokens and {budget} new ones do not fit "
                                     f"length={self.length}")
            keys = [fingerprint(text) for text in texts]
            texts = [text.tolist() for text in texts]
            for _ in range(n):
                # a prompt listed twice goes on counting
                number = count.get(tuple(keys), 0)
                count[tuple(keys)] = number + 1
                samples.append(Sample(texts=texts, keys=keys, number=number, budget=int(budget)))
        return samples

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.long, device=self.model.device)

    def prepare(self, samples):
        """Memory for a call. What CUDA graphs read and write, weights included, must stay where it is."""
        slots, columns = self.rows, self.length
        if self.graphs is None:
            slots = min(self.rows, len(samples))
            columns = max(len(text) + sample.budget for sample in samples for text in sample.texts)
        else:
            addresses = [p.data_ptr() for p in self.model.parameters()]
            if addresses == self.addresses:
                return self.slab.clear()
            self.addresses, self.graphs = addresses, {}
        self.slab = Slab(slots * self.streams, columns)
        self.last = self.tensor([[0] * self.streams] * slots)           # (slots, streams)
        self.pos = torch.zeros_like(self.last)

    def run(self, samples, stop, how, seed, combine, halt):
        """The loop: fill the free slots, sample a few tokens, hand them out, close the ranks."""
        slots = min(self.rows, len(samples))
        longest = max(sample.budget for sample in samples)
        self.step, self.state = self.tensor([0] * slots), self.tensor([0] * slots)
        self.u = torch.zeros(slots, longest + self.every, device=self.model.device)
        self.candidates = CANDIDATES
        queue = [sample for sample in samples[::-1] if sample.budget > 0]
        busy = []                               # slot -> sample
        while queue or busy:
            # fill the free slots behind the busy ones
            fresh = []
            while queue and len(busy) + len(fresh) < slots:
                fresh.append(queue.pop())
            if fresh:
                self.fill(busy, fresh, seed)
                busy += fresh
            # sample a few tokens
            ahead = min(self.every, max(sample.budget - len(sample.tokens) for sample in busy))
            used = max(len(text) + len(sample.tokens) for sample in busy for text in sample.texts)
            block = self.advance(len(busy), ahead, min(used + ahead, self.slab.columns), how, combine)
            # hand them out: what lies behind a stop token or the budget is nobody's
            for sample, tokens, logp, entropy in zip(busy, *block):
                for k in range(min(ahead, sample.budget - len(sample.tokens))):
                    sample.tokens.append(tokens[k])
                    sample.logp.append(logp[k])
                    sample.entropy.append(entropy[k])
                    if tokens[k] in stop:
                        sample.finished = True
                        break
                sample.done = sample.finished or len(sample.tokens) == sample.budget
                if halt:
                    self.cut(sample, halt(sample.tokens))
            busy = self.close_ranks(busy, used + ahead)

    def cut(self, sample, length):
        """End a sample where `halt` says, unless it has just ended there by itself."""
        if length is None or (sample.done and length == len(sample.tokens)):
            return
        for numbers in (sample.tokens, sample.logp, sample.entropy):
            del numbers[length:]
        sample.finished, sample.done = False, True

    def fill(self, busy, fresh, seed):
        """Put samples into the slots behind the busy ones. A prompt the slab holds is copied, a new one read, once."""
        home = {}                               # fingerprint of a text -> row of the slab that holds it
        for slot, sample in enumerate(busy):
            for stream, key in enumerate(sample.keys):
                home[key] = slot * self.streams + stream
        unread, source, target = [], [], []
        for slot, sample in enumerate(fresh, len(busy)):
            for stream, key in enumerate(sample.keys):
                row = slot * self.streams + stream
                if key in home:
                    source.append(home[key])
                    target.append(row)
                else:
                    home[key] = row
                    unread.append((sample.texts[stream], row))
        self.read(unread)
        if source:
            longest = max(len(text) for sample in fresh for text in sample.texts)
            self.slab.copy(self.tensor(source), self.tensor(target), longest)

        slots = slice(len(busy), len(busy) + len(fresh))
        self.last[slots] = self.tensor([[text[-1] for text in sample.texts] for sample in fresh])
        self.pos[slots] = self.tensor([[len(text) - 1 for text in sample.texts] for sample in fresh])
        self.step[slots], self.state[slots] = 0, 0
        width = max(sample.budget for sample in fresh)
        table = torch.zeros(len(fresh), width)
        for row, sample in zip(table, fresh):
            row[:sample.budget] = uniforms(seed, sample.keys, sample.number, sample.budget)
        self.u[slots, :width] = table.to(self.u.device)

    def read(self, unread, at_once=8192):
        """Prefill prompts, a list of (text, row of the slab), right-padded, about `at_once` tokens at a time.

        All but their last tokens: those are the first input of `advance`, so there is one way to sample.
        """
        todo = sorted((pair for pair in unread if len(pair[0]) > 1), key=lambda pair: len(pair[0]))
        while todo:
            width = len(todo[-1][0]) - 1
            batch = [todo.pop() for _ in range(min(len(todo), max(1, at_once // width)))]
            ids = self.tensor([text[:-1] + [0] * (width + 1 - len(text)) for text, _ in batch])
            at = torch.arange(width, device=ids.device).expand(ids.shape)
            slab = self.slab.prompts(self.tensor([row for _, row in batch]))
            self.model.base_model(input_ids=ids, position_ids=at, use_cache=False, slab=slab)

    def advance(self, B, ahead, reach, how, combine):
        """`ahead` tokens for the first B slots -> lists of tokens, logp, entropy, each B lists of `ahead`."""
        live = [x[:B] for x in (self.last, self.pos, self.step, self.state)]
        before = [x.clone() for x in live]
        block = [self.one(B, reach, how, combine) for _ in range(ahead)]
        tokens, logp, entropy, fits = [torch.stack(values, 1) for values in zip(*block)]    # (B, ahead)
        # here the host waits for the device
        if not fits.all():
            # a nucleus was wider than the candidates: the same block once more, from now on with all tokens sorted
            self.candidates = self.model.get_input_embeddings().num_embeddings
            for x, old in zip(live, before):
                x.copy_(old)
            return self.advance(B, ahead, reach, how, combine)
        return tokens.tolist(), logp.tolist(), entropy.tolist()

    def one(self, B, reach, how, combine):
        """One token for the first B slots -> token, logp, entropy, fits, each (B,). Nothing here waits."""
        logits = self.forward(B, reach) if self.graphs is None else self.replay(B, reach)
        logits = logits.float()                                         # (B, streams, V)
        step, state = self.step[:B], self.state[:B]
        if combine:
            logits, new = combine(logits, self.last[:B, 0].clone(), step.clone(), state.clone())
            state.copy_(new)
        else:
            logits = logits[:, 0]
        u = self.u[:B].gather(1, step[:, None])[:, 0]
        token, logp, entropy, fits = draw(logits, u, *how, self.candidates)
        self.last[:B] = token[:, None]                                  # every stream is fed the sampled token
        self.pos[:B].add_(1).clamp_(max=self.slab.columns - 1)          # past its end a row stays in the slab
        step.add_(1).clamp_(max=self.u.shape[1] - 1)
        return token, logp, entropy, fits

    def forward(self, B, reach):
        """Logits (B, streams, V) of the tokens after `last`."""
        ids, pos = self.last[:B].view(-1, 1), self.pos[:B].view(-1, 1)
        slab = self.slab.tokens(pos[:, 0], reach)
        out = self.model(input_ids=ids, position_ids=pos, use_cache=False, slab=slab)
        return out.logits.view(B, self.streams, -1)

    def close_ranks(self, busy, columns):
        """Move the last samples that go on into the slots of those that are done -> the samples that go on."""
        B = sum(not sample.done for sample in busy)
        holes = [slot for slot in range(B) if busy[slot].done]
        tail = [slot for slot in range(B, len(busy)) if not busy[slot].done]
        for hole, slot in zip(holes, tail):
            busy[hole] = busy[slot]
        if holes:
            target, source = self.tensor(holes), self.tensor(tail)
            for x in (self.last, self.pos, self.step, self.state, self.u):
                x.index_copy_(0, target, x.index_select(0, source))
            # the rows of a slot lie together
            stream = torch.arange(self.streams, device=target.device)
            source, target = [(slots[:, None] * self.streams + stream).flatten() for slots in (source, target)]
            self.slab.copy(source, target, columns)
        self.pos[B:] = 0            # a graph steps free slots along: they shall read one column only
        return busy[:B]

    # ---- CUDA graphs

    def replay(self, B, reach):
        """`forward` from a CUDA graph: one for each of a few batch sizes, and reaches where attention is masked."""
        size = min(self.rows, max(8, 1 << (B - 1).bit_length()))        # the next power of two
        if self.slab.flash:
            reach = self.length
        else:
            reach = min(self.length, max(256, 1 << (reach - 1).bit_length()))
        if (size, reach) not in self.graphs:
            self.capture(size, reach)
        if self.graphs is None:
            return self.forward(B, reach)
        graph, logits = self.graphs[size, reach]
        graph.replay()
        return logits[:B]

    def capture(self, size, reach):
        """Record `forward` as a graph. A model whose step waits for the device cannot be captured: said once."""
        stream = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):           # warm up; a step done twice writes the same keys twice
            self.forward(size, reach)
        stream.wait_stream(side)
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                logits = self.forward(size, reach)
            self.graphs[size, reach] = graph, logits
        except RuntimeError as error:
            # leaving a broken capture raises anew: what went wrong first is its context
            for cause in (error, error.__context__):
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause
            warnings.warn(f"no CUDA graph for {type(self.model).__name__}, its steps are launched one by one: {error}")
            self.graphs = None
        finally:
            torch.cuda.set_stream(stream)       # a capture that failed leaves its own stream behind
