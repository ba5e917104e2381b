"""Any transformers configuration  ->  the same architecture, tiny.

    LlamaConfig(hidden_size=4096, num_hidden_layers=32, vocab_size=32000, …)
    ->  LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, …)

By the names of the fields, since those are the field's: widths, heads, layers, vocabularies, experts, image and patch sizes;
configurations inside of configurations alike. Where layers differ (sliding and full, linear and softmax, dense and sparse), one
of each kind is kept. What this loses has its own small configuration in `small_configs.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, WIDTH, HEADS, HEAD_DIM, LAYERS, MOST_LAYERS = 128, 64, 4, 16, 2, 4
IMAGE, PATCH, WINDOW, POSITIONS = 32, 8, 6, 128
FIRST_SPECIAL = 100  # ids of special tokens from here on are moved into the small vocabulary

Rule = Callable[[int], int]


def at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


# (names of fields, what becomes of a whole number there); the first that fits decides.
RULES: tuple[tuple[re.Pattern[str], Rule], ...] = tuple(
    (re.compile(names), rule)
    for names, rule in (
        (r"chunk_size_feed_forward|.*temperature|.*sampling_rate|.*_theta|.*loss_.*|.*_cost|sample_rate", lambda v: v),
        (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", lambda v: 0),
        (r"first_k_dense_replace|moe_layer_start_index|.*_interval|.*decoder_sparse_step|moe_layer_freq", at_most(1)),
        (r".*vocab.*size.*|.*vocab_size|num_embeddings|codebook_size|num_buckets", at_most(VOCABULARY)),
        (r".*experts_per_tok.*|moe_topk|top_k_experts|.*_topk|moe_k|num_selected_experts", at_most(2)),
        (r"n_group|topk_group", at_most(1)),
        (r".*num_.*experts.*|n_routed_experts|num_experts", at_most(4)),
        (r"(.*_)?(num_)?(hidden_|block_)?(layers|depth)|n_layers?|num_blocks|.*num_layers.*|max_window_layers", at_most(LAYERS)),
        (r".*(key_value|kv)_?heads?|multi_query_groups?_num|n_head_kv|num_kv_heads", at_most(2)),
        (r".*(num_|n_)?heads?|.*attention_heads.*", at_most(HEADS)),
        (r"rotary_dim|mamba_d_state", at_most(8)),
        (r".*head_dim.*|d_kv|dim_head|d_head|.*channel_head|query_pre_attn_scalar", at_most(HEAD_DIM)),
        (r".*lora_rank.*", at_most(32)),
        (r".*image_size|.*img_size|input_size", at_most(IMAGE)),
        (r".*patch_size", at_most(PATCH)),
        (r".*sliding_window.*|attention_window|local_attention|attention_chunk_size", at_most(WINDOW)),
        (r".*window_size", at_most(4)),
        (r".*(position_embeddings|positions|context_length|max_seq_len|seq_length|max_length)", at_most(POSITIONS)),
        (r".*(num_queries|query_tokens|num_latents|query_length)", at_most(8)),
        (
            r".*(hidden_size|d_model|embed_dim|hidden_dim|n_embd|embedding_size|width|projection_dim|output_channels).*",
            at_most(WIDTH),
        ),
        (r".*(intermediate|ffn|d_ff|mlp_dim|d_inner|n_inner).*", at_most(WIDTH)),
        (r".*", lambda v: WIDTH if v > 256 else v),
    )
)
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_decoder_layers", "decoder_layers")
SPECIAL = re.compile(r".*(token|eos|bos|pad|boi|eoi|start|end|blank|mask|image|audio|video)\w*_(id|ids|index)")


@dataclasses.dataclass
class Shrinking:
    """One model's configurations: special tokens of one name get one id in all of them."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    special: dict[str, int] = dataclasses.field(default_factory=dict)
    derive: bool = True  # leave numbers that have no default of their own to the configuration, which derives them from others

    def config(self, config: PreTrainedConfig, path: str = "") -> PreTrainedConfig:
        """A new, small configuration of the same class. `changes` ("text_config.hidden_size": 32) overrule the rules."""
        kwargs: dict[str, Any] = {}
        own = {f.name: config.__dict__[f.name] for f in dataclasses.fields(config) if f.init and f.name in config.__dict__}
        changed = {f.name for f in dataclasses.fields(config) if is_changed(f.default, own.get(f.name))}
        derived = {f.name for f in dataclasses.fields(config) if f.default is None and isinstance(own.get(f.name), int)}
        kept = kept_layers(own)
        for name, value in own.items():
            if self.derive and name in derived and not SPECIAL.fullmatch(name):
                continue
            small = self.value(name, value, kept, own, path)
            if isinstance(value, PreTrainedConfig) or small is not value or name in changed:
                kwargs[name] = small
        if "num_key_value_heads" in kwargs and own["num_key_value_heads"] == own.get("num_attention_heads"):
            kwargs["num_key_value_heads"] = kwargs.get("num_attention_heads", own["num_attention_heads"])
        if own.get("_out_features") and own["_out_features"] != config.stage_names[-1:]:
            kwargs["out_features"] = small_stages(own)
        if kept:
            kwargs |= {name: len(kept) for name in LAYER_COUNTS if name in own}
        for change, value in self.changes.items():
            if change.rpartition(".")[0] == path:
                kwargs[change.rpartition(".")[2]] = value
        return type(config)(**kwargs)

    def value(self, name: str, value: Any, kept: list[int], own: Mapping[str, Any], path: str) -> Any:
        if isinstance(value, PreTrainedConfig):
            return self.config(value, f"{path}.{name}".lstrip("."))
        if name == "use_cache":
            return False if value else value
        if isinstance(value, bool) or value is None:
            return value
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            return small_rope(value)
        if isinstance(value, int):
            if SPECIAL.fullmatch(name):
                return self.token(name, value)
            return next(rule for names, rule in RULES if names.fullmatch(name))(value)
        if isinstance(value, (list, tuple)):
            if is_per_layer(value, own) and kept:
                return type(value)([value[i] for i in kept])
            if SPECIAL.fullmatch(name) and all(isinstance(v, int) for v in value):
                return type(value)(self.token(name, v) for v in value)
            return small_list(name, value)
        return value

    def token(self, name: str, value: int) -> int:
        if value < FIRST_SPECIAL:
            return value
        return self.special.setdefault(f"{name}={value}", 20 + len(self.special))


