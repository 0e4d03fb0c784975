"""The self-supervised method: a batch of crops in, loss terms out (arXiv 2304.07193, section 4).

A student sees all crops, the global ones with patches masked; a teacher, whose weights are a running mean of the
student's, sees the global crops whole. The student's class tokens predict the teacher's assignments of the other crops
(DINO), its masked patches those of the same patches (iBOT), and KoLeo spreads its class tokens. Nothing here goes
backward, logs or knows about processes beyond what the losses sum over.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dinov2.configs import Config
from dinov2.configs.method_sections import DinoConfig, IbotConfig
from dinov2.data.crops.collate import CropBatch
from dinov2.engine.optim import ema_update
from dinov2.engine.parallel import autocast
from dinov2.engine.schedules import Hyper
from dinov2.layers.dino_head import DINOHead
from dinov2.loss.centering import Center
from dinov2.loss.dino import dino_loss
from dinov2.loss.ibot import ibot_patch_loss
from dinov2.loss.koleo import koleo_loss
from dinov2.loss.sinkhorn import sinkhorn_knopp
from dinov2.models import build_model_from_cfg
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.objective import HealthProbe, LossTerms, Objective

__all__ = ["SSLMetaArch"]

_GLOBAL_CROPS = 2

_PLAIN_MODULE = "the model is a plain module; move it to its device with .to(device)"
_GROUPS = "dinov2.engine.optim.build_optimizer(ssl.trained_parts(), cfg.optim) makes groups and optimizer"
# Methods and attributes of the release's class that have no namesake here, each with what to use.
_IN_THE_RELEASE = {
    "forward_backward": "losses = ssl(batch, schedules.at(step)) of a CropBatch, then losses.total.backward()",
    "backprop_loss": "losses.total.backward() of the LossTerms that a call returns",
    "prepare_for_distributed_training": f"{_PLAIN_MODULE}, and the teacher is a copy of the student from the start",
    "fsdp_synchronize_streams": f"{_PLAIN_MODULE}, so there are no streams to synchronize",
    "need_to_synchronize_fsdp_streams": f"{_PLAIN_MODULE}, so there are no streams to synchronize",
    "get_params_groups": _GROUPS,
    "get_maybe_fused_params_for_submodel": _GROUPS,
    "fp16_scaler": "dinov2.engine.optim.LossScaler scales the loss",
    "cfg": "the configuration stays with the caller",
    "embed_dim": "ssl.student['backbone'].embed_dim",
    "dino_out_dim": "cfg.dino.head_n_prototypes",
    "ibot_out_dim": "cfg.ibot.head_n_prototypes",
    "do_dino": "ssl.dino_weight > 0",
    "do_koleo": "ssl.koleo_weight > 0",
    "do_ibot": "ssl.ibot_weight > 0",
    "dino_loss_weight": "ssl.dino_weight",
    "ibot_loss_weight": "ssl.ibot_weight",
    "koleo_loss": "dinov2.loss.koleo.koleo_loss(features) is a function",
    "ibot_separate_head": "ssl.separate_ibot_head",
}


class _Assignments(NamedTuple):
    cls: Tensor | None  # [G, B, K]
    patches: Tensor | None  # [M, K']


class _StudentScores(NamedTuple):
    local_cls: Tensor | None  # [L, B, K]
    global_cls: Tensor | None  # [G, B, K]
    masked_patches: Tensor | None  # [M, K']
    global_cls_tokens: Tensor  # [G, B, D], before the head: KoLeo spreads these


class SSLMetaArch(Objective):
    """Student, teacher and losses of a training configuration; state-dict prefixes are those of the release.

    `precision` is the autocast type of backbones and heads, None for float32. The teacher starts as a copy of the
    student, never requires gradients and stays in eval mode. The logged terms are the release's: without the DINO and
    iBOT loss weights, and KoLeo and iBOT at half of what enters the total.
    """

    def __init__(self, cfg: Config, *, precision: torch.dtype | None = None, student_temp: float = 0.1) -> None:
        super().__init__()
        self.precision = precision
        self.student_temp = student_temp
        self.dino_weight: float = cfg.dino.loss_weight
        self.ibot_weight: float = cfg.ibot.loss_weight
        self.koleo_weight: float = cfg.dino.koleo_loss_weight
        self.centering = cfg.train.centering
        self.masks_patches: bool = cfg.ibot.mask_sample_probability > 0
        self.separate_ibot_head: bool = cfg.ibot.separate_head and self.ibot_weight > 0
        self.student = nn.ModuleDict()
        self.teacher = nn.ModuleDict()
        self.student["backbone"], self.teacher["backbone"], embed_dim = build_model_from_cfg(cfg)
        if self.dino_weight > 0 or (self.ibot_weight > 0 and not self.separate_ibot_head):
            self._add_heads("dino_head", embed_dim, cfg.dino)
        if self.separate_ibot_head:
            self._add_heads("ibot_head", embed_dim, cfg.ibot)
        patch_section = cfg.ibot if self.separate_ibot_head else cfg.dino
        self.dino_loss = Center(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = Center(patch_section.head_n_prototypes, leading=(1, 1))
        self.copy_student_to_teacher()

    def __getattr__(self, name: str) -> Any:
        if name in _IN_THE_RELEASE:
            raise AttributeError(
                f"SSLMetaArch.{name} is not in this package: {_IN_THE_RELEASE[name]}", name=name, obj=self
            )
        return super().__getattr__(name)

    def _add_heads(self, name: str, embed_dim: int, section: DinoConfig | IbotConfig) -> None:
        for network in (self.student, self.teacher):
            network[name] = DINOHead(
                embed_dim,
                section.head_n_prototypes,
                hidden_dim=section.head_hidden_dim,
                bottleneck_dim=section.head_bottleneck_dim,
                nlayers=section.head_nlayers,
            )

    def copy_student_to_teacher(self) -> None:
        """Makes the teacher an exact copy of the student."""
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.teacher.eval()

    def train(self, mode: bool = True) -> "SSLMetaArch":
        """Training mode of the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def trained_parts(self) -> dict[str, nn.Module]:
        """Backbone and heads of the student."""
        return dict(self.student.items())

    def forward(self, batch: CropBatch, hyper: Hyper) -> LossTerms:
        """All loss terms of a batch; by centering, its teacher scores enter the center of the next step."""
        with autocast(batch.global_crops.device, self.precision):
            assignments = self._teacher_assignments(batch, hyper.teacher_temp)
            scores = self._student_scores(batch)
        return self._loss_terms(batch, assignments, scores)

    @torch.no_grad()
    def _teacher_assignments(self, batch: CropBatch, temperature: float) -> _Assignments:
        if not self.dino_weight and not self.ibot_weight:
            return _Assignments(None, None)
        features = self.teacher["backbone"](batch.global_crops, is_training=True)
        patches = _masked(features["x_norm_patchtokens"], batch)  # [M, D]
        cls_scores, patch_scores = self._heads(self.teacher, features["x_norm_clstoken"], patches)
        cls = self._assign(self.dino_loss, cls_scores, temperature)
        patch = self._assign(self.ibot_patch_loss, patch_scores, temperature)
        if self.centering == "centering":
            for center, scores in ((self.dino_loss, cls_scores), (self.ibot_patch_loss, patch_scores)):
                if scores is not None:
                    center.update(scores)
        return _Assignments(None if cls is None else cls.unflatten(0, (_GLOBAL_CROPS, -1)), patch)

    def _assign(self, center: Center, scores: Tensor | None, temperature: float) -> Tensor | None:
        """Assignments of the teacher's scores `[S, K]`; None where the term is off."""
        if scores is None:
            return None
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(scores, temperature)
        return center.softmax(scores, temperature)

    def _student_scores(self, batch: CropBatch) -> _StudentScores:
        backbone = self.student["backbone"]
        masks = batch.masks if self.masks_patches else None
        if batch.local_crops is None:
            global_features, local_cls = backbone(batch.global_crops, masks, is_training=True), None
        else:
            global_features, local_features = backbone(
                [batch.global_crops, batch.local_crops], [masks, None], is_training=True
            )
            local_cls = local_features["x_norm_clstoken"]  # [L*B, D]
        global_cls = global_features["x_norm_clstoken"]  # [G*B, D]
        cls_tokens = global_cls if local_cls is None else torch.cat([global_cls, local_cls])
        cls_scores, patch_scores = self._heads(
            self.student, cls_tokens, _masked(global_features["x_norm_patchtokens"], batch)
        )
        batch_size = global_cls.shape[0] // _GLOBAL_CROPS
        by_crop = cls_scores.unflatten(0, (-1, batch_size)) if cls_scores is not None else None  # [G + L, B, K]
        return _StudentScores(
            local_cls=by_crop[_GLOBAL_CROPS:] if by_crop is not None and local_cls is not None else None,
            global_cls=by_crop[:_GLOBAL_CROPS] if by_crop is not None else None,
            masked_patches=patch_scores,
            global_cls_tokens=global_cls.unflatten(0, (_GLOBAL_CROPS, -1)),
        )

    def _heads(
        self, network: nn.ModuleDict, cls_tokens: Tensor, patches: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scores of class tokens and masked patches; a shared head takes both in one call."""
        if not self.ibot_weight:
            return (network["dino_head"](cls_tokens) if self.dino_weight else None), None
        if self.separate_ibot_head:
            return (network["dino_head"](cls_tokens) if self.dino_weight else None), network["ibot_head"](patches)
        if not self.dino_weight:
            return None, network["dino_head"](patches)
        scores = network["dino_head"](torch.cat([cls_tokens, patches]))
        return scores[: cls_tokens.shape[0]], scores[cls_tokens.shape[0] :]

    def _loss_terms(self, batch: CropBatch, teacher: _Assignments, student: _StudentScores) -> LossTerms:
        total = student.global_cls_tokens.new_zeros((), dtype=torch.float32)
        logged: dict[str, Tensor] = {}
        if teacher.cls is not None and student.global_cls is not None:
            n_local = 0 if student.local_cls is None else student.local_cls.shape[0]
            # Every local crop meets both teacher crops, every global crop the other one: a plain mean over all pairs.
            n_pairs = _GLOBAL_CROPS * n_local + _GLOBAL_CROPS
            if student.local_cls is not None:
                local_loss = dino_loss(student.local_cls, teacher.cls, self.student_temp) / n_pairs
                total = total + self.dino_weight * local_loss
                logged["dino_local_crops_loss"] = local_loss
            global_loss = dino_loss(student.global_cls, teacher.cls, self.student_temp, skip_same_crop=True) / n_pairs
            total = total + self.dino_weight * global_loss
            logged["dino_global_crops_loss"] = global_loss
        if self.koleo_weight:
            spread = self.koleo_weight * torch.stack([koleo_loss(crop) for crop in student.global_cls_tokens]).sum()
            total = total + spread
            logged["koleo_loss"] = spread / _GLOBAL_CROPS
        if teacher.patches is not None and student.masked_patches is not None:
            patch_loss = ibot_patch_loss(
                student.masked_patches, teacher.patches, batch.mask_weights, batch.masks.shape[0], self.student_temp
            )
            total = total + self.ibot_weight * patch_loss
            logged["ibot_loss"] = patch_loss / 2
        return LossTerms(total, {name: value.detach() for name, value in logged.items()})

    @torch.no_grad()
    def update_teacher(self, momentum: float, *, finite: Tensor | None = None) -> None:
        """Moves teacher and centers after a step; leaves both alone when the step was not `finite`."""
        ema_update(list(self.teacher.parameters()), list(self.student.parameters()), momentum, finite=finite)
        self.dino_loss.apply_pending(finite)
        self.ibot_patch_loss.apply_pending(finite)

    @torch.no_grad()
    def probe(self, batch: CropBatch, hyper: Hyper) -> HealthProbe:
        """The teacher's tokens and assignments of the global crops; the centers stay where they are."""
        backbone = cast(DinoVisionTransformer, self.teacher["backbone"])
        with autocast(batch.global_crops.device, self.precision):
            features = backbone(batch.global_crops, is_training=True)
            cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]  # [G*B, D], [G*B, N, D]
            cls_scores, patch_scores = self._heads(self.teacher, cls, _masked(patches, batch))
        grid = backbone.patch_grid(*batch.global_crops.shape[-2:])
        before_norm = features["x_prenorm"][:, -patches.shape[1] :]
        return HealthProbe(
            cls=cls,
            patches=patches.unflatten(1, grid),
            patches_before_norm=before_norm.unflatten(1, grid),
            cls_assignments=self._assign(self.dino_loss, cls_scores, hyper.teacher_temp),
            patch_assignments=self._assign(self.ibot_patch_loss, patch_scores, hyper.teacher_temp),
        )


def _masked(patches: Tensor, batch: CropBatch) -> Tensor:
    """Patch tokens `[G*B, N, D]` -> those that are masked `[M, D]`."""
    return patches.flatten(0, 1).index_select(0, batch.masked_indices)
