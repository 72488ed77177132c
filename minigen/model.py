"""The decoder: one file for every supported family, written on nested jagged tensors.

Shape suffixes: T packed tokens, S sequences, j the jagged (token) dimension of a nested tensor,
H query heads, K key/value heads, D head dim, R rotated part of D, E model width, F hidden width,
V vocabulary, P rope table rows, N cache blocks, B tokens a block, W blocks a sequence.

What differs between families is data in `DecoderConfig`. Attention and norms are the only places
that open a jagged tensor (`values()`, `offsets()`): a norm over a jagged tensor breaks the compiled
backward of torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigen.kernels import kv_cache_write, paged_attention, varlen_attention
from minigen.weights.checkpoint import Checkpoint, read_config

FAMILIES = ("gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
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
    original_max_position: int = field(default=0)

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
        if family not in FAMILIES:
            raise ValueError(
                f"config.json: model_type {family!r} is not supported; supported are "
                + ", ".join(FAMILIES)
            )

        def number(key: str, default: int | None = None) -> int:
            value = hf.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.json: {key} is {value!r}, a positive integer is needed")
            return value

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        layers = number("num_hidden_layers")
        default_kv = 8 if family == "mistral" and "num_key_value_heads" not in hf else heads
        kv_heads = number("num_key_value_heads", default_kv)
        head_dim = number("head_dim", max(1, hidden // heads))
        if "head_dim" not in hf and hidden % heads:
            raise ValueError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} is no multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        max_position = number("max_position_embeddings", 2048)
        rope, original = _read_rope(hf, max_position)
        rotary_dim = int(head_dim * float(rope.get("partial_rotary_factor", 1.0)))
        activation = hf.get("hidden_activation") or hf.get("hidden_act") or "silu"
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"config.json: hidden_act {activation!r} is not supported; supported are "
                + ", ".join(_ACTIVATIONS)
            )
        gemma = family == "gemma2"
        scalar = float(hf.get("query_pre_attn_scalar") or head_dim) if gemma else float(head_dim)
        eos = hf.get("eos_token_id")
        return cls(
            model_type=family,
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            activation=activation,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", gemma)),
            rope=rope,
            rotary_dim=rotary_dim,
            layer_windows=_read_windows(hf, family, layers),
            layer_rope=_read_layer_rope(hf, family, layers),
            attention_scale=scalar**-0.5,
            qkv_bias=family == "qwen2" or bool(hf.get("attention_bias", False)),
            o_bias=family != "qwen2" and bool(hf.get("attention_bias", False)),
            mlp_bias=family in ("llama", "smollm3") and bool(hf.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            fused_checkpoint=family == "phi3",
            post_norms=gemma,
            norm_offset=1.0 if gemma else 0.0,
            embedding_scale=hidden**0.5 if gemma else 1.0,
            attention_softcap=float(hf.get("attn_logit_softcapping") or 0.0) if gemma else 0.0,
            logit_softcap=float(hf.get("final_logit_softcapping") or 0.0) if gemma else 0.0,
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            dtype=DTYPES.get(
                str(hf.get("dtype") or hf.get("torch_dtype")).removeprefix("torch."), torch.float32
            ),
            original_max_position=original,
        )


def _read_rope(hf: dict[str, Any], max_position: int) -> tuple[dict[str, Any], int]:
    """The rope parameters in transformers 5's form, and the length the model was first trained on."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json: rope parameters are {given!r}, an object is needed")
    rope = dict(given)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] == "su":
        rope["rope_type"] = "longrope"
    known = ("default", "linear", "llama3", "yarn", "longrope")
    if rope["rope_type"] not in known:
        raise ValueError(
            f"config.json: rope_type {rope['rope_type']!r} is not supported; supported are "
            + ", ".join(known)
        )
    rope["rope_theta"] = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    rope.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    original = (
        rope.get("original_max_position_embeddings")
        or hf.get("original_max_position_embeddings")
        or max_position
    )
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
    }
    for key in needed.get(rope["rope_type"], ()):
        if key not in rope:
            raise ValueError(f"config.json: rope_type {rope['rope_type']!r} needs {key!r}")
    return rope, int(original)


