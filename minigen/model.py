"""The decoder: one file for every supported family, written on nested jagged tensors.

Shape suffixes: T packed tokens, S sequences, j the jagged (token) dimension of a nested tensor,
H query heads, K key/value heads, D head dim, R rotated part of D, E model width, F hidden width,
V vocabulary, P rope table rows, N cache blocks, B tokens a block, W blocks a sequence.

What differs between families is data in `DecoderConfig`. Attention, norms and the sum before a norm
are the only places that open a jagged tensor (`values()`, `offsets()`): a norm over a jagged tensor
breaks the compiled backward of torch 2.13.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nested._internal.nested_tensor import nested_view_from_values_offsets

from minigen.kernels import (
    LayerWeights,
    decoder_layers,
    kv_cache_write,
    linear,
    native,
    paged_attention,
    rope_cache_write,
    varlen_attention,
)
from minigen.kernels.checks import MAX_HEAD_DIM
from minigen.kernels.rope_cache_write import fuses_rope
from minigen.weights.checkpoint import Checkpoint, read_config

# What each family's config class in transformers assumes for a key that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
}
FAMILIES = tuple(_DEFAULTS)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


# Keys that each way of scaling rope needs, and those it may have besides.
_ROPE_NUMBERS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
    "longrope": ((), ("factor", "attention_factor")),
}


@dataclass(frozen=True)
class DecoderConfig:
    """What a family's `config.json` says, in one form. Lengths are tokens.

    `layer_windows[i]` is layer i's sliding window (keys a query sees, itself included; 0 = all),
    `layer_rope[i]` whether the layer rotates its queries and keys.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    activation: str
    tie_word_embeddings: bool
    rope: dict[str, Any]
    rotary_dim: int
    layer_windows: tuple[int, ...]
    layer_rope: tuple[bool, ...]
    attention_scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_checkpoint: bool = False  # Phi-3 stores qkv_proj and gate_up_proj already fused
    post_norms: bool = False  # Gemma 2: a norm after attention and after the MLP, too
    norm_offset: float = 0.0  # Gemma 2 stores weight - 1
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    original_max_position: int = (
        0  # the length trained before rope was scaled; 0 = not scaled by it
    )

    @property
    def longest_context(self) -> int:
        """Tokens that the rope was scaled for; some configs keep the length before scaling."""
        scaled = {"linear": self.max_position_embeddings, "yarn": self.original_max_position}
        length = scaled.get(self.rope["rope_type"], 0) * self.rope.get("factor", 1.0)
        return max(self.max_position_embeddings, int(length))

    @property
    def rope_switch(self) -> int:
        """Length above which long rope takes its long factors; 0 = one table for all lengths."""
        return self.original_max_position if self.rope["rope_type"] == "longrope" else 0

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> DecoderConfig:
        """Reads a Hugging Face `config.json` (as transformers 4 and 5 write it).

        Raises:
            ValueError: unsupported model type, rope or activation; a key that is missing or odd.
        """
        family = hf.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise _refusal("model_type", family, f"one of {', '.join(FAMILIES)}")
        values = {"max_position_embeddings": 2048, **_DEFAULTS[family], **hf}
        if values.get("quantization_config"):
            raise ValueError(
                "config.json: quantization_config is set, but quantised weights are not supported"
            )
        if _flag(values, "use_bidirectional_attention"):
            raise _refusal("use_bidirectional_attention", True, "false: a decoder is causal")

        hidden, heads = _integer(values, "hidden_size"), _integer(values, "num_attention_heads")
        layers = _integer(values, "num_hidden_layers", most=10_000)
        kv_heads = _integer(values, "num_key_value_heads", heads)
        if values.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
            )
        head_dim = _integer(values, "head_dim", hidden // heads, most=MAX_HEAD_DIM)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} is no multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        max_position = _integer(values, "max_position_embeddings")
        rope, rotary_dim, original = _read_rope(values, family, head_dim, max_position)
        layer_rope = _read_layer_rope(values, family, layers)
        gemma = family == "gemma2"
        attention_bias = _flag(values, "attention_bias")
        has_bias = attention_bias and family in ("gemma2", "llama", "qwen3", "smollm3")
        scalar = _number(values, "query_pre_attn_scalar") if gemma else float(head_dim)
        bos = _token_ids(values, "bos_token_id")
        return cls(
            model_type=family,
            vocab_size=_integer(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(values, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
            activation=_choice(
                values, "hidden_activation" if gemma else "hidden_act", _ACTIVATIONS, "silu"
            ),
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            rope=rope,
            rotary_dim=rotary_dim,
            layer_windows=_read_windows(values, family, layer_rope),
            layer_rope=layer_rope,
            attention_scale=scalar**-0.5,
            qkv_bias=family == "qwen2" or has_bias,
            o_bias=has_bias,
            mlp_bias=_flag(values, "mlp_bias") and family in ("llama", "smollm3"),
            qk_norm=family == "qwen3",
            fused_checkpoint=family == "phi3",
            post_norms=gemma,
            norm_offset=1.0 if gemma else 0.0,
            embedding_scale=hidden**0.5 if gemma else 1.0,
            attention_softcap=_number(values, "attn_logit_softcapping", 0.0) if gemma else 0.0,
            logit_softcap=_number(values, "final_logit_softcapping", 0.0) if gemma else 0.0,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=_token_ids(values, "eos_token_id"),
            dtype=_read_dtype(values),
            original_max_position=original,
        )


def _refusal(key: str, value: Any, needed: str) -> ValueError:
    return ValueError(f"config.json: {key} is {reprlib.repr(value)}, but must be {needed}")


def _integer(
    values: dict[str, Any], key: str, none: int | None = None, most: int = 2**31 - 1
) -> int:
    """values[key], a positive integer; `none` takes the place of null or of a missing key."""
    value = none if values.get(key) is None else values[key]
    if type(value) is not int or not 1 <= value <= most:
        raise _refusal(key, value, f"an integer from 1 to {most}")
    return value


def _number(values: dict[str, Any], key: str, none: float | None = None) -> float:
    """values[key], a positive number; `none` takes the place of null or of a missing key."""
    if values.get(key) is None and none is not None:
        return none
    value = values.get(key)
    # Bounds in which no formula of this file leaves the range of a double.
    if not isinstance(value, int | float) or value is True or not 1e-30 < value < 1e30:
        raise _refusal(key, value, "a positive number")
    return float(value)


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise _refusal(key, value, "true or false")
    return value


def _choice(values: dict[str, Any], key: str, choices: Collection[str], none: str) -> str:
    value = none if values.get(key) is None else values[key]
    if not isinstance(value, str) or value not in choices:
        raise _refusal(key, value, f"one of {', '.join(choices)}")
    return value


def _token_ids(values: dict[str, Any], key: str) -> tuple[int, ...]:
    """The ids of a key: null, one id or a list. Some exporters write null as -1."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise _refusal(key, value, "a token id, a list of them or null")
    return tuple(i for i in ids if i >= 0)


def _read_dtype(values: dict[str, Any]) -> torch.dtype:
    key = "torch_dtype" if values.get("dtype") is None else "dtype"
    value = values.get(key)
    named = {key: value.removeprefix("torch.") if isinstance(value, str) else value}
    return DTYPES[_choice(named, key, DTYPES, "float32")]


def _read_rope(
    values: dict[str, Any], family: str, head_dim: int, max_position: int
) -> tuple[dict[str, Any], int, int]:
    """(rope parameters in transformers 5's form, rotated part of a head, original_max_position)."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = {} if values.get(key) is None else values[key]
    if not isinstance(given, dict) or any(isinstance(entry, dict) for entry in given.values()):
        raise _refusal(key, given, "one flat object for all layers")
    kind_key = "type" if given.get("rope_type") is None else "rope_type"
    kind = given.get(kind_key)
    if kind == "su" or (kind == "yarn" and family == "phi3"):
        given, kind_key = {**given, "rope_type": "longrope"}, "rope_type"  # the first Phi-3 files
    kind = _choice(given, kind_key, _ROPE_NUMBERS, "default")

    def first(key: str) -> dict[str, Any]:
        return {key: values.get(key) if given.get(key) is None else given[key]}

    rope: dict[str, Any] = {"rope_type": kind}
    rope["rope_theta"] = _number(first("rope_theta"), "rope_theta", 10000.0)
    if rope["rope_theta"] <= 1.0:
        raise _refusal("rope_theta", rope["rope_theta"], "above 1")
    part = _number(first("partial_rotary_factor"), "partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * part)
    if part > 1.0 or (part < 1.0 and family != "phi3"):
        needed = "at most 1" if family == "phi3" else f"1 for {family}"
        raise _refusal("partial_rotary_factor", part, needed)
    if rotary_dim < 2 or rotary_dim % 2:
        raise _refusal(
            "head_dim", head_dim, f"such that an even number is rotated, not {rotary_dim}"
        )

    needed, optional = _ROPE_NUMBERS[kind]
    for name in needed:
        if name not in given:
            raise ValueError(f"config.json: rope_type {kind!r} needs {name}, which {key} lacks")
    original = 0
    if kind in ("llama3", "yarn", "longrope"):
        name = "original_max_position_embeddings"
        source = given if values.get(name) is None else values  # Phi-3's key outside wins
        original = _integer(source, name, max_position)
        if kind == "longrope" and original == 1:
            raise _refusal(name, original, "above 1")
    for name in needed:
        # A null factor of YaRN is the ratio of the lengths.
        ratio = max_position / original if kind == "yarn" and name == "factor" else None
        rope[name] = _number(given, name, ratio)
    for name in optional:
        if given.get(name) is not None:
            rope[name] = _number(given, name)
    if kind == "yarn":
        # As transformers reads it: absent is true, null is false.
        rope["truncate"] = _flag({"truncate": given.get("truncate", True)}, "truncate")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise _refusal("high_freq_factor", rope["high_freq_factor"], "above low_freq_factor")
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            factors = given.get(name)
            if not isinstance(factors, list) or len(factors) != rotary_dim // 2:
                raise _refusal(name, factors, f"a list of {rotary_dim // 2} numbers")
            rope[name] = [_number({name: factor}, name) for factor in factors]
    return rope, rotary_dim, original


def _read_windows(
    values: dict[str, Any], family: str, layer_rope: tuple[bool, ...]
) -> tuple[int, ...]:
    layers = len(layer_rope)
    switched = family in ("qwen2", "qwen3", "smollm3")
    if family == "llama" or (switched and not _flag(values, "use_sliding_window")):
        return (0,) * layers
    window = 0 if values.get("sliding_window") is None else _integer(values, "sliding_window")
    types = values.get("layer_types")
    if types is not None and family != "phi3":
        if not isinstance(types, list) or len(types) != layers:
            raise _refusal("layer_types", types, f"a list of num_hidden_layers = {layers} names")
        kinds = ("full_attention", "sliding_attention")
        windows = {kind: kind == "sliding_attention" for kind in kinds}
        return tuple(
            window * windows[_choice({"layer_types": kind}, "layer_types", kinds, "null")]
            for kind in types
        )
    if family == "gemma2":
        return tuple(window if i % 2 == 0 else 0 for i in range(layers))
    if family == "smollm3":
        return tuple(0 if rotates else window for rotates in layer_rope)
    if family in ("qwen2", "qwen3"):
        first = values.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise _refusal("max_window_layers", first, "the index of a layer")
        return tuple(window if i >= first else 0 for i in range(layers))
    return (window,) * layers


def _read_layer_rope(values: dict[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    if family != "smollm3":
        return (True,) * layers
    flags = values.get("no_rope_layers")  # despite its name, 1 marks a layer that does rotate
    if flags is None:
        interval = _integer(values, "no_rope_layer_interval")
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(flags, list) or len(flags) < layers or any(f not in (0, 1) for f in flags):
        raise _refusal("no_rope_layers", flags, f"a list of num_hidden_layers = {layers} 0s and 1s")
    return tuple(bool(flag) for flag in flags[:layers])


def rope_frequencies(config: DecoderConfig) -> tuple[list[Tensor], float]:
    """Inverse frequencies [R/2] in fp32 (long rope: short, long), and the scale of cos and sin.

    Sources: RoPE (arXiv 2104.09864), linear interpolation (2306.15595), YaRN (2309.00071, 3.1-3.4),
    LongRoPE (2402.13753), Llama 3.1's model card for llama3.
    """
    rope, dim = config.rope, config.rotary_dim
    theta, kind = rope["rope_theta"], rope["rope_type"]
    inv = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    original = config.original_max_position
    if kind == "linear":
        return [inv / rope["factor"]], 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * inv / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return [(1 - smooth) * inv / rope["factor"] + smooth * inv], 1.0
    if kind == "yarn":
        factor = rope["factor"]

        def mscale(scale: float, m: float = 1.0) -> float:
            return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

        def dim_of(turns: float) -> float:
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
        if rope["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0
        ramp = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
        attention = rope.get("attention_factor")
        if attention is None:
            m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
            attention = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)
        return [inv / factor * ramp + inv * (1 - ramp)], attention
    if kind == "longrope":
        factor = rope.get("factor") or config.max_position_embeddings / original
        attention = rope.get("attention_factor")
        if attention is None:
            stretched = factor > 1.0
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if stretched else 1.0
        keys = ("short_factor", "long_factor")
        return [inv / torch.tensor(rope[key], dtype=torch.float32) for key in keys], attention
    return [inv], 1.0


def offsets_of(x_Sj: Tensor) -> Tensor:
    """The offsets [S + 1] of a jagged tensor, whose methods torch's type stubs do not know."""
    return x_Sj.offsets()  # pyright: ignore[reportAttributeAccessIssue]


def jagged(values_T: Tensor, offsets_S1: Tensor) -> Tensor:
    """The jagged tensor [S, j, ...] over packed values; no copy."""
    # Not `is_compiling`: since torch 2.13 that is true, too, while another thread compiles.
    if torch.compiler.is_dynamo_compiling():
        return torch.nested.nested_tensor_from_jagged(values_T, offsets_S1)
    # The public function refuses to run while another thread traces (torch 2.11 asks a flag of the
    # whole process), and chat answers uncompiled while a thread compiles.
    return nested_view_from_values_offsets(values_T, offsets_S1)


class Linear(nn.Linear):
    """`nn.Linear` on dense rows or a jagged tensor, by the kernel that suits the device.

    It computes in the dtype of its input: in training the weights are fp32, the rest is bf16.
    """

    def reset_parameters(self) -> None:
        """Leaves the values open: a checkpoint or `Decoder.from_config` gives them.

        To draw them on the meta device torch imports its compiler, 0.8 s of a start.
        """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return jagged(self(input.values()), offsets_of(input))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return linear(input, self.weight.to(input.dtype), bias)


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] dense -> the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (self.weight.float() + self.offset)).to(x.dtype)

    def jagged(self, x_SjE: Tensor) -> Tensor:
        return jagged(self(x_SjE.values()), offsets_of(x_SjE))


@dataclass
class LayerKV:
    """One step's view of a layer's paged cache: where its keys go and where its queries look.

    slots_T int64 (block * B + offset, -1 = skip); kv_lens_S and block_table_SW int32.
    """

    k_cache_NBKD: Tensor
    v_cache_NBKD: Tensor
    slots_T: Tensor
    kv_lens_S: Tensor
    block_table_SW: Tensor


@dataclass
class PagedKV:
    """The same of all layers: `caches` has one (k_NBKD, v_NBKD) each."""

    caches: list[tuple[Tensor, Tensor]]
    slots_T: Tensor
    kv_lens_S: Tensor
    block_table_SW: Tensor

    def layer(self, i: int) -> LayerKV:
        return LayerKV(*self.caches[i], self.slots_T, self.kv_lens_S, self.block_table_SW)


def apply_rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotates the first R = 2 * cos.shape[-1] entries of each head, halves paired, in fp32."""
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    a, b = x_THD[..., :half].float(), x_THD[..., half : 2 * half].float()
    parts = [(a * cos - b * sin).to(x_THD.dtype), (b * cos + a * sin).to(x_THD.dtype)]
    if 2 * half < x_THD.shape[-1]:
        parts.append(x_THD[..., 2 * half :])
    return torch.cat(parts, -1)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer = layer
        # Not looked up by layer: compiled code would hold for that layer alone.
        self.rotates = config.layer_rope[layer]
        window = config.layer_windows[layer]
        self.window_size = (window - 1, 0) if window else (-1, -1)
        self.qkv_proj = Linear(config.hidden_size, (H + 2 * K) * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps, 0.0)
            self.k_norm = RMSNorm(D, config.rms_norm_eps, 0.0)

    def forward(self, x_SjE: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv: LayerKV | None) -> Tensor:
        config = self.config
        H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
        cu_seqlens = offsets_of(x_SjE)
        qkv = self.qkv_proj(x_SjE).values().unflatten(-1, (H + 2 * K, D))
        options = {
            "scale": config.attention_scale,
            "window_size": self.window_size,
            "softcap": config.attention_softcap,
        }
        if kv is None:
            q_THD, k_TKD, v_TKD = self._rotated(qkv, cos_TR, sin_TR)
            out_THD, _ = varlen_attention(q_THD, k_TKD, v_TKD, cu_seqlens, cu_seqlens, **options)
        else:
            q_THD = self._rotated_and_cached(qkv, cos_TR, sin_TR, kv)
            out_THD = paged_attention(
                q_THD, kv.k_cache_NBKD, kv.v_cache_NBKD, cu_seqlens, kv.kv_lens_S,
                kv.block_table_SW, **options, pdl=True,
            )  # fmt: skip
        out = jagged(out_THD.flatten(1), cu_seqlens)
        return self.o_proj(out)

    def _rotated(
        self, qkv_TXD: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries and keys, and the values; X = H + 2K heads."""
        H, K = self.config.num_heads, self.config.num_kv_heads
        q_THD, k_TKD, v_TKD = qkv_TXD.split((H, K, K), 1)
        if self.config.qk_norm:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        if self.rotates:
            q_THD = apply_rope(q_THD, cos_TR, sin_TR)
            k_TKD = apply_rope(k_TKD, cos_TR, sin_TR)
        return q_THD, k_TKD, v_TKD

    def _rotated_and_cached(
        self, qkv_TXD: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv: LayerKV
    ) -> Tensor:
        """The same queries, with keys and values written into the cache."""
        caches = kv.k_cache_NBKD, kv.v_cache_NBKD
        if fuses_rope(qkv_TXD, self.config.qk_norm):
            q_weight_D = k_weight_D = None
            if self.config.qk_norm:
                q_weight_D, k_weight_D = self.q_norm.weight, self.k_norm.weight
            return rope_cache_write(
                qkv_TXD, q_weight_D, k_weight_D, self.config.rms_norm_eps, cos_TR, sin_TR, None,
                *caches, kv.slots_T, self.rotates, True,
            )  # fmt: skip
        q_THD, k_TKD, v_TKD = self._rotated(qkv_TXD, cos_TR, sin_TR)
        kv_cache_write(k_TKD, v_TKD, *caches, kv.slots_T)
        return q_THD


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        E, hidden = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(E, 2 * hidden, bias=config.mlp_bias)
        self.down_proj = Linear(hidden, E, bias=config.mlp_bias)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x_SjE: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x_SjE).chunk(2, -1)
        return self.down_proj(self.activation(gate) * up)


def added(x_TE: Tensor, out_TE: Tensor) -> Tensor:
    """Their sum, in fp32, which rounds to the same. A plain sum the compiler would leave to the
    product before it, and cuBLAS then copies x first (1.4 us at 256 rows, H200); this one joins the
    norm that follows."""
    return (x_TE.float() + out_TE.float()).to(x_TE.dtype)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)

        self.attention, self.mlp = Attention(config, layer), MLP(config)
        self.input_norm, self.mlp_norm = norm(), norm()
        self.post_attention_norm = norm() if config.post_norms else None
        self.post_mlp_norm = norm() if config.post_norms else None
        self.dropout = 0.0  # of what attention and MLP add; only while training

    def forward(self, x_SjE: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv: LayerKV | None) -> Tensor:
        x_SjE, out_SjE = self.summands(x_SjE, cos_TR, sin_TR, kv)
        return x_SjE + out_SjE

    def weights(self) -> LayerWeights:
        attention, mlp, has_norms = self.attention, self.mlp, self.attention.config.qk_norm
        return LayerWeights(
            self.input_norm.weight, attention.qkv_proj.weight, attention.qkv_proj.bias,
            attention.q_norm.weight if has_norms else None,
            attention.k_norm.weight if has_norms else None,
            attention.o_proj.weight, attention.o_proj.bias, self.mlp_norm.weight,
            mlp.gate_up_proj.weight, mlp.gate_up_proj.bias, mlp.down_proj.weight,
            mlp.down_proj.bias,
        )  # fmt: skip

    def summands(
        self, x_SjE: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv: LayerKV | None
    ) -> tuple[Tensor, Tensor]:
        """x after attention, and what the MLP adds to it."""
        out = self.attention(self.input_norm.jagged(x_SjE), cos_TR, sin_TR, kv)
        out = self.post_attention_norm.jagged(out) if self.post_attention_norm else out
        offsets = offsets_of(x_SjE)
        x_SjE = jagged(added(x_SjE.values(), self._dropped(out).values()), offsets)
        out = self.mlp(self.mlp_norm.jagged(x_SjE))
        out = self.post_mlp_norm.jagged(out) if self.post_mlp_norm else out
        return x_SjE, self._dropped(out)

    def _dropped(self, x_SjE: Tensor) -> Tensor:
        if self.dropout == 0.0 or not self.training:
            return x_SjE
        return jagged(F.dropout(x_SjE.values(), self.dropout), offsets_of(x_SjE))


def packed_layer(
    block: Block,
    x_TE: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    cu_seqlens_S1: Tensor,
    kv: LayerKV | None = None,
) -> Tensor:
    """The block over sequences that lie end to end."""
    # Dense in, dense out: a jagged input would keep compiled code out of the cache on disk.
    return block(jagged(x_TE, cu_seqlens_S1), cos_TR, sin_TR, kv).values()


def open_layer(
    block: Block,
    x_TE: Tensor,
    out_TE: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    cu_seqlens_S1: Tensor,
    kv: LayerKV | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed_layer` of x + out, whose own last sum is left open for the next layer's norm."""
    x_SjE = jagged(added(x_TE, out_TE), cu_seqlens_S1)
    x_SjE, out_SjE = block.summands(x_SjE, cos_TR, sin_TR, kv)
    return x_SjE.values(), out_SjE.values()


def closing_norm(norm: RMSNorm, x_TE: Tensor, out_TE: Tensor) -> Tensor:
    """The norm of x + out, behind the last layer."""
    return norm(added(x_TE, out_TE))


class Decoder(nn.Module):
    """A decoder-only language model on jagged tensors.

    `decoder(tokens_Sj)` takes a nested jagged tensor of token ids and gives jagged logits
    [S, j, V]. `hidden_states` is the dense entry that is compiled: it builds the jagged tensor
    inside the graph, since jagged graph inputs defeat the compile cache.
    """

    def __init__(self, config: DecoderConfig, max_length: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.max_length = config.max_position_embeddings if max_length is None else max_length
        if self.max_length < 1:
            raise ValueError(f"max_length is {max_length}, but must be at least 1")
        # Given a weight it draws none, see `Linear.reset_parameters`.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.cos_PR: Tensor
        self.sin_PR: Tensor
        self.embedding_scale: Tensor

    def build_rope(self, device: torch.device) -> None:
        """Fills the fp32 tables [P, R/2]; P is max_length, twice that for long rope's two sets."""
        frequencies, scale = rope_frequencies(self.config)
        try:
            steps = torch.arange(self.max_length, dtype=torch.float32)
            angles_PR = torch.cat([torch.outer(steps, inv) for inv in frequencies])
            cos_PR, sin_PR = (x.mul_(scale).to(device) for x in (angles_PR.cos(), angles_PR.sin()))
        except RuntimeError as error:  # the one that allocators raise
            gib = 2 * len(frequencies) * self.max_length * self.config.rotary_dim / 2 * 4 / 2**30
            raise ValueError(
                f"the rope tables of {self.max_length} positions take {gib:.1f} GiB, for which "
                "there is no memory: pass a smaller max_model_len"
            ) from error
        # No copy in checkpoints: they are recomputed from the config.
        self.register_buffer("cos_PR", cos_PR, persistent=False)
        self.register_buffer("sin_PR", sin_PR, persistent=False)
        # Gemma was trained with the scale rounded to the weights' dtype.
        embedding_scale = torch.tensor(self.config.embedding_scale, dtype=self.embed.weight.dtype)
        self.register_buffer("embedding_scale", embedding_scale.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)
        # `.to(torch.bfloat16)` would round the tables: a position of 300 has no bf16.
        if "cos_PR" in self._buffers and self.cos_PR.dtype != torch.float32:
            self.build_rope(self.cos_PR.device)
        return self

    @classmethod
    def from_config(
        cls,
        config: DecoderConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        seed: int | None = None,
    ) -> Decoder:
        """A decoder with memory but no values, or with random weights when `seed` is given."""
        model = cls._on_meta(config, max_length)._allocate(dtype, device)
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("norm.weight"):
                        parameter.fill_(1.0 - config.norm_offset)
                    else:
                        parameter.normal_(0.0, 0.02, generator=generator)
        return model

    @classmethod
    def _on_meta(cls, config: DecoderConfig, max_length: int | None) -> Decoder:
        try:
            with torch.device("meta"):
                return cls(config, max_length)
        except RuntimeError as error:  # even without memory, a size must not pass 64 bits
            raise ValueError(f"config.json: no tensor can have its sizes: {error}") from None

    def _allocate(self, dtype: torch.dtype | None, device: torch.device | str) -> Decoder:
        # `to_empty` computes strides as the compiler does, and imports parts of it for that.
        model = self.to(dtype or self.config.dtype)._apply(
            lambda x: torch.empty(x.shape, dtype=x.dtype, device=device)
        )
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.embed.weight
        model.build_rope(torch.device(device))
        return model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        progress: bool = True,
    ) -> Decoder:
        """Loads a directory in Hugging Face layout.

        Raises:
            CheckpointError: a file or tensor is missing, broken or contradicts the config.
            ValueError: the config is not supported; `max_length` is above what it allows.
        """
        checkpoint = Checkpoint.open(path)
        config = DecoderConfig.from_hf(read_config(path))
        if max_length is not None and max_length > config.longest_context:
            raise ValueError(
                f"max_model_len {max_length} is more than the {config.longest_context} tokens that "
                "the model was made for (max_position_embeddings in its config.json)"
            )
        model = cls._on_meta(config, max_length)
        optional = ("lm_head.weight",) if config.tie_word_embeddings else ()
        # A config that contradicts the files may ask for more memory than there is.
        checkpoint.compare(dict(model.checkpoint_tensors()), optional)
        model = model._allocate(dtype, device)
        with torch.no_grad():
            checkpoint.load(dict(model.checkpoint_tensors()), optional, progress=progress)
        return model

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, the view of the parameter that it fills)."""
        config = self.config
        D, hidden = config.head_dim, config.intermediate_size
        rows = [config.num_heads * D, config.num_kv_heads * D, config.num_kv_heads * D]
        yield "model.embed_tokens.weight", self.embed.weight.data
        yield "model.norm.weight", self.norm.weight.data
        if not config.tie_word_embeddings:
            yield "lm_head.weight", self.lm_head.weight.data
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            at = f"model.layers.{i}."
            attention, mlp = block.attention, block.mlp
            yield from _fused(
                at + "self_attn.", "qkv_proj", ("q_proj", "k_proj", "v_proj"), attention.qkv_proj,
                rows, config.fused_checkpoint,
            )  # fmt: skip
            yield from _fused(
                at + "mlp.", "gate_up_proj", ("gate_proj", "up_proj"), mlp.gate_up_proj,
                [hidden, hidden], config.fused_checkpoint,
            )  # fmt: skip
            for name, layer in (
                ("self_attn.o_proj", attention.o_proj),
                ("mlp.down_proj", mlp.down_proj),
            ):
                yield f"{at}{name}.weight", layer.weight.data
                if layer.bias is not None:
                    yield f"{at}{name}.bias", layer.bias.data
            if config.qk_norm:
                yield at + "self_attn.q_norm.weight", attention.q_norm.weight.data
                yield at + "self_attn.k_norm.weight", attention.k_norm.weight.data
            yield at + "input_layernorm.weight", block.input_norm.weight.data
            if block.post_attention_norm is not None and block.post_mlp_norm is not None:
                yield at + "post_attention_layernorm.weight", block.post_attention_norm.weight.data
                yield at + "pre_feedforward_layernorm.weight", block.mlp_norm.weight.data
                yield at + "post_feedforward_layernorm.weight", block.post_mlp_norm.weight.data
            else:
                yield at + "post_attention_layernorm.weight", block.mlp_norm.weight.data

    def embedded(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings [..., E] of token ids, dense or jagged, in the dtype to compute in."""
        x = F.embedding(tokens, self.embed.weight).to(dtype)
        return x * self.embedding_scale.to(dtype) if self.config.embedding_scale != 1.0 else x

    def hidden_states(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens_S1: Tensor,
        kv: PagedKV | None = None,
    ) -> Tensor:
        """Normed hidden states [T, E] of packed tokens.

        tokens_T, positions_T int64 (positions are rows of the rope table: long rope's long
        factors start at row `max_length`), cu_seqlens_S1 int32 from 0 to T.
        """
        x_TE, cos_TR, sin_TR = self.begin(tokens_T, positions_T)
        if kv is not None and self._is_one_operation(x_TE):
            return self.norm(self._in_one_operation(x_TE, cos_TR, sin_TR, cu_seqlens_S1, kv))
        x_SjE = jagged(x_TE, cu_seqlens_S1)
        for i, block in enumerate(self.blocks):
            x_SjE = block(x_SjE, cos_TR, sin_TR, None if kv is None else kv.layer(i))
        return self.norm(x_SjE.values())

    def _is_one_operation(self, x_TE: Tensor) -> bool:
        """Whether `decoder_layers` serves, and does what the layers are."""
        config, weight = self.config, self.embed.weight
        plain = config.activation == "silu" and not (
            config.post_norms or config.norm_offset or config.attention_softcap or self.training
        )
        return plain and native.serves(x_TE, weight) and x_TE.dtype == weight.dtype

    def _in_one_operation(
        self, x_TE: Tensor, cos_TR: Tensor, sin_TR: Tensor, cu_seqlens_S1: Tensor, kv: PagedKV
    ) -> Tensor:
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return decoder_layers(
            x_TE, [block.weights() for block in blocks], cos_TR, sin_TR, kv.caches, kv.slots_T,
            cu_seqlens_S1, kv.kv_lens_S, kv.block_table_SW, eps=self.config.rms_norm_eps,
            scale=self.config.attention_scale, rotates=self.config.layer_rope,
            window_sizes=[block.attention.window_size for block in blocks],
        )  # fmt: skip

    def begin(
        self, tokens_T: Tensor, positions_T: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the first block takes: embeddings [T, E], the rope table's rows [T, R/2] twice.

        `dtype` to compute in; default the weights'.
        """
        x_TE = self.embedded(tokens_T, dtype or self.embed.weight.dtype)
        return x_TE, self.cos_PR[positions_T], self.sin_PR[positions_T]

    def logits(self, hidden_RE: Tensor, wide: bool = True) -> Tensor:
        """fp32 logits [R, V] of the given rows, soft-capped where the family does so.

        Not `wide`: in the dtype they are computed in, where nothing is done to them after.
        """
        logits_RV, cap = self.lm_head(hidden_RE), self.config.logit_softcap
        if cap:
            return cap * torch.tanh(logits_RV.float() / cap)
        return logits_RV.float() if wide else logits_RV

    def forward(self, tokens_Sj: Tensor) -> Tensor:
        """Jagged token ids [S, j] -> jagged fp32 logits [S, j, V], no cache.

        Raises:
            ValueError: not a jagged tensor [S, j] of integers; on the CPU also a token outside
                the vocabulary or a sequence longer than `max_length` (a GPU is not waited for).
        """
        self._check(tokens_Sj)
        offsets, tokens_T = offsets_of(tokens_Sj).to(torch.int32), tokens_Sj.values()
        lengths_S = offsets.diff()
        rows_T = torch.repeat_interleave(lengths_S, output_size=tokens_T.shape[0])
        positions_T = torch.arange(tokens_T.shape[0], device=offsets.device) - offsets[rows_T]
        if self.config.rope_switch:
            long_T = lengths_S[rows_T] > self.config.rope_switch
            positions_T = positions_T + long_T * self.max_length
        hidden_TE = self.hidden_states(tokens_T, positions_T, offsets)
        return jagged(self.logits(hidden_TE), offsets)

    def _check(self, tokens_Sj: Tensor) -> None:
        """Refuses what `forward` cannot take; reads values only on the CPU."""
        if not tokens_Sj.is_nested or tokens_Sj.layout != torch.jagged:
            found = f"a dense one {list(tokens_Sj.shape)}" if not tokens_Sj.is_nested else "strided"
            raise ValueError(f"tokens must be a nested jagged tensor [S, j] of ids, but is {found}")
        tokens_T = tokens_Sj.values()
        if tokens_T.dim() != 1 or tokens_T.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens must be a jagged tensor [S, j] of int64 or int32, but has "
                f"{tokens_Sj.dim()} dimensions of {tokens_T.dtype}"
            )
        if tokens_Sj.lengths() is not None:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("tokens has holes between its sequences: call .contiguous() first")
        if (
            tokens_T.device.type != "cpu"
            or torch.compiler.is_dynamo_compiling()
            or not len(tokens_T)
        ):
            return
        low, high = (int(token) for token in tokens_T.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"tokens holds id {low if low < 0 else high}, but ids must be from 0 to "
                f"{self.config.vocab_size - 1}"
            )
        longest = int(offsets_of(tokens_Sj).diff().max())
        if longest > self.max_length:
            raise ValueError(
                f"tokens holds a sequence of {longest} tokens, but max_length is {self.max_length}"
            )


def _fused(
    at: str, fused: str, parts: tuple[str, ...], linear: nn.Linear, rows: list[int], whole: bool
) -> Iterator[tuple[str, Tensor]]:
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is None:
            continue
        if whole:
            yield f"{at}{fused}.{kind}", tensor.data
        else:
            for name, view in zip(parts, tensor.data.split(rows), strict=True):
                yield f"{at}{name}.{kind}", view
