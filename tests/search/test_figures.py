"""search.figures: plots become pictures."""

import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from samplers.errors import InputError
from search import figures, plots


def test_every_plot_becomes_an_svg_in_the_colour_of_its_page_and_a_png_on_white(store, play, tmp_path):
    job = play(store)
    for plot in plots.of_job(job, store.evaluations(job.id)):
        svg = figures.inline_svg(plot)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "currentColor" in svg
        words = re.sub(r"<[^>]+>", " ", svg)
        assert plot.x_label.split(" (")[0] in words
        assert figures.inline_svg(plot) == svg
        figures.save_plot(plot, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
            assert min(image.size) > 400


def test_an_unknown_ending_and_a_missing_folder_are_refused(store, play, tmp_path):
    job = play(store)
    plot = plots.cost(job, store.evaluations(job.id))
    with pytest.raises(InputError, match="plot.doc"):
        figures.save_plot(plot, tmp_path / "plot.doc")
    with pytest.raises(InputError, match="cannot be written"):
        figures.save_plot(plot, tmp_path / "none" / "plot.png")
