"""The optimiser's groups of real models are those of the public release, tensor by tensor."""

import pytest
import torch

from dinov2.configs import load_config
from dinov2.engine.optim import fuse_groups, param_groups
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.golden.loading import golden_json
from tests.train.ssl_golden import golden_config

VITS14 = ["student.arch=vit_small", "student.patch_size=14", "crops.local_crops_size=98"]
CONFIGS = {
    "tiny": lambda: golden_config("centering_separate"),
    "tiny_chunked": lambda: golden_config("sinkhorn_separate_reg"),
    "vits14": lambda: load_config(None, VITS14),
    "vits14_chunked": lambda: load_config(None, [*VITS14, "student.block_chunks=4"]),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_groups_of_the_student_equal_the_release(case):
    golden = golden_json(f"param_groups_{case}")
    with torch.device("meta"):
        student = SSLMetaArch(CONFIGS[case]()).student
    rates = {key: golden[key] for key in ("layerwise_decay", "patch_embed_lr_mult")}
    for part, expected in golden["groups"].items():
        groups = param_groups(student[part], **rates)
        assert [group["name"] for group in groups] == list(expected)
        for group in groups:
            lr, wd, last = expected[group["name"]]
            assert group["lr_multiplier"] == pytest.approx(lr, rel=1e-12), group["name"]
            assert (group["wd_multiplier"], group["is_last_layer"]) == (wd, last), group["name"]
        fused = [
            {
                "lr_multiplier": pytest.approx(group["lr_multiplier"], rel=1e-12),
                "wd_multiplier": group["wd_multiplier"],
                "is_last_layer": group["is_last_layer"],
                "tensors": len(group["params"]),
                "elements": sum(parameter.numel() for parameter in group["params"]),
            }
            for group in fuse_groups(groups)
        ]
        assert golden["fused"][part] == fused
