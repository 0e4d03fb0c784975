"""Import paths of the public release that live elsewhere here, as a table and an import hook.

A name with a drop-in successor resolves to it with one DeprecationWarning. A name whose successor takes other arguments
or returns something else is an ImportError that says what to use: a wrong call later would be harder to understand. The
same goes for modules that this package does not have at all, and for names that a module of the release has and ours
has not. What exists for real always wins over the table.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import NamedTuple

__all__ = ["GONE", "LACKING", "MOVED", "REMOVED_IN", "Instead", "install", "successor"]

REMOVED_IN = "2.0"
"""The version that no longer knows the old paths."""


class Instead(NamedTuple):
    """No drop-in successor: `advice` completes "<old path> is not in this package: ..."."""

    advice: str


_LOAD_CONFIG = Instead("dinov2.configs.load_config(file, overrides) returns the checked configuration")
_WRAPPING = Instead("models are plain modules here; dinov2.engine.parallel chooses device and precision")
_CLUSTER = Instead("no site is known here; give partition and output folder to dinov2/run/submit.py")
_FIGURES = Instead("top_k_accuracy, mean_per_class_accuracy and real_accuracy of dinov2.eval.metrics are functions")
_METERS = Instead("dinov2.engine.metrics.MetricsWriter writes figures and dinov2.engine.progress.Progress shows them")
_DECODERS = Instead("dinov2.data.decoding.decode_rgb(data) turns the bytes of a file into an RGB image")

_TRANSFORMS = (
    "IMAGENET_DEFAULT_MEAN",
    "IMAGENET_DEFAULT_STD",
    "MaybeToTensor",
    "make_classification_eval_transform",
    "make_classification_train_transform",
    "make_normalize_transform",
)

# Old module -> old name -> "module:name" of the successor, or Instead. An empty row is a package of old modules.
MOVED: Mapping[str, Mapping[str, str | Instead]] = {
    "dinov2.utils": {},
    "dinov2.utils.config": {
        "apply_scaling_rules_to_cfg": Instead(
            "dinov2.engine.schedules.scaled_lr(cfg.optim, global_batch) returns the rate, and nothing is written back"
        ),
        "default_setup": _LOAD_CONFIG,
        "get_cfg_from_args": _LOAD_CONFIG,
        "setup": _LOAD_CONFIG,
        "write_config": Instead("dinov2.configs.to_yaml(cfg) returns the text of the file"),
    },
    "dinov2.utils.utils": {
        "CosineScheduler": "dinov2.engine.schedules:CosineScheduler",
        "fix_random_seeds": Instead("train.seed seeds a run; elsewhere torch.manual_seed(seed) does"),
        "get_sha": Instead("dinov2.eval.result.environment() returns the versions that a figure came from"),
        "has_batchnorms": Instead("look for torch.nn.BatchNorm1d, 2d and 3d in model.modules(); no model here has any"),
        "load_pretrained_weights": Instead("dinov2.checkpoints.open loads strictly and reports what did not fit"),
    },
    "dinov2.utils.param_groups": {
        "fuse_params_groups": "dinov2.engine.optim:fuse_groups",
        "get_params_groups_with_decay": Instead(
            "dinov2.engine.optim.param_groups(module, layerwise_decay=..., patch_embed_lr_mult=..., n_blocks=...) "
            "returns the groups"
        ),
        "get_vit_lr_decay_rate": Instead("dinov2.engine.optim.param_groups computes the rates with the groups"),
    },
    "dinov2.utils.dtype": {
        "TypeSpec": Instead("torch.dtype is the type of number formats"),
        "as_torch_dtype": Instead("write torch.float16, torch.bfloat16 or torch.float32"),
    },
    "dinov2.utils.cluster": {
        "ClusterType": _CLUSTER,
        "get_checkpoint_path": _CLUSTER,
        "get_cluster_type": _CLUSTER,
        "get_slurm_executor_parameters": _CLUSTER,
        "get_slurm_partition": _CLUSTER,
        "get_user_checkpoint_path": _CLUSTER,
    },
    "dinov2.fsdp": {
        "FSDPCheckpointer": Instead("dinov2.engine.checkpoint.CheckpointStore saves and loads a run"),
        "ShardedGradScaler": Instead("dinov2.engine.optim.LossScaler scales the loss"),
        "free_if_fsdp": _WRAPPING,
        "get_fsdp_modules": _WRAPPING,
        "get_fsdp_wrapper": _WRAPPING,
        "is_fsdp": _WRAPPING,
        "is_sharded_fsdp": _WRAPPING,
        "rankstr": _WRAPPING,
        "reshard_fsdp_model": _WRAPPING,
    },
    "dinov2.loss.dino_clstoken_loss": {"DINOLoss": "dinov2.loss.release:DINOLoss"},
    "dinov2.loss.ibot_patch_loss": {
        "iBOTPatchLoss": "dinov2.loss.release:iBOTPatchLoss",
        "lossfunc": Instead(
            "dinov2.loss.cross_entropy.log_softmax_cross_entropy(scores, assignments, temperature) returns the "
            "cross-entropy of each row"
        ),
    },
    "dinov2.loss.koleo_loss": {"KoLeoLoss": "dinov2.loss.release:KoLeoLoss"},
    "dinov2.logging.helpers": {"MetricLogger": _METERS, "SmoothedValue": _METERS},
    "dinov2.data.adapters": {"DatasetWithEnumeratedTargets": "dinov2.data.release:DatasetWithEnumeratedTargets"},
    "dinov2.data.augmentations": {"DataAugmentationDINO": "dinov2.data.release:DataAugmentationDINO"},
    "dinov2.data.collate": {"collate_data_and_cast": "dinov2.data.release:collate_data_and_cast"},
    "dinov2.data.masking": {"MaskingGenerator": "dinov2.data.crops.masking:MaskingGenerator"},
    "dinov2.data.samplers": {
        name: f"dinov2.data.release:{name}" for name in ("EpochSampler", "InfiniteSampler", "ShardedInfiniteSampler")
    },
    "dinov2.data.transforms": {
        "GaussianBlur": "dinov2.data.release:GaussianBlur",
        **{name: f"dinov2.data.eval_transform:{name}" for name in _TRANSFORMS},
    },
    "dinov2.data.datasets.image_net_22k": {"ImageNet22k": "dinov2.data.datasets.image_net:ImageNet22k"},
    "dinov2.data.datasets.decoders": {
        "Decoder": _DECODERS,
        "ImageDataDecoder": _DECODERS,
        "TargetDecoder": Instead("get_target of a data set returns the label itself"),
    },
    "dinov2.data.datasets.extended": {
        "ExtendedVisionDataset": Instead("a data set of your own extends dinov2.data.datasets.base.EncodedDataset"),
    },
    "dinov2.hub.utils": {
        "CenterPadding": Instead("dinov2.data.eval_transform.pad_to_multiple(images, patch_size) is a function"),
        "_DINOV2_BASE_URL": "dinov2.models.releases:BASE_URL",
        "_make_dinov2_model_name": Instead("dinov2.models.releases.release(name) has name and url of every file"),
    },
    "dinov2.eval.utils": {
        "ModelWithIntermediateLayers": Instead(
            "model.get_intermediate_layers(images, n, return_class_token=True) returns the same tensors"
        ),
        "ModelWithNormalize": Instead("torch.nn.functional.normalize(model(images), dim=1) is the same"),
        "all_gather_and_flatten": Instead("dinov2.distributed.all_gather_rows(rows) joins the rows of all processes"),
        "evaluate": _FIGURES,
        "extract_features": Instead("dinov2.encode.stream.extract_features(model, dataset) returns Features"),
        "extract_features_with_dataloader": Instead("dinov2.encode.stream.extract_features takes the data set"),
    },
}
"""Modules of the release of which this package has the content, or an answer, elsewhere."""

_DENSE = (
    "depth and segmentation are not in this version; a head of your own can start from the patch features of "
    "model.get_intermediate_layers(images, n, reshape=True)"
)
_DINOTXT = "the text models of dino.txt are not in this version"

GONE: Mapping[str, str] = {
    "dinov2.eval.depth": _DENSE,
    "dinov2.eval.segmentation": _DENSE,
    "dinov2.eval.segmentation_m2f": _DENSE,
    "dinov2.hub.depth": _DENSE,
    "dinov2.hub.depthers": _DENSE,
    "dinov2.hub.dinotxt": _DINOTXT,
    "dinov2.hub.text": _DINOTXT,
    "dinov2.thirdparty": _DINOTXT,
    "dinov2.utils.checkpoint": "dinov2.engine.checkpoint.CheckpointStore saves and loads a run",
}
"""Modules of the release that do not import here, each with what to use; what lies below them is gone with them."""

_XFORMERS = Instead("attention is torch.nn.functional.scaled_dot_product_attention, and xFormers is not asked for")
_CAUSAL = Instead(
    "only the text model of dino.txt has such blocks; torch.nn.functional.scaled_dot_product_attention(..., "
    "is_causal=True) attends to what came before"
)
_ALIGNED = Instead("dinov2.layers.SwiGLUFFN computes the same with w1 and w2 in one layer, w12")
_JOB = Instead("dinov2.run.submit.run_here(run, arguments) runs a job in this process")
_LINEAR = Instead(
    "dinov2.eval.linear.evaluate_linear(train, val) takes the Features of both sets and returns the figures"
)
_UNWRAP = Instead("a module in torch.nn.parallel.DistributedDataParallel is its attribute module")
_LOG_REGRESSION = Instead(
    "dinov2.eval.log_regression.evaluate_log_regression(train, val) chooses C, fits and returns the figures"
)
_LOADED = Instead("dinov2.load(weights) returns the backbone in evaluation mode, its transform and its precision")
_KNN = Instead("dinov2.eval.knn.evaluate_knn(train, val) takes the Features of both sets and returns the figures")
_RESIDUAL = Instead("dinov2.layers.drop_path.residual_on_subset adds a branch to a part of the batch")
_PACKED = Instead(
    "dinov2.layers.packing.pack puts crops of different sizes into one sequence, and unpack takes them out"
)

LACKING: Mapping[str, Mapping[str, str | Instead]] = {
    "dinov2.data.loaders": {
        "SamplerType": "dinov2.data.release:SamplerType",
        "make_data_loader": "dinov2.data.release:make_data_loader",
    },
    "dinov2.eval.knn": {
        "DictKeysModule": _KNN,
        "ModuleDictWithForward": _KNN,
        "create_class_indices_mapping": _KNN,
        "create_module_dict": _KNN,
        "eval_knn": _KNN,
        "eval_knn_with_model": _KNN,
        "filter_train": _KNN,
        "main": Instead("dinov2.run.eval.knn.main() parses the command line and evaluates"),
    },
    "dinov2.eval.linear": {
        "AllClassifiers": Instead("dinov2.eval.linear.LinearHeads holds and trains all heads of a grid"),
        "eval_linear": _LINEAR,
        "evaluate_linear_classifiers": _LINEAR,
        "has_ddp_wrapper": _UNWRAP,
        "main": Instead("dinov2.run.eval.linear.main() parses the command line and evaluates"),
        "make_eval_data_loader": Instead(
            "dinov2.data.make_data_loader(..., sampler_type=None, drop_last=False) makes one"
        ),
        "remove_ddp_wrapper": _UNWRAP,
        "run_eval_linear": _LINEAR,
        "setup_linear_classifiers": Instead(
            "dinov2.eval.linear.head_table(settings, columns) lists the heads of a grid"
        ),
        "test_on_datasets": _LINEAR,
    },
    "dinov2.eval.log_regression": {
        "C_POWER_RANGE": Instead("dinov2.eval.log_regression.C_GRID holds the values of C, 10 to these powers"),
        "eval_log_regression": _LOG_REGRESSION,
        "eval_log_regression_with_model": _LOG_REGRESSION,
        "evaluate_model": _LOG_REGRESSION,
        "main": Instead("dinov2.run.eval.log_regression.main() parses the command line and evaluates"),
        "sweep_C_values": _LOG_REGRESSION,
        "train_and_evaluate": _LOG_REGRESSION,
    },
    "dinov2.eval.metrics": {
        "AccuracyAveraging": _FIGURES,
        "ImageNetReaLAccuracy": _FIGURES,
        "MetricType": _FIGURES,
        "build_metric": _FIGURES,
        "build_topk_accuracy_metric": _FIGURES,
        "build_topk_imagenet_real_accuracy_metric": _FIGURES,
    },
    "dinov2.eval.setup": {
        "build_model_for_eval": _LOADED,
        "get_autocast_dtype": Instead(
            "dinov2.engine.parallel.choose_precision(name, device) returns the type, or None"
        ),
        "setup_and_build_model": _LOADED,
    },
    "dinov2.layers": {"CausalAttentionBlock": _CAUSAL, "SwiGLUFFNAligned": _ALIGNED},
    "dinov2.layers.attention": {"XFORMERS_AVAILABLE": _XFORMERS, "XFORMERS_ENABLED": _XFORMERS},
    "dinov2.layers.block": {
        "CausalAttentionBlock": _CAUSAL,
        "XFORMERS_AVAILABLE": _XFORMERS,
        "XFORMERS_ENABLED": _XFORMERS,
        "add_residual": _RESIDUAL,
        "attn_bias_cache": _PACKED,
        "drop_add_residual_stochastic_depth": _RESIDUAL,
        "drop_add_residual_stochastic_depth_list": _RESIDUAL,
        "get_attn_bias_and_cat": _PACKED,
        "get_branges_scales": Instead("dinov2.layers.drop_path.draw_batch_subset draws the images and their scale"),
    },
    "dinov2.layers.swiglu_ffn": {
        "SwiGLU": "dinov2.layers.swiglu_ffn:SwiGLUFFN",
        "SwiGLUFFNAligned": _ALIGNED,
        "XFORMERS_AVAILABLE": _XFORMERS,
        "XFORMERS_ENABLED": _XFORMERS,
    },
    "dinov2.logging": {"MetricLogger": _METERS, "SmoothedValue": _METERS},
    "dinov2.models": {"vits": "dinov2.models:vision_transformer"},
    "dinov2.models.vision_transformer": {
        "init_weights_vit_timm": Instead("model.init_weights() draws all parameters anew"),
        "named_apply": Instead("model.named_modules() goes through all modules with their names"),
    },
    "dinov2.run.eval.knn": {"Evaluator": _JOB},
    "dinov2.run.eval.linear": {"Evaluator": _JOB},
    "dinov2.run.eval.log_regression": {"Evaluator": _JOB},
    "dinov2.run.submit": {
        "get_shared_folder": _CLUSTER,
        "submit_jobs": _JOB,
    },
    "dinov2.run.train.train": {"Trainer": _JOB},
    "dinov2.train.train": {
        "apply_optim_scheduler": Instead("dinov2.engine.optim.apply_hyper(optimizer, schedules.at(step)) does it"),
        "build_optimizer": Instead("dinov2.engine.optim.build_optimizer(student_parts, cfg.optim) returns AdamW"),
        "build_schedulers": Instead("dinov2.engine.schedules.Schedules holds the schedules of a training"),
        "do_test": Instead("dinov2.train.train.export_latest(cfg, output_dir) writes the teacher's weights"),
        "do_train": Instead("dinov2.train.train.train(cfg, output_dir) trains, or goes on where a run stopped"),
    },
}
"""Names of the release that are missing in modules which exist here, each with its successor or what to use."""


def successor(module: str, name: str) -> str | Instead | None:
    """The answer to a name of the release: "module:name", `Instead`, or None for a name that is here itself."""
    for gone, advice in GONE.items():
        if f"{module}.".startswith(f"{gone}."):
            return Instead(advice)
    return MOVED.get(module, LACKING.get(module, {})).get(name)


_PARENTS = {name.rpartition(".")[0] for name in (*MOVED, *GONE)}


def install() -> None:
    """Make the old paths importable; called once by `dinov2/__init__.py`, a second call changes nothing."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        # First, because the plain module `dinov2.logging` is to be found as a parent of `dinov2.logging.helpers`.
        sys.meta_path.insert(0, _OldPaths())


