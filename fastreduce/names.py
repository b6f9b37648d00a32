"""Names, families, options and uses of the methods: all that can be said of them before torch is imported."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "EXPORT_FORMATS",
    "FAMILIES",
    "METHODS",
    "TITLES",
    "ExportFormat",
    "Method",
    "Option",
    "compared_methods",
    "nearest",
    "one_of",
    "own_options",
    "parse_method_option",
]

FAMILIES: dict[str, tuple[str, ...]] = {
    "Pruning": ("topk", "evit", "dynamicvit", "ats"),
    "Hard merging": ("tome", "kmedoids", "dpcknn"),
    "Soft merging": ("sit", "patchmerger", "sinkhorn"),
    "Static": ("radial_l1", "radial_l2", "radial_linf"),
}
TITLES = {
    "none": "Unreduced",
    **{"topk": "Top-K", "evit": "EViT", "dynamicvit": "DynamicViT", "ats": "ATS", "tome": "ToMe"},
    **{"kmedoids": "K-Medoids", "dpcknn": "DPC-KNN", "sit": "SiT", "patchmerger": "PatchMerger"},
    **{"sinkhorn": "Sinkhorn", "radial_l1": "Radial ℓ1", "radial_l2": "Radial ℓ2", "radial_linf": "Radial ℓ∞"},
}


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """A format that a model can be exported to.

    Attributes:
        runtime: what runs it.
        ending: of its file.
        packages: that writing and running it take, beside torch.
    """

    runtime: str
    ending: str
    packages: tuple[str, ...] = ()


EXPORT_FORMATS = {
    "onnx": ExportFormat("ONNX Runtime", ".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": ExportFormat("OpenVINO", ".xml", ("onnx", "onnxscript", "openvino")),
    "pt2": ExportFormat("AOTInductor", ".pt2"),
}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a method in :func:`fastreduce.patch`.

    Attributes:
        default: its value where it is not given.
        kind: ``bool``, ``int`` or ``float``; a tuple of words for a choice; ``"ints"`` for an integer or several.
        least: the smallest number that it may be; ``above``: a number that it has to exceed.
        instead: what to do in place of giving it on the command line; empty if it can be given there.
    """

    default: Any
    kind: type | tuple[str, ...] | str = bool
    least: float = -1e18
    above: float = -math.inf
    instead: str = ""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, as ``fastreduce methods`` lists it.

    Attributes:
        layers: what has to be trained: ``"none"`` or the layers that the method adds to a model.
        choose: in one line, when to take it.
        options: its own options by name.
    """

    layers: str
    choose: str
    options: dict[str, Option] = dataclasses.field(default_factory=dict)


_GENERATOR = Option(None, "generator", instead="it is a torch.Generator: give it to fastreduce.patch")
_RADIAL = {
    "norm": Option("l2", ("l1", "l2", "linf"), instead="name the method radial-l1, radial-l2 or radial-linf"),
    "schedule": Option(None, ("contiguous", "stages"), instead="keep rates need schedule='stages', which is set"),
    "min_radius": Option(1.0, float, instead="it belongs to schedule='contiguous', which has no keep rate"),
}
METHODS: dict[str, Method] = {
    "topk": Method("none", "a first try, where tokens may be dropped: a simple decision that costs little"),
    "evit": Method("none", "as topk, but a summary of what was dropped should stay", {"normalize": Option(False)}),
    "dynamicvit": Method(
        "a predictor a stage",
        "you train the model, and want it to learn which tokens it needs",
        {"generator": _GENERATOR},
    ),
    "ats": Method(
        "none",
        "images differ in what they need: easy ones keep fewer tokens than the keep rate allows",
        {"trim": Option(None, bool), "packed": Option(False), "points": Option("official", ("official", "exact"))},
    ),
    "tome": Method(
        "none",
        "nothing is trained and features should stay close: similar tokens are averaged, none is dropped",
        {
            "r": Option(None, "ints", instead="it takes the place of the keep rate: give it to fastreduce.patch"),
            "rounds": Option("official", ("official", "exact")),
            "prop_attn": Option(True),
            "metric": Option("before", ("before", "after")),
        },
    ),
    "kmedoids": Method(
        "none",
        "nothing is trained, and what stays should be tokens of the image, spread over all of it",
        {
            "iters": Option(3, int, 0),
            "cost": Option("all", ("all", "members")),
            "equal_weight": Option(False),
            "first": Option(0, "ints", 0),
        },
    ),
    "dpcknn": Method(
        "a score a stage",
        "you train the model, and want clusters averaged by learned weights",
        {"k_neighbors": Option(5, int, 1), "equal_weight": Option(False), "noise": _GENERATOR},
    ),
    "sit": Method(
        "a perceptron a stage", "you train the model for one image size, and want every token mixed by content"
    ),
    "patchmerger": Method(
        "queries a stage",
        "as sit, with learned queries in place of the perceptron: fewer parameters",
        {"scaled": Option(False)},
    ),
    "sinkhorn": Method(
        "centres a stage",
        "as patchmerger, but every output token should get an equal share of the image",
        {
            "eps": Option(1.0, float, above=0),
            "iters": Option(3, int, 1),
            "gradient": Option("official", ("official", "exact")),
        },
    ),
    "radial_l1": Method("none", "a baseline: a diamond around the centre, the same for every image", _RADIAL),
    "radial_l2": Method("none", "a baseline: a disc around the centre, the same for every image", _RADIAL),
    "radial_linf": Method("none", "a baseline: a square around the centre, the same for every image", _RADIAL),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'tome'?"``, or nothing where no known word is like it."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_of(what: str, word: str, known: Sequence[str]) -> str:
    """Return the word if it is known, else raise ValueError with the nearest, or all that are known."""
    if word not in known:
        hint = nearest(word, known) or f"; expected one of {', '.join(known)}"
        raise ValueError(f"unknown {what} {word!r}{hint}")
    return word


def _letters(name: str) -> str:
    """Return what is left of a name without case and punctuation, so that ``Top-K`` and ``topk`` are one."""
    return "".join(filter(str.isalnum, name.lower().replace("ℓ", "l").replace("∞", "inf")))


def compared_methods(names: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return the methods with what tells them apart, ``("radial", {"norm": "l1"})``, in the order of :data:`METHODS`.

    Args:
        names: in any case: ``tome``, ``ToMe``, ``radial-l1``; ``radial`` stands for its three norms. Empty for all.

    Raises:
        ValueError: an unknown name.
    """
    every = {name.replace("_", "-"): (name.partition("_")[0], name.partition("_")[2]) for name in METHODS}
    known = {_letters(name): name for name in [*every, *(method for method, _ in every.values())]}
    for name in names:
        if _letters(name) not in known:
            one_of("method", name, list(known.values()))
    wanted = {known[_letters(name)] for name in names} or set(every)
    return [
        (method, {"norm": norm} if norm else {})
        for name, (method, norm) in every.items()
        if name in wanted or method in wanted
    ]


