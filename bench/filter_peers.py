"""Verdicts of other libraries on labelled rows, for bench/filter_quality.py. It does not import
gemma2 and runs in its own environment.

stdin: {file of rows: [row, ...]}; stdout: {file: {peer: [verdict, ...]}, "missing": {peer: reason}}

- personal, secret: presidio-analyzer (recognizers of patterns only: the names that its language model would add need a
  download) and scrubadub (default detectors)
- language: lingua (all languages, drops what is not English with a confidence of 0.9, as `--language-confidence`)
- near-duplicate: datasketch (MinHash of 128 permutations over word triples of the whole row, threshold 0.8)
- unsafe: better-profanity (its word list)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Judge = Callable[[Row], bool]


def presidio() -> Judge:
    """Return the judge of presidio: patterns and check digits, without a language model."""
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NlpArtifacts, NlpEngine

    class NoModel(NlpEngine):
        """No words, no entities: the recognizers see the text alone."""

        def load(self) -> None:
            pass

        def is_loaded(self) -> bool:
            return True

        def process_text(self, text: str, language: str) -> NlpArtifacts:
            return NlpArtifacts([], [], [], [], self, language)

        def process_batch(self, texts: Any, language: str, **_: Any) -> Any:
            return ((text, self.process_text(text, language)) for text in texts)

        def is_stopword(self, word: str, language: str) -> bool:
            return False

        def is_punct(self, word: str, language: str) -> bool:
            return False

        def get_supported_entities(self) -> list[str]:
            return []

        def get_supported_languages(self) -> list[str]:
            return ["en"]

    registry = RecognizerRegistry(supported_languages=["en"])
    registry.load_predefined_recognizers(languages=["en"])
    engine = AnalyzerEngine(registry=registry, nlp_engine=NoModel(), supported_languages=["en"])
    ignored = {"DATE_TIME", "URL", "PERSON", "LOCATION", "NRP"}
    wanted = [entity for entity in engine.get_supported_entities() if entity not in ignored]
    return lambda row: bool(engine.analyze(row["text"], "en", entities=wanted, score_threshold=0.5))


def scrubadub() -> Judge:
    """Return the judge of scrubadub, without its detector of URLs."""
    import scrubadub as library

    scrubber = library.Scrubber()
    scrubber.remove_detector("url")
    return lambda row: any(True for _ in scrubber.iter_filth(row["text"]))


def lingua() -> Judge:
    """Return the judge of lingua."""
    from lingua import Language, LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().build()
    return lambda row: detector.compute_language_confidence(row["text"], Language.ENGLISH) <= 0.1


def datasketch() -> Judge:
    """Return the judge of datasketch."""
    from datasketch import MinHash

    def sketch(*texts: str) -> MinHash:
        words = re.findall(r"\w+", " ".join(texts).lower())
        found = MinHash(num_perm=128)
        for place in range(max(len(words) - 2, 1)):
            found.update(" ".join(words[place : place + 3]).encode())
        return found

    def judge(row: Row) -> bool:
        first, second = sketch(row["prompt"], row["text"]), sketch(row["other_prompt"], row["other"])
        return bool(first.jaccard(second) >= 0.8)

    return judge


def better_profanity() -> Judge:
    """Return the judge of better-profanity."""
    from better_profanity import profanity

    profanity.load_censor_words()
    return lambda row: bool(profanity.contains_profanity(row["text"]))


PEERS: dict[str, dict[str, Callable[[], Judge]]] = {
    "personal": {"presidio": presidio, "scrubadub": scrubadub},
    "secret": {"presidio": presidio, "scrubadub": scrubadub},
    "language": {"lingua": lingua},
    "near-duplicate": {"datasketch": datasketch},
    "unsafe": {"better-profanity": better_profanity},
}


def main() -> None:
    """Judge the rows of stdin."""
    files: dict[str, list[Row]] = json.load(sys.stdin)
    answer: dict[str, Any] = {"missing": {}}
    for name, rows in files.items():
        answer[name] = {}
        for peer, make in PEERS.get(name, {}).items():
            try:
                judge = make()
            except ImportError as error:
                answer["missing"][peer] = f"not installed ({error})"
                continue
            answer[name][peer] = [judge(row) for row in rows]
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
