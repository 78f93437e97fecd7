"""The packages that setup.cfg names are those of the tree."""

import configparser
import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parents[1]


def test_every_package_is_installed():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    listed = options["options"]["packages"].split()
    library = setuptools.find_packages(ROOT, include=["capsjax*"], exclude=["capsjax.kernels*"])
    kernels = setuptools.find_packages(ROOT / "kernels")
    found = [*library, "capsjax.kernels", *(f"capsjax.kernels.{name}" for name in kernels)]
    assert sorted(listed) == sorted(found)
    assert options["options"]["package_dir"].split() == ["capsjax.kernels", "=", "kernels"]
