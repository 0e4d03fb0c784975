"""Names of the release that are here take its arguments, or say what to use where a use of them is gone."""

import inspect
import logging
import pickle
import warnings
from functools import reduce
from importlib import import_module

import pytest
import torch
from PIL import Image
from torchvision import transforms

from dinov2.data import DataAugmentationDINO
from dinov2.eval.log_regression import LogRegModule, fit_path
from dinov2.logging import setup_logging
from dinov2.train import SSLMetaArch
from tests.train.tiny_run import tiny_config

# Module, then name: the release's arguments in order; behind `*` by keyword only.
ARGUMENTS = {
    "dinov2.configs": {"load_config": "config_name", "load_and_merge_config": "config_name"},
    "dinov2.data": {
        "make_dataset": "* dataset_str transform target_transform",
        "make_data_loader": "* dataset batch_size num_workers shuffle seed sampler_type sampler_size sampler_advance "
        "drop_last persistent_workers collate_fn",
        "collate_data_and_cast": "samples_list mask_ratio_tuple mask_probability dtype n_tokens mask_generator",
        "MaskingGenerator": "input_size num_masking_patches min_num_patches max_num_patches min_aspect max_aspect",
        "MaskingGenerator.__call__": "self num_masking_patches",
        "DataAugmentationDINO": "global_crops_scale local_crops_scale local_crops_number global_crops_size "
        "local_crops_size",
        "DatasetWithEnumeratedTargets": "dataset",
    },
    "dinov2.data.datasets": {
        "ImageNet": "* split root extra transforms transform target_transform",
        "ImageNet22k": "* root extra transforms transform target_transform mmap_cache_size",
    },
    "dinov2.data.samplers": {
        "EpochSampler": "* size sample_count shuffle seed start step",
        "InfiniteSampler": "* sample_count shuffle seed start step advance",
        "ShardedInfiniteSampler": "* sample_count shuffle seed start step advance use_new_shuffle_tensor_slice",
    },
    "dinov2.data.transforms": {
        "GaussianBlur": "* p radius_min radius_max",
        "make_normalize_transform": "mean std",
        "make_classification_train_transform": "* crop_size interpolation hflip_prob mean std",
        "make_classification_eval_transform": "* resize_size interpolation crop_size mean std",
    },
    "dinov2.distributed": {"enable": "* set_cuda_current_device overwrite allow_nccl_timeout"},
    "dinov2.eval.knn": {"KnnModule": "train_features train_labels nb_knn T device num_classes"},
    "dinov2.eval.linear": {
        "create_linear_input": "x_tokens_list use_n_blocks use_avgpool",
        "LinearClassifier": "out_dim use_n_blocks use_avgpool num_classes",
        "LinearPostprocessor": "linear_classifier class_mapping",
        "scale_lr": "learning_rates batch_size",
    },
    "dinov2.eval.log_regression": {
        "LogRegModule": "C max_iter dtype device",
        "LogRegModule.forward": "self samples targets",
        "LogRegModule.fit": "self train_features train_labels",
        "train_for_C": "* C max_iter train_features train_labels dtype device",
    },
    "dinov2.layers.drop_path": {"drop_path": "x drop_prob training", "DropPath": "drop_prob"},
    "dinov2.layers": {"DINOHead": "in_dim out_dim use_bn nlayers hidden_dim bottleneck_dim mlp_bias"},
    "dinov2.logging": {"setup_logging": "output * name level capture_warnings"},
    "dinov2.loss": {
        "DINOLoss": "out_dim student_temp center_momentum",
        "DINOLoss.softmax_center_teacher": "self teacher_output teacher_temp",
        "DINOLoss.sinkhorn_knopp_teacher": "self teacher_output teacher_temp n_iterations",
        "DINOLoss.forward": "self student_output_list teacher_out_softmaxed_centered_list",
        "DINOLoss.update_center": "self teacher_output",
        "DINOLoss.reduce_center_update": "self teacher_output",
        "iBOTPatchLoss": "patch_out_dim student_temp center_momentum",
        "iBOTPatchLoss.softmax_center_teacher": "self teacher_patch_tokens teacher_temp",
        "iBOTPatchLoss.sinkhorn_knopp_teacher": "self teacher_output teacher_temp n_masked_patches_tensor n_iterations",
        "iBOTPatchLoss.forward": "self student_patch_tokens teacher_patch_tokens student_masks_flat",
        "iBOTPatchLoss.forward_masked": "self student_patch_tokens_masked teacher_patch_tokens_masked "
        "student_masks_flat n_masked_patches masks_weight",
        "iBOTPatchLoss.update_center": "self teacher_patch_tokens",
        "iBOTPatchLoss.reduce_center_update": "self teacher_patch_tokens",
        "KoLeoLoss.forward": "self student_output eps",
        "KoLeoLoss.pairwise_NNs_inner": "self x",
    },
    "dinov2.models": {"build_model": "args only_teacher img_size", "build_model_from_cfg": "cfg only_teacher"},
    "dinov2.models.vision_transformer": {
        "vit_small": "patch_size num_register_tokens",
        "DinoVisionTransformer.forward_features": "self x masks",
        "DinoVisionTransformer.prepare_tokens_with_masks": "self x masks",
        "DinoVisionTransformer.get_intermediate_layers": "self x n reshape return_class_token norm",
    },
    "dinov2.train": {
        "get_args_parser": "add_help",
        "main": "args",
        "SSLMetaArch": "cfg",
    },
    "dinov2.utils.utils": {
        "CosineScheduler": "base_value final_value total_iters warmup_iters start_warmup_value freeze_iters"
    },
    "dinov2.utils.param_groups": {"fuse_params_groups": "all_params_groups keys"},
    **{
        f"dinov2.{module}": {"get_args_parser": "description parents add_help"}
        for module in ("eval.knn", "eval.linear", "eval.log_regression", "eval.setup", "run.submit")
    },
}


