"""The report: site, lists and command line, with results that a test makes up and with none at all."""
import json
import shutil
import subprocess
import sys

import nbformat
import pytest

from vlarepro.core.deps import code_hash
from vlarepro.core.paths import root, write_json
from vlarepro.report import claims as claims_module
from vlarepro.report import tables as tables_module
from vlarepro.report.claims import list_claims, rejudge
from vlarepro.report.cli import main
from vlarepro.report.doctor import examine
from vlarepro.report.reference import cells_ours, find_table, load_claims, load_tables, row_key
from vlarepro.report.site import build_site, check_site
from vlarepro.report.tables import list_tables, load_results, merge, stale

TABLE_KEYS = {"paper", "table", "title", "status", "cells_ours", "cells_reproduced", "profile", "stale"}
CLAIM_KEYS = {"id", "kind", "statement", "verdict", "effect", "interval", "n", "seeds", "profile"}


def results_of(profile, table="5-ablation", rows=None):
    t = find_table(load_tables(), "ikvla", table)
    filled = {}
    for k, c in cells_ours(t): filled.setdefault(k, {})[c] = {"value": 0.5, "low": 0.45, "high": 0.56, "n": 900, "seeds": 1}
    made = [{"row": row_key(r), "arm": r["arm"], "values": filled[row_key(r)], "seeds": [0],
             "command": f"dvc repro sft-ikvla@{profile}-ik", "stages": ["sft"]} for r in t["rows"] if row_key(r) in filled]
    return {"paper": "ikvla", "table": table, "profile": profile, "rows": made if rows is None else rows}


def write_results(folder):
    "Invented results of three profiles and of real samples."
    for prof in ("smoke", "laptop", "gpu"):
        write_json(folder / prof / "ikvla/tables/5-ablation.json", results_of(prof))
        write_json(folder / prof / "ikvla/provenance.json", {
            "device": "a test machine", "seeds": [0], "date": "2026-11-20", "code": "x",
            "stages": {"sft": {"minutes": 1.5, "peak_memory_mb": 700, "notebook": "none.ipynb", "code": "0" * 12}}})
    write_json(folder / "laptop/ikvla/tables/3.json", results_of("laptop", "3"))
    control = {"row": "oracle <next> state", "arm": "oracle_next", "extra": True, "values": {"ADE (m)": {"value": 0.4}}}
    both = results_of("laptop")
    write_json(folder / "laptop/ikvla/tables/5-ablation.json", both | {"rows": [*both["rows"], control]})
    claims = {c["id"]: c for c in load_claims()}

    def judged(i, effect, lo, hi):
        c = claims[i]
        return {"id": i, "verdict": rejudge(c, effect, [lo, hi]), "effect": effect, "interval": [lo, hi], "n": 150,
                "seeds": 1, "profile": "laptop", "threshold": c["threshold"], "margin": c["margin"], "note": "one seed"}
    write_json(folder / "laptop/ikvla/claims.json",
               [judged("C-C1", 0.2, 0.1, 0.3), judged("C-C3", -0.2, -0.3, -0.1), judged("C-C4", 0.1, -0.1, 0.3)])
    real = {"paper": "ikvla", "table": "real-nuscenes", "profile": "real", "title": "Real keyframes",
            "rows": [{"row": "constant velocity", "arm": "cv", "values": {"UniAD_L2m_Avg": {"value": 1.2}}}]}
    write_json(folder / "real/ikvla/tables/real-nuscenes.json", real)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    d = tmp_path_factory.mktemp("site")
    write_results(d / "results")
    png = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# Trained $x^2$\nsee [beside](other.ipynb)"),
        nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {"image/png": png})])])
    (d / "runs/laptop/notebooks").mkdir(parents=True)
    nbformat.write(nb, d / "runs/laptop/notebooks/sft-ikvla.ipynb")
    front = build_site(d / "report", results=d / "results", runs=d / "runs", library=d / "none")
    return front.parent


def test_site_is_whole(site):
    assert check_site(site) == []
    pages = {p.name for p in site.glob("*.html")}
    assert pages == {"index.html", "spanvla.html", "specdec.html", "ikvla.html", "lastvla.html", "baselines.html", "real.html", "world.html", "cross.html"}
    text = (site / "ikvla.html").read_text()
    for what in ("0.500", "[0.450, 0.560]", "dvc repro sft-ikvla@laptop-ik", "1.5 min", "700 MB", "a test machine",
                 "stale", "not reproduced", "inconclusive", "oracle &lt;next&gt; state"):
        assert what in text, what
    assert "notebooks/laptop/notebooks-sft-ikvla.html" in text
    index = (site / "index.html").read_text()
    assert "Not measured" not in index and "real.html#t-real-nuscenes" in index


