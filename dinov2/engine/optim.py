"""Parameter groups, AdamW, clipping, and a step that a non-finite loss or gradient skips as a whole.

Groups follow the release: layer-wise learning-rate decay by depth, no weight decay on biases, norms and LayerScale, and
the heads' last layers marked so that they can be frozen. Clipping is per part of the student (backbone and heads each
have their own norm). On CUDA nothing here waits for the device: whether a step is skipped is decided inside the fused
kernel and the teacher's momentum becomes exactly 1 on the device; on other devices it is a plain `if`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_max

__all__ = [
    "LossScaler",
    "StepOutcome",
    "apply_hyper",
    "build_optimizer",
    "clip_gradients",
    "ema_update",
    "fuse_groups",
    "guarded_step",
    "param_groups",
]

_EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")
# `blocks.<i>.` or, in chunks, `blocks.<chunk>.<i>.`; the last number counts through all chunks.
_BLOCK = re.compile(r"(?:^|\.)blocks\.(?:\d+\.)?(\d+)\.")
# What torch.compile and activation checkpointing put into names.
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module)\.")
# Parameters per chunk of the teacher's update on CUDA, so that its temporaries stay small beside the model.
_EMA_CHUNK = 32


def param_groups(
    module: nn.Module, *, layerwise_decay: float, patch_embed_lr_mult: float, n_blocks: int | None = None
) -> list[dict[str, object]]:
    """One group per trainable parameter, in the order of `named_parameters`.

    Keys: `name`, `params`, `lr_multiplier` = `layerwise_decay` to the power of the layers above (embeddings lowest,
    final norm and heads 1), `wd_multiplier` (0 or 1), `is_last_layer`. `n_blocks` is the depth; by default it is read
    from the names, and a module without blocks (a head) has 0.
    """
    named = [(_WRAPPERS.sub("", name), p) for name, p in module.named_parameters() if p.requires_grad]
    if n_blocks is None:
        n_blocks = max((int(match[1]) + 1 for name, _ in named if (match := _BLOCK.search(name))), default=0)
    groups = []
    for name, parameter in named:
        lr_multiplier = layerwise_decay ** (n_blocks + 1 - _layer_id(name, n_blocks))
        if "patch_embed" in name:
            lr_multiplier *= patch_embed_lr_mult
        undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
        groups.append(
            {
                "name": name,
                "params": parameter,
                "lr_multiplier": lr_multiplier,
                "wd_multiplier": 0.0 if undecayed else 1.0,
                "is_last_layer": "last_layer" in name,
            }
        )
    return groups


_FUSED_BY = ("lr_multiplier", "wd_multiplier", "is_last_layer")


def fuse_groups(
    all_params_groups: Iterable[Mapping[str, Any]], keys: Sequence[str] = _FUSED_BY
) -> list[dict[str, Any]]:
    """Merge groups that agree in `keys`, in order of first appearance.

    `params` become lists; of the rest of a group only `keys` is kept.
    """
    fused: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in all_params_groups:
        shared = {key: group[key] for key in keys}
        fused.setdefault(tuple(shared.values()), {"params": [], **shared})["params"].append(group["params"])
    return list(fused.values())


def build_optimizer(student_parts: Mapping[str, nn.Module], optim: Any) -> torch.optim.AdamW:
    """One AdamW over the fused groups of all parts (backbone and heads), with the settings of the section `optim`.

    Learning rate and weight decay are zero until `apply_hyper` sets them. Fused kernels where the device has them.
    """
    groups = [
        group
        for module in student_parts.values()
        for group in fuse_groups(
            param_groups(module, layerwise_decay=optim.layerwise_decay, patch_embed_lr_mult=optim.patch_embed_lr_mult)
        )
    ]
    settings: dict[str, Any] = {"lr": 0.0, "betas": (optim.adamw_beta1, optim.adamw_beta2), "weight_decay": 0.0}
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)
    except RuntimeError:  # a device or type without fused kernels; which ones depends on torch
        return torch.optim.AdamW(groups, foreach=True, **settings)


def apply_hyper(optimizer: torch.optim.Optimizer, hyper: Any) -> None:
    """Set learning rate and weight decay of every group from the `Hyper` of a step."""
    for group in optimizer.param_groups:
        group["weight_decay"] = hyper.weight_decay * group["wd_multiplier"]
        group["lr"] = (hyper.last_layer_lr if group["is_last_layer"] else hyper.lr) * group["lr_multiplier"]


@torch.no_grad()
def clip_gradients(parts: Mapping[str, nn.Module], max_norm: float | None) -> dict[str, Tensor]:
    """Scale the gradients of each part so that their L2 norm is at most `max_norm` (0 or None: leave them).

    Returns the norms before clipping, scalars on the device of the part; a part without gradients has 0.
    """
    norms: dict[str, Tensor] = {}
    for name, part in parts.items():
        parameters = [parameter for parameter in part.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if parameters:
            norms[name] = norm
            if max_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        else:
            first = next(part.parameters(), norm)
            norms[name] = torch.zeros((), device=first.device)
    return norms


class LossScaler:
    """Keeps small fp16 gradients from becoming zero: the loss is multiplied, the gradients are divided again.

    The scale halves after a step with a non-finite gradient and doubles after `growth_interval` good ones. All on the
    device. An overflow is the scaler's way to find its scale and no sign of a diverged training.
    """

    def __init__(
        self, device: torch.device | str, *, initial_scale: float = 2.0**16, growth_interval: int = 2000
    ) -> None:
        self.scale = torch.full((), initial_scale, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.growth_interval = growth_interval

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self.scale

    @torch.no_grad()
    def unscale(self, parts: Mapping[str, nn.Module]) -> None:
        """Divide all gradients by the scale."""
        gradients = [p.grad for part in parts.values() for p in part.parameters() if p.grad is not None]
        if gradients:
            # The scale is a power of two, so that its inverse is exact.
            torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, finite: Tensor) -> None:
        """Adapt the scale to the outcome of a step; no effect on the step itself."""
        good = torch.where(finite, self.good_steps + 1, 0)
        grow = good >= self.growth_interval
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(min=1.0)
        self.good_steps = torch.where(grow, 0, good)

    def state_dict(self) -> dict[str, Tensor]:
        """Scale and count, for checkpoints."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.scale = state["scale"].to(self.scale)
        self.good_steps = state["good_steps"].to(self.good_steps)


