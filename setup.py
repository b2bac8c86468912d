"""Packaging that reads settings.ini, so that file stays the one place for project settings."""
from configparser import ConfigParser

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
extras = {k.removesuffix("_requirements"): s[k].split() for k in s if k.endswith("_requirements")}
setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    license="Apache-2.0",
    packages=find_packages(include=[s["lib_path"] + "*"]),
    python_requires=">=" + s["min_python"] + ",<3.13",
    install_requires=s["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": s["console_scripts"].split()},
    zip_safe=False,
)
