"""`command: push` and `command: pull` as stages of a pipeline.

A push stage has a receipt as its output, and runs again when one of the outputs has changed; what it finds at its
place there is replaced. A pull stage has the fetched output as its own, with the record of where it is from; it is not
asked again whether the other side has changed (`--force STAGE` does).
"""

from __future__ import annotations

from gemma2.core.json_files import write_json
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas.delivery.transfer import PullConfig, PushConfig

from .pulling import fetched, look_at_remote, move_into
from .pushing import push_outputs
from .remote_folder import check_allowed

__all__ = ["run_pull", "run_push"]


def run_push(config: PushConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Push the outputs; the receipt is `pushed.json`. Raises as `push_outputs`, UsageError for a store not allowed."""
    check_allowed(config.uri)
    with open_run("push", config, options) as run:
        found = push_outputs(config.uri, config.outputs, force=True, progress=progress)
        write_json(run.path / "pushed.json", found)
        return run.finish({key: found[key] for key in ("sent_files", "sent_bytes")})


def run_pull(config: PullConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Fetch an output. Raises as `pull_output`, UsageError for a store not allowed."""
    check_allowed(config.uri)
    found = look_at_remote(config.uri)
    with open_run("pull", config, options) as run:
        with fetched(found, options.out, progress) as (place, summary):
            move_into(place, run.path)
        return run.finish({"made_by": found.manifest.get("command"), "kind": config.kind, **summary})
