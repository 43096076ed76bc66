"""search.figures: plots become pictures."""

import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize(
    ("count", "shape", "size"), [(64, (1, 8, 8), (398, 398)), (5, (3, 100, 60), (184, 202))]
)
def test_a_grid_shows_the_images_in_order_and_enlarges_small_ones(count, shape, size):
    images = torch.arange(count * math.prod(shape)).reshape(count, *shape).remainder(251).to(torch.uint8)
    with Image.open(io.BytesIO(figures.grid(images))) as sheet:
        assert sheet.size == size
        pixels = np.asarray(sheet.convert("RGB"))
    times = 6 if shape[1] == 8 else 1
    step = shape[1] * times + 2
    columns = 8 if count == 64 else 3
    for place, image in enumerate(images):
        top, left = place // columns * step, place % columns * (shape[2] * times + 2)
        part = pixels[top : top + step - 2 : times, left : left + shape[2] * times : times]
        assert (part == image.permute(1, 2, 0).numpy()).all()


def test_an_unknown_ending_and_a_missing_folder_are_refused(store, play, tmp_path):
    job = play(store)
    plot = plots.cost(job, store.evaluations(job.id))
    with pytest.raises(InputError, match="plot.doc"):
        figures.save_plot(plot, tmp_path / "plot.doc")
    with pytest.raises(InputError, match="cannot be written"):
        figures.save_plot(plot, tmp_path / "none" / "plot.png")
