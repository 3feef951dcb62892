"""Whether a request fits its method: names, counts and ranges, before any file is opened. Numpy-free."""

from __future__ import annotations

from dataclasses import replace

from gemma2.core.errors import UsageError
from gemma2.core.yaml_files import closest

from .method import MANY, Method
from .option import OPTIONS
from .parameters import values_of
from .request import DTYPES, MergeRequest
from .table import METHODS

__all__ = ["check_chosen", "check_request", "method_named"]


def method_named(name: str) -> Method:
    """The entry of a method. Raises UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"unknown merge method {name!r}", closest(name, METHODS))
    return METHODS[name]


def check_chosen(request: MergeRequest) -> MergeRequest:
    """The request of a command line or a stage, which names one of the options that exclude each other."""
    names = METHODS[request.method].one_of if request.method in METHODS else ()
    given = [name for name in names if OPTIONS[name].attribute in request.values]
    if names and len(given) != 1:
        flags = " or ".join(f"--{name}" for name in names)
        raise UsageError(f"merge {request.method} needs {flags}, and not both", "choose one")
    return request


def check_request(request: MergeRequest) -> MergeRequest:
    """The request with its defaults filled in. Raises UsageError for options that the method does not take."""
    method = method_named(request.method)
    _check_number_of_models(request, method, len(request.models))
    for number, part in enumerate(request.slices):
        named = {request.models[index] for index, _, _ in part.layers if index < len(request.models)}
        if named - {request.base} and request.method != "passthrough":
            _check_number_of_models(request, method, len(part.layers), f" in slice {number + 1}")
    for option in OPTIONS.values():
        if option.attribute in request.values and option not in method.options:
            raise UsageError(f"merge {request.method} does not take --{option.name}", "leave it out")
    if request.base is not None and method.base == "none" and not request.slices:
        raise UsageError(f"merge {request.method} does not take --base", "leave it out")
    if request.vocabulary is not None and request.tokenizer is None:
        raise UsageError("rows of the vocabulary are chosen without a tokenizer", "give --tokenizer")
    if request.base is None and method.base == "required":
        raise UsageError(f"merge {request.method} needs --base", "name the init of the models")
    _check_numbers(request)
    if not request.slices:
        _check_counts(request, method)
    for part in request.slices:
        own = replace(request, models=request.models[: len(part.layers)], **part.changes)
        _check_numbers(own)
        _check_counts(own, method)
    values = {**method.filled, **request.values}
    return replace(request, granularity=request.granularity or method.granularity, values=values)


def _check_number_of_models(request: MergeRequest, method: Method, count: int, where: str = "") -> None:
    least, most = method.models
    most = MANY if request.slices and not where else most  # slices may have other models each
    if not least <= count <= most:
        wanted = f"{least} model{'s' if least > 1 else ''}" if most == least else f"{least} to {most} models"
        raise UsageError(f"merge {request.method} takes {wanted}, {count} given{where}", "see --help")


def _check_numbers(request: MergeRequest) -> None:
    for option in OPTIONS.values():
        given = request.values.get(option.attribute)
        for number in given if isinstance(given, tuple) else (given,):
            for value in values_of(number):
                if option.kind != "switch" and not option.allows(value):
                    if option.range:
                        raise UsageError(f"--{option.name} {value:g} is not {option.range}", "correct it")
                    raise UsageError(f"--{option.name} holds a value that is not finite", "give numbers")
    if request.granularity not in (None, "layer", "tensor", "model"):
        raise UsageError(f"unknown --granularity {request.granularity!r}", "choose layer, tensor or model")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {request.dtype!r}", f"choose one of {', '.join(DTYPES)}")
    if request.threads < 1:
        raise UsageError(f"--threads {request.threads} is less than 1", "give 1 or more")


def _check_counts(request: MergeRequest, method: Method) -> None:
    """As many numbers as models, and numbers that fit each other."""
    models = len(request.models)
    for option in method.options:
        given = request.values.get(option.attribute)
        if not isinstance(given, tuple):
            continue
        if option.per == "output" and len(set(given)) != len(given):
            raise UsageError(f"--{option.name} names a value twice", "give each once")
        if option.name == "weights" and len(given) != models:
            raise UsageError(f"{len(given)} weights for {models} models", "give one per model")
        if option.per == "model" and len(given) not in (1, models):
            raise UsageError(
                f"{len(given)} values of --{option.name} for {models} models", "give one, or one per model"
            )
    if method.check is not None:
        method.check(request)
