"""The command `cascade submit`: run a graph on a server, and save here what it made."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import ConsoleProgress
from ..graph import Prompt
from ..problems import describe_problems
from ..terminal import FAILED, INTERRUPTED, OK, add_graph_arguments, interrupting, refuse, say
from . import events as happened
from .address import DEFAULT_SERVER, server_address
from .errors import ClientError, ExecutionFailed, JobInterrupted, PromptRefused

if TYPE_CHECKING:
    from .asynchronous import AsyncClient
    from .job import AsyncJob


def add_command(commands: Any) -> None:
    """Add the command's parser to those of `cascade`."""
    parser = commands.add_parser(
        "submit",
        help="run a graph on a server",
        description="Run a graph in API format on a ComfyUI server or on `cascade serve`, and save its pictures here.",
    )
    parser.set_defaults(command=_submit)
    add_graph_arguments(parser)
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="URL", help=f"default: {DEFAULT_SERVER}")
    parser.add_argument("--out", type=Path, default=Path("output"), metavar="DIR", help="default: output/")


def _submit(arguments: argparse.Namespace) -> int:
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        return refuse("this command needs the package aiohttp; install it with: pip install aiohttp")
    from ..prompt_file import read_prompt, read_workflow

    try:
        server_address(arguments.server)
        prompt, extra_data = read_prompt(arguments.workflow)
        if arguments.editor_file is not None:
            extra_data.setdefault("extra_pnginfo", {})["workflow"] = read_workflow(arguments.editor_file)
    except ValueError as error:
        return refuse(str(error))
    try:
        return asyncio.run(_run_on_server(arguments, prompt, extra_data))
    except asyncio.CancelledError:  # the second Ctrl-C
        say("interrupted; the job may go on")
        return INTERRUPTED


async def _run_on_server(arguments: argparse.Namespace, prompt: Prompt, extra_data: dict[str, Any]) -> int:
    from .asynchronous import AsyncClient

    try:
        async with AsyncClient(arguments.server) as client:
            try:
                await _make_settings(client, prompt, arguments.settings)
            except ValueError as error:
                return refuse(str(error))
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            program = asyncio.current_task()
            assert program is not None
            with interrupting(
                lambda: loop.call_soon_threadsafe(stop.set), lambda: loop.call_soon_threadsafe(program.cancel)
            ):
                job = await client.submit(prompt, extra_data=extra_data)
                with _cancelling(job, stop):
                    if job.node_errors:
                        await job.cancel()
                        return _cannot_run(arguments, describe_problems(None, job.node_errors))
                    await _show(job, prompt)
            result = await job.result()
            for file in result.kept:
                print(_printable(str(await client.download(file, arguments.out))), flush=True)
        return OK
    except PromptRefused as error:
        return _cannot_run(arguments, error.problems)
    except JobInterrupted as error:
        say("interrupted" if error.node is None else f"interrupted in {_named(prompt, error.node)}")
        return INTERRUPTED
    except ExecutionFailed as error:
        if arguments.traceback:
            sys.stderr.writelines(_printable(line) for line in error.traceback)
        reason = error.exception_message.strip() or error.exception_type
        say(_printable(f"{_named(prompt, error.node)} failed: {reason}"))
    except (ClientError, OSError, ValueError) as error:
        say(_printable(str(error)))
    return FAILED


async def _make_settings(client: AsyncClient, prompt: Prompt, texts: list[str]) -> None:
    """Set inputs of the prompt, as the server's nodes declare them."""
    from ..prompt_file import read_setting, set_input
    from ..registry import Declaration

    for text in texts:
        setting = read_setting(prompt, text)
        name = setting.class_type
        known = await client.object_info(name) if isinstance(name, str) and name else {}
        inputs = known.get(name, {}).get("input")
        set_input(prompt, setting, Declaration(inputs) if isinstance(inputs, dict) else None)


@contextlib.contextmanager
def _cancelling(job: AsyncJob, stop: asyncio.Event) -> Iterator[None]:
    """Cancel the job on the server once `stop` is set."""

    async def wait() -> None:
        await stop.wait()
        try:
            await job.cancel()
        except ClientError as error:
            say(_printable(str(error)))

    waiting = asyncio.create_task(wait())
    try:
        yield
    finally:
        waiting.cancel()


async def _show(job: AsyncJob, prompt: Prompt) -> None:
    """Show the job's progress until it ends."""
    console = ConsoleProgress({node: _title(prompt, node) for node in prompt}, sys.stderr)
    try:
        async for event in job.events():
            if isinstance(event, happened.NodesCached):
                console.leave_out(event.nodes)
            elif isinstance(event, happened.NodeStarted):
                console.begin(event.node)
            elif isinstance(event, happened.NodeProgress):
                console.advance(event.value, event.maximum)
            elif isinstance(event, happened.NodeFinished):
                console.end(event.node)
            elif isinstance(event, happened.NodeBlocked):
                console.say(event.node, _printable(event.message))
            elif isinstance(event, happened.NodeOutput):
                texts = event.output.get("text")
                for text in texts if isinstance(texts, list) else ():
                    console.say(event.node, _printable(str(text)))
    finally:
        console.clear()


def _cannot_run(arguments: argparse.Namespace, problems: list[str]) -> int:
    lines = "".join(f"\n  {_printable(problem)}" for problem in problems)
    return refuse(f"{arguments.workflow} cannot run on {arguments.server}.{lines}")


def _named(prompt: Prompt, node: str) -> str:
    return f"node #{_printable(node)} ({_title(prompt, node)})"


def _title(prompt: Prompt, node: str) -> str:
    from ..prompt_file import title_of

    found = prompt.get(node, {})
    return _printable(str(title_of(found) or found.get("class_type")))


def _printable(text: str) -> str:
    """`text` without characters that steer a terminal: it may come from a server that nobody vouches for."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)
