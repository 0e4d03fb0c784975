"""The blocks of transformers' DINOv2 models under their names; the mathematics is that of `dinov2.layers`.

Modules hold parameters under the keys that every version of transformers writes to disk (query, key, value;
weights_in, weights_out; lambda1), so that checkpoints need no conversion. State dicts with the names that versions
from 5.18 on use in memory (q_proj, gate_proj, ...) load as well. Every matrix that a quantiser or an adapter may want
to replace is a plain `nn.Linear`; one that was replaced or hooked into is called as it is.

Attention is computed by

- `sdpa` (the default): `dinov2.layers.attention.attend_heads`, which takes PyTorch's fused attention or, where it
  measured faster, explicit products.
- `eager`, and `sdpa`, flex and flash attention as soon as weights are returned or heads are masked: explicit weights.
- any other name: the function that is registered with transformers under it, also where a user registered one as
  `sdpa` or `eager`. What flex and flash attention cannot do falls to `sdpa`: masks, dropout and gradients on a CPU with
  flex attention, masks of single scores with flash attention.
"""

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation

from dinov2.errors import ConfigError
from dinov2.hf.configuration import Config
from dinov2.hf.naming import refuse_adapter, rename_gates, rename_projections
from dinov2.layers.attention import attend_heads, attention_weights
from dinov2.layers.drop_path import drop_path
from dinov2.layers.kernels import add_scaled, fused_mlp, fused_swiglu, fuses_mlp, fuses_swiglu, is_untouched, project
from dinov2.layers.packing import PackedLayout, unpack
from dinov2.layers.recording import is_recording
from dinov2.layers.swiglu_ffn import swiglu_hidden_features

# This imports every quantisation package that is installed, and torch answers torchao up to 0.18 with log lines about
# torchao's own enumerations, which no user can act upon. Nothing else is silenced, and nothing afterwards.
_pytree_log = logging.getLogger("torch.utils._pytree")
_level_before = _pytree_log.level
_pytree_log.setLevel(logging.ERROR)
try:
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
finally:
    _pytree_log.setLevel(_level_before)

__all__ = [
    "Dinov2Attention",
    "Dinov2DropPath",
    "Dinov2Layer",
    "Dinov2LayerScale",
    "Dinov2MLP",
    "Dinov2SelfAttention",
    "Dinov2SelfOutput",
    "Dinov2SwiGLUFFN",
    "Dinov2WithRegistersAttention",
    "Dinov2WithRegistersDropPath",
    "Dinov2WithRegistersLayer",
    "Dinov2WithRegistersLayerScale",
    "Dinov2WithRegistersMLP",
    "Dinov2WithRegistersSelfAttention",
    "Dinov2WithRegistersSelfOutput",
    "Dinov2WithRegistersSwiGLUFFN",
    "prepare_mask",
]

_Activation = Callable[[Tensor], Tensor]
_Kernel = Callable[..., tuple[Tensor, Tensor | None]]
_STOCK_SDPA: _Kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
_EXACT_GELU = nn.GELU()  # what `GELUActivation` computes


class _Options(TypedDict, total=False):
    """Arguments of attention besides a mask; only given ones are handed on."""

    head_mask: Tensor
    output_attentions: bool
    layout: PackedLayout


class Dinov2SelfAttention(nn.Module):
    """Query, key and value projections; `[B, T, D]` -> attended values `[B, T, heads * d]` and weights or None."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if self.attention_head_size < 1:
            raise ConfigError(
                f"{config.num_attention_heads} attention heads do not fit into a hidden_size of {config.hidden_size}; "
                "choose fewer heads"
            )
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.dropout_prob = config.attention_probs_dropout_prob
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = False
        self.query, self.key, self.value = (
            nn.Linear(config.hidden_size, self.all_head_size, bias=config.qkv_bias) for _ in range(3)
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Unpack[_Options]
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, D]` (packed rows `[S, D]` with a `layout`) -> values of the same shape, weights or None."""
        queries, keys, values = (project(layer, hidden_states) for layer in (self.query, self.key, self.value))
        return _attention_forward(self, queries, keys, values, attention_mask=attention_mask, **options)