class _OldPaths(MetaPathFinder):
    """Finds the modules of the table, unless they exist for real."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(fullname in names for names in (MOVED, GONE, LACKING, _PARENTS)):
            return None
        real = PathFinder.find_spec(fullname, path, target)
        if real is not None and real.origin is not None:  # without an origin it is a left-over, empty folder
            if fullname in LACKING and type(real.loader) is SourceFileLoader:
                real.loader = _RealModule(fullname, real.origin)
            if fullname in _PARENTS and real.submodule_search_locations is None:
                # Python looks below a module only if it has a search path, be it an empty one.
                real.submodule_search_locations = []
            return real
        if fullname in GONE:
            raise ModuleNotFoundError(f"{fullname} is not in this package: {GONE[fullname]}", name=fullname)
        if fullname in MOVED:
            return ModuleSpec(fullname, _OldModule(), is_package=fullname in _PARENTS)
        return None


class _OldModule(Loader):
    """Makes a module without content, whose names are looked up in the table when they are asked for."""

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"Old import path of the public release, until version {REMOVED_IN}."
        module.__getattr__ = _lookup(module, MOVED[module.__name__])  # type: ignore[method-assign]
        module.__dir__ = lambda: sorted(MOVED[module.__name__])  # type: ignore[method-assign]


class _RealModule(SourceFileLoader):
    """Loads a module as ever; names that it has not are looked up in the table when they are asked for."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.__getattr__ = _lookup(module, LACKING[module.__name__])  # type: ignore[method-assign]


def _lookup(module: ModuleType, names: Mapping[str, str | Instead]) -> Callable[[str], object]:
    def look_up(name: str) -> object:
        entry, old = names.get(name), f"{module.__name__}.{name}"
        if entry is None:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}", name=name, obj=module)
        if isinstance(entry, Instead):
            raise ImportError(f"{old} is not in this package: {entry.advice}", name=module.__name__)
        new_module, _, new_name = entry.partition(":")
        successor = getattr(importlib.import_module(new_module), new_name)
        warnings.warn(
            f"{old} is now {new_module}.{new_name}; the old path goes with version {REMOVED_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        setattr(module, name, successor)  # so that it is warned of once
        return successor

    return look_up
