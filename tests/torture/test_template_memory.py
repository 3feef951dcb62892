"""Templates that ask for all memory in one expression, in a process whose greatest size is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ledger import recorded

from gemma2.core.limits import TEMPLATE_MEMORY

ROOM = Path(__file__).resolve().parents[1] / "posttrain" / "data"
SCRIPT = """
import json, pathlib, resource, sys
import test_template_bounds as bounds
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, most = pathlib.Path(sys.argv[1]), int(sys.argv[2])
bounds.chat(folder / "good", None)
before, said = peak(), {}
for number, (name, template) in enumerate(bounds.TOO_MUCH.items()):
    try:
        for part in (1, 8, 1000):
            template = template.replace(str(bounds.N // part), str(2 * most // part))
        bounds.chat(folder / str(number), template)
        said[name] = "accepted"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps([said, peak() - before]))
"""


@pytest.mark.torture
@pytest.mark.skipif(sys.platform != "linux", reason="nothing else says what is in use, and bounds it")
def test_an_expression_takes_no_more_than_its_bound(tmp_path):
    with recorded("chat templates that ask for all memory in one expression") as figures:
        code = f"import sys; sys.path[:0] = {[str(ROOM), *sys.path]!r}\n{SCRIPT}"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(TEMPLATE_MEMORY)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said, grown = json.loads(done.stdout)
        bad = {name: text for name, text in said.items() if not text.startswith("TemplateOutOfBounds")}
        # The bound is above what the process has, to which small objects of the templates before it still belong.
        assert bad == {} and grown < 2 * TEMPLATE_MEMORY
        figures |= {"templates": len(said), "MiB more at the peak of the process": grown >> 20}
