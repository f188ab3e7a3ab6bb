"""What the notes in the example workflows say (Markdown)."""

_AUTO = """\
`auto` takes the best file it finds, and without any the tiny model that comes with these nodes (it knows coloured
shapes only). For the real thing put files of
[stabilityai/stable-cascade](https://huggingface.co/stabilityai/stable-cascade) here and press **R**:
"""

_TABLE = f"""\
{_AUTO}
| file | below `models/` |
|---|---|
| `stage_c_bf16` or `stage_c_lite_bf16` | diffusion_models |
| `stage_b_bf16` or `stage_b_lite_bf16` | diffusion_models |
| `stage_a` | vae |
| `text_encoder/model.bf16` | text_encoders |
| `previewer` | vae_approx |
"""
_OWN = """
`0` in width, height, guidance and shift is the model's own value. Each node shows what it took after a run.
"""

FILES = _TABLE + _OWN

TEXT_TO_IMAGE = f"""\
# Text to image with Stable Cascade

Write a prompt and press **Run**. Stage C decides what is seen, Stage B adds detail, Stage A makes the picture.

{FILES}"""

PREVIEW_FIRST = f"""\
# Choose a seed first

Makes four small pictures with Stage C alone, in a fraction of the time: Stage B and Stage A change no more what is
seen. The first has the seed of the sampler, the next that seed + 1 and so on. Put the seed of the one you like into
*text_to_image*, with the same prompt.

{_AUTO}
| file | below `models/` |
|---|---|
| `stage_c_bf16` or `stage_c_lite_bf16` | diffusion_models |
| `text_encoder/model.bf16` | text_encoders |
| `previewer` | vae_approx |
"""

CHECKPOINT_FILES = f"""\
# Text to image from the two combined files

As *text_to_image*, with one loader for everything.

{_AUTO}
| file in `comfyui_checkpoints` | below `models/` |
|---|---|
| `stable_cascade_stage_c` (Stage C, text encoder, previewer) | checkpoints |
| `stable_cascade_stage_b` (Stage B, Stage A) | checkpoints |
"""

TRAIN_LORA = f"""\
# Train a LoRA on your pictures

Teaches Stage C a new word, `[thing]`, from two pictures, then makes a picture without and with it. Here the pictures
are made in the graph, so that it runs anywhere. **Change first:** put your pictures into a folder below `input`, name
it in *train LoRA* at `folder`, disconnect `pictures`, and write in `captions` what they show, with `[thing]` where
your thing is.

The LoRA is also written to `models/loras`, and the word to `models/embeddings`. The settings suit the tiny model; for
the published ones take 500 steps or more at a `learning_rate` of 0.0001.

{_TABLE}| `effnet_encoder` | vae |
{_OWN}"""

CHANGE_THE_PROMPT = f"""\
# Change the prompt of a picture

Makes a picture and from it another one that keeps its composition: *Change it* has another prompt, and starts from the
latent of the first picture instead of noise. The higher its `start`, the more may change.

{FILES}"""
