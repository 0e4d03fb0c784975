"""Images a second of frozen backbones, beside transformers and timm with the same weights in the same run.

    python benchmarks/inference.py [--models small base] [--batches 1 8 32] [--threads 2] [--rounds 7] [--json FILE]

Patches of 14, a position grid of 518 pixels, images of 224; `mixed` is eight single images of different sizes, which go
through our model in one packed pass and through the others one by one. Peers run as their libraries build them, float32
and eager (`--peers-in-bf16` adds them in bfloat16). `hf` is the same model as `dinov2.hf.Dinov2Model`, and `stage` its
backbone beside theirs when only the stage in the middle is wanted. Calls alternate; a ratio is the median over the
rounds of the peer's seconds divided by ours, with its quartiles. Without a library its columns are missing. `% of
products` is the time of the bare matrix products of the same shapes in the same precision, as a share of the whole.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.checkpoints.adapters import from_original
from dinov2.checkpoints.adapters.huggingface import huggingface_config
from dinov2.checkpoints.files import write_tensors
from dinov2.engine.parallel import choose_device, choose_precision
from dinov2.eval.result import environment
from dinov2.models.config import BackboneConfig
from dinov2.models.inference import cast_blocks, optimize_for_inference
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base, vit_large, vit_nano, vit_small

Images = Tensor | list[Tensor]
Run = Callable[[Any], Any]

MODELS = {"nano": vit_nano, "small": vit_small, "base": vit_base, "large": vit_large}
SIDE = 224
MIXED = [(224, 224), (224, 280), (280, 224), (168, 224), (196, 196), (252, 252), (224, 336), (140, 210)]
PEERS = ("transformers", "timm")
FORMS = ("eager", "compiled", "bf16", "hf", "stage")


def build(name: str, device: torch.device) -> DinoVisionTransformer:
    """Random weights; the position rule of transformers."""
    torch.manual_seed(0)
    model = MODELS[name](patch_size=14, img_size=518, init_values=1.0, block_chunks=0, interpolate_offset=0.0)
    return model.to(device).eval()


def in_transformers(
    model: DinoVisionTransformer, family: Any = None, kind: str = "Model", **settings: Any
) -> nn.Module:
    """The same weights in `Dinov2Model` (or another `kind`), by way of a folder as users have them.

    `family` is the module that holds the classes, transformers or `dinov2.hf`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        state = {key: value.cpu().contiguous() for key, value in from_original(model.state_dict(), "hf").state.items()}
        write_tensors(Path(folder, "model.safetensors"), state)
        Path(folder, "config.json").write_text(json.dumps(huggingface_config(BackboneConfig.from_model(model))))
        peer: nn.Module = getattr(family or transformers, f"Dinov2{kind}").from_pretrained(folder, **settings)
    return peer.to(model.cls_token.device).eval()


def in_timm(model: DinoVisionTransformer, *, one_size: bool) -> nn.Module:
    """The same weights in timm, with a position grid of its one size, or resized in each call."""
    import timm

    state = from_original(model.state_dict(), "timm").state
    if one_size:
        state = {**state, "pos_embed": model.interpolate_pos_encoding(model.pos_embed, SIDE, SIDE).detach()}
    options = {"img_size": SIDE} if one_size else {"img_size": 518, "dynamic_img_size": True}
    peer = timm.models.vision_transformer.VisionTransformer(
        patch_size=14, embed_dim=model.embed_dim, depth=model.n_blocks, num_heads=model.num_heads, num_classes=0,
        init_values=1.0, **options,
    )  # fmt: skip
    peer.load_state_dict(state)
    return peer.to(model.cls_token.device).eval()


def one_by_one(call: Run) -> Run:
    """`call` for a batch, or for each image of a list."""
    return lambda images: [call(image) for image in images] if isinstance(images, list) else call(images)


def in_bf16(peer: nn.Module) -> Run:
    """What users of the libraries do: all of the model and the images in bfloat16."""
    low = tokens_of(copy.deepcopy(peer).bfloat16())
    return lambda image: low(image.bfloat16())


def tokens_of(peer: nn.Module) -> Run:
    """The call that gives all tokens and no more."""
    call: Run = getattr(peer, "forward_features", peer)
    return call


