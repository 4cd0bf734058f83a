"""
sampler.py - sampling from a language model in batches: where all the methods spend their time.

`model.generate` left-pads a batch, grows its cache by concatenation, and runs until the longest row
is done. Here column c of a row of one slab always holds the keys and values of its token c: while a
call lasts, the model's attention is replaced by a function that writes a column and looks at those
before it. A sample that is done leaves its slot to the next.

    column       0      1      2      3      4      5      6      7
    slot 0      What    is     2      +      3     (?)     .      .     last "?", pos 5
    slot 1     Count    to     9      :      1      2      3     (4)    last "4", pos 7
    slot 2       Is    (it)    .      .      .      .      .      .     last "it", pos 1
                |__________ reach: what attention looks at _________|

    slot      one of `rows` places in the batch, which a sample occupies until it is done
    stream    with streams=2 a slot is two rows: two contexts, fed the same sampled tokens
    last      the token that a row is fed next; pos: its position, hence the column it fills
    logp      log p(y_t), entropy H[p_t]: of the temperature-scaled, untruncated distribution, nats

Sample j of a prompt inverts the cumulative distribution at numbers that depend on (seed, prompt, j,
step) alone: but for float rounding, neither `rows` nor order nor company change a sample. Left out:
beams, penalties, recurrent state, paged caches, speculation, several GPUs.

    python sampler.py                  how slots are refilled; the texts are those of generate
    python -m experiments.race         how much faster than generate
    python -m experiments.families     which model families it serves
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
from transformers import AttentionInterface, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

CANDIDATES = 1024       # top-p looks for its nucleus among so many tokens, before it sorts them all


@dataclass
class Sample:
    """One continuation of a prompt: the first four fields are the result, the others the loop's."""

    tokens: list = field(default_factory=list)      # ids, the stop token included
    logp: list = field(default_factory=list)        # nats, one a token
    entropy: list = field(default_factory=list)     # nats, one a token
    finished: bool = False                          # by a stop token
    texts: tuple = ()                               # the prompt, one tuple of ids a stream
    number: int = 0                                 # which sample of its prompt this is
    budget: int = 0                                 # how many tokens it may have
    done: bool = False

    def take(self, tokens, logp, entropy, stop, halt):
        """Add sampled tokens up to the first stop token, then cut where `halt` says."""
        for token, token_logp, token_entropy in zip(tokens, logp, entropy):
            self.tokens.append(token)
            self.logp.append(token_logp)
            self.entropy.append(token_entropy)
            if token in stop:
                self.finished = True
                break
        length = halt(self.tokens) if halt else None
        if length is not None:
            self.finished = self.finished and length == len(self.tokens)
            for numbers in (self.tokens, self.logp, self.entropy):
                del numbers[length:]
            self.budget = len(self.tokens)
        self.done = self.finished or len(self.tokens) == self.budget


# ---- one token -----------------------------------------------------------------------------------

def uniforms(seed, sample):
    """The numbers in [0, 1) by which a sample draws its tokens: (budget,) float32."""
    key = repr((int(seed), sample.texts, sample.number)).encode()
    digest = hashlib.sha256(key).digest()
    rng = np.random.default_rng(list(digest))
    return torch.from_numpy(rng.random(sample.budget, dtype=np.float32))


def invert(p, u):
    """The first index at which the cumulative sum of p (R, V) exceeds the share u (R,) of its
    total -> (R, 1). In two levels, since a cumulative sum over a vocabulary is slow."""
    R, V = p.shape
    size = min(V, 256)
    blocks = F.pad(p, (0, -V % size)).view(R, -1, size)
    # Which block.
    cdf = blocks.sum(-1).cumsum(-1)                                     # (R, blocks)
    target = u[:, None] * cdf[:, -1:]                                   # (R, 1)
    block = torch.searchsorted(cdf, target, right=True)
    block.clamp_(max=cdf.shape[1] - 1)
    # Where in it, for what is left of the target.
    target -= F.pad(cdf, (1, 0)).gather(1, block)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0]          # (R, size)
    place = torch.searchsorted(inside.cumsum(-1), target, right=True)
    place.clamp_(max=size - 1)
    # Rounding may lead to where p is 0.
    likeliest = inside.argmax(-1, keepdim=True)
    place = torch.where(inside.gather(1, place) > 0, place, likeliest)
    return block * size + place


