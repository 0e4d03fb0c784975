"""Self-supervised training: the method (`ssl_meta_arch`) and the loop (`train`)."""

from dinov2.train.ssl_meta_arch import SSLMetaArch

__all__ = ["SSLMetaArch"]
