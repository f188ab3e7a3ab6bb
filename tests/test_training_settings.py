"""Run files: what is read from them, what is refused and how, and what is written back."""

import dataclasses
import functools
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from stable_cascade_nodes.cascade_ops.checkpoints.loading import ParametersWithoutMemory
from stable_cascade_nodes.cascade_ops.checkpoints.releases import RELEASES
from stable_cascade_nodes.cascade_ops.models import LatentEncoder, StageA, StageB, StageC
from stable_cascade_nodes.cascade_ops.training.networks import SIZES
from stable_cascade_nodes.cascade_ops.training.settings import (
    TARGETS,
    LoRA,
    Loss,
    Models,
    Optimizer,
    Prior,
    Samples,
    Settings,
    Source,
    Token,
)
from stable_cascade_nodes.cascade_ops.training.settings_file import (
    _ALL_NAMES,
    SettingsError,
    read_settings,
    write_settings,
)
from stable_cascade_nodes.cascade_ops.training.settings_rules import CHOICES, HAS_EFFECT, RANGES

DOCS = Path(__file__).parents[1] / "docs" / "training.md"
DEFAULTS = Settings("", "")
LORA = """
target: lora
output: runs/cat
steps: 200
tokens:
  - token: "[cat]"
    init: cat
lora: {rank: 8, dialects: [comfyui, reference]}
data:
  sources:
    - path: photos
      repeats: 3
    - {path: /elsewhere/more, kind: webdataset}
optimizer:
  learning_rate: 1e-4
"""


@pytest.fixture
def read(tmp_path):
    """Read a run file with this text; changes as on the command line."""

    def run(text, *changes, name="run.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return read_settings(path, changes)

    return run


def refused(read, text, *changes, name="run.yaml"):
    with pytest.raises(SettingsError) as error:
        read(text, *changes, name=name)
    return error.value.problems


def test_a_file_gives_settings_and_leaves_the_rest_at_their_defaults(read, tmp_path):
    settings = read(LORA)
    assert settings == Settings(
        "lora",
        str(tmp_path / "runs/cat"),
        steps=200,
        tokens=(Token("[cat]", "cat"),),
        lora=LoRA(rank=8, dialects=("comfyui", "reference")),
        data=dataclasses.replace(
            Settings("lora", "x").data,
            sources=(Source(str(tmp_path / "photos"), repeats=3), Source("/elsewhere/more", "webdataset")),
        ),
        optimizer=Optimizer(learning_rate=1e-4),
    )


def test_toml_says_the_same(read, tmp_path):
    text = """
    target = "lora"
    output = "runs/cat"
    steps = 200
    tokens = [{token = "[cat]", init = "cat"}]
    lora = {rank = 8, dialects = ["comfyui", "reference"]}
    data.sources = [{path = "photos", repeats = 3}, {path = "/elsewhere/more", kind = "webdataset"}]
    optimizer.learning_rate = 1e-4
    """
    assert read(text, name="run.toml") == read(LORA)


SMALLEST = "target: lora\noutput: o\ndata: {sources: [{path: p}]}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("data: {sources: [{path: p}], resolutoin: 512}", "`data.resolutoin` is unknown, did you mean `resolution`;"),
        ("learning_rate: 1.0", "`learning_rate` is unknown, did you mean `optimizer.learning_rate`;"),
        ("colour: red", "`colour` is unknown; a run has target, output, name, steps,"),
        ("data: {sources: [{path: p, kidn: folder}]}", "`data.sources[0].kidn` is unknown, did you mean `kind`;"),
        ("data: {sources: [{kind: folder}]}", "`data.sources[0].path` is missing: every entry needs it."),
        ("steps: 0", "`steps` is 0, expected 1 or more."),
        ("steps: 1.5", "`steps` is 1.5, expected a whole number."),
        ("steps: yes", "`steps` is true, expected a whole number."),
        ('steps: "many"', "`steps` is the text 'many', expected a whole number: write digits without quotes."),
        ("name: 7", "`name` is 7, expected text: put it in quotes."),
        ("name: a/b", "`name` is 'a/b', expected a file name without folders: `output` is for the folder."),
        ("tensorboard: 1", "`tensorboard` is 1, expected true or false."),
        ("samples:", "`samples` is empty, expected settings by name (every, prompts,"),
        (
            "samples: {every: 5, prompts: a cat}",
            "`samples.prompts` is the text 'a cat', expected a list: write [a cat].",
        ),
        ("tokens: [{token: [cat]}]", "`tokens[0].token` is the list ['cat'], expected text: put it in quotes."),
        ("precision: bf16", "`precision` is 'bf16', expected one of float32, bfloat16: did you mean bfloat16."),
        ("optimizer: {ema: 1}", "`optimizer.ema` is 1, expected 0 or more and less than 1."),
        ("optimizer: {learning_rate: .inf}", "`optimizer.learning_rate` is inf, expected a number."),
        ("prior: {caption: a dog, share: 1}", "`prior.share` is 1, expected more than 0 and less than 1."),
        ("data: {sources: [], buckets: [0]}", "`data.buckets[0]` is 0, expected 0.125 to 8."),
        ("data: {}", "`data.sources` is empty, expected at least one folder: write `- path: FOLDER` below it."),
        ("target: loar", f"`target` is 'loar', expected one of {', '.join(CHOICES['target'])}: did you mean lora."),
    ],
)
def test_a_wrong_value_is_refused_by_its_path(read, text, problem):
    key = text.split(":")[0]
    kept = "".join(line + "\n" for line in SMALLEST.splitlines() if not line.startswith(f"{key}:"))
    problems = refused(read, kept + text)
    assert any(found.startswith(problem) for found in problems), problems