def truncate(p, top_k, top_p, candidates):
    """Of the top_k likeliest tokens (0: `candidates`) the fewest that hold top_p of the mass.
    p (R, V) -> kept (R, k), not renormalised, 0 behind the nucleus; ids (R, k); fits (R,) bool:
    whether the nucleus is no wider than the candidates."""
    k = min(top_k or candidates, p.shape[1])
    top, ids = p.topk(k)
    mass = top.sum(-1, keepdim=True) if top_k else 1.0
    # A token is in the nucleus if the likelier ones do not fill it.
    before = top.cumsum(-1) - top
    kept = top * (before < max(top_p, 1e-30) * mass)
    everything = k in (top_k, p.shape[1])
    fits = (kept[:, -1] == 0) | everything
    return kept, ids, fits


def draw(logits, u, temperature, top_k=0, top_p=1.0, candidates=CANDIDATES):
    """logits (R, V) float32, u (R,) in [0, 1) -> token int64, logp, entropy, fits, all (R,).
    First temperature, then top_k, then top_p. At temperature 0 logp and entropy are those of 1."""
    if temperature not in (0, 1):
        logits = logits / temperature
    log_p = logits.log_softmax(-1)
    log_p.clamp_(min=-200)                              # exp(-200) is 0, but 0 * -inf is NaN
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    fits = torch.ones_like(u, dtype=torch.bool)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)                         # (R, 1)
    elif top_k or top_p < 1:
        kept, ids, fits = truncate(p, top_k, top_p, candidates)
        token = ids.gather(1, invert(kept, u))
    else:
        token = invert(p, u)
    logp = log_p.gather(1, token)
    return token[:, 0], logp[:, 0], entropy, fits


# ---- the slab, and the attention that reads it ---------------------------------------------------

@dataclass
class Call:
    """What the layers need to know of one call of the model: R prompts, or R single tokens."""

    row: torch.Tensor                   # (R, 1) the rows of the slab
    at: torch.Tensor                    # the columns: (1, T) of prompts, (R, 1) of tokens
    reach: int                          # how many columns are looked at
    used: torch.Tensor = None           # (R,) int32 columns filled by now; None for prompts
    bias: dict = field(default_factory=dict)        # window -> what is added to the scores


def slab_attention(module, query, key, value, attention_mask, slots=None, call=None, scaling=None,
                   sliding_window=None, softcap=None, s_aux=None, dropout=0.0, position_ids=None,
                   is_causal=True, **others):
    """What a layer calls in place of its attention; `slots` and `call` are keywords of the model's
    call. query (R, heads, T, dim), key, value (R, kv heads, T, dim) -> (R, T, heads, dim), None."""
    if slots is None:
        raise ValueError("its layers keep the keywords of a call from their attention")
    others["a mask of its own"] = attention_mask
    for name, option in others.items():
        if option is not None and option is not False:
            raise ValueError(f"attention with {name}")

    layer = module.layer_idx
    window = sliding_window
    plain = softcap is None and s_aux is None
    if layer not in slots.keys:
        shape = slots.pos.numel(), slots.columns, key.shape[1]
        slots.keys[layer] = key.new_zeros(*shape, key.shape[3])
        slots.values[layer] = value.new_zeros(*shape, value.shape[3])
        slots.flash[layer] = plain and flash_fits(query, key, value)
    keys = slots.keys[layer]                                            # (rows, columns, ...)
    values = slots.values[layer]
    keys[call.row, call.at] = key.transpose(1, 2)
    values[call.row, call.at] = value.transpose(1, 2)

    # A prompt sees itself, a single token all that its row holds.
    if call.used is not None:
        R = len(query)
        if slots.flash[layer]:
            return attend_flash(slots, call, query, keys[:R], values[:R], scaling, window), None
        key = keys[:R, :call.reach].transpose(1, 2)                     # (R, kv heads, reach, dim)
        value = values[:R, :call.reach].transpose(1, 2)
    if window is not None and window >= call.reach:
        window = None
    bias = None
    if not plain or window or call.used is not None:
        bias = bias_of(slots, call, window, query.dtype)
    return attend(query, key, value, bias, scaling, softcap, s_aux).transpose(1, 2), None


AttentionInterface.register("slab", slab_attention)     # for this name no mask is built


def bias_of(slots, call, window, dtype):
    """0 where a token sees a column, -inf elsewhere: (1, 1, T, T) of prompts, (R, 1, 1, reach)."""
    if window not in call.bias:
        columns = slots.numbers[:call.reach]
        at = call.at[:, :, None]                                        # (R or 1, T, 1)
        unseen = columns > at
        if window:
            unseen |= columns <= at - window
        bias = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)
        call.bias[window] = bias[:, None]
    return call.bias[window]


