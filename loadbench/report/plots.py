"""The one door to the plot library: the JavaScript that draws a page's pictures, and pictures as SVG files.

vl-convert carries Vega and Vega-Lite within itself: no browser, no network. Making the bundle takes seconds, and so it
is kept in the cache by the library's version: a report whose bundle is there does not even import the library.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from typing import Any

from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.report.picture import LIGHT, Spec, fitting

PACKAGE = "vl-convert-python"
MISSING = f"the package {PACKAGE} cannot be imported here"
SNIPPET = "window.vegaEmbed = vegaEmbed;"
VEGALITE = "6.4"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def bundle() -> str | None:
    """Vega, Vega-Lite and vega-embed as one script that fetches nothing; None where the library is not there."""
    from loadbench.target.foundry import cache_dir

    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = cache_dir() / "plots" / f"vega-{version}.js"
    with contextlib.suppress(OSError):  # not there yet, or not ours to read
        return path.read_text(encoding="utf-8")
    try:
        import vl_convert
    except ImportError:  # no wheel for this platform, or one that its C library does not carry
        return None
    made: str = vl_convert.javascript_bundle(SNIPPET, vl_version=VEGALITE)
    made = made.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    with contextlib.suppress(OSError, UsageError):  # a cache that cannot be kept costs seconds and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, made.encode())
    return made


def svg(spec: Spec, name: str) -> str:
    """The picture as a file of its own: light, on white, with the fonts of who looks at it.

    ``name`` is what a screen reader says of it.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise UsageError(f"--figures: expected the package {PACKAGE}, found none ({error})") from error
    look = config() | {"background": "#ffffff", "padding": 12}
    drawn = coloured(fitting(spec) | {"description": name})
    made: str = vl_convert.vegalite_to_svg(drawn, vl_version=VEGALITE, config=look)
    return made


def coloured(value: Any) -> Any:
    """The spec with colours in place of the page's custom properties."""
    if isinstance(value, dict):
        return {key: coloured(each) for key, each in value.items()}
    if isinstance(value, list):
        return [coloured(each) for each in value]
    if isinstance(value, str) and (match := re.fullmatch(r"var\(--(\w+)\)", value)):
        return LIGHT[match[1]]
    return value


def config(*, themed: bool = False) -> Spec:
    """How all pictures look. ``themed`` keeps the colours as custom properties."""
    made: Spec = {
        "background": None,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--muted)",
            "titleColor": "var(--ink)",
            "gridColor": "var(--grid)",
            "domainColor": "var(--muted)",
            "tickColor": "var(--muted)",
            "labelFontSize": 12,
            "titleFontSize": 12.5,
            "titleFontWeight": 500,
            "labelOverlap": "greedy",
            "labelSeparation": 6,
        },
        "axisY": {"domain": False, "ticks": False, "minExtent": 44, "labelLimit": 130},
        "legend": {
            "orient": "top",
            "direction": "horizontal",
            "columns": 4,
            "offset": 8,
            "columnPadding": 18,
            "labelLimit": 440,
            "labelColor": "var(--ink)",
            "labelFontSize": 12.5,
            "symbolStrokeWidth": 2,
            "symbolBaseFillColor": "transparent",
            "symbolBaseStrokeColor": "var(--ink)",
            "layout": {"bounds": "flush", "top": {"anchor": "start", "direction": "horizontal", "margin": 22}},
        },
        "title": {
            "anchor": "start",
            "frame": "bounds",
            "fontSize": 12.5,
            "fontWeight": 500,
            "color": "var(--ink)",
            "offset": 8,
            "subtitleColor": "var(--muted)",
            "subtitleFontSize": 11.5,
            "subtitlePadding": 3,
        },
        "mark": {"aria": False},
    }
    return made if themed else coloured(made)
