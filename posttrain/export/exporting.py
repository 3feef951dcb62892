"""`gemma2 export`: what is asked for, checked, written to a directory, uploaded."""

from __future__ import annotations

from pathlib import Path

from gemma2.core.errors import OutputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.promised import promise
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.doctor.checks.finding import Depth
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.delivery.export import ExportConfig

from .exported_model import ExportedModel, exported_model
from .gate import refuse_broken

__all__ = ["export", "plan_export"]


def plan_export(config: ExportConfig, out: Path | None, force: bool = False, resume: bool = False) -> JsonObject:
    """Return what `export` would write and upload: files and bytes. Raises its errors about arguments and inputs."""
    check_destination(config, out, source := exported_model(config.model))
    refuse_broken(source.parts, Depth.QUICK, config.anyway, SILENT)
    plan: JsonObject = {"plan": f"export {source.given}, nothing was written or uploaded"}
    if out is not None and not (resume and finished(config, out)):
        plan |= {"out": str(out)} | _plan_of_directory(config, source, out, force)
    if config.push is not None:
        from .hub_files import pushed_files

        pushed = pushed_files(config, source.path if out is None or not finished(config, out) else out)
        plan |= {"push": config.push, "visibility": "public" if config.public else "private"}
        written = out is not None and not finished(config, out)
        if written:
            plan |= {"upload": "the files of --out"}
        else:
            plan |= {
                "notes_on_card": pushed.notes,
                "upload_bytes": pushed.bytes,
                "files": pushed.rows(),
                "left_out": list(pushed.left_out),
            }
    return plan


def _plan_of_directory(config: ExportConfig, source: ExportedModel, out: Path, force: bool) -> JsonObject:
    from .writing import check_kind, plan_of_model

    check_kind(config, source)
    if config.gguf:
        from .gguf_file import plan_gguf

        return plan_gguf(config, source, out, force)
    if config.keep_adapter:
        return {"bytes": sum(file.stat().st_size for file in weight_files(source.path))}
    return plan_of_model(config, out, force)


def export(
    config: ExportConfig, out: Path | None, *, force: bool = False, resume: bool = False, progress: Progress = SILENT
) -> JsonObject:
    """Write the model to `out`, upload it to `config.push`, or both; return what was done.

    With `resume` an `out` that this export has finished is kept, and only the upload goes on.
    Raises UsageError, InputError, OutputError.
    """
    check_destination(config, out, source := exported_model(config.model))
    depth = Depth.QUICK if config.push is None else Depth.FULL
    refuse_broken(source.parts, depth, config.anyway, progress)
    done: JsonObject = {}
    if out is not None and not (resume and finished(config, out)):
        promise(out)
        done |= _written(config, source, RunOptions(out, force=force), progress)
    if config.push is not None:
        from .hub_push import push

        done |= push(config, out or source.path, progress)
    return done


def _written(config: ExportConfig, source: ExportedModel, options: RunOptions, progress: Progress) -> JsonObject:
    from .writing import check_kind, write_adapter, write_model

    check_kind(config, source)
    if config.gguf:
        from .gguf_file import write_gguf

        return write_gguf(config, source, options, progress)
    if config.keep_adapter:
        write_adapter(config, source, options)
    else:
        write_model(config, source, options, progress)
    files = weight_files(options.out)
    return {"dtype": config.dtype or "unchanged", "files": len(files), "bytes": sum(f.stat().st_size for f in files)}


def check_destination(config: ExportConfig, out: Path | None, source: ExportedModel) -> None:
    """Require a place to write to, and --out for an upload of something that has to be written first."""
    if out is None and config.push is None:
        raise UsageError("nothing says where to export to", "give --out DIR, --push ORG/NAME, or both")
    if out is not None:
        return
    given: JsonObject = {"--dtype": config.dtype, "--shard-size": config.shard_size, "--gguf": config.gguf}
    given["--endpoint"] = config.endpoint
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} makes another model, which has to be written first", "give --out DIR too")
    if source.adapter is not None and (not config.keep_adapter or len(source.parts) > 1):
        raise UsageError(
            f"{source.given} is an adapter, which is merged into its base before it is uploaded",
            "give --out DIR too, or --keep-adapter to upload the adapter alone",
        )


def finished(config: ExportConfig, out: Path) -> bool:
    """Whether `out` is what this export writes. Raises OutputError if it is something else."""
    found = read_manifest(out) if out.is_dir() else None
    if found is None:
        return False
    kept = ("model", "dtype", "shard_size", "keep_adapter", "gguf", "endpoint")
    recorded, asked = dict(found.get("config") or {}), config.recorded()
    same = found.get("command") == "export" and all(recorded.get(key) == asked.get(key) for key in kept)
    parts = {str(parent.get("weights")) for parent in found.get("parents") or []}
    if same and {digest_weights(path) for path in exported_model(config.model).parts} <= parts:
        return True
    raise OutputError(f"{out} is not an export of {config.model} with these settings", "give another --out, or --force")