@pytest.mark.parametrize(
    ("target", "text", "problem"),
    [
        (
            "stage_b",
            "lora: {rank: 4}",
            "`lora` has no effect on the target stage_b, it is for the targets lora, lcm: remove it.",
        ),
        (
            "controlnet",
            "tokens: [{token: x}]",
            "`tokens` has no effect on the target controlnet, it is for the targets",
        ),
        ("lora", "loss: {pyramid_noise: true}", "`loss.pyramid_noise` has no effect on the target lora"),
        ("lora", "lcm: {steps: 2}", "`lcm` has no effect on the target lora, it is for the target lcm: remove it."),
        ("lcm", "loss: {weight: p2}", "`loss` has no effect on the target lcm"),
        ("lcm", "tokens: [{token: x}]", "`tokens` has no effect on the target lcm"),
        ("lcm", "samples: {every: 9, prompts: [a], steps: 9}", "`samples.steps` has no effect on the target lcm"),
        ("text_encoder", "loss: {weight: p2}", "`loss` has no effect on the target text_encoder"),
        ("stage_a", "samples: {every: 5}", "`samples` has no effect on the target stage_a"),
        ("stage_a", "gradient_checkpointing: true", "`gradient_checkpointing` has no effect on the target stage_a"),
        ("stage_c", "models: {stage_c: x.safetensors}", "`models.stage_c` has no effect on the target stage_c"),
        ("lora", "network: {c_cond: 4}", "`network` has no effect on the target lora"),
        ("stage_a", "network: {c_hidden: 8}\nmodels: {init: x}", "`network` and `models.init` are both given"),
        ("stage_c", "steps: 5", "Neither `models.init` nor `network` is given for stage_c, expected one"),
        ("lora", "prior: {pictures: 5}", "`prior.pictures` has no effect without `prior.caption`"),
        ("textual_inversion", "steps: 5", "`tokens` is empty, expected what textual inversion shall learn"),
        ("lora", "tokens: [{token: x}, {token: x}]", "`tokens` names a token twice"),
        ("controlnet", "controlnet: {kind: identity}", "`controlnet.embeddings` is missing"),
        ("controlnet", "controlnet: {embeddings: f}", "`controlnet.embeddings` has no effect on the kind canny"),
        ("lora", "loss: {weight: p2, buckets: 24}", "`loss.buckets` is of the adaptive weight and has no effect on p2"),
        ("stage_b", "loss: {offset_noise: 0.1}", "`loss.offset_noise` has no effect beside pyramid noise"),
        (
            "stage_b",
            "loss: {pyramid_noise: false, pyramid_share: 0.5}",
            "`loss.pyramid_share` has no effect without pyramid noise",
        ),
        ("lora", "loss: {pyramid_share: 0.5}", "`loss.pyramid_share` has no effect on the target lora"),
        ("lora", "loss: {weight_limit: 9}", "`loss.weight_limit` has no effect without interpolated buckets"),
        ("lora", "loss: {weight: p2, weight_limit: 9}", "`loss.weight_limit` is of the adaptive weight"),
        ("lora", "optimizer: {name: adafactor, beta1: 0.8}", "`optimizer.beta1` has no effect on adafactor"),
        ("lora", "samples: {steps: 9}", "`samples.steps` has no effect since `samples.every` is 0"),
        ("lora", "samples: {every: 9}", "`samples.prompts` is empty"),
        ("ip_adapter", "samples: {every: 9, prompts: [a]}", "`samples.pictures` has 0 entries for 1 prompts"),
        ("latent_encoder", "loss: {shift: 2}", "`loss` has no effect without Stage B"),
        ("stage_a", "encoders: {maps: [3]}", "`encoders.maps` has no effect on the target stage_a"),
        ("text_encoder", "steps: 5", "`encoders.attributes` or `encoders.token_attributes` is empty"),
        ("lora", "data: {cache: false, cache_folder: c, sources: [{path: p}]}", "`data.cache_folder` has no effect"),
    ],
)
def test_settings_without_effect_are_refused(read, target, text, problem):
    data = "" if text.startswith("data") else "data: {sources: [{path: p}]}\n"
    problems = refused(read, f"target: {target}\noutput: o\n{data}{text}")
    assert any(found.startswith(problem) for found in problems), problems


