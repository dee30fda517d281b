"""The page in a real browser: its own scripts, its own clicks, a real server behind it."""

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

# Where pictures of the page are kept to look at.
ARTEFACTS = Path(__file__).parents[2] / "build" / "demo"

GIVE_FILE = """(() => {
  const bytes = Uint8Array.from(atob(%s), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], %s, { type: "image/png" }));
  %s
  return true;
})()"""
BY_CHOICE = """document.getElementById("file").files = transfer.files;
  document.getElementById("file").dispatchEvent(new Event("change"));"""
BY_DROP = """document.getElementById("drop").dispatchEvent(
    new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));"""

SHOWN = "[...document.querySelectorAll('.box')].map((box) => box.innerText)"
ERROR = "document.getElementById('error').innerText"


class Visitor:
    """Does in the page what a person would."""

    def __init__(self, browser):
        self.browser, self.run, self.until = browser, browser.run, browser.until

    def give(self, data, name="picture.png", how=BY_CHOICE):
        encoded = json.dumps(base64.b64encode(data).decode())
        self.run(GIVE_FILE % (encoded, json.dumps(name), how))

    def write(self, text, kind="classes"):
        self.run(f"document.querySelector('[value={kind}]').click()")
        self.run(f"document.getElementById('text').value = {json.dumps(text)}")

    def find(self):
        self.run("document.getElementById('find').click()")
        self.until("!document.getElementById('find').disabled")

    def slide(self, value):
        self.run(
            f"((slider) => {{ slider.value = {value}; slider.dispatchEvent(new Event('input')); "
            "return true; })(document.getElementById('threshold'))"
        )

    def save(self, name):
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        path = ARTEFACTS / name
        assert self.browser.tell(save=str(path))
        return path


@pytest.fixture
def visitor(browser, server):
    browser.tell(resize=[1280, 800])
    assert browser.tell(open=server.url)
    visitor = Visitor(browser)
    visitor.until("document.querySelectorAll('#examples button').length === 3")
    yield visitor
    assert browser.tell(complaints=None) == []


def test_upload_prompt_boxes(visitor, tiny):
    visitor.give(tiny.images[0].read_bytes())
    visitor.until("document.getElementById('image').naturalWidth === 80")
    visitor.write("red circle. blue cross")
    visitor.find()
    boxes = visitor.run(SHOWN)
    assert boxes and visitor.run(ERROR) == ""
    # As many as the answer has above the slider, with its words and scores.
    expected = visitor.run(
        "answer.detections.filter(({ score }) => score >= 0.1)"
        ".map(({ words, score }) => `${words} ${score.toFixed(2)}`)"
    )
    assert sorted(boxes) == sorted(expected)
    assert visitor.run("document.getElementById('sentence').innerText") == "red circle. blue cross"
    assert "s in all: model" in visitor.run("document.getElementById('timing').innerText")
    # Every box lies where the answer says, over the picture as it is shown.
    assert visitor.run(
        """[...document.querySelectorAll(".box")].every((node) => {
          const [x1, y1, x2, y2] = answer.detections[node.dataset.box].box;
          const image = document.getElementById("image").getBoundingClientRect();
          const box = node.getBoundingClientRect();
          const scale = image.width / answer.width;
          return Math.abs(image.height / answer.height - scale) < 0.02 * scale
            && Math.abs(box.left - image.left - x1 * scale) < 1.5
            && Math.abs(box.top - image.top - y1 * scale) < 1.5
            && Math.abs(box.width - (x2 - x1) * scale) < 6.5
            && Math.abs(box.height - (y2 - y1) * scale) < 6.5;
        })"""
    )
    # The same words have the same colour in the sentence, over the boxes and in the list.
    colors = visitor.run(
        """[...document.querySelectorAll("[data-target]")].map((node) =>
          `${node.dataset.target} ${getComputedStyle(node).getPropertyValue("--color")}`)"""
    )
    assert len(set(colors)) == len({one.split()[0] for one in colors}) == 2
    path = visitor.save("answer.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert picture.size == (1280, 800)
    wanted = visitor.run("answer.colors")
    for color in wanted:
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - rgb).max(1) < 12).sum() > 100, color


