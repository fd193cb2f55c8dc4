"""The pages: the reference is complete, and every snippet runs."""

import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastprompt
from fastprompt.cli import main
from fastprompt.demo import scenes
from transcriptions.drop_in import dense_local_logits, topk_reduce

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}

# What stands for names that a reader replaces by his own, and for weights that would have to be downloaded.
STAND_INS = {
    '"ViT-B-16-quickgelu", "openai"': '"demo"',
    'open_clip.create_model_and_transforms("demo")': "demo_model()",
    "--pretrained openai --shots 16": "--backbone demo --shots 2 --epochs 1",
    "runs/PHOTOS/gallop/ViT-B-16-quickgelu-openai/shots16-seed1": "runs/PHOTOS/gallop/demo/shots2-seed1",
    'fastprompt.published_settings(learner.recipes["default"], shots=16)': "fastprompt.TrainingSettings(epochs=2)",
}
# Tested elsewhere: the worked example of a method in tests/experiment/test_methods.py.
ELSEWHERE = {"add_a_method.md"}


def snippets(page):
    """The Python blocks of a page, with their indentation taken away."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [stood_in(re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, code in found]


def commands(page):
    """The fastprompt commands of a page that stand on lines of their own."""
    lines = re.findall(r"^ {4,}fastprompt (.*)$", PAGES[page], re.MULTILINE)
    return [shlex.split(stood_in(line)) for line in lines]


def stood_in(text):
    for written, used in STAND_INS.items():
        text = text.replace(written, used)
    return text


def demo_model():
    """What open_clip's create_model_and_transforms gives, for the model of the package."""
    from fastprompt.backbone.demo_model import load_demo_clip

    model, _ = load_demo_clip()
    return model, None, fastprompt.image_transform(fastprompt.load_backbone("demo"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a cache of its own; of the scenes' 64 classes the first three are enough here."""
    monkeypatch.setattr(scenes, "DEMO_CLASSES", scenes.DEMO_CLASSES[:3])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def photos(place):
    """What the pages call PHOTOS, cat.jpg and bear.jpg."""
    scenes.write_dataset(place / "PHOTOS", train=2, test=1, domain_test=1, ood=2)
    for number, name in enumerate(("cat.jpg", "bear.jpg", "picture.jpg")):
        (place / name).write_bytes((place / f"PHOTOS/ood/unknown/000{number % 2}.jpg").read_bytes())
    return place


def run(page, **names):
    """Run the snippets of a page one after the other, as a reader would; returns their names."""
    code = snippets(page)
    assert code, f"{page} has no snippet"
    for number, snippet in enumerate(code, start=1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    return names


def test_every_page_with_a_snippet_is_run_here_or_elsewhere():
    with_snippets = {page for page in PAGES if snippets(page)}
    assert with_snippets == {"README.md", "first_steps.md", "own_data.md", "drop_in.md", "in_and_out.md"} | ELSEWHERE


def test_the_reference_has_every_public_name_once_and_says_what_it_is():
    written = runpy.run_path(str(ROOT / "docs" / "reference_pages.py"))
    pages, values = written["pages"](), written["VALUES"]
    rooms = {name for name in fastprompt.__all__ if (ROOT / "fastprompt" / name).is_dir()}
    assert set(pages) == rooms | {"index", "fastprompt_kernels"}
    entry = re.compile(r"^\.\. (?:autoclass|autofunction|py:data):: (\w+)$|^\.\. currentmodule:: (\S+)$", re.MULTILINE)
    for page, text in pages.items():
        module, found = None, []
        for name, current in entry.findall(text):
            module = current or module
            found += [name] if name else []
            assert not name or name in values or getattr(import_module(module), name).__doc__, f"{module}.{name}"
        pages[page] = found
    everywhere = [name for found in pages.values() for name in found]
    modules = ["fastprompt", *(f"fastprompt.{room}" for room in rooms), "fastprompt_kernels"]
    public = {name for module in modules for name in getattr(import_module(module), "__all__", ())}
    assert sorted(everywhere) == sorted(public - rooms - {"__version__"})


def test_the_picture_of_instructions_shows_the_numbers_of_the_table():
    counted = runpy.run_path(str(ROOT / "docs" / "images" / "draw_kernels.py"))["counted"]
    with Image.open(ROOT / "docs" / "images" / "kernels-instructions.png") as picture:
        assert picture.text["Description"] == str([counted(keep=False), counted(keep=True)])
    for numbers in (counted(keep=False), counted(keep=True)):
        assert [k for k, _ in numbers] == [4, 8, 16, 32]


def test_pages_with_no_list_of_names_have_their_modules():
    pages = runpy.run_path(str(ROOT / "docs" / "reference_pages.py"))["pages"]()
    for room in ("exchange", "experiment"):
        for file in (ROOT / "fastprompt" / room).glob("[a-z]*.py"):
            assert f"\n.. automodule:: fastprompt.{room}.{file.stem}\n" in pages[room]


def test_snippets_of_the_front_page(photos):
    names = run("README.md")
    assert names["scores"].logits.shape == (2, 2)
    assert len(names["learner"].class_names) == 3


def test_commands_of_the_front_page(photos, capsys):
    for command in commands("README.md"):
        assert main(command) == 0, command
    assert "picture.jpg: " in capsys.readouterr().out


@pytest.mark.slow
def test_first_steps_from_an_empty_folder(place, capsys):
    first, last = snippets("first_steps.md")
    names = {}
    exec(first, names)
    for command in commands("first_steps.md"):
        assert main(command) == 0, command
    out = capsys.readouterr().out
    assert "FPR95" in out and "0000.jpg: " in out and Path("explained.png").stat().st_size
    exec(last, names)
    torch.testing.assert_close(names["probabilities"].sum(dim=-1), torch.ones(1))


@pytest.mark.slow
def test_own_data_by_command_and_in_python(photos, capsys):
    for command in commands("own_data.md"):
        assert main(command) == 0, command
    assert "base (%)" in capsys.readouterr().out.lower()
    names = run("own_data.md")
    assert len(names["base"].class_names) == 2
    assert 0 <= names["top1"] <= 1 and 0 <= names["accuracy"].top1 <= 1


def test_a_matrix_is_used_as_the_page_says(photos):
    learner = fastprompt.CoOp(fastprompt.load_backbone("demo"), ("red ring", "blue star"))
    from fastprompt.exchange.export import write_head

    write_head(learner, Path("head.safetensors"))
    names = run("in_and_out.md", demo_model=demo_model)
    pixels = fastprompt.image_transform(learner.backbone)(fastprompt.load_image("cat.jpg"))
    expected = learner(learner.backbone.encode_images(pixels[None])).logits
    torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-3)
    assert names["name"] == learner.class_names[expected.argmax()]


def test_local_logits_for_the_code_of_gallop():
    torch.manual_seed(0)
    patches, text, k = torch.randn(2, 9, 12), F.normalize(torch.randn(5, 2, 8), dim=-1), (2, 4)
    linear = torch.nn.Linear(12, 12, bias=False)
    model = SimpleNamespace(
        local_proj=SimpleNamespace(linear=linear), visual=SimpleNamespace(proj=torch.randn(12, 8)), topk=k
    )
    unit = torch.randn(5, 8)
    names = run("drop_in.md", unit_local_features=unit[None], local_text_features=text)
    projected = linear(patches) @ model.visual.proj
    expected = topk_reduce(dense_local_logits(patches, linear, model.visual.proj, text), topk=k)
    pooled = names["pooled_local_logits"](model, patches, text)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    pooled = names["pooled_local_logits_of_projected"](model, projected, text)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    assert names["local_score"].shape == (1,)
