"""The adapter of Presidio, with a stand-in for the package; with the package itself where it is installed."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from ldm.safety.guard import Guard, Names, Policy
from ldm.safety.presidio import Presidio

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
    for module in (analyzer, engines, tldextract, ModuleType("tldextract")):
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


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("presidio_analyzer", "en_core_web_sm")),
    reason="needs presidio-analyzer and en_core_web_sm",
)
def test_presidio_itself_opens_no_socket():  # tests/conftest.py refuses sockets
    presidio = Presidio("en_core_web_sm", ("PERSON", "EMAIL_ADDRESS"), ("John Singer Sargent",))
    found = presidio.find("John Smith writes to jane@example.com about a portrait by John Singer Sargent")
    assert {one.text for one in found} == {"John Smith", "jane@example.com"}
