"""Pages in headless Chromium: they show what ONNX Runtime and this library compute, and make no other request.

Needs a ``chromium``, the package ``playwright`` (extra "browser") and onnxruntime-web: from the cache, or npm.
"""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from repvgg import reparameterize
from repvgg.data import DataConfig
from repvgg.data.dataset import read_images, read_whole_image
from repvgg.data.decode import decode
from repvgg.data.transforms import CenterCrop
from repvgg.deploy import OnnxRunner
from repvgg.deploy.onnxruntime_web import SCRIPT, WASM, find_runtime
from repvgg.deploy.targets import export
from repvgg.errors import RepvggError
from repvgg.models import create_model, describe_model
from repvgg.verify import verify
from tests.bn_statistics import trained_like
from tests.deploy.web_pages import photographs, request, segmenter

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLASSES = tuple(f"class number {index}" for index in range(23))
SIDE = 32
RESULT = "() => { const r = repvgg.result(); return {...r, pixels: [...r.pixels], mask: [...(r.mask ?? [])]}; }"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """A folder with onnxruntime-web; npm downloads it once into the cache of this run."""
    try:
        found = find_runtime()
    except RepvggError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    (folder / SCRIPT).write_bytes(found.script)
    (folder / WASM).write_bytes(found.wasm)
    return folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def network():
    torch.manual_seed(2)
    return trained_like(create_model("repvgg_t0", num_classes=len(CLASSES)))


@pytest.fixture(scope="module")
def folder(runtime, tmp_path_factory):
    """The page of a small classifier; a photograph lies in it, as on a server."""
    model = network()
    plain, _ = reparameterize(model)
    about = describe_model(plain, "plain", input_size=SIDE, classes=CLASSES)
    out = tmp_path_factory.mktemp("page") / "page"
    wanted = request(plain, out, (3, SIDE, SIDE), onnxruntime_web=runtime)
    wanted.notes.update(about.to_header())
    export("web", wanted)
    shutil.copy(photographs()[0], out / "photograph.jpg")
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class Tab:
    """A page of a folder, opened from a local server."""

    def __init__(self, browser, folder, query="", address=None):
        handler = functools.partial(Quiet, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.origin = f"http://127.0.0.1:{self.server.server_port}/"
        self.page = browser.new_page()
        self.problems, self.addresses = [], []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(address or f"{self.origin}index.html{query}")

    def wait(self, *states):
        self.page.wait_for_selector(", ".join(f"body[data-state={state}]" for state in states), timeout=120_000)

    def show(self, file):
        self.page.set_input_files("#file", file)
        self.wait("done", "failed")
        return self.page.evaluate(RESULT)

    def close(self):
        self.page.close()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def tab(browser):
    tabs = []

    def open_tab(*arguments, **options):
        tabs.append(Tab(browser, *arguments, **options))
        return tabs[-1]

    yield open_tab
    for one in tabs:
        one.close()


def same_as_in_python(folder, file, result):
    """Whether logits are those of ONNX Runtime, and equal to float64 within verify's tolerance."""
    x = read_images([file], DataConfig(), SIDE, 3)
    logits = torch.tensor([result["logits"]], dtype=torch.float32)
    evidence = verify(network(), lambda images: logits, [x])
    assert evidence.passed, str(evidence)
    native = OnnxRunner(folder / "model.onnx")(x)
    allowed = 2 * evidence.tolerance * float(native.abs().max())  # each of both is that close to float64
    assert float((native - logits).abs().max()) <= allowed
    return logits


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "transparent", "grey", "sideways"])
def test_a_classifier_on_photographs(tab, folder, tmp_path, kind):
    file, image = tmp_path / "photograph.png", read(photographs()[1])
    if kind == "jpg":
        file = photographs()[1]
    elif kind == "webp":
        file = file.with_suffix(".webp")
        image.save(file, quality=80)
    elif kind == "transparent":
        alpha = Image.linear_gradient("L").resize(image.size)
        image.putalpha(alpha.point(lambda value: 255 * (value > 99)))  # partial transparency is rounded differently
        image.save(file)
    elif kind == "sideways":
        exif = Image.Exif()
        exif[0x0112] = 6
        file = file.with_suffix(".jpg")
        image.save(file, exif=exif, quality=95)
    else:
        (image.convert("L") if kind == "grey" else image).save(file)
    opened = tab(folder)
    opened.wait("ready")
    result = opened.show(file)
    expected = CenterCrop(DataConfig(), SIDE, 3)(decode(file, "photograph"), "photograph")
    assert result["pixels"] == expected.permute(1, 2, 0).flatten().tolist()
    logits = same_as_in_python(folder, file, result)
    values, indices = logits[0].softmax(0).topk(5)
    names = opened.page.locator("#classes .name").all_inner_texts()
    shares = opened.page.locator("#classes .share").all_inner_texts()
    assert names == [CLASSES[index] for index in indices]
    assert shares == [f"{100 * value:.1f} %" for value in values.tolist()]
    assert opened.problems == []
    assert opened.page.locator("#error").is_hidden()
    assert all(address.startswith((opened.origin, "blob:")) for address in opened.addresses)


