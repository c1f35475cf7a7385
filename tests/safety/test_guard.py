"""The prompt guard: spellings, rules, the policy file, and how often the guard is right about labeled prompts."""

import random

import pytest

import ldm
from ldm.safety.guard import Guard, Names, Policy, Rule
from ldm.safety.personal import Found
from ldm.safety.spelling import fold, pattern
from tests.safety.measure import table
from tests.safety.prompts import POLICY, ROOT, count, read

RULES = {
    "color": Rule(0.6, ("crimson", "red hot*")),
    "heat": Rule(0.5, ("oven",), near=("hot",), unless=("museum",)),
    "weak": Rule(0.3, ("tepid",)),
}


@pytest.fixture(scope="module")
def guard():
    return Guard(Policy(allow=("crimson tide",), rules=RULES))


@pytest.fixture(scope="module")
def shipped():
    return Guard(Policy.read(POLICY))


# ------------------------------------------------------------------ spellings


@pytest.mark.parametrize(
    "text",
    [
        "Crimson",
        "a crimson, frog",
        "crimsons",
        "cr1mson",
        "cr!m$0n",
        "criiiimson",
        "c r i m s o n",
        "a c.r.i.m.s.o.n frog",
        "crimson_frog",
        "cri\u200bmson",
        "cri\u00admson",
        "cr\u00edmso\u0301n",
        "\uff23\uff32\uff29\uff2d\uff33\uff2f\uff2e",
        "\u0441rims\u043en",
        "\U0001d41c\U0001d42b\U0001d422\U0001d426\U0001d42c\U0001d428\U0001d427",
        "\u24d2\u24e1\u24d8\u24dc\u24e2\u24de\u24dd",
        "\U0001f172\U0001f181\U0001f178\U0001f17c\U0001f182\U0001f17e\U0001f17d",
        "red  hot",
        "red-hottest frog",
    ],
)
def test_a_word_is_found_in_every_spelling(guard, text):
    assert guard.check(text).refused


@pytest.mark.parametrize(
    "text",
    ["scrimson", "crimsonite", "crims on", "crimson tide", "CRIMSON-TIDE", "red hut", "crson", "", "1", "\u200b"],
)
def test_other_words_are_not_found(guard, text):
    assert guard.check(text).matches == ()


def test_a_letter_may_be_repeated_three_times_but_not_be_doubled():
    assert pattern(("god",)).search(fold("gooood"))
    assert not pattern(("god",)).search(fold("good"))


def test_words_without_spaces_between_them_are_found_anywhere():
    assert pattern(("\u88f8",)).search(fold("\u5168\u88f8\u306e"))
    assert not pattern(("\u0440\u043e\u0442",)).search(fold("\u043f\u0440\u043e\u0442\u043e\u043d"))


def test_folding_keeps_plain_text_and_takes_any_text():
    assert fold("a frog, 4k (best)") == "a frog, 4k (best)"
    draw = random.Random(0)
    for _ in range(300):
        fold("".join(chr(draw.randrange(0x110000)) for _ in range(20)))


def test_a_word_without_letters_is_refused():
    with pytest.raises(ValueError, match="needs a letter or digit, got '\\*'"):
        pattern(("*",))


# ------------------------------------------------------------------ rules


def test_the_score_combines_the_weights_and_the_threshold_decides(guard):
    assert guard.check("tepid").score == pytest.approx(0.3)
    assert not guard.check("tepid").refused
    decision = guard.check("a tepid hot oven")
    assert decision.score == pytest.approx(1 - 0.7 * 0.5)
    assert decision.refused
    assert decision.reason == "refused: score 0.65 of 0.50, found heat ('oven'), weak ('tepid')"
    assert guard.check("a frog").reason == "allowed: score 0.00 of 0.50"


def test_a_rule_with_near_needs_both_and_unless_cancels_it(guard):
    assert not guard.check("an oven").refused
    assert guard.check("hot air from an oven").refused
    assert not guard.check("a hot oven in a museum").refused


def test_personal_data_counts_with_its_own_weight():
    text = "portrait of jane@example.com"
    assert Guard(Policy()).check(text).matches[0].rule == "e-mail address"
    assert Guard(Policy()).check(text).refused
    assert not Guard(Policy(personal=0.4)).check(text).refused
    assert Guard(Policy(personal=0)).check(text).matches == ()


def test_nothing_is_refused_without_a_match_even_with_the_threshold_0():
    assert not Guard(Policy(threshold=0)).check("a frog").refused


def test_all_prompts_of_a_request_are_checked_but_not_the_negative_prompt(guard):
    assert not guard.check_request(ldm.Request("a frog", negative_prompt="crimson")).refused
    assert guard.check_request(ldm.Request(("a frog", "a crimson frog"), images=2)).refused
    region = ldm.RegionalPrompt("left=0.5,width=0.5", "crimson")
    assert guard.check_request(ldm.Request("a frog", regions=(region,))).refused
    variation = ldm.Variation(other_prompt="crimson", amount=0.5)
    assert guard.check_request(ldm.Request("a frog", variation=variation)).refused


def test_names_are_found_by_the_given_search():
    guard = Guard(Policy(names=Names("model", weight=0.6)), lambda text: [Found("PERSON", "Jane")])
    decision = guard.check("Jane")
    assert (decision.matches[0].rule, decision.score) == ("PERSON", pytest.approx(0.6))


# ------------------------------------------------------------------ the policy file


def test_the_policy_file_is_read_strictly(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('threshold = 0.7\n[rules.color]\nweight = 0.6\nwords = ["crimson"]\n[names]\nmodel = "m"')
    policy = Policy.read(path)
    assert (policy.threshold, policy.rules["color"].words, policy.names.model) == (0.7, ("crimson",), "m")
    for text, error in (
        ("treshold = 1", "unknown 'treshold'"),
        ("threshold = 2", "threshold must be a finite number from 0 to 1"),
        ('[rules.color]\nwords = ["a"]', "lacks weight"),
        ('[rules.color]\nweight = 3\nwords = ["a"]', "weight must be"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=error):
            Policy.read(path)


# ------------------------------------------------------------------ labeled prompts


def test_precision_and_recall_on_prompts_of_plain_words(shipped):
    prompts = read("prompts.tsv")
    assert len(prompts) >= 300
    counts, wrong = count(shipped, prompts)
    print(f"precision {counts.precision:.3f}, recall {counts.recall:.3f}, {counts}")
    print(*wrong, sep="\n")
    assert counts.precision >= 0.98
    assert counts.recall >= 0.98


def test_prompts_that_are_hard_for_word_lists_show_the_weakness(shipped):
    """If this fails because the guard became better, correct what docs/operate.md says about it."""
    counts, _ = count(shipped, read("hard.tsv"))
    print(f"precision {counts.precision:.3f}, recall {counts.recall:.3f}, {counts}")
    assert counts.recall < 0.5


def test_a_painters_name_and_a_color_are_allowed_and_the_reason_names_the_word(shipped):
    assert not shipped.check("portrait by John Singer Sargent, nude color palette, a shot glass").matches
    assert shipped.check("a n\u0430ked m\u0430n").reason == "refused: score 0.80 of 0.50, found sexual ('naked')"


def test_the_documented_table_is_that_of_the_policy(shipped):
    assert table(shipped) in (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")


def test_the_documented_names_are_a_part_of_a_policy(tmp_path):
    text = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    (tmp_path / "policy.toml").write_text(text[text.index("[names]\nmodel") :].split("```")[0])
    assert "John Singer Sargent" in Policy.read(tmp_path / "policy.toml").names.allow
