"""The table of releases: complete, by the rules of the published addresses, true to the architectures."""

import json
import re
from collections import Counter
from itertools import product

import pytest
import torch

from dinov2.data.eval_transform import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.errors import UnknownRelease
from dinov2.models.config import BackboneConfig
from dinov2.models.releases import BASE_URL, KINDS, METRICS, RELEASES, Release, backbone_config, release
from tests.golden.loading import golden_json

BACKBONES = [row for row in RELEASES if row.kind == "backbone"]


def test_there_are_65_files_of_five_kinds() -> None:
    counts = {"backbone": 8, "classifier": 16, "depth": 24, "segmentation": 16, "mask2former": 1}
    assert Counter(row.kind for row in RELEASES) == counts
    assert list(counts) == list(KINDS) == list(dict.fromkeys(row.kind for row in RELEASES))


def test_addresses_are_exactly_the_published_ones() -> None:
    published = set()
    for size in "sblg":
        folder = f"{BASE_URL}/dinov2_vit{size}14/dinov2_vit{size}14"
        for registers in ("", "_reg4"):
            published |= {f"{folder}{registers}_{file}.pth" for file in ("pretrain", "linear_head", "linear4_head")}
        for data, head in product(("nyu", "kitti"), ("linear", "linear4", "dpt")):
            published.add(f"{folder}_{data}_{head}_head.pth")
        for data, head in product(("ade20k", "voc2012"), ("linear", "ms")):
            published.add(f"{folder}_{data}_{head}_head.pth")
    published.add(f"{BASE_URL}/dinov2_vitg14/dinov2_vitg14_ade20k_m2f.pth")
    assert len(RELEASES) == len(published) and {row.url for row in RELEASES} == published


def test_names_are_unique_and_begin_with_their_backbone_s() -> None:
    assert len({row.name for row in RELEASES}) == len(RELEASES)
    assert all(row.name.startswith(row.backbone) and release(row.backbone).kind == "backbone" for row in RELEASES)
    assert release("dinov2_vits14_reg_linear4_head").url.endswith("/dinov2_vits14_reg4_linear4_head.pth")


def test_only_backbones_and_classifiers_exist_with_registers() -> None:
    assert {row.kind for row in RELEASES if row.num_register_tokens} == {"backbone", "classifier"}


@pytest.mark.parametrize("row", RELEASES, ids=lambda row: row.name)
def test_a_row_repeats_what_its_backbone_says(row: Release) -> None:
    below = release(row.backbone)
    for field in "arch num_register_tokens img_size patch_size ffn_layer mean std interpolate_offset licence".split():
        assert getattr(row, field) == getattr(below, field)
    assert (row.interpolate_offset, row.interpolate_antialias) == ((0.0, True) if "_reg" in row.name else (0.1, False))
    assert (row.mean, row.std) == (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))
    assert row.licence == "Apache-2.0"
    assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)


@pytest.mark.parametrize("row", BACKBONES, ids=lambda row: row.name)
def test_the_table_of_a_backbone_builds_the_released_model(row: Release) -> None:
    with torch.device("meta"):
        model = backbone_config(row).build()
    golden = golden_json(f"backbone_{row.name.removeprefix('dinov2_')}.keys")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    assert BackboneConfig.from_model(model, mean=row.mean, std=row.std) == backbone_config(row)
    json.dumps(backbone_config(row).table())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dinov2_vits14_reg", "dinov2_vits14_reg"),
        ("DINOv2_ViTS14", "dinov2_vits14"),
        ("facebook/dinov2-small", "dinov2_vits14"),
        ("facebook/dinov2-with-registers-giant", "dinov2_vitg14_reg"),
        ("facebook/dinov2-with-registers-base-imagenet1k-1-layer", "dinov2_vitb14_reg_linear_head"),
        ("dinov2_vits14_lc", "dinov2_vits14_linear4_head"),
        ("dinov2_vits14_reg4_pretrain", "dinov2_vits14_reg"),
        ("dinov2_vits14_reg4_pretrain.pth", "dinov2_vits14_reg"),
        (f"{BASE_URL}/dinov2_vitg14/dinov2_vitg14_ade20k_m2f.pth", "dinov2_vitg14_ade20k_m2f"),
    ],
)
def test_a_row_is_found_by_each_of_its_names(name: str, expected: str) -> None:
    assert release(name).name == expected


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("dinov2_vits14_regs", "dinov2_vits14_reg"),
        ("dinov2_vitb16", "dinov2_vitb14"),
        ("facebook/dinov2-smal", "facebook/dinov2-small"),
        ("dinov2_vitl14_nyu_linear2_head", "dinov2_vitl14_nyu_linear_head"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownRelease, match=f"no release is called '{name}'; the nearest is '{nearest}'") as failure:
        release(name)
    assert "`dinov2 releases` lists all 65" in str(failure.value)


def test_every_name_leads_to_one_row_only() -> None:
    seen: dict[str, Release] = {}
    for row in RELEASES:
        for name in (row.name, row.hf_id, row.timm_name, row.filename, row.url):
            assert name is None or seen.setdefault(name, row) is row


def test_hugging_face_has_the_backbones_and_the_one_layer_classifiers() -> None:
    with_id = [row for row in RELEASES if row.hf_id]
    assert {(row.kind, row.layers) for row in with_id} == {("backbone", None), ("classifier", 1)}
    assert len(with_id) == 16


def test_the_main_table_s_figures_are_there() -> None:
    figures = {row.name: (row.reported("imagenet_knn"), row.reported("imagenet_linear")) for row in BACKBONES}
    assert figures == {
        "dinov2_vits14": (79.0, 81.1),
        "dinov2_vitb14": (82.1, 84.5),
        "dinov2_vitl14": (83.5, 86.3),
        "dinov2_vitg14": (83.5, 86.5),
        "dinov2_vits14_reg": (79.1, 80.9),
        "dinov2_vitb14_reg": (82.0, 84.6),
        "dinov2_vitl14_reg": (83.8, 86.7),
        "dinov2_vitg14_reg": (83.7, 87.1),
    }


def test_both_figures_are_kept_where_the_release_s_two_tables_disagree() -> None:
    differing = {
        row.backbone
        for row in RELEASES
        if row.kind == "classifier"
        and row.layers == 1
        and row.reported("imagenet_linear") != release(row.backbone).reported("imagenet_linear")
    }
    assert differing == {row.name for row in BACKBONES if row.num_register_tokens}


def test_every_reported_figure_is_of_a_known_metric_and_says_where_it_stands() -> None:
    facts = [(row, fact) for row in RELEASES for fact in row.accuracy]
    assert {fact.metric for _, fact in facts} == set(METRICS)
    for row, fact in facts:
        assert fact.source
        low, high = {"%": (30, 100), "m": (0.2, 4)}[METRICS[fact.metric].unit]
        assert low < fact.value < high, (row.name, fact)
    assert release("dinov2_vitl14_nyu_linear4_head").reported("sun_rmse") == 0.396
    assert release("dinov2_vitg14_ade20k_m2f").reported("ade20k_miou") == 60.2
    assert release("dinov2_vits14_kitti_dpt_head").reported("nyu_rmse") is None


def test_larger_models_report_smaller_errors_in_depth() -> None:
    for suffix, metric in (("nyu_dpt_head", "nyu_rmse"), ("kitti_linear_head", "kitti_rmse")):
        errors = [release(f"dinov2_vit{size}14_{suffix}").reported(metric) for size in "sblg"]
        assert errors == sorted(errors, reverse=True)
