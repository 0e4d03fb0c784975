"""Transformers' DINOv2 classes, as a drop-in: the same names, arguments, outputs and checkpoints, computed here.

Change `from transformers import ...` to `from dinov2.hf import ...`, or call `dinov2.hf.register()` once. Needs
`pip install 'transformers>=4.56'`; everything else of this package works without it.
"""

from dinov2.errors import MissingDependency

try:
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise MissingDependency("transformers>=4.56", "dinov2.hf") from _error

from dinov2.hf.auto import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
    register,
)
from dinov2.hf.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2.hf.encoder import (
    Dinov2Embeddings,
    Dinov2Encoder,
    Dinov2PatchEmbeddings,
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersEncoder,
    Dinov2WithRegistersPatchEmbeddings,
)
from dinov2.hf.layers import (
    Dinov2Attention,
    Dinov2DropPath,
    Dinov2Layer,
    Dinov2LayerScale,
    Dinov2MLP,
    Dinov2SelfAttention,
    Dinov2SelfOutput,
    Dinov2SwiGLUFFN,
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersDropPath,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersLayerScale,
    Dinov2WithRegistersMLP,
    Dinov2WithRegistersSelfAttention,
    Dinov2WithRegistersSelfOutput,
    Dinov2WithRegistersSwiGLUFFN,
)
from dinov2.hf.models import (
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)
from dinov2.hf.pretrained import Dinov2PreTrainedModel, Dinov2WithRegistersPreTrainedModel
from dinov2.hf.processing import BitImageProcessor, BitImageProcessorFast, BitImageProcessorPil
from dinov2.layers.drop_path import drop_path

__all__ = [
    "AutoBackbone",
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForImageClassification",
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitImageProcessorPil",
    "Dinov2Attention",
    "Dinov2Backbone",
    "Dinov2Config",
    "Dinov2DropPath",
    "Dinov2Embeddings",
    "Dinov2Encoder",
    "Dinov2ForImageClassification",
    "Dinov2Layer",
    "Dinov2LayerScale",
    "Dinov2MLP",
    "Dinov2Model",
    "Dinov2PatchEmbeddings",
    "Dinov2PreTrainedModel",
    "Dinov2SelfAttention",
    "Dinov2SelfOutput",
    "Dinov2SwiGLUFFN",
    "Dinov2WithRegistersAttention",
    "Dinov2WithRegistersBackbone",
    "Dinov2WithRegistersConfig",
    "Dinov2WithRegistersDropPath",
    "Dinov2WithRegistersEmbeddings",
    "Dinov2WithRegistersEncoder",
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersLayer",
    "Dinov2WithRegistersLayerScale",
    "Dinov2WithRegistersMLP",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersPatchEmbeddings",
    "Dinov2WithRegistersPreTrainedModel",
    "Dinov2WithRegistersSelfAttention",
    "Dinov2WithRegistersSelfOutput",
    "Dinov2WithRegistersSwiGLUFFN",
    "drop_path",
    "pipeline",
    "register",
]
