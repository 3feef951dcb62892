"""The corpus of malformed inputs through the real command line, and good inputs that must be accepted."""

import pytest
from corpus import tried, write_world
from corpus_data import ROWS, TABLES, TEMPLATES
from corpus_files import MANIFESTS, OUTPUTS, YAML
from corpus_models import ADAPTERS, DIRECTORIES, HEADERS, INDEXES, MEANING, PAIRS, SHARDS

CASES = {
    f"{part}: {name}": case
    for part, cases in {
        "shard": SHARDS,
        "header": HEADERS,
        "index": INDEXES,
        "directory": DIRECTORIES,
        "meaning": MEANING,
        "pair": PAIRS,
        "adapter": ADAPTERS,
        "rows": ROWS,
        "table": TABLES,
        "template": TEMPLATES,
        "yaml": YAML,
        "manifest": MANIFESTS,
        "output": OUTPUTS,
    }.items()
    for name, case in cases.items()
}