def test_notebook_page_has_no_script_and_texts_for_pictures(site):
    page = (site / "notebooks/laptop/notebooks-sft-ikvla.html").read_text()
    assert "<script" not in page and 'alt="Output of the notebook Trained' in page and "other.ipynb" not in page


def test_real_results_are_never_mixed(site):
    assert "constant velocity" in (site / "real.html").read_text()
    assert "Real keyframes" not in (site / "ikvla.html").read_text()


def test_external_baselines_are_greyed_and_empty(site):
    text = (site / "ikvla.html").read_text()
    row = text.split('<th scope="row">VAD')[1].split("</tr>")[0]
    assert 'class="ours' not in row and "0.17" in row
    assert '<tr class="ext"><th scope="row">VAD' in text


def test_site_without_any_results(tmp_path):
    front = build_site(tmp_path / "report", results=tmp_path / "a", runs=tmp_path / "b", library=tmp_path / "c")
    assert check_site(front.parent) == []
    text = front.read_text()
    assert "Not measured" in text and "0 of 42 tables regenerated" in text


def test_site_is_deterministic(tmp_path, site):
    again = build_site(tmp_path / "report", results=site.parent / "results", runs=site.parent / "runs", library=tmp_path)
    for f in sorted(p for p in site.rglob("*") if p.is_file()):
        assert f.read_bytes() == (again.parent / f.relative_to(site)).read_bytes(), f.name


def test_check_site_finds_faults(site, tmp_path):
    bad = shutil.copytree(site, tmp_path / "bad")
    (bad / "figures/overview.svg").unlink()
    (bad / "style.css").write_text("@import 'https://example.invalid/x.css'; body{background:url(gone.png)}")
    page = bad / "specdec.html"
    page.write_text(page.read_text().replace("</main>", '<a href="#nowhere">x</a><img src="x.png"></main>'))
    found = "\n".join(check_site(bad))
    for what in ("overview.svg does not resolve", "external address", "gone.png", "no 'nowhere'", "picture without text"):
        assert what in found, what


def test_a_failed_build_leaves_the_old_site(site, tmp_path):
    write_json(tmp_path / "results/laptop/ikvla/tables/5-ablation.json", {"paper": "ikvla"})
    (tmp_path / "report").mkdir()
    (tmp_path / "report/index.html").write_text("old")
    with pytest.raises(ValueError, match="lacks"): build_site(tmp_path / "report", results=tmp_path / "results")
    assert (tmp_path / "report/index.html").read_text() == "old"


def test_list_tables(site):
    rows = {(r["paper"], r["table"]): r for r in list_tables(load_results(site.parent / "results"))}
    assert len(rows) == 66 and all(set(r) == TABLE_KEYS for r in rows.values())
    assert rows["ikvla", "5-ablation"] == {"paper": "ikvla", "table": "5-ablation", "title": "Component ablation",
                                           "status": "regenerated", "cells_ours": 4, "cells_reproduced": 4,
                                           "profile": "gpu", "stale": True}
    assert rows["ikvla", "3"]["profile"] == "laptop" and rows["ikvla", "3"]["cells_ours"] == 32
    assert rows["ikvla", "11"]["status"] == "missing" and rows["autovla", "1"]["status"] == "reference-only"


def test_smoke_gives_no_verdict(site):
    res = load_results(site.parent / "results")
    res["smoke", "ikvla"]["claims"] = res["laptop", "ikvla"]["claims"]
    assert all(e["effect"] is None for e in list_claims(res, profile="smoke"))
    assert sum(e["effect"] is not None for e in list_claims(res)) == 3


def test_bad_results_are_refused():
    t = find_table(load_tables(), "ikvla", "5-ablation")
    typo = results_of("laptop", rows=[{"row": "Ours", "arm": "ikvla", "values": {"ADE": {"value": 1.0}}}])
    with pytest.raises(ValueError, match="did you mean 'ADE \\(m\\)'"): merge(t, {"laptop": typo})
    with pytest.raises(ValueError, match="no claim of"):
        list_claims({("laptop", "ikvla"): {"tables": {}, "provenance": {}, "claims": [{"id": "A-C1"}]}})