def compiled(model: DinoVisionTransformer) -> Run:
    """One graph; on a CPU with the weights frozen into it, which lets the compiler lay them out anew."""
    graph = torch.compile(model, fullgraph=True, dynamic=False)
    return lambda images: graph(images, is_training=True)


def variants(model: DinoVisionTransformer, options: argparse.Namespace, batch: int | str) -> dict[str, Run]:
    """What is compared, by name; every call gives all tokens after the final norm."""
    runs: dict[str, Run] = {}
    if "transformers" in options.peers:
        peer = in_transformers(model)
        runs["transformers"] = one_by_one(peer)
        if options.peers_in_bf16:
            runs["transformers bf16"] = one_by_one(in_bf16(peer))
    if "timm" in options.peers:
        peer = in_timm(model, one_size=batch != "mixed")
        runs["timm"] = one_by_one(tokens_of(peer))
        if options.peers_in_bf16:
            runs["timm bf16"] = one_by_one(in_bf16(peer))
    runs.update(hugging_face_variants(model, options, batch))
    compiles = "compiled" in options.forms and batch != "mixed" and int(batch) <= options.compile_up_to
    if "eager" in options.forms:
        runs["ours"] = model.forward_features
    if compiles:
        runs["ours compiled"] = compiled(model)
    if options.dtype is not None and "bf16" in options.forms:
        runs["ours bf16"] = optimize_for_inference(model, options.dtype).forward_features
        if compiles:
            runs["ours bf16 compiled"] = compiled(cast_blocks(model, options.dtype))
    return runs


