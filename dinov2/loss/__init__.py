"""The three losses of DINOv2, as functions of tensors and under the names of the public release."""

from dinov2.loss.release import DINOLoss, KoLeoLoss, iBOTPatchLoss

__all__ = ["DINOLoss", "KoLeoLoss", "iBOTPatchLoss"]
