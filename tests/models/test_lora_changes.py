"""The change of each kind of LoRA equals its formula, written out over indices."""

import math

import pytest
import torch

from ldm.models.lora import Change, product, rank, shape

LINEAR, CONV = (6, 8), (6, 8, 3, 3)


def drawn(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(sides, generator=generator, dtype=torch.float64) for name, sides in shapes.items()}


def lora(f):
    return torch.einsum("or,ri->oi", f["up"], f["down"])


def lora_of_a_convolution(f):
    return torch.einsum("or,rihw->oihw", f["up"][:, :, 0, 0], f["down"])


def locon(f):
    return torch.einsum("rshw,or,si->oihw", f["mid"], f["up"][:, :, 0, 0], f["down"][:, :, 0, 0])


def loha(f):
    first, second = (torch.einsum("or,ri->oi", f[f"hada_w{i}_a"], f[f"hada_w{i}_b"]) for i in (1, 2))
    return first * second


def loha_of_a_convolution(f):
    return loha(f).reshape(CONV)


def loha_with_cores(f):
    first, second = (
        torch.einsum("rshw,ro,si->oihw", f[f"hada_t{i}"], f[f"hada_w{i}_a"], f[f"hada_w{i}_b"]) for i in (1, 2)
    )
    return first * second


def kronecker(first, second):
    """Elements (o1 o2, i1 i2, ...) of the Kronecker product, which keeps the kernel of the second factor."""
    return torch.einsum("ab,cdhw->acbdhw", first, second).flatten(0, 1).flatten(1, 2)


def lokr(f):
    return kronecker(f["lokr_w1"], f["lokr_w2"][..., None, None])[..., 0, 0]


def lokr_of_products(f):
    first, second = (torch.einsum("or,ri->oi", f[f"lokr_w{i}_a"], f[f"lokr_w{i}_b"]) for i in (1, 2))
    return kronecker(first, second[..., None, None])[..., 0, 0]


def lokr_of_a_convolution(f):
    return kronecker(f["lokr_w1"], f["lokr_w2"])


def lokr_of_a_convolution_as_a_matrix(f):
    second = torch.einsum("or,ri->oi", f["lokr_w2_a"], f["lokr_w2_b"]).reshape(3, 4, 3, 3)
    return kronecker(f["lokr_w1"], second)


def lokr_with_a_core(f):
    return kronecker(f["lokr_w1"], torch.einsum("rshw,ro,si->oihw", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"]))


_TWO = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
_CORES = {"hada_w1_a": (2, 6), "hada_w2_a": (2, 6), "hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}
CASES = {  # formula, factors, shape of the weight, rank
    "LoRA": (lora, {"up": (6, 2), "down": (2, 8)}, LINEAR, 2),
    "LoRA of a convolution": (lora_of_a_convolution, {"up": (6, 2, 1, 1), "down": (2, 8, 3, 3)}, CONV, 2),
    "LoCon": (locon, {"up": (6, 2, 1, 1), "mid": (2, 2, 3, 3), "down": (2, 8, 1, 1)}, CONV, 2),
    "LoHa": (loha, _TWO, LINEAR, 2),
    "LoHa of a convolution": (loha_of_a_convolution, _TWO | {"hada_w1_b": (2, 72), "hada_w2_b": (2, 72)}, CONV, 2),
    "LoHa with cores": (loha_with_cores, _TWO | _CORES, CONV, 2),
    "LoKr": (lokr, {"lokr_w1": (2, 2), "lokr_w2": (3, 4)}, LINEAR, None),
    "LoKr of products": (
        lokr_of_products,
        {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4)},
        LINEAR,
        2,
    ),
    "LoKr of a convolution": (lokr_of_a_convolution, {"lokr_w1": (2, 2), "lokr_w2": (3, 4, 3, 3)}, CONV, None),
    "LoKr of a convolution as a matrix": (
        lokr_of_a_convolution_as_a_matrix,
        {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 36)},
        CONV,
        2,
    ),
    "LoKr with a core": (
        lokr_with_a_core,
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)},
        CONV,
        2,
    ),
    "the difference": (lambda f: f["diff"], {"diff": LINEAR}, LINEAR, None),
    "the difference of a normalization": (lambda f: f["diff"], {"diff": (6,)}, (6,), None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_the_formula_and_its_sides_are_known_before(case):
    formula, factors, sides, middle = CASES[case]
    held = drawn(**factors)
    change = product(held)
    torch.testing.assert_close(change.reshape(sides), formula(held), rtol=0, atol=1e-12)
    assert shape(held) == (sides[0], math.prod(sides[1:]))
    assert rank(held) == middle


@pytest.mark.parametrize("case", CASES)
def test_a_factor_that_is_missing_is_found_without_a_product(case):
    factors = CASES[case][1]
    for name in factors.keys() - {"mid", "hada_t1", "hada_t2", "lokr_t2"}:
        with pytest.raises(KeyError):
            shape(drawn(**{other: sides for other, sides in factors.items() if other != name}))


@pytest.mark.parametrize(("size", "dim"), [((6,), 1), ((6, 1), 1), ((1, 8), 0)])
def test_dora_gives_each_output_or_input_its_norm(size, dim):
    weight = torch.randn(LINEAR, generator=torch.Generator().manual_seed(1))
    factors = {name: value.float() for name, value in drawn(up=(6, 2), down=(2, 8)).items()}
    sizes = 1 + torch.rand(size, generator=torch.Generator().manual_seed(2))
    change = Change(factors | {"size": sizes}, 0.5).of("weight", weight)
    merged, plain = weight + change, weight + 0.5 * factors["up"] @ factors["down"]
    torch.testing.assert_close(merged.norm(dim=dim), sizes.flatten())
    cosine = torch.nn.functional.cosine_similarity(merged, plain, dim=dim)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_a_change_of_the_bias_leaves_the_weight():
    change = Change({"diff_b": torch.ones(6)})
    assert change.of("weight", torch.zeros(LINEAR)) is None
    assert torch.equal(change.of("bias", torch.zeros(6)), torch.ones(6))