class Dinov2SelfOutput(nn.Module):
    """The output projection of attention, with dropout `hidden_dropout_prob` in training."""

    def __init__(self, config: Config, all_head_size: int | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(all_head_size or config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor | None = None) -> Tensor:
        """`[..., heads * d]` -> `[..., D]`; `input_tensor` is accepted and not needed."""
        projected: Tensor = self.dropout(project(self.dense, hidden_states))
        return projected


class Dinov2Attention(nn.Module):
    """Self-attention with its output projection; heads can be pruned."""

    _attention_class: ClassVar[type[Dinov2SelfAttention]] = Dinov2SelfAttention
    _output_class: ClassVar[type[Dinov2SelfOutput]] = Dinov2SelfOutput

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = self._attention_class(config)
        self.output = self._output_class(config, self.attention.all_head_size)
        self.pruned_heads: set[int] = set()

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Unpack[_Options]
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, D]` -> `[B, T, D]`, and weights `[B, heads, T, T]` or None."""
        attended, weights = self.attention(hidden_states, attention_mask, **options)
        return self.output(attended, hidden_states), weights

    def prune_heads(self, heads: Sequence[int]) -> None:
        """Takes heads out for good, by their numbers in the whole model; those gone already do not matter."""
        inner = self.attention
        n_whole = inner.num_attention_heads + len(self.pruned_heads)
        beyond = [head for head in heads if not 0 <= head < n_whole]
        if beyond:
            raise ValueError(f"there are no heads {beyond}: this layer has heads 0 to {n_whole - 1}")
        present = [head for head in range(n_whole) if head not in self.pruned_heads]
        kept = [place for place, head in enumerate(present) if head not in set(heads)]
        if len(kept) == len(present):
            return
        if not kept:
            raise ValueError("all heads of a layer were to be pruned; leave at least one, or mask them with head_mask")
        size = inner.attention_head_size
        rows = torch.cat([torch.arange(place * size, (place + 1) * size) for place in kept])
        inner.query, inner.key, inner.value = (
            _select_rows(layer, rows, dim=0) for layer in (inner.query, inner.key, inner.value)
        )
        self.output.dense = _select_rows(self.output.dense, rows, dim=1)
        inner.num_attention_heads = len(kept)
        inner.all_head_size = len(kept) * size
        self.pruned_heads |= set(heads)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        rename_projections(state_dict, prefix)
        refuse_adapter(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Dinov2LayerScale(nn.Module):
    """One learned factor a channel, `lambda1` `[D]`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(config.layerscale_value * torch.ones(config.hidden_size))

    def forward(self, hidden_state: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        return hidden_state * self.lambda1


class Dinov2DropPath(nn.Module):
    """Stochastic depth per sample, in training."""

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob or 0.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, ...]` -> `[B, ...]`."""
        return drop_path(hidden_states, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"p={self.drop_prob}"


class Dinov2MLP(nn.Module):
    """Linear, activation, linear; `[..., D]` -> `[..., D]`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.activation = _activation(config.hidden_act)
        self.fc2 = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_state: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        is_gelu = is_untouched(self.activation, GELUActivation)  # type: ignore[arg-type]
        if is_gelu and fuses_mlp(hidden_state, self.fc1, _EXACT_GELU, self.fc2):
            return fused_mlp(hidden_state, self.fc1, self.fc2)
        return project(self.fc2, self.activation(project(self.fc1, hidden_state)))


