"""The graph *text_to_image* with a choice out of a batch between Stage C and Stage B."""

SAMPLER_C, SAMPLER_B, CHOICE = "9", "10", "20"
# What runs when the choice changes: the choice, and what follows from it.
FOLLOWING = {CHOICE, SAMPLER_B, "11", "12"}


def choosing(graph, indexes, batch=4, **changes):
    """changes: inputs of the sampler of Stage B."""

    def with_inputs(node, **inputs):
        return graph[node] | {"inputs": graph[node]["inputs"] | inputs}

    choice = {"class_type": "CascadeSelectLatents", "inputs": {"latent": [SAMPLER_C, 0], "indexes": indexes}}
    return graph | {
        "8": with_inputs("8", batch_size=batch),
        SAMPLER_C: with_inputs(SAMPLER_C, steps=4),
        SAMPLER_B: with_inputs(SAMPLER_B, latent=[CHOICE, 0], steps=3, **changes),
        CHOICE: choice,
    }