def attend(q, k, v, bias, scale, cap=None, sinks=None):
    """Attention of q (R, heads, T, dim) to k, v (R, kv heads, S, dim) -> (R, heads, T, dim). bias
    (R or 1, 1, T, S) is added to the scores; without one a token sees those up to itself. cap: a
    soft one on the scores (Gemma 2); sinks (heads,): the score of a token that is not there and
    gives nothing (gpt-oss)."""
    if bias is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    # Query heads that share a key head become query positions: the keys are read once.
    R, heads, T, dim = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(R, kv_heads, -1, dim)                             # (R, kv heads, group T, dim)
    if T > 1:
        bias = bias.repeat(1, 1, heads // kv_heads, 1)
    if cap is None and sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
        return out.reshape(R, heads, T, -1)
    # What no kernel knows.
    scores = q @ k.transpose(2, 3) * scale                              # (R, kv heads, group T, S)
    scores = scores.float()
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores += bias
    out = scores.softmax(-1).to(v.dtype) @ v
    out = out.view(R, heads, T, -1)
    if sinks is not None:
        mass = scores.logsumexp(-1).view(R, heads, T, 1)
        out *= torch.sigmoid(mass - sinks.view(-1, 1, 1)).to(v.dtype)   # what the sink leaves
    return out


# ---- the slots -----------------------------------------------------------------------------------

class Slots:
    """What a call of the sampler keeps on the device. The slots in use come first."""

    def __init__(self, model, count, streams, columns):
        self.model, self.streams, self.columns = model, streams, columns
        self.device = model.device
        self.numbers = torch.arange(count * streams + columns, device=model.device)
        self.keys, self.values = {}, {}         # layer -> (rows, columns, kv heads, dim)
        self.flash = {}                         # layer -> whether it takes the flash kernel
        self.graphs = {}                        # number of slots -> CUDA graph, its logits
        self.reach = columns
        self.candidates = CANDIDATES
        self.last = self.numbers.new_zeros(count, streams)
        self.pos = self.last.clone()
        self.step = self.last[:, 0].clone()     # tokens sampled so far
        self.state = self.step.clone()          # what `combine` remembers
        self.u = torch.zeros(count, columns, device=model.device)       # the random numbers
        self.fields = self.last, self.pos, self.step, self.state, self.u

    def fill(self, busy, fresh, seed):
        """Put samples behind the busy ones. A prompt that the slab holds is copied, not read."""
        home = {sample.texts: slot for slot, sample in enumerate(busy)}
        unread, source, target, ends = [], [], [], []
        u = torch.zeros(len(fresh), self.columns)
        for slot, sample in enumerate(fresh, len(busy)):
            first = home.setdefault(sample.texts, slot)
            if first != slot:
                source.append(first)
                target.append(slot)
            for stream, text in enumerate(sample.texts):
                # The last token is the first input of `advance`: there is one way to sample.
                if first == slot and len(text) > 1:
                    unread.append((text[:-1], slot * self.streams + stream))
                ends.append((text[-1], len(text) - 1))
            u[slot - len(busy), :sample.budget] = uniforms(seed, sample)
        slots = slice(len(busy), len(busy) + len(fresh))
        ends = torch.tensor(ends, device=self.device).view(len(fresh), self.streams, 2)
        self.last[slots] = ends[:, :, 0]
        self.pos[slots] = ends[:, :, 1]
        self.step[slots] = 0
        self.state[slots] = 0
        self.u[slots] = u.to(self.device)
        self.read(unread)
        self.copy(source, target)

    def read(self, unread, at_once=8192):
        """Prefill texts, a list of (text, row), about `at_once` tokens at a time, right-padded."""
        unread.sort(key=lambda pair: len(pair[0]), reverse=True)
        while unread:
            batch = max(1, at_once // len(unread[0][0]))
            texts, rows = zip(*unread[:batch])
            del unread[:batch]
            ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
            ids = ids.to(self.device)                                   # (R, T)
            T = ids.shape[1]
            rows = torch.tensor(rows, device=self.device)[:, None]
            call = Call(rows, self.numbers[None, :T], T)
            self.model.base_model(input_ids=ids, use_cache=False, slots=self, call=call)

    def copy(self, source, target, fields=()):
        """Keys, values and `fields` of the slots `source` into the slots `target`, lists both."""
        if source:
            source, target = torch.tensor([source, target], device=self.device)
            for x in (*fields, *self.keys.values(), *self.values.values()):
                x = x.view(len(self.pos), -1)                           # (slots, ...)
                x[target] = x[source]

    def forward(self, B):
        """Logits (B, streams, V) of the tokens after `last`, in the first B slots."""
        ids = self.last[:B].view(-1, 1)                                 # (R, 1)
        pos = self.pos[:B].view(-1, 1)
        row = self.numbers[:len(pos), None]
        call = Call(row, pos, self.reach, used=pos[:, 0].int() + 1)
        out = self.model(input_ids=ids, position_ids=pos, use_cache=False, slots=self, call=call)
        return out.logits.view(B, self.streams, -1)

    def advance(self, B, ahead, how, combine):
        """`ahead` tokens for the first B slots -> tokens, logp, entropy: B lists of `ahead`."""
        self.reach = self.pos.max().item() + 1 + ahead
        last, pos, step, state, u = (x[:B] for x in self.fields)
        changing = last, pos, step, state
        before = [x.clone() for x in changing]
        block = []
        for _ in range(ahead):                  # nothing in this loop waits for the device
            logits = replay(self, B).float()                            # (B, streams, V)
            if combine:
                logits, state[:] = combine(logits, last[:, 0], step, state)
            else:
                logits = logits[:, 0]
            now = u.gather(1, step[:, None])[:, 0]                      # (B,)
            drawn = draw(logits, now, *how, self.candidates)
            block.append(drawn)
            last[:] = drawn[0][:, None]         # every stream is fed the sampled token
            pos += 1
            step += 1
        tokens, logp, entropy, fits = (torch.stack(x, 1) for x in zip(*block))      # (B, ahead)
        if fits.all():
            return tokens.tolist(), logp.tolist(), entropy.tolist()
        # A nucleus was wider than the candidates: the block once more, from now on sorting all.
        self.candidates = logits.shape[1]
        for x, old in zip(changing, before):
            x.copy_(old)
        return self.advance(B, ahead, how, combine)

    def close_ranks(self, busy):
        """Move the last samples that go on into the slots of those that are done."""
        B = sum(not sample.done for sample in busy)
        holes = [slot for slot in range(B) if busy[slot].done]
        tail = [slot for slot in range(B, len(busy)) if not busy[slot].done]
        for hole, slot in zip(holes, tail):
            busy[hole] = busy[slot]
        del busy[B:]
        self.copy(tail, holes, self.fields)
        self.pos[B:] = 0                        # free slots in a graph shall read one column


# ---- on a GPU: flash attention and graphs --------------------------------------------------------

def flash_fits(q, k, v):
    """Whether the kernel of flash attention takes these queries, keys and values."""
    dim = k.shape[3]
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] < 8:
        return False
    return q.dtype != torch.float32 and v.shape[3] == dim and dim % 8 == 0 and dim <= 256


def attend_flash(slots, call, q, keys, values, scale, window):
    """One query a row, by a kernel that is told on the device how much each row has filled.
    q (R, heads, 1, dim), keys and values (R, columns, kv heads, dim) -> (R, 1, heads, dim)."""
    # Where each row's queries and keys start, were the rows laid end to end.
    query_start = slots.numbers[:len(q) + 1].int()
    key_start = query_start * slots.columns
    left = None if window is None else window - 1
    out = torch.ops.aten._flash_attention_forward(
        q[:, :, 0], keys.flatten(0, 1), values.flatten(0, 1), query_start, key_start, 1,
        slots.columns, 0.0, False, False, scale=scale, window_size_left=left, seqused_k=call.used)
    return out[0][:, None]


def replay(slots, B):
    """slots.forward(B) from a CUDA graph, if there can be one."""
    # A graph fixes how much attention reads, unless every layer's kernel is told on the device.
    if not slots.flash or not all(slots.flash.values()):
        return slots.forward(B)
    power_of_two = 1 << (B - 1).bit_length()
    size = min(len(slots.pos), max(8, power_of_two))
    if size not in slots.graphs:
        slots.graphs[size] = capture(slots, size)
    graph, logits = slots.graphs[size]
    if graph is None:
        return slots.forward(B)
    graph.replay()
    return logits[:B]


def capture(slots, size):
    """Record slots.forward -> graph, the logits it writes; None, None if the model forbids it."""
    slots.forward(size)                         # warms up; done twice, a step writes the same
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            return graph, slots.forward(size)
    except RuntimeError as error:
        # Leaving a broken capture raises anew: what went wrong first is its context.
        for cause in (error, error.__context__):
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause
        warnings.warn(f"no CUDA graph of {type(slots.model).__name__}: {error}")
        return None, None
    finally:
        torch.cuda.set_stream(stream)           # a capture that failed leaves its own current


# ---- the sampler ---------------------------------------------------------------------------------

@contextmanager
def attention(model, name):
    """The model with attention `name`, in eval mode, no autocast, no gradients, its GPU the current
    one; then as it was."""
    config = model.config.get_text_config()
    old = config._attn_implementation
    training = [module for module in model.modules() if module.training]
    kind = model.device.type
    gpu = model.device if kind == "cuda" else -1                        # -1: none
    # At every new shape cuDNN's attention takes a good part of a second, and prompts have many.
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        config._attn_implementation = name
        model.eval()
        torch.backends.cuda.enable_cudnn_sdp(False)
        with torch.no_grad(), torch.autocast(kind, enabled=False), torch.cuda.device(gpu):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        config._attn_implementation = old
        for module in training:
            module.training = True


def limit_length(length, limit, what):
    if length > limit:
        raise ValueError(f"its {what} differs in texts of more than {limit} tokens, and {length=}: "
                         "lower --max_new_tokens")


def examine(model, length):
    """ValueError, naming the cause, if the slab cannot serve the model."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    state = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if state or getattr(model, "_is_stateful", False):
        state = ", ".join(sorted(state)) or "recurrent"
        raise ValueError(f"its layers ({state}) keep more than the keys and values of a slab; "
                         "idft.py trains it where no --eval_data is asked for")
    if "chunked_attention" in kinds:
        limit_length(length, config.attention_chunk_size, "attention in chunks")
    if getattr(config, "attn_temperature_tuning", False):
        limit_length(length, config.floor_scale - 1, "attention scaled by position")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limit_length(length, rope["original_max_position_embeddings"], "long rope")
    elif "dynamic" in str(rope) or "longrope" in str(rope):
        raise ValueError("dynamic rope: frequencies depend on the longest row of a batch")

    # The proof: four texts, the last token read by itself, give the model's own logits. They are
    # longer than its window, unless that would take minutes.
    window = getattr(config, "sliding_window", None) or 0
    T = 40 if window > 1000 else max(40, window + 8)
    T = min(T, max(length, 8))
    ids = torch.arange(4 * T, device=model.device).view(4, T) * 37 + 11
    ids %= model.get_input_embeddings().num_embeddings
    with attention(model, "eager"):
        want = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    texts = [Sample(texts=(tuple(text),), budget=1) for text in ids.tolist()]
    slots = Slots(model, 4, 1, T)
    with attention(model, "slab"):
        slots.fill([], texts, seed=0)
        got = slots.forward(4)[:, 0].float()
    if len(slots.keys) != config.num_hidden_layers:
        raise ValueError("not all of its layers attend through transformers.AttentionInterface")
    # The median row: bf16 may send a token to another expert, but a wrong model errs in all rows.
    largest = want.abs().amax(-1).clamp(min=1e-6)
    error = (got - want).abs().amax(-1) / largest
    error = error.median()
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    if not error < (1e-4 if exact else 5e-2):
        raise ValueError(f"its logits through the slab are off by {error:.1e} of their size")


class Sampler:
    """Samples from a decoder-only Hugging Face model, `rows` side by side, texts of at most
    `length` tokens. ValueError for a model that the slab cannot serve. With `dtype` it keeps a twin
    in that precision (bf16 beside float32 weights that learn), as of the last `sync`."""

    def __init__(self, model, rows=64, length=2048, streams=1, dtype=None):
        if dtype not in (None, model.dtype):
            # The parameters only: rotary frequencies must stay float32.
            model = copy.deepcopy(model).requires_grad_(False)
            for p in model.parameters():
                p.data = p.data.to(dtype)
        if not any("inv_freq" in name for name, _ in model.named_buffers()):
            # Positions come from a table.
            length = min(length, getattr(model.config, "max_position_embeddings", length))
        try:
            examine(model, length)
        except Exception as error:
            cause = error
            if not isinstance(error, ValueError):
                cause = "its attention cannot be replaced through transformers.AttentionInterface"
            raise ValueError(f"the sampler cannot serve {type(model).__name__}: {cause}") from error
        self.model, self.streams = model, streams
        self.rows, self.length = rows, length
        self.every = 32 if model.device.type == "cuda" else 4       # tokens between looks

    def sync(self, model):
        """Copy the weights of `model` into the twin."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters()):
                mine.copy_(theirs)

    def __call__(self, prompts, n=1, max_new_tokens=256, stop=None, temperature=1.0, top_k=0,
                 top_p=1.0, seed=0, combine=None, halt=None):
        """n continuations of every prompt -> list of Sample; number r belongs to prompt r // n.

        prompts         ragged lists of token ids; with streams=2 pairs of lists
        max_new_tokens  an int, or a list with one for every prompt
        stop            ids of the tokens that end a sample; None: the model's own EOS
        temperature     0 is greedy; top_k=0 and top_p=1 truncate nothing
        combine         (logits (R, streams, V), last (R,) the token fed, step (R,) tokens sampled
                        so far, state (R,) int64, at first 0) -> logits (R, V), the new state (R,)
        halt            (list of tokens sampled so far) -> the length to cut the sample to, or None;
                        asked every `every` tokens, and what it cuts is not finished
        ValueError, naming the prompt, for what cannot be sampled.
        """
        if not (n >= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(f"cannot sample with {n=}, {temperature=}, {top_k=}, {top_p=}")
        if self.streams > 1 and combine is None:
            raise ValueError(f"{self.streams} streams need a `combine`")
        if stop is None:
            stop = self.model.generation_config.eos_token_id
            stop = stop if isinstance(stop, list) else [stop]
        stop = set(stop)
        samples = self.plan(prompts, n, max_new_tokens)
        count = min(self.rows, len(samples))
        columns = max(len(text) + sample.budget for sample in samples for text in sample.texts)
        slots = Slots(self.model, count, self.streams, columns)
        how = temperature, top_k, top_p
        queue = [sample for sample in samples if sample.budget > 0]
        busy = []                               # slot -> sample
        with attention(self.model, "slab"):
            while queue or busy:
                free = count - len(busy)
                fresh, queue = queue[:free], queue[free:]
                if fresh:
                    slots.fill(busy, fresh, seed)
                    busy += fresh
                # No further than the first budget ends.
                left = min(sample.budget - len(sample.tokens) for sample in busy)
                ahead = min(left, self.every)
                block = slots.advance(len(busy), ahead, how, combine)
                for sample, *numbers in zip(busy, *block):
                    sample.take(*numbers, stop, halt)
                slots.close_ranks(busy)
        return samples

    def plan(self, prompts, n, max_new_tokens):
        """Check the request -> its samples, still empty."""
        budgets = max_new_tokens
        if not isinstance(budgets, (list, tuple)):
            budgets = [budgets] * len(prompts)
        if not 0 < len(prompts) == len(budgets):
            raise ValueError(f"{len(prompts)} prompts and {len(budgets)} values of max_new_tokens")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        samples, count = [], Counter()
        for i, (prompt, budget) in enumerate(zip(prompts, budgets)):
            texts = prompt if self.streams > 1 else [prompt]
            texts = tuple(tuple(map(int, text)) for text in texts)
            if len(texts) != self.streams:
                raise ValueError(f"prompt {i} needs {self.streams} texts, one a stream")
            for text in texts:
                if not text or min(text) < 0 or max(text) >= vocabulary:
                    raise ValueError(f"prompt {i} is empty or outside the vocabulary {vocabulary}")
                if budget < 0 or len(text) + budget > self.length:
                    raise ValueError(f"prompt {i}: {len(text)} tokens and {budget} new ones do not "
                                     f"fit length={self.length}")
            # A prompt listed twice goes on counting.
            for _ in range(n):
                samples.append(Sample(texts=texts, number=count[texts], budget=budget))
                count[texts] += 1
        return samples


def main():
    """Six prompts of a small random model pass through three slots; then `generate` answers."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=1000, hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         initializer_range=0.3)
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=list(range(100)))
    prompts = torch.randint(100, 1000, (6, 8)).tolist()

    print("What three slots hold at every look; a fresh sample comes behind those that go on.\n")
    sampler = Sampler(model, rows=3, length=128)
    samples = sampler(prompts, max_new_tokens=12, temperature=0.0, halt=print)
    equal = 0
    for prompt, sample in zip(prompts, samples):
        text = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
        equal += text[0].tolist() == prompt + sample.tokens
    print(f"\n{equal} of {len(samples)} texts are those of generate, token by token")


if __name__ == "__main__":
    main()
