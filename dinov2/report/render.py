"""Pages from the templates, style sheets and scripts in `assets`: each page is one file that loads nothing.

Every value is escaped on its way into a page, because names of files, classes and models are not ours. The frame of all
pages forbids the browser to load anything, so that a page that is not complete in itself is seen to be broken.
"""

import base64
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.errors import MissingDependency
from dinov2.eval.metrics import Estimate
from dinov2.eval.result import now

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["PNG_START", "percent", "render", "require_templates"]

PNG_START = b"\x89PNG"
"""First bytes of a PNG file."""


def render(template: str, **values: object) -> str:
    """The text of a template of `assets` with these values. Raises `MissingDependency` without jinja2."""
    return str(_environment().get_template(template).render(values))


def require_templates() -> None:
    """Raise `MissingDependency` where no page can be written, before the work that the page would show."""
    _environment()


def percent(value: float, digits: int = 1) -> str:
    """A fraction in per cent, without the sign."""
    return f"{100 * value:.{digits}f}" if math.isfinite(value) else "–"


def _interval(estimate: Estimate) -> str:
    """The bounds in per cent; "" where they are not known (NaN)."""
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return f"{percent(estimate.low)}–{percent(estimate.high)}" if known else ""


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}".replace("-", "−")


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _data_uri(picture: bytes) -> str:
    mime = "image/png" if picture.startswith(PNG_START) else "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(picture).decode('ascii')}"


@cache
def _environment() -> "Environment":
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependency("dinov2-anywhere[report]", "an HTML page") from error

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"p_value": _p_value, "points": _points}
    environment.filters |= {"data_uri": _data_uri, "grouped": "{:,}".format, "interval": _interval, "percent": percent}
    environment.globals["written"] = lambda: f"Written {now().replace('T', ' ').replace('+00:00', ' UTC')}."
    return environment
