"""Pages of the site that are not in docs/: README, CONTRIBUTING, the notebooks, and the API reference (a hook of mkdocs.yml)."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them to the files of the site."""
    for name in ("README.md", "CONTRIBUTING.md"):
        text = Path(ROOT, name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name.replace("README", "index"), content=text))
    for path in (Path(ROOT, "LICENSE"), *Path(ROOT, "examples").glob("*.ipynb")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for module in re.findall(r"api/([\w.]+)\.md", str(config.nav)):
        files.append(File.generated(config, f"api/{module}.md", content=f"# `{module}`\n\n::: {module}\n"))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to what lies beside docs/ lead into the site."""
    return markdown.replace("](../", "](")