class Dinov2SwiGLUFFN(nn.Module):
    """The gated network of the giant model: `weights_out(silu(gate) * value)`, gate and value in `weights_in`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner = swiglu_hidden_features(int(config.hidden_size * config.mlp_ratio))
        self.weights_in = nn.Linear(config.hidden_size, 2 * inner)
        self.weights_out = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_state: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        if fuses_swiglu(hidden_state, self.weights_in, self.weights_out):
            return fused_swiglu(hidden_state, self.weights_in, self.weights_out)
        gate, value = project(self.weights_in, hidden_state).chunk(2, dim=-1)
        return project(self.weights_out, F.silu(gate) * value)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        rename_gates(state_dict, prefix)
        refuse_adapter(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Dinov2Layer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A block: `x + scale1(attention(norm1(x)))`, then `x + scale2(mlp(norm2(x)))`."""

    _attention_class: ClassVar[type[Dinov2Attention]] = Dinov2Attention
    _scale_class: ClassVar[type[Dinov2LayerScale]] = Dinov2LayerScale
    _drop_class: ClassVar[type[Dinov2DropPath]] = Dinov2DropPath
    _mlp_class: ClassVar[type[Dinov2MLP]] = Dinov2MLP
    _swiglu_class: ClassVar[type[Dinov2SwiGLUFFN]] = Dinov2SwiGLUFFN

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = self._attention_class(config)
        self.layer_scale1 = self._scale_class(config)
        self.drop_path = self._drop_class(config.drop_path_rate) if config.drop_path_rate > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = self._swiglu_class(config) if config.use_swiglu_ffn else self._mlp_class(config)
        self.layer_scale2 = self._scale_class(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attentions: list[Tensor] | None = None,
        **options: Unpack[_Options],
    ) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`; the attention weights `[B, heads, T, T]` are appended to `attentions`."""
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        if attentions is not None:
            options["output_attentions"] = True
        attended, weights = self.attention(self.norm1(hidden_states), **mask, **options)
        if attentions is not None:
            attentions.append(weights)
        hidden_states = self._add(hidden_states, attended, self.layer_scale1)
        return self._add(hidden_states, self.mlp(self.norm2(hidden_states)), self.layer_scale2)

    def _add(self, tokens: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        is_scaled = is_untouched(scale, self._scale_class) and self._scale_class.forward is _SCALE_FORWARD
        if is_scaled and self._drops_nothing():
            return add_scaled(tokens, branch, scale.lambda1)  # type: ignore[arg-type]
        added: Tensor = self.drop_path(scale(branch)) + tokens
        return added

    def _drops_nothing(self) -> bool:
        if is_untouched(self.drop_path, nn.Identity):
            return True
        is_unchanged = is_untouched(self.drop_path, self._drop_class) and self._drop_class.forward is _DROP_FORWARD
        return is_unchanged and not self.drop_path.training


# As written here: a class whose `forward` was replaced is called.
_SCALE_FORWARD, _DROP_FORWARD = Dinov2LayerScale.forward, Dinov2DropPath.forward


class Dinov2WithRegistersSelfAttention(Dinov2SelfAttention):
    """The same for models with registers."""


class Dinov2WithRegistersSelfOutput(Dinov2SelfOutput):
    """The same for models with registers."""


class Dinov2WithRegistersAttention(Dinov2Attention):
    """The same for models with registers."""

    _attention_class = Dinov2WithRegistersSelfAttention
    _output_class = Dinov2WithRegistersSelfOutput


class Dinov2WithRegistersLayerScale(Dinov2LayerScale):
    """The same for models with registers."""


class Dinov2WithRegistersDropPath(Dinov2DropPath):
    """The same for models with registers."""


class Dinov2WithRegistersMLP(Dinov2MLP):
    """The same for models with registers."""


class Dinov2WithRegistersSwiGLUFFN(Dinov2SwiGLUFFN):
    """The same for models with registers."""


class Dinov2WithRegistersLayer(Dinov2Layer):
    """The same for models with registers."""

    _attention_class = Dinov2WithRegistersAttention
    _scale_class = Dinov2WithRegistersLayerScale
    _drop_class = Dinov2WithRegistersDropPath
    _mlp_class = Dinov2WithRegistersMLP
    _swiglu_class = Dinov2WithRegistersSwiGLUFFN


def _activation(hidden_act: str | _Activation) -> _Activation:
    """The activation that a config names, or the callable itself. Raises `ConfigError` for an unknown name."""
    if not isinstance(hidden_act, str):
        return hidden_act
    if hidden_act == "selu":  # documented by transformers, and missing in its table
        return nn.SELU()
    if hidden_act not in ACT2FN:
        known = ", ".join(sorted({"selu", *ACT2FN}))
        raise ConfigError(f"hidden_act is {hidden_act!r}; give a callable, or one of {known}")
    activation: _Activation = ACT2FN[hidden_act]
    return activation


def _select_rows(layer: nn.Linear, rows: Tensor, *, dim: int) -> nn.Linear:
    """The same linear layer with these rows (dim 0) or columns (dim 1) of its weight only."""
    rows = rows.to(layer.weight.device)
    weight = layer.weight.detach().index_select(dim, rows)
    kept = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    kept.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = layer.bias.detach()
        bias = (bias.index_select(0, rows) if dim == 0 else bias).clone()
        kept.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    return kept


def _attention_forward(
    module: Dinov2SelfAttention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
    layout: PackedLayout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Projections `[B, T, heads * d]` (or packed rows `[S, heads * d]`) -> attended values alike, weights or None.

    `attention_mask` broadcasts to `[B, heads, T, T]`: False is left out, or numbers are added to the scores;
    `head_mask` is `[heads]` or broadcasts to `[B, heads, T, T]`; weights are those in use, after dropout.
    """
    if layout is None:
        return _attend(module, queries, keys, values, attention_mask, head_mask, output_attentions)
    groups = zip(*(unpack(rows, layout) for rows in (queries, keys, values)), strict=True)
    attended = [_attend(module, q, k, v, attention_mask, head_mask, False)[0].flatten(0, 1) for q, k, v in groups]
    return torch.cat(attended), None


def prepare_mask(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """A mask of tokens `[B, T]` (1 attends) as `[B, 1, 1, T]` of bool, None if it masks nothing; 4-D ones as they are.

    Raises `ValueError` for another shape.
    """
    if mask is None or mask.ndim == 4:
        return mask
    batch, length = tokens.shape[:2]
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, but there are {batch} images of {length} tokens (class "
            f"token, registers and patches); give [{batch}, {length}], or a prepared 4-D mask"
        )
    attends = mask.to(tokens.device) != 0
    # A compiled or recorded graph cannot branch on what is in a tensor.
    whole = not (torch.compiler.is_compiling() or is_recording()) and bool(attends.all())
    return None if whole else attends[:, None, None, :]


def _attend(
    module: Dinov2SelfAttention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    head_mask: Tensor | None,
    output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:
    size = module.attention_head_size
    query, key, value = (_heads(rows, size) for rows in (queries, keys, values))  # [B, heads, T, d] each
    weights: Tensor | None
    dropout = module.dropout_prob if module.training else 0.0
    implementation = module.config._attn_implementation
    kernel = _registered_kernel(implementation)
    is_standard = kernel is None or implementation == "flex_attention" or "flash" in implementation
    if kernel is None or head_mask is not None or (output_attentions and is_standard):
        query = query * (module.scaling * size**0.5) if module.scaling != size**-0.5 else query
        if implementation != "eager" and head_mask is None and not output_attentions:
            attended = attend_heads(query, key, value, mask=mask, dropout=dropout)
            return attended.transpose(1, 2).flatten(2), None
        weights = F.dropout(attention_weights(query, key, mask=mask), dropout, training=module.training)
        if head_mask is not None:
            weights = weights * (head_mask[:, None, None] if head_mask.ndim == 1 else head_mask)
        attended = (weights.to(value.dtype) @ value).transpose(1, 2)
        return attended.flatten(2), weights if output_attentions else None
    if is_standard:
        on_cpu_with_gradient = query.requires_grad and query.is_cpu
        kernel, mask = _possible(implementation, kernel, mask, dropout=dropout, backward_on_cpu=on_cpu_with_gradient)
    attended, weights = kernel(
        module, query, key, value, mask, dropout=dropout, scaling=module.scaling, is_causal=module.is_causal
    )  # [B, T, heads, d]
    if output_attentions and weights is None:
        weights = attention_weights(query * (module.scaling * size**0.5), key, mask=mask)
    return attended.flatten(2), weights if output_attentions else None


def _registered_kernel(implementation: str | None) -> _Kernel | None:
    """The function registered under the name; None for `sdpa` and `eager`, unless a user registered another there."""
    if implementation is None or (implementation == "eager" and "eager" not in ALL_ATTENTION_FUNCTIONS):
        return None
    kernel: _Kernel = ALL_ATTENTION_FUNCTIONS[implementation]
    return None if kernel is _STOCK_SDPA else kernel


def _possible(
    implementation: str, kernel: _Kernel, mask: Tensor | None, *, dropout: float, backward_on_cpu: bool
) -> tuple[_Kernel, Tensor | None]:
    """The kernel that can do the call, and the mask in its form; `sdpa` where the chosen one cannot."""
    if implementation == "flex_attention" and (mask is not None or dropout or backward_on_cpu):
        return _STOCK_SDPA, mask
    if "flash" in implementation and mask is not None:
        is_per_token = mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
        return (kernel, mask[:, 0, 0]) if is_per_token else (_STOCK_SDPA, mask)  # flash attention takes [B, T]
    return kernel, mask


def _heads(rows: Tensor, size: int) -> Tensor:  # [B, T, heads * d] -> [B, heads, T, d]
    batch, length, width = rows.shape
    return rows.reshape(batch, length, width // size, size).transpose(1, 2)