def test_slider_filters_at_once_without_asking_again(visitor, tiny):
    visitor.give(tiny.images[0].read_bytes())
    visitor.write("red circle. blue cross")
    visitor.find()
    visitor.run("(window.fetch = () => { throw Error('asked again') }) && true")
    scores = sorted(visitor.run("answer.detections.map(({ score }) => score)"))
    middle = round(scores[len(scores) // 2], 2)
    visitor.slide(middle)
    assert len(visitor.run(SHOWN)) == sum(score >= middle for score in scores)
    visitor.slide(1)
    assert visitor.run(SHOWN) == []
    assert "weaker" in visitor.run("document.getElementById('count').innerText")
    assert visitor.run("document.querySelectorAll('mark.missing').length") == 2


def test_a_word_lights_up_its_boxes_and_a_box_its_word(visitor, tiny):
    visitor.give(tiny.images[0].read_bytes(), how=BY_DROP)
    visitor.until("document.getElementById('image').naturalWidth === 80")
    visitor.write("red circle. blue cross")
    visitor.find()
    lit = (
        "[...document.querySelectorAll('.lit')].map((node) => [node.tagName, node.dataset.target])"
    )
    all_of_1 = "document.querySelectorAll('.box[data-target=\"1\"]').length"
    assert visitor.run(lit) == []
    # By keyboard as well as by pointer.
    visitor.run("(document.querySelectorAll('mark')[1].focus(), true)")
    found = visitor.run(lit)
    assert {target for _, target in found} == {"1"} and ["MARK", "1"] in found
    assert sum(tag == "DIV" for tag, _ in found) == visitor.run(all_of_1) > 0
    visitor.run("(document.activeElement.blur(), true)")
    assert visitor.run(lit) == []
    visitor.run(
        "document.querySelector('.box[data-target=\"0\"]')"
        ".dispatchEvent(new PointerEvent('pointerenter'))"
    )
    assert sorted(visitor.run(lit)) == [["DIV", "0"], ["LI", "0"], ["MARK", "0"]]


def test_examples_and_kinds(visitor):
    for kind in ("classes", "caption", "expression"):
        visitor.run(f"document.querySelector('[value={kind}]').click()")
        visitor.run("document.querySelectorAll('#examples button')[1].click()")
        visitor.until(f"answer !== null && answer.kind === '{kind}'")
        texts = visitor.run("about.examples[1].texts")
        assert visitor.run("document.getElementById('sentence').innerText") == texts[kind]
    visitor.slide(1)
    assert len(visitor.run(SHOWN)) == 1  # an expression's best


def test_text_is_text(visitor, tiny):
    visitor.give(tiny.images[0].read_bytes(), name="<script>x</script>.png")
    visitor.write("<b>x</b>", kind="expression")
    visitor.find()
    assert visitor.run("document.getElementById('sentence').innerText") == "<b>x</b>"
    assert visitor.run("document.querySelectorAll('#sentence *').length") == 1
    assert any("<b>x</b>" in box for box in visitor.run(SHOWN))
    # An answer may hold anything.
    text = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    box = {"box": [1, 1, 9, 9], "score": 0.9, "target": 0, "words": text}
    answer = {
        **{"width": 80, "height": 70, "kind": "caption", "targets": [text], "detections": [box]},
        "pieces": [{"text": text, "target": 0}],
        "colors": ["#ff0000"],
        "seconds": {"waited": 0, "decoded": 0, "predicted": 0},
    }
    visitor.run(f"(receive({json.dumps(answer)}, 1), true)")
    assert visitor.run(SHOWN) == [f"{text} 0.90"]
    assert visitor.run("document.getElementById('sentence').innerText") == text
    assert visitor.run("document.querySelectorAll('[onerror], main script').length") == 0
    assert "owned" not in visitor.run("document.title")


def test_bad_uploads_are_told_and_the_page_goes_on(visitor, tiny):
    visitor.run("document.getElementById('find').click()")  # nothing written: the form says so
    visitor.write("red circle")
    visitor.find()
    assert visitor.run(ERROR) == "Choose a picture first."
    for data, message in (
        (b"", "cannot show this file"),
        (b"no picture", "cannot show this file"),
        (os.urandom(600_000), "0.6 MB, and 0.5 MB are the limit"),
    ):
        visitor.give(data)
        visitor.until(f"{ERROR}.includes({json.dumps(message)})")
        assert visitor.run("picture === null")
    svg = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    visitor.run(f"(show(new Blob([{json.dumps(svg)}], {{ type: 'image/svg+xml' }})), true)")
    visitor.until("picture !== null")
    visitor.find()
    assert "no picture of a kind that is read here" in visitor.run(ERROR)
    visitor.save("error.png")
    visitor.give(tiny.images[1].read_bytes())
    visitor.until("document.getElementById('image').naturalWidth === 60")
    assert visitor.run(ERROR) == ""
    visitor.find()
    assert visitor.run(SHOWN)


def test_turned_pictures(visitor, tiny, tmp_path):
    """The browser turns a picture as the server does."""
    image = Image.open(tiny.images[0])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    visitor.give((tmp_path / "turned.jpg").read_bytes())
    visitor.until("document.getElementById('image').naturalWidth === 70")
    visitor.write("red circle")
    visitor.find()
    assert visitor.run("[answer.width, answer.height]") == [70, 80]


def test_on_a_phone(visitor, browser, tiny):
    browser.tell(resize=[360, 740])
    visitor.give(tiny.images[0].read_bytes())
    visitor.write("red circle. blue cross")
    visitor.find()
    visitor.until("innerWidth <= 360")
    assert visitor.run("document.documentElement.scrollWidth <= innerWidth")
    assert visitor.run(
        "document.getElementById('image').getBoundingClientRect().right <= innerWidth"
    )
    visitor.save("phone.png")
