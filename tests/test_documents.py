"""What the documents say of the repository."""

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from scripts.draw_rooms import floors, picture, stairs

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist_and_nothing_is_left_to_fill_in(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z0-9_]+@|TODO|FIXME", text)
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_programs_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for program in re.findall(r"\b((?:scripts|benchmarks|tests)/[\w/]+\.py)\b", text):
        assert (REPOSITORY / program).exists(), program


def test_settings_of_the_readme_can_be_typed():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = text.partition("| override | meaning |")[2].partition("\n\n")[0]
    typed = re.findall(r"`([^`]*)`", " ".join(line.split("|")[1] for line in table.split("\n")[2:]))
    words = [w.replace("…", "x") for each in typed for w in each.split() if "=" in w]
    assert len(words) > 20
    parser = OverridesParser.create()
    for word in words:
        parser.parse_override(word.removeprefix("--"))


@pytest.mark.parametrize(
    "place", ["docs/when-to-trust.md", "configs/experiment/probe.yaml", "dd/report/words.py"]
)
def test_columns_chosen_by_labels_are_spoken_of_where_nothing_can_warn(place):
    text = (REPOSITORY / place).read_text(encoding="utf-8")
    words = re.sub(r'[\s"]+', " ", text)
    assert re.search(r"chosen by the labels of (the same|these) samples", words)


def test_rooms_are_drawn_as_they_are():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert picture(REPOSITORY / "dd") in text, (
        "CONTRIBUTING.md lacks what `python scripts/draw_rooms.py` prints"
    )


def test_stairs_are_the_arrows_that_no_others_imply():
    arrows = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert stairs(arrows) == {"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert floors(arrows) == {"a": 2, "b": 1, "c": 0, "d": 0}
