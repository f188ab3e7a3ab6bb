"""The two families of weights, whose latents mean different things."""


def families_clash(first: str, second: str) -> bool:
    """Whether one is the bundled tiny family and the other a published release; see `handles.StageHandle.family`."""
    return {first, second} == {"tiny", "release"}