def test_truncated_results_file_is_named(tmp_path):
    f = tmp_path / "laptop/ikvla/tables/3.json"
    f.parent.mkdir(parents=True)
    f.write_text('{"paper": "ikv')
    with pytest.raises(ValueError, match="not valid JSON"): load_results(tmp_path)


def test_stale_follows_the_code(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("from vlarepro.core.seeds import rng\nrng(0)")])
    nbformat.write(nb, tmp_path / "30_sft.ipynb")
    record = {"stages": {"sft": {"notebook": "30_sft.ipynb", "code": code_hash(tmp_path / "30_sft.ipynb")}}}
    assert not stale(record, tmp_path)
    nb.cells.append(nbformat.v4.new_markdown_cell("prose changes nothing"))
    nbformat.write(nb, tmp_path / "30_sft.ipynb")
    assert not stale(record, tmp_path)
    nb.cells[0].source += "\nrng(1)"
    nbformat.write(nb, tmp_path / "30_sft.ipynb")
    assert stale(record, tmp_path)


def run(capsys, *argv):
    rc = main(list(argv))
    out = capsys.readouterr()
    return rc, out.out, out.err


@pytest.fixture
def no_results(monkeypatch, tmp_path):
    "The lists as a fresh clone without results shows them."
    for m in (tables_module, claims_module): monkeypatch.setattr(m, "load_results", lambda folder=None: {})


def test_cli_lists_without_results(capsys, no_results):
    rc, out, _ = run(capsys, "tables", "--json")
    rows = json.loads(out)
    assert rc == 0 and len(rows) == 66 and all(set(r) == TABLE_KEYS for r in rows)
    assert sum(r["status"] == "missing" for r in rows) == 42
    rc, out, _ = run(capsys, "claims", "--json")
    rows = json.loads(out)
    assert rc == 0 and len(rows) == 51 and all(set(r) >= CLAIM_KEYS for r in rows)
    assert {r["verdict"] for r in rows} == {"not run in this profile"}
    for command in ("tables", "claims"):
        rc, out, _ = run(capsys, command, "--paper", "ikvla")
        assert rc == 0 and "missing" in out or "not run" in out
    rc, out, _ = run(capsys, "report", "--summary")
    assert rc == 0 and "IK-VLA" in out and "report:" in out


@pytest.mark.parametrize("argv, says", [
    (["tables", "--profile", "labtop"], "did you mean 'laptop'"),
    (["claims", "--paper", "ikvl"], "did you mean 'ikvla'"),
    (["world", "summary", "no/such/world"], "no finished minidrive world"),
    (["world", "verify", "no/such/world"], "no finished minidrive world"),
    (["oracle", "openloop", "no/such/folder"], "no/such/folder"),
    (["oracle", "pdm", "x"], "invalid choice"),
    ([], "required"),
    (["tabels"], "invalid choice"),
])
def test_cli_errors(capsys, argv, says):
    rc, out, err = run(capsys, *argv)
    assert rc == 2 and says in err and "Traceback" not in err and out == ""


def test_cli_json_errors_are_json(capsys):
    rc, out, _ = run(capsys, "tables", "--json", "--profile", "labtop")
    assert rc == 2 and "laptop" in json.loads(out)["error"]


def test_cli_oracle_on_the_golden_cases(capsys):
    from vlarepro.core.paths import shared
    if shared() is None: pytest.skip("shared folder not found: set VLAREPRO_SHARED")
    rc, out, _ = run(capsys, "oracle", "openloop", str(shared() / "golden/planning_openloop"), "--json")
    assert rc == 0 and json.loads(out)["ok"]


def test_cli_deps(capsys):
    rc, out, _ = run(capsys, "deps", "--json")
    rows = json.loads(out)
    assert rc == 0 and rows and all({"notebook", "code", "files", "state"} == set(r) for r in rows)


def test_doctor(capsys):
    d = examine()
    assert d["attention"] in ("sdpa", "flash_attention_2") and d["devices"]
    assert {o["package"] for o in d["optional"]} >= {"flash-attn", "ray", "java"} and all(o["without"] for o in d["optional"])
    rc, out, _ = run(capsys, "doctor", "--json")
    assert rc == (1 if d["problems"] else 0) and set(json.loads(out)) == set(d) | {"real"}   # the command adds what of the real sets is here


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from vlarepro.report.cli import main; rc = main(['--help']); assert rc == 0; " \
           "heavy = {'torch', 'matplotlib', 'transformers', 'jinja2', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    p = subprocess.run([sys.executable, "-c", code], cwd=root(), capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert "tables" in p.stdout
