"""Vision transformers and linear heads, their architecture as typed values, and the table of releases."""

from typing import Any

from dinov2.models.vision_transformer import ARCHITECTURES, DinoVisionTransformer

__all__ = ["build_model", "build_model_from_cfg"]


def build_model(args: object, only_teacher: bool = False, img_size: int = 224) -> tuple[object, ...]:
    """Backbones of a `student` configuration section: `(teacher, D)`, or `(student, teacher, D)`.

    Only the student gets stochastic depth. `args` is anything with the attributes of `student.*`.
    """
    teacher = _backbone(args, img_size, drop_path=False)
    if only_teacher:
        return teacher, teacher.embed_dim
    return _backbone(args, img_size, drop_path=True), teacher, teacher.embed_dim


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> tuple[Any, ...]:
    """`build_model` for a whole configuration, whose global crop size is the native image size."""
    return build_model(cfg.student, only_teacher=only_teacher, img_size=cfg.crops.global_crops_size)


def _backbone(args: Any, img_size: int, *, drop_path: bool) -> DinoVisionTransformer:
    name = args.arch.removesuffix("_memeff")
    sizes = {key: getattr(args, key, None) for key in ("embed_dim", "depth", "num_heads")}
    if name not in ARCHITECTURES and None in sizes.values():
        choices = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"student.arch is {args.arch!r}; choose one of {choices}, or give student.embed_dim, depth and num_heads"
        )
    preset = ARCHITECTURES[name]._asdict() if name in ARCHITECTURES else {}
    return DinoVisionTransformer(
        **{**preset, **{key: value for key, value in sizes.items() if value is not None}},
        img_size=img_size,
        patch_size=args.patch_size,
        in_chans=getattr(args, "in_chans", 3),
        mlp_ratio=getattr(args, "mlp_ratio", 4.0),
        init_values=args.layerscale,
        ffn_layer=args.ffn_layer,
        block_chunks=args.block_chunks,
        qkv_bias=args.qkv_bias,
        proj_bias=args.proj_bias,
        ffn_bias=args.ffn_bias,
        num_register_tokens=args.num_register_tokens,
        interpolate_offset=args.interpolate_offset,
        interpolate_antialias=args.interpolate_antialias,
        drop_path_rate=args.drop_path_rate if drop_path else 0.0,
        drop_path_uniform=args.drop_path_uniform,
        drop_path_per_sample=getattr(args, "drop_path_per_sample", False),
    )
