"""Finds the classes that a plan names as nnU-Net does, but only in torch.nn and the architecture library."""

from __future__ import annotations

import pydoc
import re
from typing import Any

from torch import nn

from ..errors import ModelError
from .architecture import Architecture

LIBRARY = "dynamic_network_architectures."
NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
BLOCKS = ("BasicBlockD", "BottleneckD")
CLASS_ENTRIES = ("conv_op", "norm_op", "dropout_op", "nonlin", "block")
"""Arguments of these networks that are classes."""

NEEDED = ("conv_op", "block")
"""Arguments without which nnU-Net builds no network; without another one it builds a network that lacks it."""

PATHS = re.compile(r"(torch\.nn|dynamic_network_architectures)(\.[A-Za-z_]\w*)+")
"""Paths that may be imported."""


def network_class(name: str) -> type[nn.Module]:
    """Find a network of the architecture library by its name; the path before the name is ignored.

    Raises:
        ModelError: For a network that is not supported.

    Note:
        nnU-Net imports the path; if it does not exist, it searches the library for the name
        (get_network_from_plans). Here the path is never imported; weights of another network do not fit.
    """
    short = name.rpartition(".")[2]
    if short not in NETWORKS:
        raise ModelError(
            f"the network must be one of {', '.join(NETWORKS)} of dynamic_network_architectures, the plan "
            f"names {name!r:.120}; other classes are never imported"
        )
    from dynamic_network_architectures.architectures import unet

    return getattr(unet, short)


def is_unet(architecture: Architecture) -> bool:
    """Whether a plan names a U-Net of the architecture library."""
    return architecture.class_name.rpartition(".")[2] in NETWORKS


def argument_classes(architecture: Architecture) -> dict[str, Any]:
    """Give a network's arguments with classes in place of their names.

    Raises:
        ModelError: For an entry that is not listed as a class, a class that is not allowed, or a class that does not
            exist although every network needs it.

    Note:
        nnU-Net resolves each entry of `_kw_requires_import` by pydoc.locate, which gives None for a path that does not
        exist (get_network_from_plans). It then builds the network without the entry, and so does nnturbo; see
        `remarks_on`.
    """
    arguments = dict(architecture.arguments)
    for entry in architecture.class_arguments:
        if entry not in arguments:
            raise ModelError(
                f"plans.json: _kw_requires_import lists {entry!r:.80}, which must be among arch_kwargs; nnU-Net builds "
                f"no network of this plan"
            )
        if arguments[entry] is not None:
            arguments[entry] = _argument_class(entry, arguments[entry])
    for entry in CLASS_ENTRIES:
        if isinstance(arguments.get(entry), str):
            raise ModelError(
                f"plans.json: _kw_requires_import must list {entry!r}, which names {arguments[entry]!r:.120}; without "
                f"that nnU-Net builds no network of this plan"
            )
    return arguments


def remarks_on(architecture: Architecture) -> tuple[str, ...]:
    """Warn about unusual classes of a plan whose network can be built."""
    remarks = []
    name = architecture.class_name
    if not name.startswith(LIBRARY) and is_unet(architecture):
        remarks.append(
            f"plans.json names the network {name:.120}, which is never imported: it runs as "
            f"{LIBRARY}architectures.unet.{name.rpartition('.')[2]}"
        )
    for entry in architecture.class_arguments:
        path = architecture.arguments.get(entry)
        if entry in NEEDED or not isinstance(path, str) or not PATHS.fullmatch(path):
            continue  # building the network gives an error
        if _located(path) is None:
            remarks.append(
                f"plans.json: {entry} names {path:.120}, which does not exist{_instead(path)}: as in nnU-Net, the "
                f"network has no {entry}"
            )
    return tuple(remarks)


def _argument_class(entry: str, path: Any) -> type[nn.Module] | None:
    """Find a class as nnU-Net does; None if it does not exist and nnU-Net builds the network without it."""
    if not isinstance(path, str) or not PATHS.fullmatch(path):
        raise ModelError(
            f"plans.json: {entry} must name a module of torch.nn or one of {', '.join(BLOCKS)} by its whole path, got "
            f"{path!r:.120}; other classes are never imported"
        )
    found = _located(path)
    if found is None:
        if entry in NEEDED:
            raise ModelError(f"plans.json: {entry} names {path!r:.120}, which does not exist{_instead(path)}")
        return None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and _is_allowed(found)):
        raise ModelError(
            f"plans.json: {entry} must name a module of torch.nn or one of {', '.join(BLOCKS)}, {path!r:.120} is not; "
            f"other classes are never imported"
        )
    return found


def _located(path: str) -> Any:
    try:
        return pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise ModelError(f"plans.json names {path!r:.120}, which cannot be imported here") from error


def _is_allowed(found: type) -> bool:
    module = found.__module__
    return module.startswith(("torch.nn.", "torch.ao.nn.")) or (module.startswith(LIBRARY) and found.__name__ in BLOCKS)


def _instead(path: str) -> str:
    """Name the class that a path may mean."""
    short = path.rpartition(".")[2]
    return f" (torch has torch.nn.{short})" if isinstance(vars(nn).get(short), type) else ""
