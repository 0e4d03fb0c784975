"""The config tree: frozen, documented, and refusing what cannot work with a sentence that shows the way out."""

import dataclasses
from typing import get_args

import pytest

from dinov2.configs import Config, describe, dinov2_default_config, load_config
from dinov2.configs.run_sections import CropsConfig, OptimConfig, ScalingRule, TrainPrecision
from dinov2.engine.parallel import PRECISIONS
from dinov2.engine.schedules import SCALING_RULES
from dinov2.errors import ConfigError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_the_default_is_a_value_that_never_changes() -> None:
    assert dinov2_default_config == Config()
    assert hash(dinov2_default_config) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        dinov2_default_config.optim.epochs = 3  # type: ignore[misc]


def test_each_key_is_described_with_type_default_and_one_sentence() -> None:
    rows = {row.key: row for row in describe()}
    assert rows["optim.epochs"][1:3] == ("whole number", 100)
    assert rows["student.depth"][1:3] == ("whole number or null", None)
    assert rows["train.centering"].type == "centering or sinkhorn_knopp"
    assert rows["crops.blur_p"][1:3] == ("list of 3 numbers", (0.0, 0.9, 0.5))
    assert rows["crops.mean"].type == "list of numbers"
    # A parent's default wins over the section's own: only the student's heads sum gradients in full precision.
    precision = "compute_precision.{}.mixed_precision.reduce_dtype"
    assert rows[precision.format("student.dino_head")].default == "fp32"
    assert rows[precision.format("teacher.dino_head")].default == "fp16"
    for row in rows.values():
        assert row.sentence.endswith("."), row.key
        assert row.sentence[0].isupper() or row.sentence.startswith("AdamW"), row.key


def test_the_description_tells_the_release_keys_from_the_new_ones() -> None:
    added = {row.key for row in describe() if not row.is_release_key}
    assert {"train.log_every", "student.in_chans", "crops.blur_p", "evaluation.knn_k"} <= added
    assert not {"train.saveckp_freq", "MODEL.WEIGHTS", "optim.lr"} & added