class StepOutcome(NamedTuple):
    """Outcome of a guarded step, as tensors, so that nothing waits for the device."""

    finite: Tensor  # [] bool: False when the whole step was skipped, the same on all processes
    loss_finite: Tensor  # [] bool: of this process; with a LossScaler a skip with a finite loss is an overflow
    grad_norms: dict[str, Tensor]  # per part, before clipping


@torch.no_grad()
def guarded_step(
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, nn.Module],
    max_norm: float | None,
    *,
    loss: Tensor,
    scaler: LossScaler | None = None,
) -> StepOutcome:
    """Clip each part and step, unless the loss or a gradient norm is not finite on some process.

    A skipped step leaves weights, moments and step counters as they were; the caller then leaves teacher and centers
    alone too (`ema_update(..., finite=outcome.finite)`). `loss` is the unscaled one.
    """
    if scaler is not None:
        scaler.unscale(parts)
    grad_norms = clip_gradients(parts, max_norm)
    loss_finite = loss.detach().isfinite().all()
    norms_finite = torch.stack([norm.to(loss_finite.device) for norm in grad_norms.values()]).isfinite().all()
    # Gradients agree between processes, losses do not: one process must not step alone.
    skip = all_reduce_max((~(loss_finite & norms_finite)).float())
    finite = skip == 0
    if scaler is not None:
        scaler.update(finite)
    if _decides_on_device(optimizer):
        # The hook that torch's own gradient scaler uses: the fused kernel reads it and does nothing where it is 1.
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(finite):
        optimizer.step()
    return StepOutcome(finite, loss_finite, grad_norms)


@torch.no_grad()
def ema_update(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float, *, finite: Tensor | None = None
) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in the teacher's float32, in place.

    `finite` is that of the step's outcome: where it is False the teacher keeps its values.
    """
    teacher, student = list(teacher), list(student)
    if not teacher:
        return
    if finite is not None and finite.device.type == "cuda":
        _ema_update_on_device(teacher, student, momentum, finite)
    elif finite is None or bool(finite):
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)


def _ema_update_on_device(teacher: list[Tensor], student: list[Tensor], momentum: float, finite: Tensor) -> None:
    keep = torch.where(finite, momentum, 1.0)
    take = torch.where(finite, 1 - momentum, 0.0)
    for start in range(0, len(teacher), _EMA_CHUNK):
        chunk = teacher[start : start + _EMA_CHUNK]
        torch._foreach_mul_(chunk, keep)
        torch._foreach_add_(chunk, torch._foreach_mul(student[start : start + _EMA_CHUNK], take))


def _layer_id(name: str, n_blocks: int) -> int:
    if any(embedding in name for embedding in _EMBEDDINGS):
        return 0
    match = _BLOCK.search(name)
    return n_blocks + 1 if match is None else int(match[1]) + 1


def _decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    on_cuda = optimizer.param_groups[0]["params"][0].device.type == "cuda"
    return on_cuda and bool(optimizer.param_groups[0].get("fused"))
