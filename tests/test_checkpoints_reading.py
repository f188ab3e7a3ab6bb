"""Reading a model's tensors with several threads at once."""

import threading
import time

import pytest
import torch

from stable_cascade_nodes.cascade_ops.checkpoints import CheckpointError, inspect_file, load
from stable_cascade_nodes.cascade_ops.checkpoints.reading import TensorReader
from stable_cascade_nodes.tiny.family import WEIGHTS

FILE = WEIGHTS / "stage_a.safetensors"


def test_threads_read_side_by_side_and_close_their_files(monkeypatch):
    meeting, real, readers = threading.Barrier(2), TensorReader.read, set()
    waited = threading.local()

    def read(self, *arguments):
        readers.add(self)
        if not hasattr(waited, "once"):
            waited.once = True
            meeting.wait(timeout=20)  # a second thread has to come
        return real(self, *arguments)

    monkeypatch.setattr("stable_cascade_nodes.cascade_ops.checkpoints.loading._THREADS", 2)
    monkeypatch.setattr(TensorReader, "read", read)
    quick = load(FILE, dtype=torch.float32)[0].state_dict()
    monkeypatch.undo()
    (reader,) = readers
    assert len(reader._files) == 2 and all(file.closed for file in reader._files.values())
    with TensorReader() as alone:
        for name, recipe in inspect_file(FILE).recipes.items():
            assert torch.equal(quick[name], alone.read(recipe, torch.float32).to(quick[name].dtype)), name


def test_after_an_error_nothing_more_is_read(monkeypatch):
    calls = []

    def read(self, recipe, *_):
        calls.append(recipe)
        if len(calls) == 3:
            raise CheckpointError("the file ends here.")
        if len(calls) > 3:
            time.sleep(0.05)  # there is time to say that nothing more is wanted
        return torch.zeros(recipe.shape)

    monkeypatch.setattr("stable_cascade_nodes.cascade_ops.checkpoints.loading._THREADS", 1)
    monkeypatch.setattr(TensorReader, "read", read)
    with pytest.raises(CheckpointError, match="the file ends here"):
        load(FILE)
    assert len(calls) < len(inspect_file(FILE).recipes) / 2