@pytest.mark.parametrize(
    ("override", "key", "way_out"),
    [
        ("train.batch_size_per_gpu=0", "train.batch_size_per_gpu", "1 or more"),
        ("train.seed=-1", "train.seed", "from 0"),
        ("train.device=gpu", "train.device", "cuda:<number>"),
        ("train.precision=half", "train.precision", "bf16"),
        ("train.centering=sinkhorn", "train.centering", "sinkhorn_knopp"),
        ("train.augmentation_backend=gpu", "train.augmentation_backend", "pil or tensor"),
        ("optim.scaling_rule=linear", "optim.scaling_rule", "linear_wrt_256"),
        ("optim.clip_grad=-1", "optim.clip_grad", "0 for no clipping"),
        ("optim.adamw_beta1=1", "optim.adamw_beta1", "below 1"),
        ("optim.layerwise_decay=1.5", "optim.layerwise_decay", "from 0 to 1"),
        ("optim.layerwise_decay=0", "optim.layerwise_decay", "above 0"),
        ("optim.epochs=5", "optim.warmup_epochs", "at most 5"),
        ("optim.freeze_last_layer_epochs=101", "optim.freeze_last_layer_epochs", "at most 100"),
        ("train.num_workers=99999999999", "train.num_workers", "1024 or less"),
        ("train.num_threads=2000", "train.num_threads", "1024 or less"),
        ("student.depth=999999999", "student.depth", "1000 or less"),
        ("student.embed_dim=999999999936", "student.embed_dim", "131072 or less"),
        ("student.mlp_ratio=1e30", "student.mlp_ratio", "1000 or less"),
        ("student.ffn_layer=gated", "student.ffn_layer", "swiglufused"),
        ("student.arch=", "student.arch", "vit_small"),
        ("student.drop_path_rate=1", "student.drop_path_rate", "below 1"),
        ("student.in_chans=1", "crops.mean", "one number"),
        ("teacher.momentum_teacher=1.01", "teacher.momentum_teacher", "from 0 to 1"),
        ("teacher.teacher_temp=0", "teacher.teacher_temp", "above 0"),
        ("ibot.mask_ratio_min_max=[0.5, 0.1]", "ibot.mask_ratio_min_max", "smaller one first"),
        ("ibot.mask_ratio_min_max=[0.1, 1.1]", "ibot.mask_ratio_min_max", "from 0 to 1"),
        ("ibot.mask_sample_probability=2", "ibot.mask_sample_probability", "from 0 to 1"),
        ("crops.global_crops_scale=[0, 1]", "crops.global_crops_scale", "above 0"),
        ("crops.local_crops_number=-1", "crops.local_crops_number", "0 for no local crops"),
        ("crops.blur_p=[0, 0, 2]", "crops.blur_p", "three numbers from 0 to 1"),
        ("crops.grayscale_p=-0.1", "crops.grayscale_p", "from 0 to 1"),
        ("crops.std=[0]", "crops.std", "above 0"),
        ("dino.head_nlayers=0", "dino.head_nlayers", "1 or more"),
        ("ibot.head_n_prototypes=1", "ibot.head_n_prototypes", "2 or more"),
        ("evaluation.knn_k=0", "evaluation.knn_k", "1 or more"),
        ("evaluation.knn_temperature=0", "evaluation.knn_temperature", "above 0"),
        ("evaluation.knn_train_dataset=x", "evaluation.knn_val_dataset", "both data sets"),
        (
            "compute_precision.student.backbone.mixed_precision.param_dtype=fp8",
            "compute_precision.student.backbone.mixed_precision.param_dtype",
            "bf16",
        ),
        ("compute_precision.teacher.ibot_head.sharding_strategy=ALL", "ibot_head.sharding_strategy", "FULL_SHARD"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_a_way_out(override: str, key: str, way_out: str) -> None:
    message = refusal(override)
    assert key in message
    assert way_out in message


def test_the_nearest_crop_sizes_are_named_when_patches_do_not_fit() -> None:
    message = refusal("crops.global_crops_size=230")
    assert message == (
        "crops.global_crops_size is 230, which is not a multiple of student.patch_size = 16; write 224 or 240"
    )
    assert refusal("crops.global_crops_size=8").endswith("write 16")


def test_only_training_asks_for_local_crops_of_whole_patches() -> None:
    cfg = load_config(None, ["student.patch_size=14"])  # as an evaluation's file may leave them
    with pytest.raises(ConfigError, match=r"crops\.local_crops_size is 96, .* student.patch_size = 14; write 84 or 98"):
        cfg.check_training()
    load_config(None, ["student.patch_size=14", "crops.local_crops_number=0"]).check_training()
    load_config(None, ["student.patch_size=14", "crops.local_crops_size=98"]).check_training()


@pytest.mark.parametrize("left", ["dino.loss_weight", "ibot.loss_weight", "dino.koleo_loss_weight"])
def test_any_one_of_the_three_losses_is_enough(left: str) -> None:
    weights = {"dino.loss_weight": 0.0, "ibot.loss_weight": 0.0, "dino.koleo_loss_weight": 0.0, left: 1.0}
    load_config(None, [f"{key}={weight}" for key, weight in weights.items()]).check_training()


def test_more_steps_than_a_schedule_can_hold_are_refused() -> None:
    cfg = load_config(None, ["train.OFFICIAL_EPOCH_LENGTH=999999999999999999999"])
    with pytest.raises(ConfigError, match="100000000 or less"):
        cfg.check_training()


def test_a_run_without_any_loss_is_refused() -> None:
    cfg = load_config(None, ["dino.loss_weight=0", "ibot.loss_weight=0", "dino.koleo_loss_weight=0"])
    with pytest.raises(ConfigError, match="nothing is learned"):
        cfg.check_training()


def test_training_on_a_batch_of_one_is_refused_only_with_koleo() -> None:
    cfg = load_config(None, ["train.batch_size_per_gpu=1"])  # as an evaluation's file may have it
    with pytest.raises(ConfigError, match=r"dino\.koleo_loss_weight=0"):
        cfg.check_training()
    load_config(None, ["train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0"]).check_training()


def test_heads_share_the_width_evenly() -> None:
    assert "write a multiple of 6" in refusal("student.embed_dim=128", "student.num_heads=6")
    load_config(None, ["student.embed_dim=192", "student.num_heads=6"])
    load_config(None, ["student.embed_dim=128"])  # the architecture knows the rest


def test_chunks_divide_a_given_depth() -> None:
    assert "does not divide the 6 blocks" in refusal("student.depth=6", "student.block_chunks=4")
    load_config(None, ["student.depth=6", "student.block_chunks=3"])


def test_images_of_other_channels_take_one_mean_or_one_for_each() -> None:
    for mean in ("[0.5]", "[0.5, 0.4, 0.3, 0.2]"):
        load_config(None, ["student.in_chans=4", f"crops.mean={mean}", "crops.std=[0.2]"])
    assert "2 numbers for student.in_chans = 4" in refusal(
        "student.in_chans=4", "crops.mean=[0.5, 0.5]", "crops.std=[0.2]"
    )


def test_a_run_may_be_all_warm_up() -> None:
    # Warm-up and frozen last layers overlap, so their sum may exceed the run.
    load_config(None, ["optim.epochs=10", "optim.warmup_epochs=10", "optim.freeze_last_layer_epochs=10"])


def test_sections_check_themselves_when_made_in_python() -> None:
    with pytest.raises(ConfigError, match=r"crops\.local_crops_number is -1; write 0 or more"):
        CropsConfig(local_crops_number=-1)
    with pytest.raises(ConfigError, match=r"optim\.base_lr is nan"):
        OptimConfig(base_lr=float("nan"))


def test_the_choices_are_those_that_the_engine_knows() -> None:
    assert set(get_args(ScalingRule)) == set(SCALING_RULES)
    assert set(get_args(TrainPrecision)) - {"auto", "parts"} == set(PRECISIONS)
