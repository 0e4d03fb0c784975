"""Images one after the other through the models; what cannot be read is left out and listed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from dinov2.analysis.patch_maps import PatchView, patch_at
from dinov2.apps.viewing.models import look
from dinov2.encode.image_inputs import Frame, open_frame
from dinov2.errors import DataError
from dinov2.pretrained import Pretrained
from dinov2.report.map_pictures import display_size

__all__ = ["Scene", "look_at", "share_of_point"]

_PATCHES_ALONG = 32
_KEPT_WHOLE = 32  # features of more images are kept in half precision


@dataclass
class Scene:
    """An image with what each model sees in it; `shown` is the size at which it is drawn."""

    name: str
    size: tuple[int, int]
    shown: Image.Image
    views: list[PatchView]


def look_at(
    frames: Sequence[Frame],
    models: Sequence[Pretrained],
    *,
    size: int | None = None,
    block: int = -1,
    point: tuple[float, float] | None = None,
    max_tokens: int | None = None,
    show: Callable[[int, int], None] | None = None,
) -> tuple[list[Scene], list[tuple[str, str]]]:
    """Every readable image through every model, and (path, reason) of those that cannot be read.

    `size` is the shorter side in pixels, None 32 patches; an image that would be more than `max_tokens` patches is seen
    smaller. `point` is a pixel of the first readable image, whose patch's attention is wanted.

    Raises `DataError` when not one image can be read, `ConfigError` for a point outside.
    """
    scenes: list[Scene] = []
    unreadable: list[tuple[str, str]] = []
    for done, frame in enumerate(frames, start=1):
        try:
            picture = open_frame(frame)
            whole = (picture.height, picture.width)
            place = share_of_point(point, whole) if point is not None and not scenes else None
            sizes = [size or _PATCHES_ALONG * model.patch_size for model in models]
            views = [
                _kept(look(model, picture, size=shorter, block=block, point=place, max_tokens=max_tokens), frames)
                for model, shorter in zip(models, sizes, strict=True)
            ]
        except DataError as error:
            reason = str(error)
            unreadable.append((str(frame.path), reason if str(frame.path) in reason else f"{frame.path}: {reason}"))
            continue
        height, width = display_size(*whole)
        scenes.append(Scene(frame.name, whole, picture.resize((width, height), Image.Resampling.LANCZOS), views))
        if show is not None:
            show(done, len(frames))
    if not scenes:
        raise DataError(unreadable[0][1])
    return scenes, unreadable


def _kept(view: PatchView, frames: Sequence[Frame]) -> PatchView:
    return view if len(frames) <= _KEPT_WHOLE else replace(view, patches=view.patches.half())


def share_of_point(point: tuple[float, float] | None, size: tuple[int, int]) -> tuple[float, float]:
    """A pixel (x, y) of an image of `size` (height, width) as shares of both; the centre when there is none.

    Raises `ConfigError` for a point outside.
    """
    if point is None:
        return 0.5, 0.5
    patch_at(*point, size=size, grid=(1, 1))  # raises outside
    return point[0] / size[1], point[1] / size[0]