def hugging_face_variants(
    model: DinoVisionTransformer, options: argparse.Namespace, batch: int | str
) -> dict[str, Run]:
    """Our classes for transformers, and backbones of theirs and ours that give the stage in the middle."""
    if "transformers" not in options.peers:
        return {}
    import dinov2.hf as ours

    runs: dict[str, Run] = {}
    if "hf" in options.forms:
        peer = in_transformers(model, ours)
        runs["hf"] = peer
        if options.peers_in_bf16 and batch != "mixed":
            runs["hf bf16"] = in_bf16(peer)
        if "compiled" in options.forms and batch != "mixed" and int(batch) <= options.compile_up_to:
            graph = torch.compile(peer, fullgraph=True, dynamic=False)
            runs["hf compiled"] = lambda images: graph(images)
    if "stage" in options.forms and batch != "mixed":
        for name, family in (("transformers stage", None), ("hf stage", ours)):
            backbone = in_transformers(model, family, "Backbone", out_indices=[model.n_blocks // 2])
            runs[name] = backbone
    return runs


def bare_products(model: DinoVisionTransformer, n_images: int, dtype: torch.dtype) -> Run:
    """The matrix products of a pass over `n_images` and nothing else: linear layers, attention, patch projection."""
    device, patches = model.cls_token.device, (SIDE // model.patch_size) ** 2
    tokens, heads = patches + 1 + model.num_register_tokens, model.num_heads
    weights = [layer.weight.detach().to(dtype) for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    rows = {width: torch.randn(n_images * tokens, width, device=device, dtype=dtype) for width in {
        weight.shape[1] for weight in weights
    }}  # fmt: skip
    q = torch.randn(n_images * heads, tokens, model.embed_dim // heads, device=device, dtype=dtype)
    scores = torch.randn(n_images * heads, tokens, tokens, device=device, dtype=dtype)
    kernel = model.patch_embed.proj.weight.detach().flatten(1).to(dtype)
    pixels = torch.randn(n_images * patches, kernel.shape[1], device=device, dtype=dtype)

    def run(_: Images) -> Tensor:
        nn.functional.linear(pixels, kernel)
        for _block in range(model.n_blocks):
            torch.bmm(q, q.transpose(1, 2))
            torch.bmm(scores, q)
        for weight in weights:
            product = nn.functional.linear(rows[weight.shape[1]], weight)
        return product

    return run


def class_tokens(output: Any) -> Tensor:
    """Class tokens `[B, D]` in whatever form a variant gives its tokens."""
    if hasattr(output, "feature_maps"):
        return output.feature_maps[0].flatten(2).mean(dim=2).float()
    if isinstance(output, dict) and "x_norm_clstoken" in output:
        output = output["x_norm_clstoken"][:, None]
    return getattr(output, "last_hidden_state", output)[:, 0].float()


def compare(model: DinoVisionTransformer, batch: int | str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of alternating calls of all variants, and what each is to the peers."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, *size) for size in MIXED] if batch == "mixed" else [(int(batch), SIDE, SIDE)]
    crops = [torch.randn(n, 3, h, w, generator=generator).to(options.device) for n, h, w in shapes]
    images: Images = crops if batch == "mixed" else crops[0]
    runs = variants(model, options, batch)
    outputs = {name: run(images) for name, run in runs.items()}
    if batch != "mixed":
        runs["products"] = bare_products(model, int(batch), torch.float32)
        if options.dtype is not None:
            runs["products bf16"] = bare_products(model, int(batch), options.dtype)
    # The peers resize positions by rules of their own, so that only one size is compared; bfloat16 is no equality.
    differences = {} if batch == "mixed" else {
        name: (class_tokens(output) - class_tokens(model.forward_features(images))).abs().max().item()
        for name, output in outputs.items() if not name.endswith("stage")
    }  # fmt: skip
    if "hf stage" in outputs:
        mine, stock = (class_tokens(outputs[name]) for name in ("hf stage", "transformers stage"))
        differences["hf stage"] = (mine - stock).abs().max().item()
    del outputs
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(options.rounds):
        for name in list(runs) if i % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            runs[name](images)
            if options.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    better = min((name for name in PEERS if name in runs), key=medians.__getitem__, default=None)
    peers = [name for name in runs if name.split()[0] in PEERS]
    return {
        "batch": batch,
        "images": sum(n for n, _, _ in shapes),
        "seconds": medians,
        "differences": differences,
        "better_peer": better,
        "ratios": {
            name: {peer: spread(seconds[peer], seconds[name]) for peer in peers}
            for name in runs
            if name not in peers and not name.startswith("products")
        },
        "share_of_products": {
            name: medians[limit] / medians[name]
            for name in runs
            if (limit := "products bf16" if "bf16" in name else "products") in runs
            and not name.startswith("products")
            and not name.endswith("stage")
        },
    }


def spread(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratio in each round."""
    ratios = sorted(t / o for t, o in zip(theirs, ours, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, low, high


def show(name: str, row: dict[str, Any]) -> None:
    """One line a variant: images a second, then how many times each peer's rate."""
    for variant, seconds in row["seconds"].items():
        ratios = [
            f"{median:5.2f} x {peer} ({low:.2f} to {high:.2f})"
            for peer, (median, low, high) in row["ratios"].get(variant, {}).items()
        ]
        rate = f"{row['images'] / seconds:9.2f} images/s"
        if variant in row["share_of_products"]:
            ratios.insert(0, f"{100 * row['share_of_products'][variant]:3.0f} % of products")
        print(f"{name:6} {row['batch']!s:>5}  {variant:19} {rate}  {'  '.join(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["small", "base"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--mixed", action=argparse.BooleanOptionalAction, default=True, help="images of several sizes")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of our model")
    parser.add_argument("--compile-up-to", type=int, default=8, help="largest batch that is compiled for (8)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peers-in-bf16", action="store_true")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run at all?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.models, options.batches, options.rounds, options.compile_up_to = ["nano"], [1, 2], 2, 0
    if options.threads:
        torch.set_num_threads(options.threads)
    options.device = choose_device(options.device)
    options.dtype = choose_precision(options.precision, options.device)
    options.peers = [peer for peer in options.peers if importlib.util.find_spec(peer)]
    inductor.freezing = options.device.type == "cpu"
    rows = []
    with torch.inference_mode():
        for name in options.models:
            model = build(name, options.device).requires_grad_(False)
            for batch in [*options.batches, *(["mixed"] if options.mixed else [])]:
                rows.append({"model": name, **compare(model, batch, options)})
                show(name, rows[-1])
    if options.json:
        versions = {peer: importlib.metadata.version(peer) for peer in options.peers}
        document = {"environment": {**environment(), **versions}, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
