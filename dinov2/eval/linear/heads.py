"""All classifiers of the grid as one model: heads that read the same input share one product.

Training is stochastic gradient descent with momentum on the sum of their losses; heads do not influence each other, so
each ends where it would have ended alone. Gradients of a softmax are written out: what is summed over processes is one
flat tensor, and nothing is recorded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.eval.linear.grid import Head
from dinov2.eval.linear.inputs import TokenColumns

__all__ = ["LinearHeads"]


class _Group:
    """The heads of one input."""

    def __init__(self, heads: list[int], part: slice, weights: Tensor, rates: Tensor) -> None:
        self.heads, self.part = heads, part
        self.weights = weights  # [H, K, d]
        self.biases = torch.zeros_like(weights[..., 0])  # [H, K]
        self.weight_momenta, self.bias_momenta = torch.zeros_like(self.weights), torch.zeros_like(self.biases)
        self.rates = rates  # [H]

    def logits(self, rows: Tensor) -> Tensor:  # [B, W] -> [B, H, K]
        n_heads, n_classes, width = self.weights.shape
        flat = rows[:, self.part] @ self.weights.view(n_heads * n_classes, width).T
        return flat.view(len(rows), n_heads, n_classes) + self.biases


class LinearHeads:
    """The classifiers of `table` for `n_classes` classes, on `device`, with weights drawn from N(0, 0.01^2).

    The draw is made on the CPU, in the order of the table, from a generator of its own.
    """

    def __init__(
        self,
        table: Sequence[Head],
        columns: TokenColumns,
        *,
        n_classes: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.table, self.columns, self.n_classes = tuple(table), columns, n_classes
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        by_input: dict[tuple[int, bool], list[int]] = {}
        for number, head in enumerate(self.table):
            by_input.setdefault((head.n_blocks, head.avgpool), []).append(number)
        self._groups = []
        for (n_blocks, avgpool), numbers in by_input.items():
            part = columns.part(n_blocks, avgpool)
            shape = (len(numbers), n_classes, part.stop - part.start)
            weights = 0.01 * torch.randn(shape, generator=generator)
            rates = torch.tensor([self.table[number].rate for number in numbers])
            self._groups.append(_Group(numbers, part, weights.to(self.device), rates.to(self.device)))

    @torch.no_grad()
    def step(self, rows: Tensor, classes: Tensor, *, decay: float, momentum: float = 0.9) -> Tensor:  # -> [heads]
        """One step of every head at `decay` times its rate; returns their losses before it, of all processes' images.

        Args:
            rows: [B, W] of this process's share of the batch, which may be empty.
            classes: int64 [B], 0 .. K - 1.
        """
        rows, classes = rows.to(self.device, torch.float32), classes.to(self.device)
        n_images = int(distributed.all_reduce_sum(torch.tensor([len(rows)], device=self.device)))
        losses, gradients = [], []
        for group in self._groups:
            logits = group.logits(rows)
            target = classes.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
            errors = logits.log_softmax(dim=2)  # [B, H, K]
            losses.append(-errors.gather(2, target).sum(dim=(0, 2)))
            errors = errors.exp_().scatter_add_(2, target, torch.full_like(target, -1, dtype=errors.dtype))
            gradients.append((errors.flatten(1).T @ rows[:, group.part]).view_as(group.weights))
            gradients.append(errors.sum(dim=0))
        if distributed.get_global_size() > 1:
            # One message; heads of one process never pay for the copy.
            flat = distributed.all_reduce_sum(torch.cat([part.flatten() for part in (*losses, *gradients)]))
            parts = flat.split([part.numel() for part in (*losses, *gradients)])
            losses = list(parts[: len(losses)])
            gradients = [part.view_as(old) for part, old in zip(parts[len(losses) :], gradients, strict=True)]
        for group, weight_gradient, bias_gradient in zip(self._groups, gradients[::2], gradients[1::2], strict=True):
            rates = -decay * group.rates
            group.weight_momenta.mul_(momentum).add_(weight_gradient, alpha=1 / n_images)
            group.bias_momenta.mul_(momentum).add_(bias_gradient, alpha=1 / n_images)
            group.weights.addcmul_(group.weight_momenta, rates.view(-1, 1, 1))
            group.biases.addcmul_(group.bias_momenta, rates.view(-1, 1))
        return self._in_order(losses) / n_images

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:  # [B, W] -> [heads, B, K]
        """Logits of every head, in the order of the table."""
        rows = rows.to(self.device, torch.float32)
        return self._in_order([group.logits(rows).transpose(0, 1) for group in self._groups])

    def head(self, number: int) -> tuple[Tensor, Tensor]:  # -> [K, d], [K]
        """Weight and bias of one head, copied to the CPU."""
        for group in self._groups:
            if number in group.heads:
                row = group.heads.index(number)
                return group.weights[row].clone().cpu(), group.biases[row].clone().cpu()
        raise IndexError(f"there are {len(self.table)} heads, and none has the number {number}")

    def head_logits(self, number: int, rows: Tensor) -> Tensor:  # [B, W] -> [B, K]
        """Logits of one head, on the CPU."""
        weight, bias = (part.to(self.device) for part in self.head(number))
        head = self.table[number]
        part = self.columns.part(head.n_blocks, head.avgpool)
        # In blocks: the features of a large test set need not fit on the device.
        return torch.cat([(block[:, part].to(self.device) @ weight.T + bias).cpu() for block in rows.split(8192)])

    def state_dict(self) -> dict[str, Any]:
        """Weights, biases and momenta of each input, by reference."""
        names = ("weights", "biases", "weight_momenta", "bias_momenta")
        return {str(i): {name: getattr(group, name) for name in names} for i, group in enumerate(self._groups)}

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        order = torch.tensor([number for group in self._groups for number in group.heads], device=self.device)
        return torch.cat(parts)[order.argsort()]
