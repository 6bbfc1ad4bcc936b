"""Adds to the site what is outside of docs/: the examples, and the files that pages link to."""

import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
EXAMPLE = re.compile(r"<!-- example: (.+) -->")
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
FORMATTER = re.compile(r"  # fmt: (skip|off|on)$", re.MULTILINE)


def on_files(files, config):
    """Adds the files of the repository that a page of docs/ links to."""
    for page in list(files.documentation_pages()):
        for path in OUTSIDE.findall(page.content_string):
            if (ROOT / path).is_file() and files.get_file_from_path(path) is None:
                of_site = File.generated(
                    config, path, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(of_site)
    return files


def on_page_markdown(markdown, page, **_):
    """Changes links to such files into the site's, and inserts the examples that a page names."""
    if "/" in page.file.src_uri:
        return markdown
    return EXAMPLE.sub(lambda found: _cells(found[1]), OUTSIDE.sub(r"\1", markdown))


def _cells(example):
    """An example's cells as Markdown and blocks of Python, with headings one level lower, and a link to its file."""
    parts = CELL.split((ROOT / "examples" / f"{example}.py").read_text(encoding="utf-8"))[1:]
    made = []
    for kind, cell in zip(parts[::2], parts[1::2], strict=True):
        if kind.strip() == "[markdown]":
            made.append(re.sub(r"^#", "##", re.sub(r"^# ?", "", cell.strip(), flags=re.MULTILINE), flags=re.MULTILINE))
        else:
            made.append(f"```python\n{FORMATTER.sub('', cell.strip())}\n```")
    made.insert(1, f"The whole file: [{example}.py](examples/{example}.py).")
    return "\n\n".join(made)
