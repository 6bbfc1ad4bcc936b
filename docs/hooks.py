"""What the site takes from beside docs/: README's sections, examples, and the files that pages link to."""

import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
SECTION = re.compile(r"<!-- README: (.+) -->")
EXAMPLE = re.compile(r"<!-- example: (.+) -->")
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def on_files(files, config):
    """A file of the repository that a page of docs/ links to is one of the site's."""
    for page in list(files.documentation_pages()):
        for path in OUTSIDE.findall(_whole(page.content_string)):
            if (ROOT / path).is_file() and files.get_file_from_path(path) is None:
                of_site = File.generated(
                    config, path, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(of_site)
    return files


def on_page_markdown(markdown, page, **_):
    """Such links as the site has them, and README's sections and examples where a page asks for one."""
    return markdown if "/" in page.file.src_uri else OUTSIDE.sub(r"\1", _whole(markdown))


def _whole(text):
    """The text with examples, and README's sections in it, whose links are then those of a page in docs/."""

    def section(found):
        _, _, rest = README.partition(f"\n## {found[1]}\n")
        return re.sub(r"(?<=\]\()(?!https?:|#)", "../", rest.partition("\n## ")[0]).replace("](../docs/", "](")

    return EXAMPLE.sub(lambda found: _cells(found[1]), SECTION.sub(section, text))


def _cells(example):
    """An example's cells of text and of Python, its headings one level down."""
    parts = CELL.split((ROOT / "examples" / f"{example}.py").read_text(encoding="utf-8"))[1:]
    made = []
    for kind, cell in zip(parts[::2], parts[1::2], strict=True):
        if kind.strip() == "[markdown]":
            made.append(re.sub(r"^#", "##", re.sub(r"^# ?", "", cell.strip(), flags=re.MULTILINE), flags=re.MULTILINE))
        else:
            made.append(f"```python\n{cell.strip()}\n```")
    return "\n\n".join(made)
