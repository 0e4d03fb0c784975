"""Builds the models and batches of the stored self-supervised steps."""

import torch

from dinov2.configs import from_dict
from dinov2.data.crops.collate import CropBatch
from dinov2.engine.schedules import Hyper
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.golden.loading import golden_json, golden_tensors
from tests.golden.recipe import images, values

__all__ = ["HYPER", "STEP", "golden_batch", "golden_config", "golden_ssl"]

STEP = golden_json("ssl_step")
HYPER = Hyper(lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.05, last_layer_lr=1e-4)


def golden_config(variant: str):
    sections: dict = {}
    for part in (STEP["config_common"], STEP["config"][variant]):
        for section, entries in part.items():
            sections.setdefault(section, {}).update(entries)
    sections["student"].update(embed_dim=64, depth=4, num_heads=4)
    return from_dict(sections)


def golden_ssl(variant: str) -> SSLMetaArch:
    ssl = SSLMetaArch(golden_config(variant)).train()
    with torch.no_grad():
        for key, tensor in ssl.student.state_dict().items():
            tensor.copy_(torch.from_numpy(values(f"student.{key}", tuple(tensor.shape))))
        for key, tensor in ssl.teacher.state_dict().items():
            student = torch.from_numpy(values(f"student.{key}", tuple(tensor.shape)))
            tensor.copy_(0.7 * student + 0.3 * torch.from_numpy(values(f"teacher.{key}", tuple(tensor.shape))))
        for name in ("dino_loss.center", "ibot_patch_loss.center"):
            center = ssl.get_buffer(name)
            center.copy_(torch.from_numpy(values(name, tuple(center.shape))))
    return ssl


def golden_batch(step: int = 0) -> CropBatch:
    stored = golden_tensors("ssl_step_batch")
    crops = images(8, 98, 98), images(12, 42, 42)
    return CropBatch.from_dict(
        {
            "collated_global_crops": crops[0].flip(-1) if step else crops[0],
            "collated_local_crops": crops[1].flip(-1) if step else crops[1],
            **{
                key: stored[f"step{step}.{key}"]
                for key in ("collated_masks", "mask_indices_list", "masks_weight", "n_masked_patches")
            },
        }
    )
