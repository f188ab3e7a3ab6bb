"""What a person does in the editor, in a real browser."""

from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from editor import ROOT, Editor, pixels, read_json
from PIL import Image, ImageDraw

from stable_cascade_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from stable_cascade_nodes.tiny.checker import read_picture
from stable_cascade_nodes.workflows.layout import colours_of

TEXT_TO_IMAGE = read_json(ROOT / "workflows/text_to_image.json")
# A place on the canvas without a node.
EMPTY = (1000, 850)
PROMPT, STAGE_C, STAGE_B, SAVE = 6, 9, 10, 12


def shown(picture):
    """What a picture shows: its background, and colour, shape and place of what is on it."""
    reading = read_picture(pixels(picture))
    return reading.background, [(item.colour, item.shape, item.position) for item in reading.objects]


def test_the_template_opens_with_every_node_in_its_place(editor):
    editor.open()
    assert editor.page.get_by_test_id("topbar-workflow-tabs").get_by_text("text_to_image").is_visible()
    # An unknown node is a red box without a class of its own.
    assert editor.ask("app.graph.nodes.filter((node) => !(node.type in LiteGraph.registered_node_types)).length") == 0
    assert editor.ask("app.graph.nodes.filter((node) => node.has_errors).length") == 0
    assert editor.overlaps() == []
    assert editor.page.get_by_role("dialog").count() == 0
    assert editor.page.get_by_test_id("toast").count() == 0
    assert editor.page.get_by_test_id("error-overlay").count() == 0
    editor.shot("opened")


def test_a_run_shows_progress_previews_the_picture_and_what_was_used(editor):
    editor.open()
    # What an earlier run has left would not be made again.
    editor.page.request.post(f"{editor.server.url}/api/free", data={"free_memory": True, "unload_models": True})
    before = editor.exported()
    started = editor.start()
    editor.wait(f"watched.pictures[{STAGE_C}]?.length >= 2")
    editor.shot("running")
    assert editor.end(started)[0] == "success"

    watched = editor.ask("watched")
    for node in (STAGE_C, STAGE_B):
        progress = watched["progress"][str(node)]
        assert len(progress) >= 3
        assert progress == sorted(progress)
        previews = watched["pictures"][str(node)]
        assert len(previews) >= 3
        assert all(address.startswith("blob:") for address in previews)
    assert shown(editor.picture(SAVE)) == ("blue", [("red", "circle", "left")])

    editor.wait(f"app.graph.nodes.find((node) => node.id == {STAGE_B}).widgets.at(-1).element?.textContent")
    assert "20 steps of ddpm" in editor.value(STAGE_C, "cascade_used")
    assert "256 x 256 pixels" in editor.value(8, "cascade_used")
    assert editor.page.get_by_text("10 steps of ddpm").is_visible()
    assert editor.overlaps() == []
    # What is shown belongs neither to the prompt nor to the workflow.
    assert editor.exported() == before
    saved = {str(node["id"]): node.get("widgets_values") for node in editor.serialized()["nodes"]}
    for node in TEXT_TO_IMAGE["nodes"]:
        if node["type"].startswith("Cascade"):
            assert (saved[str(node["id"])] or []) == node["widgets_values"]
    editor.shot("finished")


def test_another_prompt_and_another_seed_make_other_pictures(editor):
    editor.open()
    editor.run()
    first = pixels(editor.picture(SAVE))
    address = editor.node(SAVE, "node.imgs[0].src")
    editor.type_text(PROMPT, "a large green square on the right on a white background")
    editor.run()
    editor.wait(f"(old) => app.graph.nodes.find((node) => node.id == {SAVE}).imgs[0].src !== old", address)
    second = editor.picture(SAVE)
    background, items = shown(second)
    assert (background, items[0][0], items[0][2]) == ("white", "green", "right")
    address = editor.node(SAVE, "node.imgs[0].src")
    editor.type_number(STAGE_C, "seed", 12345)
    editor.run()
    editor.wait(f"(old) => app.graph.nodes.find((node) => node.id == {SAVE}).imgs[0].src !== old", address)
    third = pixels(editor.picture(SAVE))
    assert len({first.tobytes(), pixels(second).tobytes(), third.tobytes()}) == 3
    assert editor.exported()[str(STAGE_C)]["inputs"]["seed"] == 12345
    editor.shot("another_prompt_and_seed")


