"""What a ``config.json`` beside a file knows that shapes do not say."""

from __future__ import annotations

from collections.abc import Mapping

_CLIP_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")


def from_config_json(stage: str, config: Mapping, proven: Mapping) -> dict:
    """Take from a diffusers or transformers ``config.json`` what shapes cannot say, if it is for this kind of model.

    proven: what shapes do say. A CLIP encoder of other widths is another one: a ``config.json`` often lies beside
    several, and the wrong heads or activation give other embeddings without any complaint.
    """
    kind = str(config.get("_class_name") or "")
    if stage in ("stage_b", "stage_c") and kind.lower() == "stablecascadeunet":
        taken = {
            name: config[theirs]
            for name, theirs in (("self_attn", "self_attn"), ("dropout", "dropout"), ("patch_size", "patch_size"))
            if config.get(theirs) is not None
        }
        heads = config.get("num_attention_heads", config.get("nhead"))
        if heads:
            taken["nhead"] = [count or -1 for count in heads]
        if stage == "stage_c" and config.get("switch_level"):
            taken["switch_level"] = list(config["switch_level"])
        for ours, theirs in (("c_in", "in_channels"), ("c_out", "out_channels")):
            if theirs in config:
                taken[ours] = config[theirs]
        return taken
    if stage == "stage_a" and kind == "PaellaVQModel" and "scale_factor" in config:
        return {"scale_factor": config["scale_factor"]}
    if stage in ("text_encoder", "image_encoder") and str(config.get("model_type", "")).startswith("clip"):
        tower = config.get("text_config" if stage == "text_encoder" else "vision_config") or config
        if any(tower.get(name, proven[name]) != proven[name] for name in _CLIP_SIZES):
            return {}
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
        return {name: tower[name] for name in names if name in tower}
    return {}
