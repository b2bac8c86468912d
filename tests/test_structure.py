"""The repository's own rules: generated code, clean notebooks, import direction, pipeline shape, pinned packages."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from vlarepro.core.deps import imported_modules, library_files, notebook_code
from vlarepro.core.runner import declared_parameters

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["core", "world", "data", "scoring", "models", "decoding", "methods", "training", "evaluation", "report"]
RUNS = sorted((ROOT / "nbs" / "runs").glob("*.ipynb"))
LIBRARY = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if "runs" not in p.parts and ".ipynb_checkpoints" not in p.parts)


def settings():
    c = ConfigParser(delimiters=["="])
    c.read(ROOT / "settings.ini", encoding="utf-8")
    return c["DEFAULT"]


def tracked():
    out = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / f for f in out.stdout.decode().split("\0") if f and (ROOT / f).is_file()]


def default_exp(nb):
    m = re.search(r"^#\|\s*default_exp\s+(\S+)", notebook_code(nb), flags=re.M)
    return m.group(1) if m else None


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the notebooks, cleaned and exported afresh."
    d = tmp_path_factory.mktemp("export")
    shutil.copytree(ROOT / "nbs", d / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", d)
    bin_ = Path(sys.executable).parent
    for tool in ("nbdev_clean", "nbdev_export"):
        subprocess.run([bin_ / tool], cwd=d, check=True, capture_output=True)
    return d


def test_no_drift(exported):
    "The committed library is what the notebooks export, file by file."
    fresh = {p.relative_to(exported / "vlarepro"): p.read_text() for p in (exported / "vlarepro").rglob("*.py")}
    here = {p.relative_to(ROOT / "vlarepro"): p.read_text() for p in (ROOT / "vlarepro").rglob("*.py")}
    assert sorted(fresh) == sorted(here), "orphan or missing modules: run nbdev_export, delete what no notebook makes"
    assert [str(p) for p in fresh if fresh[p] != here[p]] == [], "edited by hand or not exported: run nbdev_export"


def test_notebooks_are_clean(exported):
    dirty = [str(p.relative_to(ROOT)) for p in [*LIBRARY, *RUNS] if (exported / p.relative_to(ROOT)).read_text() != p.read_text()]
    assert dirty == [], "run `make clean`"


def test_no_timings_or_paths_in_stored_outputs():
    for p in LIBRARY:
        for c in json.loads(p.read_text())["cells"]:
            text = json.dumps([{k: v for k, v in o.get("data", {}).items() if k.startswith("text")} or o.get("text", "") for o in c.get("outputs", [])])
            assert "site-packages" not in text and not re.search(r"0x[0-9a-f]{9,}", text), f"{p.name}: machine path or address in an output"


def test_import_direction():
    "A notebook imports lower layers, and siblings with a lower number."
    number = {default_exp(p): p.relative_to(ROOT / "nbs").as_posix() for p in LIBRARY if default_exp(p)}
    bad = []
    for p in LIBRARY:
        mod = default_exp(p)
        if mod is None:
            continue
        layer, mine = mod.split(".")[0], number[mod]
        assert layer in LAYERS, f"{p.name}: {mod} is in no layer of {LAYERS}"
        exported_code = "\n\n".join("".join(c["source"]) for c in json.loads(p.read_text())["cells"]
                                    if c["cell_type"] == "code" and re.match(r"#\|\s*export", "".join(c["source"])))
        for name in imported_modules(exported_code):
            parts = name.split(".")[1:]
            if not parts:
                continue
            other = parts[0]
            if LAYERS.index(other) > LAYERS.index(layer):
                bad.append(f"{mine} imports {name}: a higher layer")
            target = next((number[".".join(parts[:k])] for k in range(len(parts), 0, -1) if ".".join(parts[:k]) in number), None)
            if other == layer and target is not None and target >= mine:
                bad.append(f"{mine} imports {name}: a sibling that does not come before it")
    assert bad == []


def test_every_layer_notebook_has_title_and_summary():
    for p in LIBRARY:
        first = json.loads(p.read_text())["cells"][0]
        text = "".join(first["source"])
        assert first["cell_type"] == "markdown" and re.match(r"# .+\n+> .+", text), f"{p.name}: first cell is not `# Title` and `> summary`"


def test_run_notebooks_are_fit_to_run():
    assert RUNS, "no run-notebooks"
    for p in RUNS:
        declared_parameters(p)
        assert not re.search(r"^#\|\s*export", notebook_code(p), flags=re.M), f"{p.name} exports code: methods belong in library notebooks"


def test_pipeline_passes_exactly_the_declared_parameters():
    "Each stage of dvc.yaml runs a notebook with its declared parameters, depends on its fingerprint, and caches all it makes."
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    used = set()
    for name, s in stages.items():
        s = s.get("do", s)
        m = re.search(r"vlarepro\.core\.runner nbs/runs/(\w+)\.ipynb (\S+) (\S+)(.*)", " ".join(s["cmd"].split()))
        if not m:
            continue
        nb, executed, record, rest = m.groups()
        used.add(nb)
        given = {a.split("=", 1)[0] for a in rest.split()}
        assert given == set(declared_parameters(ROOT / "nbs" / "runs" / f"{nb}.ipynb")), f"stage {name}"
        assert f"build/code/{nb}.txt" in s["deps"], f"stage {name} does not depend on the fingerprint of {nb}"
        assert "requirements.lock" in s["deps"], f"stage {name} does not depend on the lock"
        outs = [o if isinstance(o, str) else next(iter(o)) for o in s["outs"]]
        uncached = [o for o in s["outs"] if isinstance(o, dict) and next(iter(o.values())).get("cache") is False]
        assert not uncached or name.startswith(("tables", "real", "report")), f"stage {name}: an uncached out switches the run cache off"
        assert executed in outs and record in outs, f"stage {name}"
    assert used == {p.stem for p in RUNS}, "run-notebooks and stages differ"


def test_data_dvc_has_no_remote_dependence():
    "A plain `dvc add` fails in a fresh clone; ours is made from a stage's output."
    d = yaml.safe_load((ROOT / "data.dvc").read_text())
    assert [x["path"] for x in d["deps"]] == ["build/embedded"] and [x["path"] for x in d["outs"]] == ["data"] and not d.get("frozen")


def test_traps_have_their_guards():
    s = settings()
    assert s["allowed_cell_metadata_keys"] == "tags" and s["clear_all"] == "False", "nbdev_clean would drop papermill's tag"
    assert "nbdev==2.4.14" in s["dev_requirements"] and "fastcore>=1.12,<2" in s["requirements"] and "execnb>=0.1.12,<0.2" in s["dev_requirements"]
    assert "pyarrow>=22,<26" in s["requirements"]
    assert not re.search(r"\bnavsim\b", s["requirements"] + s["dev_requirements"]), "the registry's navsim is another project"
    assert "flash-attn" not in s["requirements"] + s["dev_requirements"] and "flash-attn" in s["gpu_requirements"]
    assert "__pycache__/" in (ROOT / ".dvcignore").read_text().split()
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/runs/", "/build/", "/data", "/scratch/", "/report/"} <= set(ignored), "top-level outputs must be ignored, anchored"


def test_lock_is_names_and_versions_only():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9A-Za-z.]+", line) for line in lines)
    lock = dict(line.split("==") for line in lines)
    assert lock["numpy"].startswith("1.26") and int(lock["pyarrow"].split(".")[0]) < 26 and lock["nbdev"] == "2.4.14"
    assert "navsim" not in lock and "flash-attn" not in lock


def test_lock_is_what_runs_and_it_imports():
    "Installed versions equal the lock (torch may be a build of its own), and the packages import: `pip check` does not see every break."
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    wrong = []
    for name, version in lock.items():
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # platform packages such as CUDA's
        if have.split("+")[0] != version and name != "torch":
            wrong.append(f"{name} {have} != {version}")
    assert wrong == []
    code = "import torch, transformers, peft, papermill, nbdev, dvc, nuscenes, seaborn, pyarrow, cv2, shapely, jupyterlab, jaxtyping, beartype"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_undefined_names():
    "ruff cannot judge names inside shape annotations, so the rule is off in its run over the repository; here it counts outside of strings."
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", "vlarepro", "tools", "tests"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    def in_string(e):
        line = Path(e["filename"]).read_text(encoding="utf-8").splitlines()[e["location"]["row"] - 1]
        return line[:e["location"]["column"] - 1].count('"') % 2
    wrong = [(e["filename"], e["location"]["row"], e["message"]) for e in json.loads(found.stdout) if not in_string(e)]
    assert not wrong, wrong


def test_no_hosts_or_machine_paths():
    bad = []
    for p in tracked():
        if p.suffix in {".png", ".npz", ".jpg", ".zip"} or p == Path(__file__):
            continue
        text = p.read_text(encoding="utf-8", errors="ignore")
        index = re.search(r"--(extra-)?index-url|--find-links|://\S+/sim" + r"ple\b", text)
        if index or re.search(rf"(?<![\w.])(/root|/home/\w+|{re.escape(str(ROOT))})/\w", text):
            bad.append(str(p.relative_to(ROOT)))
    assert bad == []


def test_library_dependencies_follow_lazy_packages():
    files = {f.relative_to(ROOT).as_posix() for f in library_files("from vlarepro.core import strict")}
    assert "vlarepro/core/params.py" in files and "vlarepro/core/runner.py" not in files


def test_generators_only():
    "No draw from a global generator in the library."
    bad = []
    for p in (ROOT / "vlarepro").rglob("*.py"):
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "random":
                fine = ("default_rng", "Generator", "SeedSequence", "PCG64", "Philox")
                if isinstance(node.value.value, ast.Name) and node.value.value.id in ("np", "numpy") and node.attr not in fine:
                    bad.append(f"{p.name}: np.random.{node.attr}")
    assert bad == []