def test_an_error_is_seen_on_its_node_and_the_next_run_succeeds(editor):
    editor.open()
    editor.type_text(PROMPT, "a red circle, embedding:not_there")
    kind, data = editor.end(editor.start())
    assert kind == "error"
    assert data["node_id"] == str(PROMPT)
    overlay = editor.page.get_by_test_id("error-overlay")
    overlay.wait_for()
    editor.wait("app.lastExecutionError")
    assert str(editor.ask("app.lastExecutionError.node_id")) == str(PROMPT)
    assert editor.node(PROMPT, "Object.values(node.strokeStyles ?? {}).some((style) => style.call(node)?.color)")
    editor.shot("error")
    overlay.get_by_test_id("error-overlay-see-errors").click()
    editor.page.get_by_text("The prompt asks for the embedding 'not_there'").first.wait_for()
    editor.shot("error_details")
    # The details ask for the addresses where faults of packs are reported.
    editor.expect("outside: https://api.comfy.org/nodes[?]")
    editor.type_text(PROMPT, "a large red circle on the left on a blue background")
    editor.run()
    assert shown(editor.picture(SAVE))[0] == "blue"


def test_a_refused_value_is_seen_on_its_node(editor):
    editor.open()
    # A file that was there when the workflow was made.
    editor.node(2, "node.widgets[0].value = 'gone.safetensors'")
    editor.page.get_by_test_id("queue-button").click()
    editor.wait("app.lastNodeErrors && '2' in app.lastNodeErrors")
    editor.page.get_by_test_id("error-overlay").wait_for()
    editor.wait("app.graph.nodes.find((node) => node.id == 2).has_errors")
    editor.shot("refused")
    editor.expect("400: .*/api/prompt")
    editor.expect("console: PromptExecutionError")


def test_a_run_is_interrupted_and_the_next_one_succeeds(editor):
    editor.open()
    editor.type_number(STAGE_C, "steps", 1000)
    started = editor.start()
    editor.wait(f"watched.progress[{STAGE_C}]?.at(-1) > 0")
    editor.page.get_by_role("button", name="Cancel current run").click()
    kind, data = editor.end(started)
    assert (kind, data["node_id"]) == ("interrupted", str(STAGE_C))
    assert editor.ask("watched.progress")[str(STAGE_C)][-1] < 1
    editor.shot("interrupted")
    editor.type_number(STAGE_C, "steps", 2)
    editor.run()
    assert editor.picture(SAVE).size == (256, 256)


def test_a_picture_is_uploaded_and_used(editor, tmp_path):
    editor.open()
    path = tmp_path / "drawn here.png"
    picture = Image.new("RGB", (96, 64), "yellow")
    ImageDraw.Draw(picture).rectangle((8, 8, 40, 40), fill="purple")
    picture.save(path)
    editor.page.mouse.dblclick(*EMPTY)
    search = editor.page.get_by_placeholder("Add a node...")
    search.fill("LoadImage")
    editor.page.get_by_role("option").first.wait_for()
    search.press("Enter")
    editor.wait("app.graph.nodes.some((node) => node.type === 'LoadImage')")
    node = editor.ask("app.graph.nodes.find((node) => node.type === 'LoadImage').id")
    # The new node hangs on the mouse until a click, once the search is gone.
    search.wait_for(state="hidden")
    editor.page.locator(".p-dialog-mask").wait_for(state="detached")
    editor.page.mouse.move(EMPTY[0], EMPTY[1] - 40)
    editor.page.mouse.click(EMPTY[0], EMPTY[1] - 20)
    editor.wait("(id) => !app.graph.nodes.find((node) => node.id == id).flags.ghost", node)
    # Where a widget is, is known once it is drawn.
    editor.wait("(id) => app.graph.nodes.find((node) => node.id == id).widgets.at(-1).last_y > 0", node)
    y = editor.node(node, "node.widgets.find((widget) => widget.name === 'upload').last_y")
    with editor.page.expect_file_chooser() as chooser:
        editor.page.mouse.click(*editor.point(node, editor.node(node, "node.size[0] / 2"), y + 10))
    chooser.value.set_files(path)
    editor.wait("(id) => app.graph.nodes.find((node) => node.id == id).widgets[0].value === 'drawn here.png'", node)
    assert np.array_equal(pixels(editor.picture(node)), pixels(picture))
    assert (editor.server.data / "input" / "drawn here.png").read_bytes() == path.read_bytes()
    editor.shot("uploaded")
    editor.ask(
        "(id) => app.graph.nodes.find((node) => node.id == id)"
        f".connect(0, app.graph.nodes.find((node) => node.id == {SAVE}), 'images')",
        node,
    )
    editor.run()
    assert np.array_equal(pixels(editor.picture(SAVE)), pixels(picture))


def plain(markdown):
    """A line of Markdown without its marks."""
    return markdown.strip("-| ").replace("`", "").replace("**", "")