def own_options(method: str) -> dict[str, Option]:
    """Return the options of a method by its name in ``fastreduce.REDUCERS``."""
    return METHODS["radial_l2" if method == "radial" else method].options


def _whole(text: str) -> int:
    return int(text, 10)


def _boolean(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]


def _parse(option: Option, text: str) -> Any:
    """Return the value, or raise ValueError or KeyError."""
    if text.lower() == "none" and option.default is None:
        return None
    if isinstance(option.kind, tuple):
        return {word: word for word in option.kind}[text.lower()]
    if option.kind is bool:
        return _boolean(text)
    if option.kind == "ints":
        values = tuple(_whole(part) for part in text.split(","))
        number: Any = values[0] if len(values) == 1 else values
    else:
        number = _whole(text) if option.kind is int else float(text)
        values = (number,)
    if not all(option.least <= value <= 1e18 and value > option.above for value in values):
        raise ValueError
    return number


def _accepted(option: Option) -> str:
    """Return in words what an option takes."""
    if isinstance(option.kind, tuple):
        return " or ".join(option.kind)
    words = {bool: "true or false", int: "a whole number", "ints": "a whole number, or one a stage"}
    least = f" of at least {option.least:g}" if option.least >= 0 else ""
    return words.get(option.kind, "a number") + (f" above {option.above:g}" if option.above >= 0 else least)


def parse_method_option(word: str, methods: Sequence[str]) -> tuple[str, str, Any]:
    """Read ``tome.rounds=exact``, or ``rounds=exact`` where one of the methods has such an option.

    Args:
        word: what was given.
        methods: names in ``fastreduce.REDUCERS``, those that are to be measured.

    Returns:
        Method, option and value.

    Raises:
        ValueError: no such method or option, one that cannot be given here, or a value that it does not take.
    """
    given, sign, text = word.partition("=")
    if not sign or not given.strip():
        raise ValueError(f"--method-option takes option=value, like tome.rounds=exact, got {word!r}")
    prefix, dot, name = given.strip().rpartition(".")
    if dot:
        method = compared_methods([prefix])[0][0]
        if method not in methods:
            raise ValueError(f"--method-option {word!r}: {method} is not among the methods ({', '.join(methods)})")
    else:
        having = [method for method in methods if name in own_options(method)] or list(methods)[:1]
        if len(having) > 1:
            raise ValueError(f"--method-option {word!r}: say of which method, like {having[0]}.{word}")
        method = having[0] if len(methods) == 1 or name in own_options(having[0]) else ""
    return _option_of(method, name, text.strip(), word, methods)


def _option_of(method: str, name: str, text: str, word: str, methods: Sequence[str]) -> tuple[str, str, Any]:
    if not method:
        raise ValueError(f"--method-option {word!r}: none of {', '.join(methods)} has an option {name!r}")
    options = own_options(method)
    if name not in options:
        near = nearest(name, options)
        known = near or (f"; its options are {', '.join(options)}" if options else "; it has none")
        raise ValueError(f"--method-option {word!r}: {method} has no option {name!r}{known}")
    option = options[name]
    if option.instead:
        raise ValueError(f"--method-option {word!r} cannot be given here: {option.instead}")
    try:
        return method, name, _parse(option, text)
    except (KeyError, ValueError):
        raise ValueError(f"--method-option {word!r}: {name} takes {_accepted(option)}, got {text!r}") from None
