"""Packaging that reads settings.ini, so that file stays the one place for project settings."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
extras = {k.removesuffix("_requirements"): s[k].split() for k in s if k.endswith("_requirements")}
extras["dev"] = extras["pipeline"] + extras["dev"]  # whoever works on it runs it
setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=s["author"],
    keywords=s["keywords"],
    license="Apache-2.0",
    packages=find_packages(include=[s["lib_path"] + "*"]),
    python_requires=">=" + s["min_python"] + ",<3.13",
    install_requires=s["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": s["console_scripts"].split()},
    zip_safe=False,
)