def read(file):
    with Image.open(file) as image:
        return image.copy()


def test_an_image_by_link_and_only_of_this_server(tab, folder):
    opened = tab(folder, "?image=photograph.jpg")
    opened.wait("done")
    same_as_in_python(folder, photographs()[0], opened.page.evaluate(RESULT))
    opened = tab(folder, "?image=//other.example/photograph.jpg")
    opened.wait("failed")
    assert opened.page.inner_text("#error") == "?image= names an image on this server only."
    assert not any("other.example" in address.split("?")[0] for address in opened.addresses)


def test_a_single_file_without_a_server(tab, folder, runtime, tmp_path):
    plain, _ = reparameterize(network())
    export("web", request(plain, tmp_path / "page", (3, SIDE, SIDE), onnxruntime_web=runtime, single_file=True))
    opened = tab(tmp_path / "page", address=(tmp_path / "page" / "index.html").as_uri())
    opened.wait("ready")
    same_as_in_python(folder, photographs()[0], opened.show(photographs()[0]))
    assert opened.problems == []
    assert all(address.startswith(("file:", "blob:", "data:")) for address in opened.addresses)
    assert opened.page.locator("#classes .name").first.inner_text().startswith("class ")


def test_masks(tab, runtime, tmp_path):
    model, shape = segmenter(), (3, 120, 160)
    export("web", request(model, tmp_path / "page", shape, onnxruntime_web=runtime))
    file = tmp_path / "small.png"
    read(photographs()[0]).resize((131, 97)).save(file)  # smaller than the input: neither resized nor enlarged
    opened = tab(tmp_path / "page")
    opened.wait("ready")
    result = opened.show(file)
    pixels, x = read_whole_image(file, DataConfig(), 3)
    assert result["pixels"] == pixels.permute(1, 2, 0).flatten().tolist()
    padded = nn.functional.pad(x, (0, 160 - 131, 0, 120 - 97))  # 0 is the mean pixel
    with torch.inference_mode():
        logits = model.double()(padded.double())[0, :, :97, :131]
    mask = torch.tensor(result["mask"]).reshape(97, 131)
    # The class of each pixel is the best one, or as good within the rounding of float32.
    loss = logits.max(0).values - logits.gather(0, mask[None]).squeeze(0)
    assert float(loss.max()) <= 2 * verify(model, model.float(), [padded]).tolerance * float(logits.abs().max())
    assert len(set(result["mask"])) > 1
    assert result["counts"] == np.bincount(result["mask"], minlength=5).tolist()
    shares = opened.page.locator("#classes .share").all_inner_texts()
    counts = sorted(filter(None, result["counts"]), reverse=True)
    assert shares == [f"{100 * count / (97 * 131):.1f} %" for count in counts]
    # The colours: at full opacity the picture is the palette, at none the image.
    for value, expected in ((100, palette_of(tmp_path / "page")[mask.numpy()]), (0, pixels.permute(1, 2, 0).numpy())):
        opened.page.locator("#opacity").fill(str(value))
        drawn = opened.page.evaluate(
            "() => { const c = document.getElementById('picture');"
            " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }"
        )
        assert np.array_equal(np.array(drawn).reshape(97, 131, 4)[..., :3], expected)
    assert opened.problems == []


def palette_of(folder):
    return np.array(json.loads((folder / "repvgg-page.json").read_text())["palette"])


def test_errors_are_sentences(tab, folder, tmp_path):
    opened = tab(folder)
    opened.wait("ready")
    (tmp_path / "text.jpg").write_text("no image")
    opened.page.set_input_files("#file", tmp_path / "text.jpg")
    opened.wait("failed")
    assert opened.page.inner_text("#error") == (
        "This file is not an image that the browser can read: choose a JPEG, PNG or WebP file."
    )
    same_as_in_python(folder, photographs()[0], opened.show(photographs()[0]))  # the next image is fine
    assert opened.page.locator("#error").is_hidden()
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"damaged")
    opened = tab(broken)
    opened.wait("broken")
    assert opened.page.inner_text("#error").endswith(".")
    (broken / "model.onnx").unlink()
    opened = tab(broken)
    opened.wait("broken")
    assert opened.page.inner_text("#error") == "Model.onnx cannot be read (status 404)."
    opened = tab(folder, address=(folder / "index.html").as_uri())
    assert opened.page.locator("#drop").is_visible()  # what a browser allows of a folder without a server varies


def test_the_keyboard_suffices(tab, folder):
    opened = tab(folder)
    opened.wait("ready")
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("() => document.activeElement.id") == "file"
    with opened.page.expect_file_chooser() as chooser:
        opened.page.keyboard.press("Space")
    chooser.value.set_files(photographs()[0])
    opened.wait("done")


@pytest.mark.parametrize("width", [1200, 500, 320])
def test_nothing_overflows(tab, folder, width):
    opened = tab(folder)
    opened.page.set_viewport_size({"width": width, "height": 700})
    opened.wait("ready")
    opened.show(photographs()[0])
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= width
