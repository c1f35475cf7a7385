"""Names of people and places in a text, by Microsoft's Presidio (the extra `guard`). Nothing is fetched."""

import importlib
from pathlib import Path
from typing import Any

from ldm.safety.personal import Found
from ldm.safety.spelling import fold

LANGUAGE = "en"


class Presidio:
    """Finds `entities` in texts, by a spaCy model that is installed.

    model: the name or folder of a spaCy model, such as "en_core_web_sm". allow: names that are not reported. A found
    name is allowed if all its words stand in one of `allow`: "Sargent" and "Singer Sargent's" with "John Singer
    Sargent".
    Raises ValueError if Presidio or the model is not installed: Presidio itself would fetch the model.
    """

    def __init__(self, model: str, entities: tuple[str, ...], allow: tuple[str, ...] = ()):
        analyzer, engines, domains, spacy = map(
            _installed, ("presidio_analyzer", "presidio_analyzer.nlp_engine", "tldextract.tldextract", "spacy.util")
        )
        if not Path(model).is_dir() and not spacy.is_package(model):  # Presidio fetches what this function refuses
            raise ValueError(
                f"the spaCy model {model} is neither a folder nor an installed package, and nothing is fetched: "
                "install its wheel with pip, or name another in the policy"
            )
        # The recognizer of e-mail addresses asks tldextract, whose default fetches a list. This reads the packaged one.
        domains.TLD_EXTRACTOR = domains.TLDExtract(cache_dir=None, suffix_list_urls=())
        engine = engines.SpacyNlpEngine(models=[{"lang_code": LANGUAGE, "model_name": model}])
        engine.load()
        self._analyzer = analyzer.AnalyzerEngine(nlp_engine=engine, supported_languages=[LANGUAGE])
        self._entities = list(entities)
        self._allow = [_words(name) for name in allow]

    def find(self, text: str) -> list[Found]:
        """Return what was found and is not allowed, in the order of the text."""
        results = self._analyzer.analyze(text=text, language=LANGUAGE, entities=self._entities)
        found = [
            Found(result.entity_type, text[result.start : result.end])
            for result in sorted(results, key=lambda result: result.start)
        ]
        return [one for one in found if not any(_words(one.text) <= names for names in self._allow)]


def _words(name: str) -> set[str]:
    return set(fold(name.removesuffix("'s").removesuffix("\u2019s")).split())


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f'[names] of the policy needs Presidio: pip install "ldm[guard]", or leave out [names] ({error})'
        ) from error
