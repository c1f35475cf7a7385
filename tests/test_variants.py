"""Balanced variants of prompts, and the report of what came out."""

import itertools
import json
import math
from collections import Counter

import pytest

import ldm
from ldm.variants import Balance, Variant, expand, report, varied

PROMPT = "a photo of a {nurse|engineer}, {at work|at home}"


def test_a_group_gives_a_prompt_for_each_of_its_words():
    assert [v.prompt for v in expand("a {red|blue|} frog")] == ["a red frog", "a blue frog", "a  frog"]
    assert expand("a {red|blue} frog")[1] == Variant("a blue frog", {"red|blue": "blue"})
    assert expand("a frog") == [Variant("a frog", {})]


def test_groups_and_attributes_combine():
    variants = expand(PROMPT, {"age": ("young", "old", ""), "light": ("dim", "bright")})
    assert len({v.prompt for v in variants}) == 24
    assert "a photo of a nurse, at home, old, dim" in {v.prompt for v in variants}
    assert "a photo of a nurse, at home, bright" in {v.prompt for v in variants}
    assert variants[0].choices.keys() == {"nurse|engineer", "at work|at home", "age", "light"}


def test_any_number_of_variants_is_balanced_and_all_together_are_each_combination_once():
    for sizes in [s for n in (1, 2, 3) for s in itertools.product((1, 2, 3, 4, 6), repeat=n)] + [(2, 2, 2, 2, 3)]:
        attributes = {str(i): tuple(map(str, range(size))) for i, size in enumerate(sizes)}
        variants = expand("a frog", attributes)
        assert len({tuple(v.choices.items()) for v in variants}) == math.prod(sizes) == len(variants)
        counts = [Counter(dict.fromkeys(values, 0)) for values in attributes.values()]
        for variant in variants:
            for counter, value in zip(counts, variant.choices.values(), strict=True):
                counter[value] += 1
                assert max(counter.values()) - min(counter.values()) <= 1


def test_the_same_group_twice_is_two_choices():
    variants = expand("a {cat|dog} and a {cat|dog}")
    assert {v.prompt for v in variants} == {f"a {x} and a {y}" for x in ("cat", "dog") for y in ("cat", "dog")}
    assert list(variants[0].choices) == ["cat|dog", "cat|dog #2"]


def test_braces_without_a_choice_stay():
    assert expand("a {frog}, {x}: {red|blue}")[0].prompt == "a {frog}, {x}: red"


@pytest.mark.parametrize(
    ("prompt", "attributes", "error"),
    [
        ("a {red {frog|cat}|dog}", {}, "must not stand in other braces"),
        ("a {red|red} frog", {}, r"needs values that differ from each other, got \['red', 'red'\]"),
        ("a frog", {"age": ()}, "age needs values"),
        ("a frog", {str(i): tuple("0123456789") for i in range(5)}, "100000 combinations; at most 99999"),
    ],
)
def test_wrong_groups_are_refused(prompt, attributes, error):
    with pytest.raises(ValueError, match=error):
        expand(prompt, attributes)


def test_attributes_are_read_from_a_file(tmp_path):
    path = tmp_path / "balance.toml"
    path.write_text('[attributes]\nage = ["young", "old"]\nlight = ["dim", ""]')
    assert dict(Balance.read(path).attributes) == {"age": ("young", "old"), "light": ("dim", "")}
    path.write_text('[classifiers]\nage = "a folder"')
    assert Balance.read(path) == Balance({}, {"age": "a folder"})
    path.write_text('[attribute]\nage = ["young"]')
    with pytest.raises(ValueError, match="unknown 'attribute'; valid keys: attributes, classifiers"):
        Balance.read(path)


def test_a_varied_request_has_each_variant_equally_often():
    variants = expand(PROMPT)
    request = varied(ldm.Request("x", images=6, seed=3, steps=2), variants)
    assert (request.images, request.seed, request.steps) == (8, 3, 2)
    assert set(Counter(request.prompt).values()) == {2}
    assert varied(ldm.Request("x"), variants).images == 4


def test_a_varied_request_gives_the_pictures_of_its_prompts(pipe):
    request = varied(ldm.Request("x", steps=1, seed=5, width=32, height=32), expand("a {frog|cat}"))
    both = pipe.generate(request)
    alone = [
        pipe.generate(ldm.Request(f"a {word}", steps=1, seed=5 + i, width=32, height=32))[0]
        for i, word in enumerate(("frog", "cat"))
    ]
    assert [picture.tobytes() for picture in both] == [picture.tobytes() for picture in alone]


def test_the_report_counts_what_came_out_for_what_was_asked():
    variants = expand("a {nurse|engineer}", {"age": ("young", "old")})
    found = [
        {"gender": "woman", "age": "young"},
        {"gender": "man", "age": "young"},
        {"gender": "woman", "age": "old"},
        {"age": "old"},
    ]
    assert [v.prompt for v in variants] == ["a nurse, young", "a engineer, old", "a nurse, old", "a engineer, young"]
    table = report([v.choices for v in variants], found)
    assert table["pictures"] == 4
    assert table["asked"]["age"] == {"old": 2, "young": 2}
    assert table["found"] == {"age": {"old": 2, "young": 2}, "gender": {"man": 1, "woman": 2}}
    assert table["crossed"]["nurse|engineer"]["nurse"]["gender"] == {"woman": 2}
    assert table["crossed"]["nurse|engineer"]["engineer"]["gender"] == {"man": 1}
    assert table["right"] == {"age": 0.5}
    assert json.loads(json.dumps(table)) == table


def test_a_report_needs_an_answer_for_each_picture():
    with pytest.raises(ValueError, match="an answer for each of 2 pictures, got 1"):
        report([v.choices for v in expand("a {x|y}")], [{}])
