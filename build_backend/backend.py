"""The PEP 517 build backend of fastrnn: setuptools, with the user's own torch.

Build isolation hides the torch that is installed, and a plain requirement on torch would download
gigabytes a second time and might compile against another version than the one that is used. So:

    torch >= 2.11 is installed  ->  its folder goes on the search path, torch is not a requirement
    it is not                   ->  torch>=2.11 is required in the build environment

Either is right: the libraries are built on torch's stable ABI and run under every torch >= 2.11.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import site
import sys
import sysconfig
from typing import Any

from setuptools import build_meta

OLDEST_TORCH = (2, 11)

Settings = dict[str, Any] | None


def package_folders() -> list[str]:
    """The folders in which the environment that pip installs into looks for packages.

    Inside an isolated build `sys.path` names the build environment, but `sysconfig` still answers
    for the interpreter's own: the one that pip belongs to.
    """
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if sys.prefix != sys.base_prefix and not _sees_base_packages():
        return list(dict.fromkeys(folders))
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    folders += [sysconfig.get_path("platlib", vars=base), sysconfig.get_path("purelib", vars=base)]
    folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def _sees_base_packages() -> bool:
    """True for a virtual environment made with --system-site-packages."""
    try:
        with open(os.path.join(sys.prefix, "pyvenv.cfg"), encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return False
    return bool(re.search(r"^include-system-site-packages\s*=\s*true", text, re.I | re.M))


def folder_of_torch() -> str | None:
    """The folder that holds an installed torch that is new enough, or None."""
    for folder in package_folders():
        if not os.path.isdir(os.path.join(folder, "torch", "include")):
            continue
        for distribution in importlib.metadata.distributions(name="torch", path=[folder]):
            found = tuple(int(n) for n in re.findall(r"\d+", distribution.version)[:2])
            if found >= OLDEST_TORCH:
                return folder
    return None


def _use_installed_torch() -> None:
    # At the end: what the build environment has (setuptools, pybind11, ninja) goes first.
    for folder in package_folders() if folder_of_torch() else []:
        if folder not in sys.path:
            sys.path.append(folder)


def _torch_requirement() -> list[str]:
    return [] if folder_of_torch() else ["torch>=2.11"]


# These hooks answer without running setup.py, which would import torch before it is there.
def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _torch_requirement()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _torch_requirement()


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    _use_installed_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    _use_installed_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return build_meta.build_sdist(sdist_directory, config_settings)
