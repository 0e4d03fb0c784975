"""`Dinov2Config` and `Dinov2WithRegistersConfig`: the settings of transformers' classes, and what their files hold.

Any version's files and arguments are taken: positional ones, a `mlp_ratio` of 4.0, a callable `hidden_act`. Defaults
are those of the newest documentation. One key is ours: `position_interpolation`, and it is written only when it was
changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneConfigMixin

__all__ = ["Config", "Dinov2Config", "Dinov2WithRegistersConfig", "align_stages"]

_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
# Of a file and its writer, and no setting.
_PROVENANCE = ("_name_or_path", "transformers_version")
_NOT_STORED = {"self", "kwargs", "out_features", "out_indices", "__class__"}
_Size = int | Sequence[int]
_Activation = str | Callable[[Tensor], Tensor]


class _Config(BackboneConfigMixin, PretrainedConfig):  # type: ignore[misc]
    """Common configuration of both families; `out_features`, `out_indices` and `stage_names` follow the depth."""

    position_interpolation = "hf"  # an instance has a value of its own when it was changed

    def _fill(self, settings: Mapping[str, object], stages: Mapping[str, Any], rest: dict[str, Any]) -> None:
        problem = rest.get("problem_type")
        if problem is not None and problem not in _PROBLEMS:
            raise ValueError(f"problem_type is {problem!r}; choose one of {', '.join(_PROBLEMS)}")
        rule = rest.pop("position_interpolation", "hf")
        rest.pop("stage_names", None)  # follows from the depth
        asked_attentions = rest.pop("output_attentions", False)
        pruned = rest.pop("pruned_heads", None) or {}
        super().__init__(**rest)
        self.output_attentions = asked_attentions
        for name, value in settings.items():
            setattr(self, name, value)
        self.set_output_features_output_indices(**stages)
        if rule != "hf":
            self.position_interpolation = rule
        if pruned:  # keys of a JSON file are text
            self.pruned_heads = {int(layer): sorted(heads) for layer, heads in pruned.items()}

    def __setattr__(self, name: str, value: object) -> None:
        if name == "position_interpolation" and value not in ("hf", "original"):
            raise ValueError(f"position_interpolation is {value!r}; choose 'hf' or 'original'")
        super().__setattr__(name, value)
        if name == "num_hidden_layers":
            self._follow_depth()

    def _follow_depth(self) -> None:
        before = self.__dict__.get("stage_names")
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]
        if before is None:
            return
        # Whoever chose no stage has the last one, and keeps it when the depth changes.
        if self._out_features == before[-1:] or any(name not in self.stage_names for name in self._out_features):
            self.set_output_features_output_indices(None, None)

    def set_output_features_output_indices(
        self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None
    ) -> None:
        """Chooses stages by name, by index or both; raises `ValueError` when the two disagree."""
        self._out_features, self._out_indices = align_stages(self.stage_names, out_features, out_indices)

    def verify_out_features_out_indices(self) -> None:
        """Raises `ValueError` unless names and indices denote the same stages of this depth."""
        align_stages(self.stage_names, self._out_features, self._out_indices)

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that a backbone gives out; setting them sets the indices."""
        return self._out_features

    @out_features.setter
    def out_features(self, names: Sequence[str] | None) -> None:
        self.set_output_features_output_indices(names, None)

    @property
    def out_indices(self) -> list[int]:
        """Indices of the stages that a backbone gives out; setting them sets the names."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, indices: Sequence[int] | None) -> None:
        self.set_output_features_output_indices(None, indices)

    @property
    def output_attentions(self) -> bool:
        """Whether models return attention maps; whatever kernel computes attention otherwise."""
        return bool(self.__dict__.get("_output_attentions"))

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = bool(value)

    def validate_output_attentions(self) -> None:
        """Nothing to refuse: attention maps are returned under every attention implementation."""

    def __eq__(self, other: object) -> bool:
        """Whether both are of one class and have the same settings, wherever they were read from."""
        if type(self) is not type(other):
            return NotImplemented
        return self._settings() == other._settings()

    def __init_subclass__(cls, **kwargs: object) -> None:
        # Version 5 would make a dataclass of a subclass, whose fields are not our settings.
        for name in ("__init__", "__eq__"):
            if name not in vars(cls):
                setattr(cls, name, getattr(cls, name))
        super().__init_subclass__(**kwargs)

    def _settings(self) -> dict[str, object]:
        return {name: value for name, value in self.to_dict().items() if name not in _PROVENANCE}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a callable activation goes by its name."""
        activation = self.hidden_act
        plain = super().to_dict()
        if not isinstance(activation, str):
            plain["hidden_act"] = getattr(activation, "__name__", type(activation).__name__).lower()
        return plain


