"""
families.py - which model families the sampler serves, and where token_stats is exact.

Every family that transformers lists as a causal language model is built from a tiny random
configuration, with all windows, chunks and index sizes at 8 tokens, and asked twice.

    greedy        the sampler's texts of up to 31 tokens, three rows side by side, beside the
                  likeliest tokens of the model's own whole forward: how many of 7 are equal
    token_stats   logp and entropy of a ragged batch, padded right and left, beside the model's own
                  forward of every row alone: the largest difference in nats

Left out: encoders, encoder-decoders, and models that read more than text.

    python -m experiments.families                  the table: some minutes
    python -m experiments.families gemma2 gpt_oss   these alone
"""

import sys
import warnings

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ddt import logp_entropy, token_stats
from sampler import Sampler

V = 128
WINDOW = 8
# The sizes of a tiny model, under all the names that configurations have for them.
SIZES = {
    V: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    96: "intermediate_size ffn_dim d_ff dff d_inner dim_ff shared_intermediate_size "
        "ffn_hidden_size dense_intermediate_size",
    64: "hidden_size d_model n_embd word_embed_proj_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size o_lora_rank mlp_hidden_size",
    24: "qk_head_dim",
    16: "head_dim kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim index_head_dim d_head "
        "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim "
        "mamba_headdim dim_head global_head_dim",
    WINDOW: "sliding_window sliding_window_size attention_chunk_size index_topk window_size",
    8: "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads mamba_d_state mamba_chunk_size "
       "ssm_state_size state_size hidden_size_per_layer_input chunk_size laurel_rank rank "
       "rel_extent",
    4: "num_hidden_layers num_attention_heads num_experts num_local_experts n_routed_experts "
       "moe_num_experts index_n_heads linear_num_value_heads linear_num_heads n_layer n_head "
       "n_heads n_layers num_layers attention_heads zero_expert_num",
    2: "num_key_value_heads num_experts_per_tok moe_topk linear_num_key_heads altup_num_inputs "
       "pad_token_id eos_token_id bos_token_id mamba_expand moe_k",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups "
       "first_k_dense_replace mamba_n_groups",
    0: "num_kv_shared_layers",
}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
             "long_factor": [4.0] * 8, "original_max_position_embeddings": 40}
# What single families need beside the sizes.
MORE = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0], "intermediate_size_mlp": 96, "floor_scale": 64,
                    "layer_types": ["chunked_attention"] * 3 + ["full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 16, "sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 40,
             "rope_parameters": LONG_ROPE},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "starcoder2": {"sliding_window": WINDOW},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
# The same families with other settings.
VARIANTS = {
    "llama4_text, full attention": ("llama4_text", {**MORE["llama4_text"],
                                                    "layer_types": ["full_attention"] * 4}),
    "llama4_text, short chunks": ("llama4_text", {**MORE["llama4_text"],
                                                  "attention_chunk_size": WINDOW}),
    "phi3, window": ("phi3", {"sliding_window": WINDOW}),
    "qwen2, no window": ("qwen2", {"use_sliding_window": False}),
}
MORE["llama4_text"]["attention_chunk_size"] = 40
NO_TEXT_DECODERS = """
    aria_text_vision bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small
    blt camembert data2vec-text diffllama_vision dots3_note electra emu3 ernie fuyu gemma3 gemma3n
    gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 llama4 marian mbart
    megatron-bert mllama moshi moss_transcribe_diarize musicgen musicgen_melody mvp pegasus
    phi4_multimodal plbart prophetnet qwen3_5 qwen3_5_moe qwen4_exp reformer rembert roberta
    roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet
    xmod""".split()


def tiny_config(kind, more):
    """The configuration of a family with SIZES in place of its own, and `more`."""
    Config = CONFIG_MAPPING[kind]
    known = vars(Config())
    settings = {}
    for size, names in SIZES.items():
        for name in names.split():
            if known.get(name) is not None:
                settings[name] = size
    if "qk_rope_head_dim" in settings:
        settings["head_dim"] = settings["qk_rope_head_dim"]
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return Config(**{**settings, **more})


def tiny_model(config):
    """A random model, with weights large enough to have opinions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(3)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def texts(lengths):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (length,), generator=g) for length in lengths]


@torch.no_grad()
def own_logits(model, text):
    """The model's own forward of a text (T,) -> (T, V)."""
    return model(text[None], use_cache=False).logits[0].float()


def greedy(model):
    """How many of the sampler's greedy texts are those of the uncached forward, or why not."""
    prompts = [text.tolist() for text in texts((1, 9, 3, 17, 5, 12, 2))]
    try:
        sampler = Sampler(model, rows=3, length=40)
    except ValueError as error:
        return str(error).split(": ", 1)[1]
    samples = sampler(prompts, max_new_tokens=14, stop=(), temperature=0.0)
    equal = 0
    for prompt, sample in zip(prompts, samples):
        logits = own_logits(model, torch.tensor(prompt + sample.tokens))
        likeliest = logits[len(prompt) - 1:-1].argmax(-1)
        equal += likeliest.tolist() == sample.tokens
    return f"{equal} of {len(prompts)} equal"


def largest_difference(model, side):
    """Of token_stats in a batch padded on one side from a forward of every text alone, in nats."""
    rows = texts((20, 13, 7, 20))
    ids = torch.zeros(len(rows), 20, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    places = []
    for row, text in enumerate(rows):
        start = 0 if side == "right" else 20 - len(text)
        places.append(slice(start, start + len(text)))
        ids[row, places[row]] = text
        mask[row, places[row]] = True
    with torch.no_grad():
        stats = token_stats(model, ids, mask)
    largest = 0.0
    for row, text in enumerate(rows):
        want = logp_entropy(own_logits(model, text)[:-1], text[1:])
        place = slice(places[row].start, places[row].stop - 1)
        for got, wanted in zip(stats, want):
            largest = max(largest, (got[row, place] - wanted).abs().max().item())
    return largest


def exactness(model):
    """largest_difference on either side, or the error."""
    cells = []
    for side in ("right", "left"):
        try:
            cells.append(f"{largest_difference(model, side):.0e}")
        except Exception as error:
            cells.append(f"{type(error).__name__}: {error}"[:90])
    return cells


def main(names):
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind not in NO_TEXT_DECODERS:
            families[kind] = kind, MORE.get(kind, {})
    families.update(VARIANTS)

    served, refused, failed = [], [], []
    for name in names or sorted(families):
        kind, more = families[name]
        try:
            model = tiny_model(tiny_config(kind, more))
        except Exception as error:
            failed.append(name)
            print(f"{name}: not built: {type(error).__name__}: {error}"[:150], file=sys.stderr)
            continue
        verdict, stats = greedy(model), exactness(model)
        row = f"| {name} | {' | '.join([verdict, *stats])} |".replace("\n", " ")
        (served if verdict.endswith("equal") else refused).append(row)
        print(row, file=sys.stderr, flush=True)

    print(f"{len(served)} served, {len(refused)} refused; transformers {transformers.__version__}, "
          f"torch {torch.__version__}; no tiny configuration: {', '.join(failed) or 'none'}.")
    for title, rows in (("served: greedy", served), ("refused, and why", refused)):
        print(f"\n| family | {title} | token_stats, right | left |\n| --- | --- | --- | --- |")
        print("\n".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
