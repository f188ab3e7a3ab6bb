"""What ComfyUI 0.3.64 answered to the probe nodes' prompts and to plain routes, and how to compare with it.

Compared: status, body, messages with their order, history. Left out: `number`, client and prompt ids (replaced in the
record), time stamps, tracebacks, `status` messages, and the order of what ComfyUI keeps in sets.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

from stable_cascade_nodes.host import ExecutionBlocker, ProgressBar

DATA = Path(__file__).parent / "data"
_RECORD = json.loads((DATA / "comfyui" / "answers_0.3.64.json").read_text())
PROMPT_ANSWERS = {name: answer for name, answer in _RECORD.items() if not name.startswith("route_")}
ROUTE_ANSWERS = {name: answer for name, answer in _RECORD.items() if name.startswith("route_")}
UNORDERED = {"errors", "dependent_outputs", "nodes", "current_outputs"}


def probe_nodes():
    spec = importlib.util.spec_from_file_location("probe_nodes", DATA / "probe_nodes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.time = SimpleNamespace(sleep=lambda seconds: None)
    return module.make_probe_nodes(ProgressBar, ExecutionBlocker)


def comparable(value, key=None, prompt_id=None):
    """`value` as JSON, with ids, times and set orders made equal."""
    if isinstance(value, dict):
        left_out = {"number", "create_time"}
        return {k: comparable(v, k, prompt_id) for k, v in value.items() if k not in left_out}
    if key == "traceback":
        return "traceback"
    if key in ("timestamp", "modified", "created"):
        return 0
    if isinstance(value, (list, tuple)):
        items = [comparable(item, None, prompt_id) for item in value]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True)) if key in UNORDERED else items
    return "PID" if prompt_id is not None and value == prompt_id else value


def history_of(entry, prompt_id):
    entry = comparable(entry, None, prompt_id)
    _, name, prompt, extra_data, outputs = entry["prompt"]
    entry["prompt"] = [name, prompt, extra_data, sorted(outputs)]
    return entry


def messages_of(messages, prompt_id=None):
    """Messages without the queue's state."""
    return [comparable(message, None, prompt_id) for message in messages if message["type"] != "status"]