class Dinov2Config(_Config):
    """Settings of a DINOv2 model without registers, as `transformers.Dinov2Config`.

    The defaults give a model of the size of [facebook/dinov2-base](https://huggingface.co/facebook/dinov2-base).
    Further keywords become attributes and are written to `config.json`, as in every version.

    Args:
        hidden_size: width D of the tokens.
        mlp_ratio: inner width of the feed-forward network over D; any number.
        hidden_act: name of an activation of transformers (gelu, relu, selu, gelu_new, ...) or a callable.
        hidden_dropout_prob: dropout of the embeddings and of the attention's output, in training.
        image_size: native size in pixels, one number or (height, width); fixes the position grid.
        patch_size: one number or (height, width).
        layerscale_value: starting value of the LayerScale factors.
        drop_path_rate: rate of stochastic depth, the same in every block.
        out_features: stages that `Dinov2Backbone` gives out, by name; or `out_indices`; the last one by default.
        position_interpolation: `hf` resizes position embeddings as the stock class does, `original` as in training.

    Raises:
        ValueError: stages that do not exist, an unknown problem type or interpolation.
    """

    model_type = "dinov2"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4,
        hidden_act: _Activation = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        image_size: _Size = 224,
        patch_size: _Size = 14,
        num_channels: int = 3,
        qkv_bias: bool = True,
        layerscale_value: float = 1.0,
        drop_path_rate: float = 0.0,
        use_swiglu_ffn: bool = False,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        use_mask_token: bool = True,
        **kwargs: Any,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in _NOT_STORED}
        self._fill(settings, {"out_features": out_features, "out_indices": out_indices}, kwargs)


class Dinov2WithRegistersConfig(_Config):
    """Settings of a DINOv2 model with registers, as `transformers.Dinov2WithRegistersConfig`.

    As `Dinov2Config`, with `num_register_tokens`; the default `patch_size` is 16 here, though the released models, as
    [facebook/dinov2-with-registers-base](https://huggingface.co/facebook/dinov2-with-registers-base), have 14. There is
    always a mask token.
    """

    model_type = "dinov2_with_registers"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4,
        hidden_act: _Activation = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        image_size: _Size = 224,
        patch_size: _Size = 16,
        num_channels: int = 3,
        qkv_bias: bool = True,
        layerscale_value: float = 1.0,
        drop_path_rate: float = 0.0,
        use_swiglu_ffn: bool = False,
        num_register_tokens: int = 4,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        **kwargs: Any,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in _NOT_STORED}
        self._fill(settings, {"out_features": out_features, "out_indices": out_indices}, kwargs)


Config = Dinov2Config | Dinov2WithRegistersConfig
"""The settings that modules are built from."""


def align_stages(
    names: Sequence[str],
    out_features: Sequence[str] | None,
    out_indices: Sequence[int] | None,
) -> tuple[list[str], list[int]]:
    """Both spellings of the chosen stages of `names`: what is not given follows from the other, nothing is the last.

    Negative indices stay as they are given. Raises `ValueError` for stages that do not exist, are named twice, out of
    order, or differently in the two spellings.
    """
    if out_indices is None:
        features = [names[-1]] if out_features is None else _check_names(names, out_features)
        return features, [names.index(name) for name in features]
    indices = _check_indices(names, out_indices)
    if out_features is None:
        return [names[index] for index in indices], indices
    features = _check_names(names, out_features)
    if len(features) != len(indices):
        raise ValueError(
            f"out_features and out_indices should have the same length, got {len(features)} and {len(indices)}; "
            "give one of them, the other follows"
        )
    if features != [names[index] for index in indices]:
        raise ValueError(
            f"out_features {features} and out_indices {indices} should correspond to the same stages; give one of "
            "them, the other follows"
        )
    return features, indices


def _check_names(names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    if isinstance(chosen, str) or not isinstance(chosen, (list, tuple)):
        raise ValueError(f'out_features must be a list such as ["stage1"], got {chosen!r}')
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(f"out_features must be a subset of stage_names, {unknown} are not among {list(names)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"out_features must not contain any duplicates, got {list(chosen)}")
    in_order = [name for name in names if name in chosen]
    if list(chosen) != in_order:
        raise ValueError(
            f"out_features must be in the same order as stage_names, expected {in_order} got {list(chosen)}"
        )
    return list(chosen)


def _check_indices(names: Sequence[str], chosen: Sequence[int]) -> list[int]:
    if not isinstance(chosen, (list, tuple)):
        raise ValueError(f"out_indices must be a list such as [-1], got {chosen!r}")
    n_stages = len(names)
    beyond = [index for index in chosen if not -n_stages <= index < n_stages]
    if beyond:
        raise ValueError(
            f"out_indices must be valid indices for stage_names, {beyond} are not among the {n_stages} stages "
            f"{list(names)}"
        )
    places = [index % n_stages for index in chosen]
    if len(set(places)) < len(places):
        raise ValueError(f"out_indices must not contain any duplicates, got {list(chosen)}, which are {places}")
    if places != sorted(places):
        in_order = [index for _, index in sorted(zip(places, chosen, strict=True))]
        raise ValueError(
            f"out_indices must be in the same order as stage_names, expected {in_order} got {list(chosen)}"
        )
    return list(chosen)
