"""Help pages and translations: what is generated is up to date, what a person writes is there."""

import json
import re

import pytest

from stable_cascade_nodes.nodes import help_pages, locale
from stable_cascade_nodes.nodes.files import AUTO, BUNDLED
from stable_cascade_nodes.nodes.locale import documented_nodes

NODES = documented_nodes()
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in help_pages.FOLDER.rglob("*.md")}


def test_pages_are_what_the_nodes_say():
    stale = [path.name for path, text in help_pages.written().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run: python -m stable_cascade_nodes.nodes.help_pages"


def test_there_is_a_page_for_every_node_and_for_nothing_else():
    assert PAGES.keys() == NODES.keys()
    # No folder per language yet: a page in one would be shown instead of the generated one.
    assert all(path.parent == help_pages.FOLDER for path in help_pages.FOLDER.rglob("*.md"))


@pytest.mark.parametrize("name", sorted(NODES))
def test_a_page_names_everything_and_says_what_a_person_must_know(name):
    page, node = PAGES[name], NODES[name]
    assert page.startswith(f"# {node.title}\n\n{node.description}\n")
    assert page.count(help_pages.HINTS) == 1
    hints = help_pages.hints_of(page)
    assert len(hints.splitlines()) >= 2
    assert all(line.startswith("- ") for line in hints.splitlines())
    listed = re.findall(r"^- \*\*([a-z_]+)\*\* \(.*?`.*?\): ", page, re.MULTILINE)
    assert listed == [*node.inputs, *(output for output, _, _ in node.outputs)]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_what_a_page_points_to_is_there(name):
    page = PAGES[name]
    titles = {node.title for node in NODES.values()}
    mentioned = set(re.findall(r"['`](Cascade: [^'`]+)['`]", page))
    assert mentioned <= titles
    # The panel shows pages under an address of its own, so links must be whole. It is narrow: no tables.
    assert not re.search(r"^\|", page, re.MULTILINE)
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert [link for link in links if not link.startswith("https://")] == []
    assert not re.search(r"<[a-zA-Z!/]", page)
    # Inputs that the hints speak of, here or in a neighbour.
    spoken = set(re.findall(r"`([a-z]+_[a-z_]+|seed|steps|guidance|shift|start|end)`", help_pages.hints_of(page)))
    known = {entry for node in NODES.values() for entry in (*node.inputs, *(output for output, _, _ in node.outputs))}
    assert spoken <= known | {"stable_cascade"}


def test_a_page_is_made_of_what_a_node_declares():
    node = locale.Node(
        "A title",
        "What it does.",
        {
            "model": ("MODEL", {"tooltip": "A * B."}, True),
            "mask": ("MASK", {"tooltip": "A mask."}, False),
            "file": ([AUTO, BUNDLED, "mine.safetensors"], {"default": AUTO, "tooltip": "A file."}, True),
            "mode": (["a", "b"], {"default": "b", "tooltip": "A mode."}, True),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "tooltip": "A seed."}, True),
            "scale": ("FLOAT", {"default": 0.5, "min": -1.0, "max": 2, "tooltip": "A scale."}, False),
            "on": ("BOOLEAN", {"default": False, "tooltip": "A switch."}, True),
            "text": ("STRING", {"default": "", "tooltip": "A text."}, True),
        },
        [("image", "IMAGE", "A picture.")],
    )
    assert help_pages.help_page(node, "- Written.") == (
        "# A title\n\nWhat it does.\n\n"
        "## Inputs\n\n"
        "- **model** (`MODEL`): A \\* B.\n"
        "- **mask** (`MASK`, optional): A mask.\n"
        "- **file** (a file; default `auto`): A file.\n"
        "- **mode** (one of `a`, `b`; default `b`): A mode.\n"
        "- **seed** (`INT`, 0 to 2^64 - 1, default 0): A seed.\n"
        "- **scale** (`FLOAT`, -1 to 2, default 0.5): A scale.\n"
        "- **on** (`BOOLEAN`, default `false`): A switch.\n"
        "- **text** (`STRING`): A text.\n\n"
        "## Outputs\n\n"
        "- **image** (`IMAGE`): A picture.\n\n"
        "## Hints\n\n- Written.\n"
    )


def test_writing_pages_keeps_what_a_person_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(help_pages, "FOLDER", tmp_path)
    (tmp_path / "CascadeLoadStageA.md").write_text("# Old\n\nold table\n\n## Hints\n\n- Mine.\n\n## And more\n")
    help_pages.main()
    assert {path.stem for path in tmp_path.iterdir()} == NODES.keys()
    page = (tmp_path / "CascadeLoadStageA.md").read_text()
    assert page.endswith("\n## Hints\n\n- Mine.\n\n## And more\n")
    assert "old table" not in page
    assert page.startswith("# Cascade: load Stage A\n")
    said = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "CascadeLoadStageA.md") in said
    assert f"{tmp_path / 'CascadeLoadStageB.md'} (write its hints)" in said
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    help_pages.main()
    assert before == {path: path.read_text() for path in tmp_path.iterdir()}


def test_the_locale_file_is_what_the_nodes_say():
    assert locale.PATH.read_text(encoding="utf-8") == locale.written(), (
        "run: python -m stable_cascade_nodes.nodes.locale"
    )


def test_the_locale_file_covers_everything():
    texts = json.loads(locale.PATH.read_text(encoding="utf-8"))
    assert texts.keys() == NODES.keys()
    for name, node in NODES.items():
        entry = texts[name]
        assert entry.keys() == {"display_name", "description", "inputs", "outputs"}
        assert (entry["display_name"], entry["description"]) == (node.title, node.description)
        assert list(entry["inputs"]) == list(node.inputs)
        assert list(entry["outputs"]) == [str(slot) for slot in range(len(node.outputs))]
        for part in (*entry["inputs"].values(), *entry["outputs"].values()):
            assert part.keys() == {"name", "tooltip"}
            assert part["name"]
            # A sentence, which people read when they rest on a socket.
            assert re.fullmatch(r"[A-Za-z].{9,}\.", part["tooltip"]), (name, part)
