"""The key maps, rule by rule: one that is dropped, doubled, swapped with its neighbor or of another piece is told.

Of each map a digest is kept, made where the networks equal those of the reference libraries (tests/parity).
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoint import tables
from ldm.checkpoint.keymap import Piece, Rule, key_map
from ldm.checkpoint.parts import Part, collect, fill
from ldm.checkpoint.tensors import TensorFiles
from ldm.config import UNetConfig, VAEConfig
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.presets import SDXL_BASE

Rules = tuple[Rule, ...]
UNET = UNetConfig(channels=(32, 64), res_blocks=1, depth=(0, 2), heads=(1, 1), vector_dim=8, guidance_dim=4)
PER_BLOCK = dataclasses.replace(
    UNET,
    channels=(32, 64, 64),
    heads=(1, 1, 1),
    res_blocks=2,
    depth=(1, (1, 0), 0),
    up_depth=((1, 0, 2), (1, 1, 0), 0),  # upsampling after a transformer, and after a residual block
)
VAES = VAEConfig(channels=(32, 64), res_blocks=2)
MAPS = {  # the network, the rules, the digest
    "unet, ldm": ("unet", tables.ldm_unet(UNET), "e77ef0f5473d1f92"),
    "unet, diffusers": ("unet", tables.diffusers_unet(UNET), "136540fb78338864"),
    "a depth per block, ldm": ("per block", tables.ldm_unet(PER_BLOCK), "842282d22e3a91d7"),
    "a depth per block, diffusers": ("per block", tables.diffusers_unet(PER_BLOCK), "b27a80f43e1eea96"),
    "vae, ldm": ("vae", tables.ldm_vae(VAES), "1bce697a93215157"),
    "vae, diffusers": ("vae", tables.diffusers_vae(), "78909a30c2968f53"),
    "vae, old diffusers": ("vae", tables.diffusers_vae(tables.OLD_DIFFUSERS_VAE_ATTENTION), "e47b7d9fd9afbb1f"),
    "text, transformers": ("text", tables.hf_text(), "ca0748779bbb2b8b"),
    "text, openclip": ("text", tables.OPENCLIP_TEXT, "ec16ee0e3064c4e9"),
}


@pytest.fixture(scope="module")
def keys(tokenizer) -> dict[str, list[str]]:
    """The names of our parameters, by network."""
    with torch.device("meta"):
        tower = TextTower(dataclasses.replace(SDXL_BASE.text[1], layers=2), tokenizer)
        networks: dict[str, nn.Module] = {
            "unet": UNet(UNET),
            "per block": UNet(PER_BLOCK),
            "vae": VAE(VAES),
            "text": tower,
        }
    return {name: list(network.state_dict()) for name, network in networks.items()}


def digest(keys: list[str], rules: Rules) -> str:
    """Return what `rules` make of `keys`, or why they do not, as a few letters."""
    try:
        stored = key_map(keys, rules)
    except (ValueError, LookupError, TypeError) as error:
        return str(error)
    lines = (f"{key} {at.name} {at.form.value} {at.piece.number}/{at.piece.of}\n" for key, at in sorted(stored.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def lists(rules: Rules) -> Iterator[Rules]:
    """Yield `rules` and every list inside it."""
    yield rules
    for rule in rules:
        yield from lists(rule.inside) if rule.inside else ()


def edits(rules: Rules) -> Iterator[tuple[str, Rules]]:
    """Yield a list with one rule dropped, swapped with the next, with the next's name, or of another piece."""
    for i, rule in enumerate(rules):
        before, after = rules[:i], rules[i + 1 :]
        yield f"without {rule.ours}", before + after
        if after and after[0].theirs != rule.theirs:
            other = after[0]
            one, two = dataclasses.replace(rule, theirs=other.theirs), dataclasses.replace(other, theirs=rule.theirs)
            yield f"{rule.ours} as {other.ours}", (*before, one, *after)
            yield f"{rule.ours} and {other.ours} swapped", (*before, one, two, *after[1:])
        if rule.piece.of > 1:
            piece = Piece((rule.piece.number + 1) % rule.piece.of, rule.piece.of)
            yield f"another piece of {rule.ours}", (*before, dataclasses.replace(rule, piece=piece), *after)


def with_list(rules: Rules, old: Rules, new: Rules) -> Rules:
    """Return `rules` with `new` wherever the list `old` is, as an edit of it in the source does."""
    if rules is old:
        return new
    return tuple(dataclasses.replace(rule, inside=with_list(rule.inside, old, new)) for rule in rules)


@pytest.mark.parametrize("name", MAPS)
def test_every_map_is_what_it_was_where_the_networks_were_compared(name, keys):
    network, rules, wanted = MAPS[name]
    assert digest(keys[network], rules) == wanted


@pytest.mark.slow
def test_no_rule_can_be_dropped_doubled_or_swapped_without_being_told(keys):
    found = {id(rules): rules for _, all_rules, _ in MAPS.values() for rules in lists(all_rules)}
    untold, count = [], 0
    for rules in found.values():
        for what, new in edits(rules):
            changed = (
                (keys[n], all_rules, with_list(all_rules, rules, new), wanted) for n, all_rules, wanted in MAPS.values()
            )
            count += 1
            if not any(digest(k, other) != wanted for k, old, other, wanted in changed if other != old):
                untold.append(what)
    assert untold == [], untold
    assert count > 200


def test_a_fused_projection_is_cut_into_queries_keys_and_values_as_torch_does(tokenizer, tmp_path):
    config = dataclasses.replace(SDXL_BASE.text[1], width=64, heads=2, layers=1, mlp=64, projection=64)
    torch.manual_seed(0)
    tower = TextTower(config, tokenizer)
    for parameter in tower.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    held = collect(tower, tables.OPENCLIP_TEXT)
    save_file(held, tmp_path / "text")
    theirs = nn.MultiheadAttention(64, 2, batch_first=True)  # what OpenCLIP is made of
    prefix = "transformer.resblocks.0.attn."
    theirs.load_state_dict({n.removeprefix(prefix): v for n, v in held.items() if n.startswith(prefix)})
    x = torch.randn(1, 5, 64)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    wanted = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]

    def fused(order: tuple[int, ...]) -> torch.Tensor:
        """Attend with a tower that is filled by rules whose pieces are in that order."""
        block = next(rule for rule in tables.OPENCLIP_TEXT if rule.inside)
        pieces = [
            r if r.piece.of == 1 else dataclasses.replace(r, piece=Piece(order[r.piece.number], 3))
            for r in block.inside
        ]
        rules = tuple(dataclasses.replace(r, inside=tuple(pieces)) if r is block else r for r in tables.OPENCLIP_TEXT)
        with torch.device("meta"):
            ours = TextTower(config, tokenizer)
        fill(ours, Part(TensorFiles([tmp_path / "text"]), rules), dtype=None, device=torch.device("cpu"))
        attn = ours.blocks[0].attn
        q, k, v = (f(x).unflatten(-1, (2, 32)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )

    right, *wrong = itertools.permutations(range(3))
    torch.testing.assert_close(fused(right), wanted)
    for order in wrong:
        assert not torch.allclose(fused(order), wanted, atol=1e-3), order
