"""Silence while transformers is imported."""

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_import"]


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """For the first import of `transformers.modeling_utils`, which imports every quantisation package it finds.

    Torch answers torchao up to 0.18 with log lines about torchao's own enumerations, which no user can act upon.
    Nothing else is silenced, and nothing afterwards.
    """
    logger = logging.getLogger("torch.utils._pytree")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
