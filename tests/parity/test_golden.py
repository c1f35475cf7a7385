"""Token ids and step lists against values that were published before this package was written."""

import dataclasses

import pytest

from ldm.models.text import TextTower
from ldm.models.tokens import Tokenizer
from ldm.presets import SD15, SD21_BASE
from tests.parity import golden
from tests.parity.golden import EXPRESSED, REPAIRED_BY_OPENAI, SCHEDULES, TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.official()


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: ascii(case["prompt"][:30]))
def test_ids_are_those_of_transformers(case, tokenizer):
    assert golden.token_ids(tokenizer, case["prompt"]) == case["transformers"]


def test_ids_are_those_of_openai_too_but_where_its_code_repairs_the_text_first(tokenizer):
    unlike = {case["prompt"] for case in TOKENS if golden.token_ids(tokenizer, case["prompt"]) != case["openai"]}
    assert unlike == REPAIRED_BY_OPENAI.keys()


def test_an_exclamation_mark_stays_one_where_transformers_takes_it_for_padding(tokenizer):
    unlike = [case for case in TOKENS if case["transformers"] != case["transformers_padding_with_exclamation_mark"]]
    assert len(unlike) == 5
    for case in unlike:
        assert "!" in case["prompt"]
        assert 0 in case["transformers_padding_with_exclamation_mark"]
        assert 0 not in golden.token_ids(tokenizer, case["prompt"])


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("text", [SD15.text[0], SD21_BASE.text[0]], ids=["end", "zero"])
def test_a_tower_pads_and_cuts_every_golden_prompt_to_its_length(text, tokenizer):
    tower = TextTower(dataclasses.replace(text, width=16, heads=2, layers=1, mlp=16), tokenizer)
    for case, row in zip(TOKENS, tower.tokenize([case["prompt"] for case in TOKENS]), strict=True):
        ids = case["transformers"]
        whole = ids + [text.pad_id] * (77 - len(ids))
        assert row.tolist() == (whole if len(ids) <= 77 else ids[:76] + [49407])


@pytest.mark.parametrize(
    "case", [case for case in SCHEDULES if not isinstance(EXPRESSED[case["name"]], str)], ids=lambda case: case["name"]
)
def test_step_lists_are_those_of_diffusers(case):
    sigmas, timesteps = golden.steps(case)
    # 2e-5, 2e-3: printed with five decimals, from fp32 tables. 0.05: between whole timesteps ours is linear in
    # log sigma, theirs in sigma. 0.5: their DPM++ rounds Karras' timesteps.
    tolerance = 2e-3 if all(t == int(t) for t in case["timesteps"]) else 0.05
    if "use_karras_sigmas" in case["name"]:
        tolerance = 0.5
    assert timesteps == pytest.approx(case["timesteps"], abs=tolerance)
    if case["sigmas"] is not None:
        assert sigmas == pytest.approx(case["sigmas"], abs=2e-5, rel=2e-5)


def test_every_golden_list_is_tested_or_says_why_it_has_no_name_here():
    assert len(SCHEDULES) == 31
    assert {case["name"] for case in SCHEDULES} == EXPRESSED.keys()
    assert sum(isinstance(way, str) for way in EXPRESSED.values()) == 8
