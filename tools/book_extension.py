"""What the book adds to Sphinx: formulas without a network, and notebooks behind the download button."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import nbformat
import notebooks


def local_mathjax(app: Any, config: Any) -> None:
    """Serve MathJax from the book itself, if the package that carries it is installed (else from a CDN)."""
    spec = importlib.util.find_spec("mathjax")
    folder = (
        Path(spec.submodule_search_locations[0]) / "static" / "mathjax" / "es5"
        if spec and spec.submodule_search_locations
        else None
    )
    if folder and (folder / "tex-mml-chtml.js").exists():
        config.mathjax_path = "mathjax/tex-mml-chtml.js"
        app.dsv3_mathjax = folder


def copy_mathjax(app: Any, exception: Exception | None) -> None:
    folder = getattr(app, "dsv3_mathjax", None)
    if exception or folder is None or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "mathjax"
    (target / "output" / "chtml").mkdir(parents=True, exist_ok=True)
    shutil.copy2(folder / "tex-mml-chtml.js", target)
    shutil.copytree(folder / "output" / "chtml" / "fonts", target / "output" / "chtml" / "fonts", dirs_exist_ok=True)


def notebook_download(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Write the page's notebook beside its source; the theme's download menu links to it."""
    if doctree is None or app.builder.format != "html":
        return
    page = Path(app.env.doc2path(pagename))
    if page.suffix == ".md" and notebooks.is_notebook(page):
        target = Path(app.outdir) / "_sources" / f"{pagename}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebooks.convert(page, Path(app.srcdir), Path(app.outdir).parent), target)
        context["ipynb_source"] = f"{pagename}.ipynb"


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", local_mathjax, priority=100)
    app.connect("build-finished", copy_mathjax)
    app.connect("html-page-context", notebook_download, priority=100)  # before the theme draws its buttons
    return {"parallel_read_safe": True, "parallel_write_safe": True}