def _read_windows(hf: dict[str, Any], family: str, layers: int) -> tuple[int, ...]:
    window = int(hf.get("sliding_window") or 0)
    types = hf.get("layer_types")
    if family == "llama" or (
        family in ("qwen2", "qwen3", "smollm3") and not hf.get("use_sliding_window", False)
    ):
        return (0,) * layers
    if types is not None:
        if len(types) != layers:
            raise ValueError(
                f"config.json: layer_types names {len(types)} layers, num_hidden_layers {layers}"
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    if family == "gemma2":
        return tuple(window if i % 2 == 0 else 0 for i in range(layers))
    if family in ("qwen2", "qwen3"):
        first = int(hf.get("max_window_layers", layers))
        return tuple(window if i >= first else 0 for i in range(layers))
    return (window,) * layers


def _read_layer_rope(hf: dict[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    if family != "smollm3":
        return (True,) * layers
    flags = hf.get("no_rope_layers")  # despite its name, 1 marks a layer that does rotate
    if flags is None:
        interval = int(hf.get("no_rope_layer_interval", 4))
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if len(flags) != layers:
        raise ValueError(
            f"config.json: no_rope_layers names {len(flags)} layers, num_hidden_layers {layers}"
        )
    return tuple(bool(flag) for flag in flags)


def rope_frequencies(config: DecoderConfig) -> tuple[list[Tensor], float]:
    """Inverse frequencies [R/2] in fp32 (two sets for long rope: short, long) and the scale of cos and sin.

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
        if rope.get("truncate", True):
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
        sets = []
        for key in ("short_factor", "long_factor"):
            if len(rope[key]) != dim // 2:
                raise ValueError(
                    f"config.json: {key} has {len(rope[key])} entries, the rotary dimension "
                    f"{dim} needs {dim // 2}"
                )
            sets.append(inv / torch.tensor(rope[key], dtype=torch.float32))
        return sets, attention
    return [inv], 1.0


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
        return torch.nested.nested_tensor_from_jagged(self(x_SjE.values()), x_SjE.offsets())


@dataclass
class PagedKV:
    """One step's view of the paged cache: where the step's keys go and where its queries look.

    caches: one (k_NBKD, v_NBKD) a layer; slots_T int64 (block * B + offset, -1 = skip);
    kv_lens_S and block_table_SW int32.
    """

    caches: list[tuple[Tensor, Tensor]]
    slots_T: Tensor
    kv_lens_S: Tensor
    block_table_SW: Tensor


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
        window = config.layer_windows[layer]
        self.window_size = (window - 1, 0) if window else (-1, -1)
        self.qkv_proj = nn.Linear(config.hidden_size, (H + 2 * K) * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps, 0.0)
            self.k_norm = RMSNorm(D, config.rms_norm_eps, 0.0)

    def forward(self, x_SjE: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv: PagedKV | None) -> Tensor:
        config = self.config
        H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
        cu_seqlens = x_SjE.offsets()
        qkv = self.qkv_proj(x_SjE).values().unflatten(-1, (H + 2 * K, D))
        q_THD, k_TKD, v_TKD = qkv.split((H, K, K), 1)
        if config.qk_norm:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        if config.layer_rope[self.layer]:
            q_THD = apply_rope(q_THD, cos_TR, sin_TR)
            k_TKD = apply_rope(k_TKD, cos_TR, sin_TR)
        options = {
            "scale": config.attention_scale,
            "window_size": self.window_size,
            "softcap": config.attention_softcap,
        }
        if kv is None:
            out_THD, _ = varlen_attention(q_THD, k_TKD, v_TKD, cu_seqlens, cu_seqlens, **options)
        else:
            k_cache, v_cache = kv.caches[self.layer]
            kv_cache_write(k_TKD, v_TKD, k_cache, v_cache, kv.slots_T)
            out_THD = paged_attention(
                q_THD, k_cache, v_cache, cu_seqlens, kv.kv_lens_S, kv.block_table_SW, **options
            )
        out = torch.nested.nested_tensor_from_jagged(out_THD.flatten(1), cu_seqlens)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        E, hidden = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(E, 2 * hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden, E, bias=config.mlp_bias)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x_SjE: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x_SjE).chunk(2, -1)
        return self.down_proj(self.activation(gate) * up)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)

        self.attention, self.mlp = Attention(config, layer), MLP(config)
        self.input_norm, self.mlp_norm = norm(), norm()
        self.post_attention_norm = norm() if config.post_norms else None
        self.post_mlp_norm = norm() if config.post_norms else None

    def forward(self, x_SjE: Tensor, cos_TR: Tensor, sin_TR: Tensor, kv: PagedKV | None) -> Tensor:
        out = self.attention(self.input_norm.jagged(x_SjE), cos_TR, sin_TR, kv)
        x_SjE = x_SjE + (self.post_attention_norm.jagged(out) if self.post_attention_norm else out)
        out = self.mlp(self.mlp_norm.jagged(x_SjE))
        return x_SjE + (self.post_mlp_norm.jagged(out) if self.post_mlp_norm else out)


class Decoder(nn.Module):
    """A decoder-only language model on jagged tensors.

    `decoder(tokens_Sj)` takes a nested jagged tensor of token ids and gives jagged logits
    [S, j, V]. `hidden_states` is the dense entry that is compiled: it builds the jagged tensor
    inside the graph, since jagged graph inputs defeat the compile cache.
    """

    def __init__(self, config: DecoderConfig, max_length: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.max_length = max_length or config.max_position_embeddings
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.cos_PR: Tensor
        self.sin_PR: Tensor

    def build_rope(self, device: torch.device) -> None:
        """Fills the fp32 tables [P, R/2]; P is max_length, twice that for long rope (short, long)."""
        frequencies, scale = rope_frequencies(self.config)
        steps = torch.arange(self.max_length, dtype=torch.float32)
        angles_PR = torch.cat([torch.outer(steps, inv) for inv in frequencies])
        # No copy in checkpoints: they are recomputed from the config.
        self.register_buffer("cos_PR", (angles_PR.cos() * scale).to(device), persistent=False)
        self.register_buffer("sin_PR", (angles_PR.sin() * scale).to(device), persistent=False)

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
        with torch.device("meta"):
            model = cls(config, max_length)
        model = model.to(dtype or config.dtype).to_empty(device=device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed.weight
        model.build_rope(torch.device(device))
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("norm.weight"):
                        parameter.fill_(1.0 - config.norm_offset)
                    else:
                        parameter.normal_(0.0, 0.02, generator=generator)
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
            ValueError: the config is not supported.
        """
        checkpoint = Checkpoint.open(path)
        config = DecoderConfig.from_hf(read_config(path))
        model = cls.from_config(config, dtype=dtype, device=device, max_length=max_length)
        with torch.no_grad():
            optional = ("lm_head.weight",) if config.tie_word_embeddings else ()
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
            for name, linear in (("self_attn.o_proj", attention.o_proj), ("mlp.down_proj", mlp.down_proj)):
                yield f"{at}{name}.weight", linear.weight.data
                if linear.bias is not None:
                    yield f"{at}{name}.bias", linear.bias.data
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
        tokens_Sj = torch.nested.nested_tensor_from_jagged(tokens_T, cu_seqlens_S1)
        x_SjE = F.embedding(tokens_Sj, self.embed.weight)
        if self.config.embedding_scale != 1.0:
            # Rounded to the weights' dtype first, as Gemma was trained.
            scale = torch.tensor(self.config.embedding_scale, dtype=x_SjE.dtype).item()
            x_SjE = x_SjE * scale
        cos_TR, sin_TR = self.cos_PR[positions_T], self.sin_PR[positions_T]
        for block in self.blocks:
            x_SjE = block(x_SjE, cos_TR, sin_TR, kv)
        return self.norm(x_SjE.values())

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """fp32 logits [R, V] of the given rows, soft-capped where the family does so."""
        logits_RV = self.lm_head(hidden_RE).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits_RV / cap) if cap else logits_RV

    def forward(self, tokens_Sj: Tensor) -> Tensor:
        """Jagged token ids [S, j] -> jagged fp32 logits [S, j, V], no cache."""
        if not tokens_Sj.is_nested or tokens_Sj.layout != torch.jagged:
            raise ValueError("tokens: a nested jagged tensor [S, j] of token ids is needed")
        offsets, tokens_T = tokens_Sj.offsets().to(torch.int32), tokens_Sj.values()
        lengths_S = offsets.diff()
        rows_T = torch.repeat_interleave(lengths_S, output_size=tokens_T.shape[0])
        positions_T = torch.arange(tokens_T.shape[0], device=offsets.device) - offsets[rows_T]
        if self.config.rope_switch:
            long_T = lengths_S[rows_T] > self.config.rope_switch
            positions_T = positions_T + long_T * self.max_length
        hidden_TE = self.hidden_states(tokens_T, positions_T, offsets)
        return torch.nested.nested_tensor_from_jagged(self.logits(hidden_TE), offsets)


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
