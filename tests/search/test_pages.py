"""search.pages: every format holds the same findings, and a page of HTML stands alone."""

import csv
import html.parser
import io
import json
import re
from pathlib import Path

import pytest

from samplers.errors import InputError
from search import findings, pages


@pytest.fixture
def found(store, play):
    job = play(store)
    return findings.of_job(store, job.id)


class Page(html.parser.HTMLParser):
    """What a page has, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "use", "path", "line"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.fetched.append(value)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "use", "path", "line"):
            assert self.open.pop() == tag


def test_a_page_stands_alone_and_is_well_formed(found):
    text = pages.write(found, "html")
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "url(http" not in text
    assert page.tags.count("svg") == len(found.plots)
    assert page.tags.count("table") == len(found.tables)
    assert page.tags.count("img") == len(found.pictures)
    assert "prefers-color-scheme: dark" in text


def test_the_job_file_has_paths_that_start_in_its_folder(store, play):
    job = play(store, spec={"model": {"path": "net.pt"}, "features": "/x/y/f.pt", "folder": "/x/y"})
    text = pages.write(findings.of_job(store, job.id), "md")
    assert "features: f.pt\n" in text
    assert "/x/y" not in text


def test_names_of_users_are_text_and_not_markup(store, play):
    job = play(store, model="<script>alert(1)</script>|_x*")
    found = findings.of_job(store, job.id)
    page = Page(pages.write(found, "html"))
    assert "script" not in page.tags
    tex = pages.write(found, "tex")
    assert (
        re.search(r"(?<!\\)[_#%&]", re.sub(r"^%.*$|\$[^$]*\$", "", tex, flags=re.M).replace(" & ", " "))
        is None
    )


def test_markdown_has_every_table_and_links_to_the_plots(found):
    text = pages.write(found, "md", Path("pictures"))
    for table in found.tables:
        assert f"## {table.title}" in text
    assert text.count("![") == len(found.plots) + len(found.pictures)
    assert "](pictures/images-0.png)" in text
    assert "](pictures/cost.svg)" in text
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(blocks) == len(found.tables)
    for block in blocks:  # readers split at every | that is not escaped
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_latex_balances_its_tables(found):
    text = pages.write(found, "tex")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(found.tables)
    assert "λ" not in text
    assert "±" not in text


def test_csv_has_the_numbers_as_they_were_stored(found):
    rows = list(csv.DictReader(io.StringIO(pages.write(found, "csv"))))
    assert [float(row["distance"]) for row in rows] == [e.distance for e in found.evaluations]
    assert [json.loads(row["lambdas"]) for row in rows] == [list(e.lambdas) for e in found.evaluations]


def test_json_is_the_plain_data(found):
    assert json.loads(pages.write(found, "json")) == found.as_dict()


def test_the_format_is_asked_for_or_the_files_ending():
    assert pages.form_of(None, None) == "md"
    assert pages.form_of(Path("a.tex"), None) == "tex"
    assert pages.form_of(Path("a.txt"), "csv") == "csv"
    with pytest.raises(InputError, match="a.txt: the ending says none of html, md, csv, json, tex"):
        pages.form_of(Path("a.txt"), None)


def test_plots_are_written_as_svg_and_png(found, tmp_path):
    pages.save_plots(found, tmp_path / "plots")
    names = {f"{plot.key}.{suffix}" for plot in found.plots for suffix in ("svg", "png")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names | {
        f"images-{place}.png" for place in range(len(found.pictures))
    }
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--plots .* cannot be made"):
        pages.save_plots(found, tmp_path / "file" / "plots")
