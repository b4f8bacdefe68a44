"""Write notebooks as HTML pages or slides whose pictures have their alternative texts.

``jupyter nbconvert`` does the same but for the texts: its present templates leave them out.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import DictLoader
from nbconvert import HTMLExporter, SlidesExporter

_TEMPLATE = """{%% extends '%s/index.html.j2' %%}
{%% block data_png scoped %%}
{%% set alt = output | get_metadata('alt', 'image/png') | escape_html %%}
{{ super() | replace('<img ', '<img alt="' ~ alt ~ '" ', 1) }}
{%% endblock %%}"""


def export(path: Path, folder: Path, *, slides: bool = False) -> Path:
    """Write the notebook at `path`, as it is stored, to an HTML file in `folder`.

    Parameters
    ----------
    slides
        True for a lecture with reveal.js, which the page loads from the network when it is opened.

    Returns
    -------
    Path
        The file.
    """
    kind, theme, suffix = (SlidesExporter, "reveal", ".slides.html") if slides else (HTMLExporter, "lab", ".html")
    loader = DictLoader({"with_alt.html.j2": _TEMPLATE % theme})
    exporter = kind(extra_loaders=[loader], template_file="with_alt.html.j2", exclude_input_prompt=True)
    html, _ = exporter.from_filename(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{path.stem}{suffix}"
    target.write_text(html, encoding="utf-8")
    return target