def test_only_what_is_written_counts(read):
    """The defaults of other targets' settings refuse nothing."""
    read("target: stage_a\noutput: o\ndata: {sources: [{path: p}]}")
    read("target: controlnet\noutput: o\ndata: {sources: [{path: p}]}\nloss: {offset_noise: 0.1}")


def test_all_problems_are_listed_at_once(read):
    text = SMALLEST + "stpes: 5\nbatch_size: 0\nlora: {rnak: 3}\nip_adapter: {tokens: 4}"
    problems = refused(read, text)
    assert [problem.split("`")[1] for problem in problems] == ["stpes", "batch_size", "lora.rnak", "ip_adapter"]
    with pytest.raises(SettingsError, match=r"^run.yaml:\n  `stpes` is unknown, .*\n  `batch_size`"):
        read(text)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("run.json", "{}", "The suffix is .json, expected .yaml or .toml: rename the file."),
        ("run.yaml", "a: [", "This is no valid yaml: "),
        ("run.yaml", "a: 1\nb: 2\na: 3", "This is no valid yaml: 'a' is given twice, the second time near line"),
        ("run.yaml", "- a", "The file holds the list ['a'], expected settings by name: add some."),
        ("run.toml", "a = ", "This is no valid toml: "),
    ],
)
def test_a_file_that_is_no_run_is_refused(read, name, text, problem):
    assert refused(read, text, name=name)[0].startswith(problem)


def test_yaml_reads_no_python_objects(read, tmp_path):
    target = tmp_path / "made"
    problems = refused(read, f"target: !!python/object/apply:os.mkdir ['{target}']")
    assert "could not determine a constructor" in problems[0] and not target.exists()


