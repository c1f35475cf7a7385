"""Numbers for parts of a model, such as {"text_encoder": 0, "down": 0.5, "up.3": 1}.

A part is "vae", "text_encoder", "text_encoder_2", or a module of the UNet. The longest name counts.
"""

from collections.abc import Iterable, Mapping


def full_name(part: str, name: str) -> str:
    """Return the name of a layer or weight: that in the UNet, or that in another network with the network's."""
    return name if part == "unet" else f"{part}.{name}"


def number_for(blocks: Mapping[str, float], name: str, default: float) -> float:
    """Return the number of the smallest part that holds the layer or weight of this full name."""
    above = [part for part in blocks if f"{name}.".startswith(f"{part}.")]
    return blocks[max(above, key=len)] if above else default


def check_blocks(blocks: Mapping[str, float], names: Iterable[str], where: str) -> None:
    """Raise ValueError for a part that has none of these full names. where: how the message begins."""
    names = list(names)
    for part in blocks:
        if not any(f"{name}.".startswith(f"{part}.") for name in names):
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(f"{where} for {part!r}, and the model has {tops}")
