"""Two processes that share a batch make the run that one process makes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from training_kit import trainer

from stable_cascade_nodes.cascade_ops.training import checkpoint
from stable_cascade_nodes.cascade_ops.training.accelerated import Accelerated

# FSDP2 through Accelerate wants an accelerator device, so its sharding is applied by hand here: the same call that
# Accelerate makes, over the CPU.
SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import training_kit
    import torch
    from stable_cascade_nodes.cascade_ops.training.accelerated import Accelerated, default_launch, launched

    class Sharded(Accelerated):
        def prepare(self, objective, optimizer):
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            names = {{parameter: name for name, parameter in objective.named_parameters()}}
            groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
            fully_shard(objective, mesh=init_device_mesh("cpu", (2,)))
            sharded = dict(objective.named_parameters())
            for group, chosen in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [sharded[name] for name in chosen]
            return objective, optimizer

    assert launched()
    launch = {launch}
    assert launch.processes == 2
    stop = {stop}
    run = training_kit.trainer(
        Path({folder!r}), batch_size=2, launch=launch, stop=lambda: stop and run.step == stop, **{changes}
    )
    run.run()

    # What is exported has its weights in one piece, wherever they lay.
    from stable_cascade_nodes.cascade_ops.training import checkpoint, run as whole_run

    whole_run.targets.build = lambda settings, parts: training_kit.SumObjective()
    whole = whole_run._whole(run, run.settings, None)
    if launch.index == 0:
        saved = checkpoint.read(run.path).weights
        for name, value in whole.named_parameters():
            if name in saved:
                assert type(value.data) is torch.Tensor and torch.equal(value, saved[name]), name
        assert torch.equal(whole.weight.losses, run.objective.weight.losses)
        print("sharded" if whole_run.is_spread(run) else "whole")
"""
DDP = "default_launch('float32')"
FSDP2 = "Sharded()"


def launch(folder: Path, kind: str, stop: int = 0, **changes) -> str:
    script = folder.with_suffix(".py")
    script.write_text(
        textwrap.dedent(SCRIPT).format(
            tests=str(Path(__file__).parent), folder=str(folder), launch=kind, stop=stop, changes=changes
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    # No word about a CPU: `torchrun` and the trainer have to find out by themselves.
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    trainer(folder).run()
    return checkpoint.read(folder / checkpoint.FILE_NAME)


@pytest.mark.parametrize(("kind", "layout"), [(DDP, "whole"), (FSDP2, "sharded")])
def test_two_processes_make_the_run_of_one(tmp_path, single, kind, layout):
    folder = tmp_path / "run"
    # Stopped and resumed on the way, so that a checkpoint of two processes is read by two.
    launch(folder, kind, stop=7)
    assert checkpoint.read(folder / checkpoint.FILE_NAME).step == 7
    assert launch(folder, kind) == layout
    found = checkpoint.read(folder / checkpoint.FILE_NAME)
    assert found.losses == pytest.approx(single.losses, rel=1e-4)
    for group in ("weights", "average", "own"):
        for name, value in getattr(single, group).items():
            torch.testing.assert_close(getattr(found, group)[name], value, rtol=1e-4, atol=1e-5, msg=f"{group} {name}")


def test_a_run_of_two_processes_goes_on_in_one(tmp_path, single):
    folder = tmp_path / "run"
    launch(folder, DDP, stop=6, optimizer={"accumulation": 1})
    rest = trainer(folder)
    assert rest.step == 6
    rest.run()
    assert rest.losses == pytest.approx(single.losses, rel=1e-4)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    class Alone:
        device, process_index, num_processes = torch.device("cpu"), 0, 1

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RuntimeError, match="started 3 processes and Accelerate joined 1, expected all of them"):
        Accelerated(accelerator=Alone())