def is_changed(default: Any, value: Any) -> bool:
    """Whether an inner configuration was given a value in place of the default of its class; what is derived is of another kind."""
    if isinstance(value, (list, tuple)):
        return isinstance(default, (list, tuple)) and list(value) != list(default)
    return value is not None and isinstance(default, type(value)) and value != default


def layer_count(own: Mapping[str, Any]) -> int:
    return next((own[n] for n in LAYER_COUNTS if isinstance(own.get(n), int)), 0)


def is_per_layer(value: Any, own: Mapping[str, Any]) -> bool:
    """A list with one plain entry for each layer, of a model that has more layers than are kept."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == layer_count(own) > LAYERS
        and all(isinstance(v, (str, int, float, type(None))) for v in value)
    )


def kept_layers(own: Mapping[str, Any]) -> list[int]:
    """One layer of each kind, in order, where the layers of a model differ; empty where no field tells them apart."""
    kinds = [v for v in own.values() if is_per_layer(v, own)]
    if not kinds:
        return []
    first: dict[Any, int] = {}
    for i, kind in enumerate(zip(*kinds, strict=True)):
        first.setdefault(kind, i)
    picked = list(first.values())[:MOST_LAYERS]
    return picked if len(picked) >= LAYERS else [0, 1]


def small_stages(own: Mapping[str, Any]) -> list[str]:
    """The stages that a backbone gives out; those of a transformer are its layers, of which few are left."""
    count = layer_count(own)
    last = [int(name.removeprefix("stage")) for name in own["_out_features"] if name.startswith("stage")]
    if count <= LAYERS or len(last) < len(own["_out_features"]):
        return list(own["_out_features"])
    return sorted({f"stage{min(LAYERS, max(1, stage * LAYERS // count))}" for stage in last})


def small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings for the small head; those of several axes divide it as before."""
    made = {k: small_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if "mrope_section" in made and sum(made["mrope_section"]):
        section, pairs = made["mrope_section"], int(HEAD_DIM // 2 * made.get("partial_rotary_factor", 1.0))
        small = [max(1, s * pairs // sum(section)) for s in section]
        small[-1] += pairs - sum(small)
        made["mrope_section"] = small
    if "original_max_position_embeddings" in made:
        made["original_max_position_embeddings"] = min(made["original_max_position_embeddings"], POSITIONS // 2)
    for factor in ("short_factor", "long_factor"):
        if factor in made:
            made[factor] = made[factor][: HEAD_DIM // 2]
    return made if made != rope else rope


def small_list(name: str, value: Any) -> Any:
    """Widths of stages in proportion, blocks of a stage at most two, heads from one on."""
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if "depth" in name or name in ("layers", "num_blocks", "stage_num_blocks"):
        made = [min(v, LAYERS) for v in value]
    elif "heads" in name:
        made = [max(1, v // max(1, min(value))) for v in value]
    elif "image_size" in name or "img_size" in name:
        made = [min(v, IMAGE) for v in value]
    elif "patch_size" in name and len(value) <= 3 and max(value) > PATCH:
        made = [min(v, PATCH) for v in value]
    elif max(value) > WIDTH and any(word in name for word in ("hidden", "dim", "channels", "size")):
        factor = max(1, min(value) // HEAD_DIM)
        made = [v // factor for v in value]
    elif "block_indexes" in name or "attn_indexes" in name:
        made = [LAYERS - 1]
    elif "visual_indexes" in name:
        made = list(range(LAYERS))[: len(value)]
    else:
        return value
    return type(value)(made)


def small_config(model_type: str, changes: Mapping[str, Any] | None = None, *, derive: bool = True) -> PreTrainedConfig:
    """The shrunk default configuration of a model type; `changes` are what the rules must not decide."""
    return Shrinking(changes or {}, derive=derive).config(CONFIG_MAPPING[model_type]())
