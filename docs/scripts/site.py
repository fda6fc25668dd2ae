"""mkdocs' hook: pages link to files of the repository beside docs/, as GitHub shows them; the site carries copies.

A link from a page to ``../examples/own_loop.py`` leads to ``repository/examples/own_loop.py`` of the site, one to a
folder or to a file in Markdown becomes its text.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    wanted = {link for page in ROOT.glob("docs/*.md") for _, _, link, _ in OUTSIDE.findall(page.read_text())}
    for link in sorted(wanted):
        path = ROOT / link
        if not path.exists():
            raise FileNotFoundError(f"a page links to ../{link}, which is not there")
        if carried(path):
            files.append(File.generated(config, f"repository/{link}", abs_src_path=str(path)))
    return files


def carried(path):
    return path.is_file() and path.suffix != ".md"


def on_page_markdown(markdown, page, config, files):
    def link(found):
        mark, text, path, _ = found.groups()
        return f"{mark}[{text}](repository/{path})" if carried(ROOT / path) else text

    return OUTSIDE.sub(link, markdown)