@pytest.mark.filterwarnings("ignore:dinov2.(utils|data):DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in ARGUMENTS.items() for name in names])
def test_the_release_s_arguments_are_taken_in_their_order(module: str, name: str) -> None:
    signature = inspect.signature(reduce(getattr, name.split("."), import_module(module)))
    positional, _, by_keyword = ARGUMENTS[module][name].partition("*")
    words = [*positional.split(), *by_keyword.split()]
    signature.bind(**dict.fromkeys(words))
    bound = signature.bind(*positional.split(), **dict.fromkeys(by_keyword.split()))
    assert [bound.arguments[word] for word in positional.split()] == positional.split()


@pytest.mark.parametrize("module", ["eval.knn", "eval.linear", "eval.log_regression", "eval.setup", "run.submit"])
def test_a_parser_takes_none_for_no_parents(module: str) -> None:
    assert import_module(f"dinov2.{module}").get_args_parser(parents=None, add_help=False).parse_args([])


@pytest.mark.parametrize(
    "name",
    "forward_backward backprop_loss prepare_for_distributed_training fsdp_synchronize_streams get_params_groups "
    "get_maybe_fused_params_for_submodel cfg do_ibot".split(),
)
def test_a_method_of_the_release_s_meta_architecture_says_what_to_use(name: str) -> None:
    with torch.device("meta"):
        ssl = SSLMetaArch(tiny_config())
    with pytest.raises(AttributeError, match=rf"SSLMetaArch\.{name} is not in this package: ..."):
        getattr(ssl, name)
    assert not hasattr(ssl, name) and not hasattr(ssl, "no_such_name")


def test_logistic_regression_for_one_c_is_made_fitted_and_called_as_in_the_release() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    module = LogRegModule(0.3, max_iter=200, dtype=torch.float64, device="cpu")
    module.fit(features, labels)
    found = module(features, labels)
    (fit,) = fit_path(features, labels, n_classes=3, Cs=[0.3], max_iter=200, dtype=torch.float64)
    assert torch.equal(found["preds"], fit.scores(features).softmax(dim=1)) and found["target"] is labels


def test_the_steps_of_the_augmentation_are_replaced_under_the_release_s_names() -> None:
    class Own(DataAugmentationDINO):
        def __init__(self) -> None:
            super().__init__((0.3, 1.0), (0.1, 0.3), 2, global_crops_size=16, local_crops_size=8)
            self.geometric_augmentation_global = transforms.Resize((16, 16))
            self.geometric_augmentation_local = transforms.Resize((8, 8))
            self.global_transfo1 = self.global_transfo2 = transforms.Compose([transforms.ToTensor(), self.normalize])
            self.local_transfo = transforms.ToTensor()

    crops = Own()(Image.new("RGB", (40, 30), (255, 0, 0)))
    assert all(
        torch.equal(crop, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8)) for crop in crops["local_crops"]
    )
    assert crops["global_crops"][0].shape == (3, 16, 16) and len(crops["local_crops"]) == 2
    assert torch.equal(*crops["global_crops"])  # nothing is drawn any more
    assert crops["global_crops"][0][0, 0, 0] == pytest.approx((1 - 0.485) / 0.229)


def test_an_augmentation_travels_to_a_worker_and_follows_its_settings() -> None:
    augment = pickle.loads(pickle.dumps(DataAugmentationDINO((0.3, 1.0), (0.1, 0.3), 1, 16, 8)))
    augment.local_crops_size = 4
    crops = augment(Image.new("RGB", (40, 30)))
    assert crops["global_crops"][0].shape == (3, 16, 16) and crops["local_crops"][0].shape == (3, 4, 4)


def test_captured_warnings_reach_the_log(tmp_path, request: pytest.FixtureRequest) -> None:
    name, python_warnings = request.node.name, logging.getLogger("py.warnings")
    before = list(python_warnings.handlers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            setup_logging(tmp_path / "first", name=name, capture_warnings=True)
            setup_logging(tmp_path / "second", name=name, capture_warnings=True)
            warnings.warn("odd pixels", stacklevel=1)
    finally:
        logging.captureWarnings(False)
        setup_logging(name=name)
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
    assert "odd pixels" in (tmp_path / "second" / "logs" / "log.txt").read_text()
    assert (tmp_path / "first" / "logs" / "log.txt").read_text() == ""
    assert python_warnings.handlers == before