def test_paths_are_relative_to_the_file_and_home_is_known(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = read(SMALLEST + "models: {stage_c: ../c.safetensors, text_encoder: ~/t.safetensors, stage_b: auto}")
    assert settings.output == str(tmp_path / "o")
    assert settings.models.stage_c == str(tmp_path.parent / "c.safetensors")
    assert settings.models.text_encoder == str(tmp_path / "home/t.safetensors")
    assert (settings.models.stage_b, settings.models.init) == ("auto", "none")


def test_fractions_are_aspect_ratios_and_exponents_are_numbers(read):
    settings = read(SMALLEST.replace("[{path: p}]", "[{path: p}], buckets: [1, 4/5, 1.5]") + "steps: 2e3")
    assert settings.data.buckets == (1.0, 0.8, 1.5) and settings.steps == 2000


def test_a_change_replaces_what_the_file_says(read, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = read(
        LORA, "optimizer.learning_rate=3e-5", "data.sources.0.repeats=7", "lora.dora=true", "output=out",
        'tokens[1].token="<dog>"', "samples={every: 5, prompts: [a dog]}",
    )  # fmt: skip
    assert settings.optimizer.learning_rate == 3e-5 and settings.data.sources[0].repeats == 7 and settings.lora.dora
    assert settings.output == str(tmp_path / "here/out"), "relative to the current folder, not to the file"
    assert settings.data.sources[0].path == str(tmp_path / "photos")
    assert settings.tokens == (Token("[cat]", "cat"), Token("<dog>"))
    assert settings.samples == Samples(every=5, prompts=("a dog",))


@pytest.mark.parametrize("change", ["steps", "=5", "steps.x=5", "data.sources.5.path=x", "data.sources.path=x"])
def test_a_change_that_fits_nowhere_is_refused(read, change):
    with pytest.raises(SettingsError, match=f"^--set {change}"):
        read(LORA, change)


def test_what_was_run_is_written_and_read_back(read, tmp_path):
    full = Settings(
        "lora",
        "/runs/ü",
        name="cat",
        seed=3,
        precision="bfloat16",
        models=Models(stage_c="/m/c.safetensors"),
        data=dataclasses.replace(read(LORA).data, buckets=(0.8, 16 / 9), caption_dropout=0.1),
        prior=Prior(caption="a dog"),
        optimizer=Optimizer(learning_rate=1e-5, ema=0.999),
        loss=Loss(weight="min_snr", shift=2.0),
        tokens=(Token("[cat]", "cat"),),
        samples=Samples(every=9, prompts=("a: b", "yes")),
    )
    for settings in (full, read(LORA), Settings("stage_a", "/r", data=read(LORA).data)):
        path = tmp_path / "again" / "settings.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(write_settings(settings), encoding="utf-8")
        assert read_settings(path) == settings
    assert "lora:" not in write_settings(full), "what is at its default is left out"


def test_settings_that_a_file_could_not_hold_are_not_written():
    with pytest.raises(SettingsError, match="has no effect on the target stage_a"):
        write_settings(Settings("stage_a", "/r", lora=LoRA(rank=8), data=Settings("x", "y").data))


def test_published_sizes_become_arguments(read):
    text = "target: stage_c\noutput: o\ndata: {sources: [{path: p}]}\nnetwork: {size: %s}"
    assert read(text % "1B lite").network == SIZES["stage_c"]["1B lite"]
    assert read(text % "3.6B, c_clip_img: 96").network == {**SIZES["stage_c"]["3.6B"], "c_clip_img": 96}
    (problem,) = refused(read, text % "2B")
    assert problem == '`network.size` is \'2B\', expected one of the published sizes of stage_c: "3.6B", "1B lite".'
    (problem,) = refused(read, text % "1B lite, c_hiden: 5")
    assert problem.startswith("`network.c_hiden` is unknown, did you mean `c_hidden`;")


def test_published_sizes_have_the_published_number_of_weights():
    classes = {"stage_c": StageC, "stage_b": StageB, "stage_a": StageA, "latent_encoder": LatentEncoder}
    published = {(stage, release.size): count for (stage, count), release in RELEASES.items() if stage in classes}
    made = {}
    for stage, sizes in SIZES.items():
        for size, arguments in sizes.items():
            with ParametersWithoutMemory():
                network = classes[stage](**arguments)
            made[stage, size] = sum(parameter.numel() for parameter in network.parameters())
    assert made == published


def test_rules_are_about_settings_that_exist():
    """A renamed setting must take its rules along."""
    groups = {name.rsplit(".", depth)[0] for name in _ALL_NAMES for depth in (1, 2)}
    assert {*CHOICES, *RANGES} <= set(_ALL_NAMES)
    assert set(HAS_EFFECT) <= {*_ALL_NAMES, *groups}


def run_files():
    """The run files in the document, by their target and place."""
    text = DOCS.read_text(encoding="utf-8")
    return {
        f"{number} {block.split()[1]}": block
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.S))
    }


@pytest.mark.parametrize("name", run_files())
def test_the_documents_examples_can_be_run(read, name):
    assert read(run_files()[name]).target == name.split()[1]


def test_the_document_has_an_example_of_every_target():
    assert {name.split()[1] for name in run_files()} == set(TARGETS)


def test_the_documents_table_has_every_setting_with_its_default():
    rows = re.findall(
        r"^\| `([\w.]+)` \| (.+?) \| ", DOCS.read_text(encoding="utf-8").split("## All settings")[1], re.M
    )
    assert [name for name, _ in rows] == _ALL_NAMES
    first = {"data.sources": Source(""), "tokens": Token("")}
    for name, shown in rows:
        group, _, last = name.rpartition(".")
        value = getattr(first[group], last) if group in first else functools.reduce(getattr, name.split("."), DEFAULTS)
        if shown == "required":
            assert value == "" and (group in first or name in ("target", "output"))
        elif shown in ("empty", "none"):
            assert not value and value is not False and value != 0, name
        else:
            value = list(value) if isinstance(value, tuple) else value
            close = pytest.approx(value, rel=1e-3) if name == "data.buckets" else value
            assert yaml.safe_load(shown.strip("`")) == close, name
