"""The prompt guard: a policy of word lists and personal data gives each prompt a score, a decision and the reasons."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ldm.config import check_number
from ldm.request import Request
from ldm.safety import personal
from ldm.safety.spelling import fold, pattern
from ldm.strict import from_dict, read_toml


@dataclass(frozen=True)
class Rule:
    """A list of words. It counts once for a prompt with any of `words`, any of `near` if given, and none of `unless`.

    weight: 0 to 1, how sure it is that such a prompt is to be refused. See `ldm.safety.spelling.pattern` for the words.
    """

    weight: float
    words: tuple[str, ...]
    near: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the weight."""
        check_number("weight", self.weight, 0, 1)


@dataclass(frozen=True)
class Names:
    """The search for names of people and places by Presidio, see `ldm.safety.presidio`.

    model: the name or folder of a spaCy model. entities: what to search for, by Presidio's names.
    allow: names that may stand in a prompt, such as those of painters.
    """

    model: str
    entities: tuple[str, ...] = ("PERSON",)
    allow: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Policy:
    """What a guard refuses. A file of it is `configs/policy.toml`.

    threshold: prompts with this score or a higher one are refused. personal: the weight of personal data; 0: allowed.
    allow: phrases that are taken out of a prompt before the rules read it. rules: by name.
    """

    threshold: float = 0.5
    personal: float = 1.0
    allow: tuple[str, ...] = ()
    rules: Mapping[str, Rule] = field(default_factory=dict)
    names: Names | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_number("threshold", self.threshold, 0, 1)
        check_number("personal", self.personal, 0, 1)

    @classmethod
    def read(cls, path: str | Path) -> "Policy":
        """Read a TOML file. Raises ValueError for a wrong file, and OSError for one that cannot be read."""
        return from_dict(read_toml(path), cls, where=str(path))


@dataclass(frozen=True)
class Match:
    """A reason: the name of a rule or kind of personal data, the characters that were found, and the weight."""

    rule: str
    text: str
    weight: float


@dataclass(frozen=True)
class Decision:
    """What a guard decided on a prompt: 1 - score is the product of 1 - weight over all matches."""

    refused: bool
    score: float
    threshold: float
    matches: tuple[Match, ...] = ()

    @property
    def reason(self) -> str:
        """The decision in a sentence, with the words that were found."""
        found = ", ".join(f"{match.rule} ({match.text!r})" for match in self.matches)
        what = "refused" if self.refused else "allowed"
        return f"{what}: score {self.score:.2f} of {self.threshold:.2f}{f', found {found}' if found else ''}"


Finder = Callable[[str], list[personal.Found]]  # text -> personal data in it


class Guard:
    """Decides on prompts by a policy. find_names: replaces the search that `policy.names` describes.

    The guard reads words, and does not understand them: docs/operate.md has its precision and recall. It does not look
    at pictures.
    Raises ValueError for a policy with `names`, if Presidio or its model is not installed.
    """

    def __init__(self, policy: Policy, find_names: Finder | None = None):
        self.policy = policy
        self._allow = pattern(policy.allow)
        self._rules = [
            (name, rule, pattern(rule.words), pattern(rule.near), pattern(rule.unless))
            for name, rule in policy.rules.items()
        ]
        self._find_names = find_names
        if find_names is None and policy.names is not None:
            from ldm.safety.presidio import Presidio  # of the extra `guard`

            names = policy.names
            self._find_names = Presidio(names.model, names.entities, names.allow).find

    def check(self, prompt: str) -> Decision:
        """Decide on a prompt."""
        weights = self.policy.personal, self.policy.names.weight if self.policy.names else 1.0
        found = [personal.find(prompt), self._find_names(prompt) if self._find_names else []]
        matches = [Match(*one, weight) for some, weight in zip(found, weights, strict=True) for one in some if weight]
        text = self._allow.sub(" . ", fold(prompt))
        for name, rule, words, near, unless in self._rules:
            match = words.search(text)
            if match and (not rule.near or near.search(text)) and not unless.search(text):
                matches.append(Match(name, re.sub(r"\s+", " ", match[0]), rule.weight))
        score = 1 - math.prod(1 - match.weight for match in matches)
        return Decision(bool(matches) and score >= self.policy.threshold, score, self.policy.threshold, tuple(matches))

    def check_request(self, request: Request) -> Decision:
        """Decide on all prompts of a request together: of its pictures, its regions and its variation.

        The negative prompt says what the pictures must not show. So it may hold any word.
        """
        prompts = [*request.prompts, *(region.prompt for region in request.regions)]
        if request.variation is not None:
            prompts.append(request.variation.other_prompt or "")
        return max(map(self.check, prompts), key=lambda decision: (decision.refused, decision.score))
