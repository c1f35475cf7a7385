"""What can be counted without computing: floating-point operations, weights, and the peak memory of tensors."""

from functools import cache, partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.attention import math_attention, set_attention, sliced_attention
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.live_bytes import LiveBytes
from ldm.placement.offload import Streamed
from ldm.placement.slabs import decode_slabs, encode_slabs
from ldm.placement.tiles import decode_tiles, encode_tiles
from tests.benchmarks.cases import CASES


@cache
def networks(config):
    """Make the UNet, the VAE and the text encoder in fp16 on the meta device, where they take no memory."""
    with torch.device("meta"):
        text = TextEncoder(config.text, [Tokenizer.official()] * len(config.text))
        made = UNet(config.unet), VAE(config.vae), text
    return [network.to("meta", torch.float16) for network in made]


def size(*networks):
    """Count the parameters of the networks."""
    return sum(p.numel() for network in networks for p in network.parameters())


def calls(case):
    """Map each part to its network and to a function that runs it; a step has guidance, a batch of two."""
    config, pixels = CASES[case]
    unet, vae, text = networks(config)
    side, tokens = pixels // config.vae.factor, config.text[0].max_length
    empty = partial(torch.empty, dtype=torch.float16, device="meta")
    latents, context = empty(2, config.unet.in_channels, side, side), empty(2, tokens, config.unet.context_dim)
    image, vector = empty(1, 3, pixels, pixels), empty(2, config.unet.vector_dim or 0)

    def streamed():
        with Streamed(unet, "meta"):
            unet(latents, empty(2), context, vector)

    return {
        "text": (text, lambda: text.encode(["", ""])),
        "step": (unet, lambda: unet(latents, empty(2), context, vector)),
        "step sequential": (unet, lambda: unet(latents[:1], empty(1), context[:1], vector[:1])),
        "step streamed": (unet, streamed),
        "decode": (vae.decoder, lambda: vae.decode(latents[:1])),
        "decode slabs": (vae.decoder, lambda: decode_slabs(vae, latents[:1])),
        "decode tiles": (vae.decoder, lambda: decode_tiles(vae, latents[:1])),
        "encode": (vae.encoder, lambda: vae.encode(image)),
        "encode slabs": (vae.encoder, lambda: encode_slabs(vae, image)),
        "encode tiles": (vae.encoder, lambda: encode_tiles(vae, image)),
    }


@cache
@torch.no_grad()
def work(case, part, steps=1):
    """Count the operations of a part (a multiply-add is two) and the weights that it reads (a UNet's in each step)."""
    if part == "txt2img":
        works = [work(case, "text"), *[work(case, "step")] * steps, work(case, "decode")]
        return [sum(amounts) for amounts in zip(*works, strict=True)]
    network, call = calls(case)[part]
    set_attention(network, math_attention)
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops(), size(network)


def fused(q, k, v):
    """Hold what a fused kernel holds beside its inputs: the output."""
    return torch.empty_like(q)


ATTENTIONS = {"sdpa": fused, "sliced": sliced_attention, "math": math_attention}
WAYS = {  # of a whole picture: its parts, and whether a network is on the device only while it works
    "ldm": (["text", "step", "decode"], False),
    "ldm-sequential": (["text", "step sequential", "decode"], False),
    "ldm-slabs": (["text", "step", "decode slabs"], False),
    "ldm-tiles": (["text", "step", "decode tiles"], False),
    "ldm-offload-model": (["text", "step", "decode"], True),
    "ldm-offload-blocks": (["text", "step streamed", "decode"], True),
    "ldm-offload-blocks, slabs": (["text", "step streamed", "decode slabs"], True),
}


@cache
@torch.no_grad()
def peak(case, part, attention):
    """Count the most bytes in tensors at one time during a part, without the weights that were there before."""
    network, call = calls(case)[part]
    set_attention(network, ATTENTIONS[attention])
    with LiveBytes() as live:
        call()
    return live.peak


def counted(case):
    """Yield rows of the peak memory in fp16: of each part without its weights, and of a picture with all weights."""
    large = CASES[case][1] > CASES[case][0].image_size  # a case of the VAE alone
    for part in ("decode", "encode") if large else ("step", "decode", "encode"):
        for attention in ATTENTIONS:
            yield memory_row(case, part, f"ldm-{attention}", peak(case, part, attention))
    for part in ("decode", "encode"):
        for way in ("slabs", "tiles"):
            yield memory_row(case, part, f"ldm-{way}", peak(case, f"{part} {way}", "sdpa"))
    if large:
        return
    yield memory_row(case, "step", "ldm-sequential", peak(case, "step sequential", "sdpa"))
    unet, vae, text = (2 * size(network) for network in networks(CASES[case][0]))
    for side, (parts, offload) in WAYS.items():
        peaks = [peak(case, part, "sdpa") for part in parts]
        if offload:  # the peak of a streamed step includes the weights of its stages
            weights = [text, 0 if "streamed" in parts[1] else unet, vae]
            most = max(w + p for w, p in zip(weights, peaks, strict=True))
        else:
            most = unet + vae + text + max(peaks)
        yield memory_row(case, "picture", side, most)


def memory_row(case, part, side, most):
    return {"case": case, "part": part, "side": side, "peak, MiB": mib(most)}


def mib(count):
    return round(count / 2**20, 1)
