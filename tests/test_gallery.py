"""The gallery shows what its records say, and every command on it is one that its script takes."""

import re
import runpy
import shlex

import gallery
import head
import pytest
from PIL import Image

from tests.house import ROOT

TEXT = gallery.PAGE.read_text(encoding="utf-8") if gallery.PAGE.exists() else ""
COMMANDS = re.findall(r"^ {4}(python .*)$", TEXT, re.MULTILINE)


def test_the_page_is_the_one_that_the_records_make():
    assert gallery.page() == TEXT


def test_the_page_shows_every_picture_there_is():
    shown = re.findall(r"!\[.+?\]\(gallery/(.+?)\)", TEXT)
    assert sorted(shown) == sorted(path.name for path in gallery.FOLDER.glob("*.png"))
    assert len(shown) == len(set(shown)) > 15
    known = {path for section in gallery.SECTIONS for path in section.files()}
    assert set(gallery.FOLDER.iterdir()) == known


def test_pictures_are_small():
    pictures = list(gallery.FOLDER.glob("*.png"))
    sizes = [path.stat().st_size for path in pictures]
    assert max(sizes) <= 60_000
    assert sum(sizes) <= 1_000_000
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 50
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 5  # something is on it


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_one_that_its_script_takes(command, monkeypatch):
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr("sys.argv", [script, *arguments, "--output", "elsewhere"])
    taken, parser = [], head.parser

    def options(doc, **wanted):
        taken.append(parser(doc, **wanted).parse_args())
        raise StopIteration

    monkeypatch.setattr(head, "options", options)
    with pytest.raises(StopIteration):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert str(taken[0].output) == "elsewhere"


def test_a_picture_is_made_smaller_until_it_fits(tmp_path):
    source, target = tmp_path / "noise.png", tmp_path / "small.png"
    Image.effect_noise((1200, 1200), 50).save(source)
    with pytest.raises(ValueError, match="more than 60,000 bytes"):
        gallery.shrink(source, target)
    assert not target.exists()
    Image.radial_gradient("L").resize((1800, 600)).save(source)
    gallery.shrink(source, target)
    with Image.open(target) as picture:
        assert picture.size == (900, 300)
    assert target.stat().st_size <= 60_000


SCRIPT = """import pathlib, sys
from PIL import Image
print("figure 1")
print("in", sys.argv[-1])
folder = pathlib.Path(sys.argv[-1])
folder.mkdir(parents=True)
Image.new("RGB", (20, 10)).save(folder / "drawn.png")
"""


def test_a_section_is_made_once_and_again_where_something_is_missing(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(gallery, "FOLDER", tmp_path / "gallery")
    section = gallery.Section("Title", f"python {tmp_path / 'script.py'}", {"drawn": "A caption."})
    assert section.record() is None
    gallery.make(section, tmp_path / "full")
    assert section.record()["printed"] == "figure 1"
    assert section._replace(command=section.command + " --more").record() is None
    section.files()[0].unlink()
    assert section.record() is None
