"""The pictures on the pages of the tasks: what workflows say of them, and how they are put together."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from editor import ROOT
from PIL import Image

from stable_cascade_nodes.tiny.examples import FOLDER as EXAMPLES
from stable_cascade_nodes.workflows import pictures
from stable_cascade_nodes.workflows.graphs import WORKFLOWS
from stable_cascade_nodes.workflows.layout import Column, Node, Shot, Workflow
from stable_cascade_nodes.workflows.pictures import changed, pictures_of_shots, task_picture, with_shot
from stable_cascade_nodes.workflows.running import Runner
from stable_cascade_nodes.workflows.write import writing

SHOTS = [(workflow, shot) for workflow in WORKFLOWS for shot in workflow.shots]
LINK = re.compile(r"\]\(tasks/([^)]+)\.jpg\)")
COLOURS = ("red", "lime", "blue", "yellow", "black")


def example(*shots):
    """A workflow that shows and saves two of the pictures that come with the package."""
    nodes = (
        Node(1, "CascadeExampleImage", {"picture": "circle"}),
        Node(2, "PreviewImage", {"images": (1, 0)}),
        Node(3, "CascadeExampleImage", {"picture": "cross"}),
        Node(4, "SaveImage", {"images": (3, 0)}),
    )
    return Workflow("example", "", (Column("", nodes[:2]), Column("", nodes[2:])), shots=shots)


def same(picture, name):
    with Image.open(EXAMPLES / f"{name}.png") as wanted:
        return picture.tobytes() == wanted.convert("RGB").tobytes()


def test_changes_reach_the_graph_and_nothing_else():
    workflow = example()
    with writing() as writer:
        before = writer.api(workflow)
        graph = writer.api(changed(workflow, {1: {"picture": "square"}, 4: {"images": (1, 0)}}))
        assert writer.api(workflow) == before
    assert graph["1"]["inputs"] == {"picture": "square"}
    assert graph["4"]["inputs"] == {**before["4"]["inputs"], "images": ["1", 0]}
    assert {key: graph[key] for key in "23"} == {key: before[key] for key in "23"}


def test_a_change_of_an_unknown_node_is_refused():
    with pytest.raises(ValueError, match="example has no node 7, 9: change one of 1, 2, 3, 4"):
        changed(example(), {9: {}, 1: {}, 7: {}})


def test_a_change_of_an_unknown_input_is_refused():
    with writing() as writer, pytest.raises(ValueError, match="node 1: CascadeExampleImage has no input strength"):
        writer.api(changed(example(), {1: {"strength": 0.0}}))


@pytest.mark.parametrize(("node", "found"), [(6, "a CascadeLoadStageA without pictures"), (5, "missing")])
def test_a_shot_of_a_node_without_pictures_is_refused(node, found):
    workflow = example()
    loader = Column("", (Node(6, "CascadeLoadStageA"),))
    workflow = replace(workflow, columns=(*workflow.columns, loader))
    with writing() as writer, pytest.raises(ValueError, match=f"node {node} of the shot 'With' is {found}, expected"):
        with_shot(workflow, Shot("With", node), writer)


class Watching(Runner):
    """Keeps what it was asked for."""

    def __init__(self, data):
        super().__init__(data)
        self.asked = []

    def shown(self, graph, nodes=()):
        self.asked.append((graph, list(nodes)))
        return super().shown(graph, nodes)


def test_each_shot_is_of_its_own_graph_and_runs_no_more_than_it_shows(tmp_path):
    square = {1: {"picture": "square"}}
    workflow = example(Shot("a", 2), Shot("b", 2, square), Shot("c", 4), Shot("d", 2))
    runner = Watching(tmp_path)
    with writing() as writer:
        found = pictures_of_shots(workflow, writer, runner)
        graph = writer.api(workflow)
    assert [len(each) for each in found] == [1, 1, 1, 1]
    wanted = ("circle", "square", "cross", "circle")
    assert all(same(each[0], name) for each, name in zip(found, wanted, strict=True))
    assert [nodes for _, nodes in runner.asked] == [["2"], ["2"], ["4"], ["2"]]
    assert [graph == asked for asked, _ in runner.asked] == [True, False, True, True]
    assert len(list((tmp_path / "output").iterdir())) == 1


def test_a_node_that_only_gives_pictures_is_shown_too(tmp_path):
    workflow = example(Shot("a", 3, {3: {"picture": "two"}}))
    with writing() as writer:
        ((picture,),) = pictures_of_shots(workflow, writer, Runner(tmp_path))
    assert same(picture, "two")


def test_a_workflow_that_is_refused_or_fails_says_why(tmp_path):
    runner = Runner(tmp_path)
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a"}}
    with pytest.raises(ValueError, match=r"refused.*nowhere"):
        picture = {"class_type": "CascadeExampleImage", "inputs": {"picture": "nowhere"}}
        runner.shown({"1": picture, "2": save})
    with pytest.raises(ValueError, match=r"failed.*leads out of the folder"):
        picture = {"class_type": "CascadeExampleImage", "inputs": {"picture": "circle"}}
        save["inputs"]["filename_prefix"] = "../a"
        runner.shown({"1": picture, "2": save})


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def test_pictures_are_cells_of_256_four_in_a_row_with_their_captions_below():
    shots = tuple(Shot("What was asked for" if n == 1 else "", n) for n in range(5))
    found = [[plain(colour), plain("grey")] for colour in COLOURS]
    sheet = task_picture(shots, found)
    assert sheet.width == 4 * 256 + 3 * 12
    captions = 256 + 26 + 12
    centres = [(128 + 268 * n, 128) for n in range(4)] + [(128, captions + 128)]
    wanted = [plain(colour).getpixel((0, 0)) for colour in COLOURS]
    assert [sheet.getpixel(centre) for centre in centres] == wanted
    # A picture fills its cell, and around the cells is white paper.
    assert [sheet.getpixel((x, y)) for x, y in ((0, 0), (255, 255), (256, 255), (267, 0), (268, 0))] == [
        *[(255, 0, 0)] * 2,
        *[(255, 255, 255)] * 2,
        (0, 255, 0),
    ]
    assert darkest(sheet, (268, 257, 524, 282)) < 60 and darkest(sheet, (0, 257, 256, 282)) == 255


def darkest(sheet, box):
    return min(sheet.crop(box).convert("L").tobytes())


def test_a_long_caption_is_wrapped_below_its_own_picture():
    short, long = (
        Shot("a", 1),
        Shot("a much longer text about this picture, which is wrapped into just three lines of words", 2),
    )
    sheet = task_picture((short, long), [[plain("red")], [plain("red")]])
    assert sheet.height == 256 + 6 + 3 * 20
    for line in range(3):
        assert darkest(sheet, (268, 262 + 20 * line, 524, 282 + 20 * line)) < 60
    assert darkest(sheet, (0, 284, 267, sheet.height)) == 255


@pytest.mark.parametrize(("count", "columns", "lines"), [(2, 4, 1), (4, 4, 1), (7, 7, 1), (20, 10, 2), (23, 10, 2)])
def test_a_batch_has_a_row_of_its_own_with_up_to_twenty(count, columns, lines):
    shots = (Shot("", 1), Shot("", 2, batch=True), Shot("", 1))
    batch = [plain("lime" if n == min(count, 20) - 1 else "blue") for n in range(count)]
    sheet = task_picture(shots, [[plain("red")], batch, [plain("red")]])
    cell = (1060 - 12 * (columns - 1)) // columns
    top, pitch = 256 + 26 + 12, cell + 12
    middles = [(pitch * (n % columns) + cell // 2, top + pitch * (n // columns) + cell // 2) for n in range(count)][:20]
    assert {sheet.getpixel(middle) for middle in middles[:-1]} == {(0, 0, 255)}
    assert sheet.getpixel(middles[-1]) == (0, 255, 0)
    below = top + pitch * lines - 12 + 26 + 12
    assert sheet.height == below + 256 + 26
    assert sheet.getpixel((128, below + 128)) == (255, 0, 0)


def test_a_picture_that_is_not_square_keeps_its_shape():
    sheet = task_picture((Shot("", 1),), [[plain("red", (64, 32))]])
    assert [sheet.getpixel((128, y)) for y in (60, 66, 190, 196)] == [
        (255, 255, 255),
        (255, 0, 0),
        (255, 0, 0),
        (255, 255, 255),
    ]


def test_the_command_writes_what_is_named_and_refuses_other_names(tmp_path, monkeypatch, capsys):
    workflow = example(Shot("The cross", 4))
    monkeypatch.setattr(pictures, "WORKFLOWS", (workflow, example()))
    monkeypatch.setattr(pictures, "FOLDER", tmp_path / "tasks")
    arguments = SimpleNamespace(argv=["pictures", "example"])
    monkeypatch.setattr("sys.argv", arguments.argv)
    pictures.main()
    with Image.open(tmp_path / "tasks" / "example.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (256, 282)
    arguments.argv[1] = "elsewhere"
    with pytest.raises(SystemExit):
        pictures.main()
    assert "no workflow with shots is called elsewhere: choose from example" in capsys.readouterr().err


@pytest.mark.parametrize(("workflow", "shot"), SHOTS, ids=[f"{w.name}: {s.caption}" for w, s in SHOTS])
def test_every_shot_is_of_a_node_that_shows_pictures_and_changes_what_is_there(workflow, shot):
    with writing() as writer:
        made, node = with_shot(workflow, shot, writer)
        graph = writer.api(made)
    assert graph[str(node)]["class_type"] in pictures.SHOWING
    assert shot.caption
    for node, inputs in shot.changes.items():
        for name, value in inputs.items():
            expected = [str(value[0]), value[1]] if isinstance(value, tuple) else value
            assert graph[str(node)]["inputs"][name] == expected


def test_pages_show_pictures_of_workflows_and_every_workflow_with_shots_is_shown():
    linked = {name for page in (ROOT / "docs").glob("*.md") for name in LINK.findall(page.read_text(encoding="utf-8"))}
    assert linked == {workflow.name for workflow, _ in SHOTS}
    assert {path.stem for path in (ROOT / "docs" / "tasks").glob("*.jpg")} == linked
