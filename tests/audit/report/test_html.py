"""The HTML file stands alone, is well formed, and shows text as text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from audit.report.conftest import CASES, EVIL
from PIL import Image

from lightning_wdefense import ThreatModel
from lightning_wdefense.audit.report.pages.images import images_of, is_image, png
from lightning_wdefense.evaluation.details.examples import Example

pytestmark = pytest.mark.filterwarnings("ignore")

VOID = {"meta", "link", "img"}
SVG_EMPTY = {"rect", "line", "path"}


class Checked(HTMLParser):
    """Keeps what a document holds; tags must be balanced."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_EMPTY, f"<{tag}/> is not closed in HTML"
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.text.append(data)


def document(report, folder) -> str:
    return report.write(folder)[0].read_text()


def test_it_is_well_formed_and_stands_alone(report, tmp_path):
    text = document(report, tmp_path)
    page = Checked(text)
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for tag, name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text.replace("http-equiv", "")
    anchors = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    assert anchors <= {value for _, name, value in page.attributes if name == "id"}
    assert ("meta", "name", "viewport") in page.attributes


def test_it_is_readable_in_light_dark_and_print(report, tmp_path):
    text = document(report, tmp_path)
    for rule in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto"):
        assert rule in text
    used, defined = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--\w+):", text))
    assert used <= defined


def test_text_of_users_stays_text(tmp_path):
    page = Checked(document(CASES["full"](), tmp_path))
    words = "".join(page.text)
    assert words.count(EVIL) >= 5  # title twice, a finding, a setting's name and its value
    assert EVIL in "".join(Checked(document(CASES["rows"](), tmp_path)).text)


def test_numbers_are_readable(report, tmp_path):
    words = " ".join(Checked(document(report, tmp_path)).text)
    for word in ("nan%", " nan ", "None", "inf%", "tensor("):
        assert word not in words, word


def test_pictures_are_those_of_the_samples(tmp_path):
    report = CASES["full"]()
    page = Checked(document(report, tmp_path))
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    examples = [*report.result.examples.least, *report.result.examples.most]
    assert len(pictures) == 3 * len(examples) == 18
    for index, example in enumerate(examples):
        for place, tensor in enumerate((example.inputs, example.attacked)):
            data = base64.b64decode(pictures[3 * index + place].partition(",")[2])
            pixels = torch.tensor(list(Image.open(io.BytesIO(data)).tobytes())).view(8, 8)
            assert torch.equal(pixels, (tensor[0] * 255).round().long())


@pytest.mark.parametrize(("shape", "mode"), [((1, 5, 7), "L"), ((3, 5, 7), "RGB"), ((4, 5, 7), "RGB")])
def test_png(shape, mode):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    read = Image.open(io.BytesIO(png(image)))
    assert (read.mode, read.size) == (mode, (7, 5))
    pixels = torch.frombuffer(bytearray(read.tobytes()), dtype=torch.uint8).view(5, 7, -1).permute(2, 0, 1)
    assert torch.equal(pixels, (image[:3] * 255).round().byte())


def test_large_images_are_made_smaller():
    read = Image.open(io.BytesIO(png(torch.rand(3, 600, 300))))
    assert read.size == (128, 256)


def test_the_difference_is_amplified_around_grey():
    clean = torch.full((1, 2, 2), 0.5)
    delta = torch.tensor([[[0.0, 0.1], [-0.1, 0.05]]])
    example = Example(0, 0, 0, -1, 0.0, torch.stack([clean, clean + delta]))
    images = images_of(example, ThreatModel(eps=0.1))
    assert [word for _, word in images] == ["clean", "attacked", "change × 5"]
    pixels = list(Image.open(io.BytesIO(images[2][0])).tobytes())
    assert pixels == pytest.approx([128, 255, 0, 191], abs=1)


@pytest.mark.parametrize(
    ("shape", "image"), [((3, 8, 8), True), ((6,), False), ((2, 8, 8), False), ((8, 8), False), ((1, 1, 9), False)]
)
def test_what_an_image_is(shape, image):
    assert is_image(torch.zeros(shape)) is image