def test_node_help_opens_its_page(editor):
    editor.open()
    editor.select(STAGE_C)
    editor.page.get_by_test_id("info-button").click()
    page = (ROOT / "web/docs/CascadeSampleStageC.md").read_text(encoding="utf-8")
    hints = [plain(line) for line in page.splitlines() if line.startswith("- ")]
    assert hints
    for hint in hints:
        editor.page.get_by_text(hint).first.wait_for()
    editor.shot("help")


def test_a_workflow_is_saved_and_opened_again(editor):
    editor.open()
    editor.type_number(STAGE_C, "seed", 77)
    # The keyboard belongs to the graph after a click on it.
    editor.page.mouse.click(*EMPTY)
    editor.page.keyboard.press("Control+s")
    name = editor.page.get_by_role("dialog").get_by_role("textbox")
    name.fill("my cascade")
    name.press("Enter")
    name.wait_for(state="hidden")
    path = editor.server.data / "user/default/workflows/my cascade.json"
    editor.wait("!app.extensionManager.workflow.activeWorkflow.isModified")
    assert path.exists()
    saved = {str(node["id"]): node for node in read_json(path)["nodes"]}
    assert saved[str(STAGE_C)]["widgets_values"][0] == 77
    exported = editor.exported()

    editor.page.evaluate("localStorage.clear(); sessionStorage.clear()")
    editor.open("checkpoint_files")
    assert editor.exported() != exported
    editor.page.get_by_role("button", name="Workflows").first.click()
    editor.page.get_by_test_id("workflows-sidebar").get_by_text("my cascade").first.click()
    editor.wait(f"app.graph.nodes.some((node) => node.id == {STAGE_C} && node.type === 'CascadeSampleStageC')")
    assert editor.exported() == exported
    editor.shot("opened_again")


def test_a_saved_picture_brings_its_graph_back(editor):
    editor.open()
    editor.type_number(STAGE_C, "seed", 4)
    editor.type_text(PROMPT, "a small blue ring at the top on a yellow background")
    editor.run()
    exported = editor.exported()
    editor.picture(SAVE)
    name = parse_qs(urlsplit(editor.node(SAVE, "node.imgs[0].src")).query)["filename"][0]
    editor.open("checkpoint_files")
    assert editor.exported() != exported
    editor.page.mouse.click(*EMPTY)
    with editor.page.expect_file_chooser() as chooser:
        editor.page.keyboard.press("Control+o")
    chooser.value.set_files(editor.server.data / "output" / name)
    editor.wait(f"app.graph.nodes.some((node) => node.id == {STAGE_C} && node.type === 'CascadeSampleStageC')")
    assert editor.exported() == exported
    assert editor.value(STAGE_C, "seed") == 4
    # The whole workflow, not only what can run.
    assert editor.ask("app.graph.groups.map((group) => group.title)") == [
        group["title"] for group in TEXT_TO_IMAGE["groups"]
    ]


def test_the_template_browser_shows_the_workflows_with_their_thumbnails(editor):
    editor.open()
    editor.page.get_by_role("button", name="Templates").first.click()
    editor.page.get_by_test_id("template-workflows-content").wait_for()
    names = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    for name in names:
        card = editor.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        editor.wait(
            "(id) => [...document.querySelectorAll(`[data-testid='${id}'] img`)].some((image) => image.naturalWidth)",
            f"template-workflow-{name}",
        )
    editor.shot("templates")
    editor.page.get_by_test_id("template-workflow-preview_first").click()
    editor.wait("app.graph.nodes.some((node) => node.type === 'CascadePreviewLatent')")


@pytest.mark.parametrize("class_type", NODE_CLASS_MAPPINGS)
def test_nodes_have_the_colours_of_the_templates(class_type, palette):
    node = NODE_CLASS_MAPPINGS[class_type]
    colours = colours_of(node)
    # Those that only pass on pictures, masks, latents or conditioning are left in the editor's grey.
    required = [kind for kind, *_ in node.INPUT_TYPES().get("required", {}).values()]
    models = [kind for kind in (*node.RETURN_TYPES, *required) if str(kind).startswith("CASCADE_")]
    assert (colours is None) == (not models)
    assert palette[class_type] == [NODE_DISPLAY_NAME_MAPPINGS[class_type], *(colours or (None, None))]


@pytest.fixture(scope="module")
def palette(chromium, editor_server, screenshots):
    """Title and colours of a new node of each class."""
    context = chromium.new_context()
    opened = Editor(context.new_page(), editor_server, screenshots)
    opened.open()
    found = opened.ask(
        """(names) => Object.fromEntries(names.map((name) => {
          const node = LiteGraph.createNode(name);
          return [name, [node.title, node.color, node.bgcolor]];
        }))""",
        list(NODE_CLASS_MAPPINGS),
    )
    context.close()
    return found
