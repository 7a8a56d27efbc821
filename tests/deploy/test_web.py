import base64
import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from repvgg.checkpoints import Metadata
from repvgg.data import DataConfig
from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD
from repvgg.data.dataset import read_images
from repvgg.data.label_sets import voc_colours
from repvgg.data.transforms import CenterCrop, pixels_of
from repvgg.deploy import OnnxRunner, web
from repvgg.deploy.onnxruntime_web import SCRIPT, WASM
from repvgg.deploy.targets import export
from repvgg.errors import UsageError
from tests.deploy.web_pages import SCRIPT_TEXT, WASM_BYTES, classifier, request, runtime_folder, segmenter

FILES = {
    "index.html",
    "app.js",
    "style.css",
    "worker.js",
    "preprocessing.mjs",
    "model.onnx",
    "repvgg-page.json",
    SCRIPT,
    WASM,
}
TEXTS = sorted(web._TEMPLATES.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    runtime = runtime_folder(folder)
    return export(
        "web", request(classifier(), folder / "page", (3, 20, 20), onnxruntime_web=runtime, crop_fraction=0.9)
    )


def test_the_folder_is_complete(exported):
    folder = exported.path
    assert {file.name for file in folder.iterdir()} == FILES
    assert (folder / SCRIPT).read_bytes() == SCRIPT_TEXT
    assert (folder / WASM).read_bytes() == WASM_BYTES
    assert exported.evidence.passed
    x = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(OnnxRunner(folder / "model.onnx")(x), classifier()(x).detach(), rtol=1e-4, atol=1e-6)
    serve, untested = exported.remarks
    assert "http.server --directory" in serve
    assert "not tested with onnxruntime-web 9.9.9" in untested
    assert exported.contents.startswith("a page for classification of images of 3 x 20 x 20, ")


def test_the_description_has_what_the_page_reads(exported):
    about = json.loads((exported.path / "repvgg-page.json").read_text())
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in ((SCRIPT, SCRIPT_TEXT), (WASM, WASM_BYTES))}
    assert about["runtime"] == {"version": "9.9.9", "script": SCRIPT, "wasm": WASM, "sha256": digests}
    assert about["inputShape"] == [3, 20, 20]
    assert (about["kind"], about["numClasses"], about["cropFraction"]) == ("classification", 7, 0.9)
    assert (about["mean"], about["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    scripts = "".join(path.read_text() for path in TEXTS if path.suffix in (".js", ".mjs"))
    read = set(re.findall(r"\babout\.(\w+)", scripts))
    assert read <= set(about)
    assert set(about) - read == {"writtenBy"}


def test_a_missing_runtime_is_reported_before_the_export(tmp_path):
    with pytest.raises(UsageError, match="There is no '"):
        export("web", request(classifier(), tmp_path / "page", (3, 20, 20), onnxruntime_web=tmp_path / "missing.tgz"))
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_holds_all_others(exported, tmp_path):
    folder = shutil.copytree(exported.path, tmp_path / "page")
    web._embed(folder)
    assert {file.name for file in folder.iterdir()} == {"index.html", "repvgg-page.json"}
    page = (folder / "index.html").read_text()
    embedded = dict(re.findall(r'<script type="text/plain" data-asset="([^"]+)">([^<]+)</script>', page))
    assert set(embedded) == FILES - {"index.html", "app.js", "style.css"}
    for name, text in embedded.items():
        assert base64.b64decode(text) == (exported.path / name).read_bytes()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "'self'" not in policy
    assert "connect-src" not in policy  # default-src 'none' forbids every request
    for tag, directive in (("style", "style-src"), ('script type="module"', "script-src")):
        text = re.search(f"<{tag}>(.*?)</{tag.split()[0]}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "src=" not in page.replace("data-asset=", "")
    assert "style.css" not in page


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_pages_name_no_other_server(path):
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", path.read_text())


def test_the_page_has_a_content_security_policy():
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', (web._TEMPLATES / "index.html").read_text())[1]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == directives["style-src"] == "'self'"
    assert "unsafe-inline" not in policy
    assert "'unsafe-eval'" not in policy


def test_networks_that_a_page_can_show():
    about = web.describe_page(segmenter(), (3, 9, 17), {})
    assert (about.kind, about.num_classes, about.classes) == ("segmentation", 5, ())
    assert about.palette == tuple(map(tuple, voc_colours(5).tolist()))
    grey = web.describe_page(classifier(1), (1, 20, 20), {})
    assert grey.mean == (sum(IMAGENET_MEAN) / 3,)
    assert grey.palette == ()
    colours = tuple((10 * k, 0, 5) for k in range(5))
    header = Metadata(
        "mine", "plain", 5, 3, 17, mean=(0.5,) * 3, std=(0.25,) * 3, classes=tuple("abcde"), palette=colours
    ).to_header()
    known = web.describe_page(segmenter(), (3, 9, 17), header)
    assert (known.name, known.classes, known.palette, known.mean, known.std) == (
        "mine",
        tuple("abcde"),
        colours,
        (0.5,) * 3,
        (0.25,) * 3,
    )


def test_networks_that_a_page_cannot_show():
    with pytest.raises(UsageError, match=r"square images, got 20 x 24: add --input-size 20 20"):
        web.describe_page(classifier(), (3, 20, 24), {})
    with pytest.raises(UsageError, match="1 or 3 channels, and the network takes 4"):
        web.describe_page(classifier(4), (4, 20, 20), {})
    with pytest.raises(UsageError, match=r"the network returns a tensor of shape \(1, 8, 10, 10\)"):
        web.describe_page(classifier()[:2], (3, 20, 20), {})
    with pytest.raises(UsageError, match="at most 255 classes, and the network has 300"):
        web.describe_page(segmenter(300), (3, 9, 9), {})
    with pytest.raises(UsageError, match="crop_fraction"):
        web.describe_page(classifier(), (3, 20, 20), {}, crop_fraction=1.5)


PREPARE = """
import fs from "node:fs";
const { prepare } = await import(process.argv[1]);
const cases = JSON.parse(fs.readFileSync(0, "utf8"));
const results = cases.map(({ rgba, width, height, about }) => {
  const { input, pixels, crop } = prepare(Uint8ClampedArray.from(rgba), width, height, about);
  return { input: Array.from(input), pixels: Array.from(pixels), crop };
});
process.stdout.write(JSON.stringify(results));
"""


def in_node(cases):
    """Run the page's preprocessing on images, each with the fields of repvgg-page.json that it reads."""
    requests = []
    for image, about in cases:
        rgba = np.asarray(image.convert("RGBA"))
        requests.append(
            {"rgba": rgba.reshape(-1).tolist(), "width": image.width, "height": image.height, "about": about}
        )
    path = (web._TEMPLATES / "preprocessing.mjs").as_uri()
    command = ["node", "--input-type=module", "--eval", PREPARE, path]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def about_of(model_shape, **changes):
    channels = model_shape[0]
    about = {"kind": "classification", "inputShape": model_shape, "cropFraction": 0.875, "interpolation": "bilinear"}
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.4,), (0.3,))
    return {**about, "mean": mean, "std": std, **changes}


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_preprocessing_in_javascript_is_that_of_the_library(tmp_path):
    generator = np.random.default_rng(3)
    # Shrunk and enlarged, wide and high, of the input's size already, halves to round (33 - 16) / 2, a 3-pixel image.
    sizes = [(97, 61), (16, 16), (33, 18), (19, 33), (3, 5), (64, 64), (18, 18), (200, 17)]
    # Before version 13, Pillow resized rows first in images of all shapes.
    sizes += [(40, 131), (17, 300), (40, 80)] if int(PIL.__version__.partition(".")[0]) >= 13 else []
    cases, expected = [], []
    for number, (width, height) in enumerate(sizes):
        for channels in (3, 1):
            for interpolation in ("bilinear", "bicubic"):
                crop_fraction = (0.875, 1.0, 0.6)[number % 3]
                image = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
                path = tmp_path / f"{len(cases)}.png"
                image.save(path)
                about = about_of((channels, 16, 16), interpolation=interpolation, cropFraction=crop_fraction)
                config = DataConfig(
                    mean=about["mean"], std=about["std"], crop_fraction=crop_fraction, interpolation=interpolation
                )
                pixels = CenterCrop(config, 16, channels)(image, "image")
                expected.append((pixels, read_images([path], config, 16, channels)[0]))
                cases.append((image, about))
    for result, (pixels_CHW, input_CHW) in zip(in_node(cases), expected, strict=True):
        assert result["pixels"] == pixels_CHW.permute(1, 2, 0).flatten().tolist()
        assert torch.equal(torch.tensor(result["input"], dtype=torch.float32), input_CHW.flatten())


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_images_for_masks_are_fitted_and_padded():
    generator = np.random.default_rng(4)
    images = [
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in ((60, 33), (9, 14), (20, 24))
    ]
    about = about_of((3, 20, 24), kind="segmentation")
    fitted = [(11, 20), (14, 9), (24, 20)]  # 33 x 60 is scaled by 1/3, and small images are not enlarged
    for image, size, result in zip(images, fitted, in_node([(image, about) for image in images]), strict=True):
        assert result["crop"] == {"left": 0, "top": 0, "width": size[0], "height": size[1]}
        pixels = pixels_of(image if image.size == size else image.resize(size, Image.Resampling.BILINEAR))
        assert result["pixels"] == pixels.permute(1, 2, 0).flatten().tolist()
        x = torch.tensor(result["input"]).reshape(3, 20, 24)
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        assert torch.equal(x[:, : size[1], : size[0]], pixels.float().div(255).sub(mean).div(std))
        assert not x[:, size[1] :].any()
        assert not x[:, :, size[0] :].any()
