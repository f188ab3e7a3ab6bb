"""The command `cascade`: run a graph, make a picture from a prompt, serve the editor, train, say what a file is.

Heavy libraries are imported by the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import serve, train
from .client import command as submit
from .problems import describe_problems
from .terminal import FAILED, INTERRUPTED, OK, add_graph_arguments, interrupting, refuse, say

if TYPE_CHECKING:
    from .engine import Host

DEMO_PROMPT = "a large red circle on a blue background"
DEMO_GRAPH = Path(__file__).parents[1] / "workflows" / "api" / "text_to_image.json"

_EXAMPLES = """examples:
  cascade demo "a green triangle on a white background" --seed 7 --out triangle.png
  cascade run text_to_image.json --set CascadeSampleStageC.seed=7 --set SaveImage.filename_prefix=seven
  cascade run picture.png --data ~/cascade      run the graph that a saved picture carries
  cascade serve                                 open the graph editor in a browser
  cascade submit text_to_image.json --server http://127.0.0.1:8188 --out pictures
  cascade inspect stage_c_lite.safetensors      say which stage, size and layout a file is
  cascade train cat.yaml                        train a LoRA, a ControlNet, a whole stage: see cascade train --help
  cascade dataset check photos                  say what would be trained on

exit codes: 0 done, 1 the run failed, 2 wrong usage or a graph that cannot run, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cascade",
        description="Run Stable Cascade graphs, here or on a server, and train its models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cascade {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a graph in API format", description="Run a graph in API format.")
    run.set_defaults(command=_run)
    add_graph_arguments(run)
    run.add_argument("--data", type=Path, default=Path(), metavar="DIR", help="holds models/, input/ and output/")
    run.add_argument("--output", type=Path, metavar="DIR", help="where pictures go (default: output/ in --data)")

    demo = commands.add_parser("demo", help="make a picture from a prompt", description="Make a picture from a prompt.")
    demo.set_defaults(command=_demo)
    demo.add_argument("prompt", nargs="?", default=DEMO_PROMPT, help=f"default: {DEMO_PROMPT}")
    demo.add_argument("--seed", type=int, default=0, help="another seed, another picture (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("cascade-demo.png"), metavar="FILE", help="a PNG file")

    serve.add_command(commands)
    submit.add_command(commands)
    train.add_commands(commands)

    inspect = commands.add_parser("inspect", help="say what a checkpoint is", description="Say what a checkpoint is.")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("file", type=Path, help="a safetensors file or a model folder")
    inspect.add_argument("--json", action="store_true", help="as JSON, for programs")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from .console import ConsoleProgress
    from .folders import DataFolders
    from .graph import post_order, sources_in
    from .pack import open_host
    from .prompt_file import read_prompt, read_setting, read_workflow, set_input, title_of

    progress: ConsoleProgress | None = None

    def deliver(kind: str, data: dict[str, Any], client: str | None) -> None:
        if progress is not None:
            progress.receive(kind, data)

    host = open_host(DataFolders(arguments.data, output=arguments.output), deliver)
    try:
        prompt, extra_data = read_prompt(arguments.workflow)
        if arguments.editor_file is not None:
            extra_data.setdefault("extra_pnginfo", {})["workflow"] = read_workflow(arguments.editor_file)
        declarations = host.registry.declarations()
        for text in arguments.settings:
            setting = read_setting(prompt, text)
            set_input(prompt, setting, declarations.get(setting.class_type))
    except ValueError as error:
        return refuse(str(error))
    status, answer = host.submit({"prompt": prompt, "extra_data": extra_data, "client_id": "cascade"})
    if status != 200 or answer["node_errors"]:
        problems = describe_problems(answer.get("error"), answer["node_errors"])
        return refuse("\n  ".join([f"{arguments.workflow} cannot run.", *problems]))

    outputs = host.queue()[1][0].outputs
    titles = {
        node_id: title_of(prompt[node_id]) or host.registry.title(prompt[node_id]["class_type"])
        for node_id in post_order(outputs, sources_in(prompt))
    }
    progress = ConsoleProgress(titles, sys.stderr)
    with interrupting(host.interrupt):
        prompt_id = host.run_next()
    assert prompt_id is not None
    return _report(host, host.history(prompt_id)[prompt_id], titles, show_traceback=arguments.traceback)


def _report(host: Host, entry: dict[str, Any], titles: dict[str, str], *, show_traceback: bool) -> int:
    """Print the files that were written and why a run ended early; returns the exit code."""
    for shown in entry["outputs"].values():
        for image in shown.get("images", ()):
            path = host.folders.directory(image["type"]) / image["subfolder"] / image["filename"]
            print(path, file=sys.stdout if image["type"] == "output" else sys.stderr)
    if entry["status"]["completed"]:
        return OK
    kind, data = entry["status"]["messages"][-1]
    node = f"node #{data['node_id']} ({titles[data['node_id']]})"
    if kind == "execution_interrupted":
        say(f"interrupted in {node}")
        return INTERRUPTED
    if show_traceback:
        sys.stderr.writelines(data["traceback"])
    say(f"{node} failed: {data['exception_message'].strip() or data['exception_type']}")
    return FAILED


def _demo(arguments: argparse.Namespace) -> int:
    from .console import ConsoleProgress
    from .demo import demo_graph
    from .pictures import picture_metadata, write_png

    progress = ConsoleProgress({"stage_c": "Sample Stage C", "stage_b": "Sample Stage B"}, sys.stderr)
    try:
        graph = demo_graph(DEMO_GRAPH, arguments.prompt, arguments.seed)
        from ..cascade_ops.pipeline import CascadePipeline

        pipeline = CascadePipeline.load("auto")
        picture = pipeline.generate(
            arguments.prompt,
            seed=arguments.seed,
            callback=lambda stage, info: progress.step(stage, info.step + 1, info.steps),
        )[0]
        write_png(arguments.out.absolute(), picture, picture_metadata(graph, None))
    except (ValueError, OSError, RuntimeError) as error:
        say(str(error))
        return FAILED
    print(arguments.out)
    return OK


def _inspect(arguments: argparse.Namespace) -> int:
    from ..cascade_ops.checkpoints import inspect_file

    try:
        info = inspect_file(arguments.file)
    except (ValueError, OSError) as error:
        say(str(error))
        return FAILED
    print(json.dumps(info.as_dict(), indent=2) if arguments.json else info.describe())
    return OK


def _version() -> str:
    try:
        return importlib.metadata.version("stable-cascade-nodes")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
