"""What each approximation changes in the pictures and what it saves: the tables of docs/performance/approximations.md.

    python -m stable_cascade_nodes.benchmarks.approximations [--count 50] [--repeats 9] [--json FILE] [--page FILE]

With the tiny family, every approximation of Stage C or Stage B against the exact run of the same prompts and seeds. All
the rest of the chain is exact, so that a row shows what one approximation does. ``--page`` puts the tables into a page,
between the comments that name them. Times are of the stage alone, for one picture and in turns with the exact run; they
mean something on a quiet machine.

The second table counts operations of the published Stage B, which needs neither weights nor much time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cascade_ops import stages
from ..cascade_ops.catalog import bundled
from ..cascade_ops.denoisers import TextCondition
from ..cascade_ops.handles import DTYPES, StageHandle, load_stage
from ..cascade_ops.pipeline import CascadePipeline
from ..cascade_ops.reuse import InnerReuse, Kept, ReusedSteps, reuse_inner
from ..cascade_ops.stages import SamplingSettings
from ..cascade_ops.wires import Latent
from ..tiny.captions import caption_full
from ..tiny.checker import read_picture, score
from ..tiny.evaluate import BATCH, measured_scenes, psnr
from .comparing import in_turns, seconds_of, summary
from .floors import operations
from .models import CONFIGS, without_memory

SEED = 9_000
STEPS = {"stage_c": 20, "stage_b": 10}
TITLES = {"stage_c": "Stage C", "stage_b": "Stage B"}
WEIGHTS = ("bfloat16", "float16", "float8 weights", "int8 weights")
EVERY, OUTER = (2, 3), (1, 2, 3)
# Of Stage B, and pixels a side of its latent for a picture of 1024 x 1024.
SIZES = ("lite", "full")
PUBLISHED_SIDE = 256


@dataclass(frozen=True)
class Way:
    """One approximation of one stage. settings: what differs from the exact run's. dtype: of the stage's weights."""

    kind: str
    name: str
    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    reuse: InnerReuse | None = None
    dtype: str = "float32"

    def chosen(self) -> SamplingSettings:
        return replace(SamplingSettings(steps=STEPS[self.stage]), **self.settings)

    def handle(self, exact: StageHandle) -> StageHandle:
        """The stage as this way runs it."""
        if self.dtype != "float32":
            exact = load_stage(bundled(self.stage).path, self.stage, dtype=self.dtype, name=exact.name)
        return exact if self.reuse is None else reuse_inner(exact, self.reuse)


def ways() -> list[Way]:
    """All approximations that there are, by kind."""
    found = [
        Way("guidance interval", f"until {until:g}", stage, {"guidance_until": until})
        for stage, times in (("stage_c", (0.25, 0.5, 0.75)), ("stage_b", (0.5,)))
        for until in times
    ]
    found += [
        Way("reused inner blocks", f"every {every}, {outer} outer", "stage_b", reuse=InnerReuse(every, outer))
        for every in EVERY
        for outer in OUTER
    ]
    found += [
        Way("fewer steps", f"{sampler}, {steps}", stage, {"sampler": sampler, "steps": steps})
        for stage, counts in (("stage_c", (10, 5)), ("stage_b", (5, 3)))
        for sampler in ("ddpm", "dpmpp_2m")
        for steps in counts
    ]
    found += [
        Way("smaller numbers", dtype, stage, dtype=dtype) for dtype in WEIGHTS if dtype in DTYPES for stage in STEPS
    ]
    return found


class Chain:
    """The tiny family on some prompts, with the exact latents and pictures of each batch of them."""

    def __init__(self, count: int) -> None:
        self.pipeline = CascadePipeline.load("tiny", device="cpu", dtype="float32")
        self.scenes = measured_scenes(count, "test", 1)
        self.negative = stages.encode_text(self.pipeline.text_encoder, "")
        prompts = [stages.encode_text(self.pipeline.text_encoder, caption_full(scene)) for scene in self.scenes]
        self.batches = [
            TextCondition(*(torch.cat(parts) for parts in zip(*prompts[start : start + BATCH], strict=True)))
            for start in range(0, count, BATCH)
        ]
        settings = {stage: SamplingSettings(steps=steps) for stage, steps in STEPS.items()}
        runs = range(len(self.batches))
        self.latents = [self.sample("stage_c", self.pipeline.stage_c, settings["stage_c"], number) for number in runs]
        self.exact = self.pictures("stage_b", self.pipeline.stage_b, settings["stage_b"])
        self.judged = self.judge(self.exact)

    def sample(self, stage: str, handle: StageHandle, settings: SamplingSettings, number: int, first=False) -> Latent:
        """Latents of one batch, or of its first picture alone. Stage B goes on from the exact latents of Stage C."""
        text = self.batches[number]
        text = TextCondition(text.hidden[:1], text.pooled[:1]) if first else text
        seed = SEED + number * BATCH
        if stage == "stage_c":
            latent = stages.empty_latent(handle, batch_size=len(text.hidden))
            return stages.sample_stage_c(handle, text, self.negative, latent, seed=seed, settings=settings)
        return self.finish(handle, self.latents[number], text, seed, settings)

    def judge(self, pictures: Sequence[np.ndarray]) -> list[dict[str, bool]]:
        """What the checker finds right in the picture of each prompt, attribute by attribute."""
        return [score(scene, read_picture(picture)) for scene, picture in zip(self.scenes, pictures, strict=True)]

    def finish(
        self, handle: StageHandle, latent: Latent, text: TextCondition, seed: int, settings: SamplingSettings
    ) -> Latent:
        latent = replace(latent, samples=latent.samples[: len(text.hidden)])
        return stages.sample_stage_b(handle, latent, text, self.negative, seed=seed, settings=settings)

    def pictures(self, stage: str, handle: StageHandle, settings: SamplingSettings) -> np.ndarray:
        """uint8 ``[N, H, W, 3]``, one stage sampled like this and everything else exact."""
        found = []
        for number, text in enumerate(self.batches):
            latent = self.sample(stage, handle, settings, number)
            if stage == "stage_c":
                exact = SamplingSettings(steps=STEPS["stage_b"])
                latent = self.finish(self.pipeline.stage_b, latent, text, SEED + number * BATCH, exact)
            found += [
                np.asarray(stages.to_picture(one)) for one in stages.decode_stage_a(self.pipeline.stage_a, latent)
            ]
        return np.stack(found)


def row_of(chain: Chain, way: Way, repeats: int) -> dict[str, Any]:
    """What `measured` says, or why a stage with smaller numbers refused to run."""
    try:
        return measured(chain, way, repeats)
    except ValueError as error:
        if way.dtype == "float32":
            raise
        return {"kind": way.kind, "stage": TITLES[way.stage], "name": way.name, "refused": str(error)}


def measured(chain: Chain, way: Way, repeats: int) -> dict[str, Any]:
    """A row: how far the pictures differ, how many are still right, and what the stage saves."""
    exact = getattr(chain.pipeline, way.stage)
    handle, settings, plain = way.handle(exact), way.chosen(), SamplingSettings(steps=STEPS[way.stage])
    pictures = chain.pictures(way.stage, handle, settings)
    judged = chain.judge(pictures)

    def exactly() -> Latent:
        return chain.sample(way.stage, exact, plain, 0, first=True)

    def so() -> Latent:
        return chain.sample(way.stage, handle, settings, 0, first=True)

    seconds = in_turns([exactly, so], repeats, lambda run: seconds_of(run, torch.device("cpu")))
    return {
        "kind": way.kind,
        "stage": TITLES[way.stage],
        "name": way.name,
        "psnr": psnr(pictures, chain.exact),
        "largest_difference": int(np.abs(pictures.astype(int) - chain.exact).max()),
        "read_the_same": _share(ours == theirs for ours, theirs in zip(judged, chain.judged, strict=True)),
        "right": _share(result["all"] for result in judged),
        "operations": operations(so) / operations(exactly),
        "weight_bytes": handle.size_in_bytes / exact.size_in_bytes,
        "seconds": summary([ours / theirs for theirs, ours in zip(*seconds, strict=True)]),
        "exact_seconds": summary(seconds[0]),
    }


def _share(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def published(size: str) -> list[dict[str, Any]]:
    """Operations of a guided run of a published Stage B of 10 steps, as parts of the exact run's, by counting."""
    model, steps = without_memory("stage_b", CONFIGS["stage_b"][size]).to("meta"), STEPS["stage_b"]
    side, found = PUBLISHED_SIDE, []

    def step(outer: int, index: int) -> Callable[[], Any]:
        kept = Kept(ReusedSteps(outer, (False, True)))
        kept.at(0).keep(torch.empty(2, *(side // 2 ** (outer + 1),) * 2, model.c_hidden[outer], device="meta"))
        return lambda: model.step(x, prepared, index, inner=kept.at(index))

    with torch.no_grad():
        grid = torch.empty(2, 16, 24, 24, device="meta")
        text = torch.empty(2, 1, model.clip_mapper.in_features, device="meta")
        prepared = model.prepare(torch.zeros(2, device="meta"), grid, text, (side, side))
        x = torch.empty(2, 4, side, side, device="meta")
        whole = operations(step(1, 0))
        for outer in OUTER:
            part = operations(step(outer, 1)) / whole
            for every in EVERY:
                reused = InnerReuse(every, outer).steps([1 - i / steps for i in range(steps)], [True] * steps)
                run = (reused.count(False) + reused.count(True) * part) / steps
                row = {"size": size, "every": every, "outer": outer, "reusing_step": part, "run": run}
                found.append({**row, "step_operations": whole})
    return found


def ways_table(rows: Sequence[dict[str, Any]], exact_right: float) -> str:
    """The measured rows as Markdown."""
    head = ("approximation", "of", "how", "PSNR", "largest", "reads the same", "right", "operations", "weights", "time")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines.append(f"| none |  |  |  |  |  | {exact_right:.2f} | 1 | 1 | 1 |")
    for row in rows:
        cells = [row["kind"], row["stage"], row["name"]]
        if "refused" in row:
            lines.append(f"| {' | '.join([*cells, 'refuses', *[''] * 6])} |")
            continue
        cells += [f"{row['psnr']:.1f} dB", str(row["largest_difference"])]
        cells += [f"{row[key]:.2f}" for key in ("read_the_same", "right", "operations", "weight_bytes")]
        cells.append(f"{row['seconds']['median']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def published_table(rows: Sequence[dict[str, Any]]) -> str:
    """The counted rows as Markdown."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    head = ["outer levels", *(f"{size}: a reusing step" for size in sizes)]
    head += [f"{size}: a run, every {every}" for size in sizes for every in EVERY]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for outer in OUTER:
        found = {(row["size"], row["every"]): row for row in rows if row["outer"] == outer}
        cells = [str(outer), *(f"{found[size, EVERY[0]]['reusing_step']:.2f}" for size in sizes)]
        cells += [f"{found[size, every]['run']:.2f}" for size in sizes for every in EVERY]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def into_page(page: str, name: str, text: str) -> str:
    """The page with `text` between its comments ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises ValueError for a page without them.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"The page has no {start} with an {end} after it: put both where the table belongs.")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the approximations on the tiny family.")
    parser.add_argument("--count", type=int, default=50, help="prompts")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--page", type=Path, help="page to put the tables into")
    given = parser.parse_args(arguments)
    chain = Chain(given.count)
    exact_right = _share(result["all"] for result in chain.judged)
    rows = []
    for way in ways():
        rows.append(row_of(chain, way, given.repeats))
        print(ways_table(rows[-1:], exact_right).splitlines()[-1], flush=True)
    counted = [row for size in SIZES for row in published(size)]
    tables = {"measured approximations": ways_table(rows, exact_right), "counted operations": published_table(counted)}
    print("\n\n".join(tables.values()))
    if given.json:
        machine = {
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        content = {**machine, "count": given.count, "exact_right": exact_right, "rows": rows, "published": counted}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if given.page:
        page = given.page.read_text(encoding="utf-8")
        for name, table in tables.items():
            page = into_page(page, name, table)
        given.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
