"""`matrix-new`, with releases that are taken out of a copy of the table first."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from mmlane.compat import matrix
from mmlane.patching import Target
from tools.matrix_new import main
from tools.probes import TOKENIZER
from tools.releases import our_patches, release

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A copy of the table."""
    copy = tmp_path / "table.yaml"
    copy.write_text((ROOT / "compat_matrix.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return copy


def forget(table: Path, release: str, *cells: str) -> None:
    """Take a release and all later ones out of the table, and these patches' cells from there on."""
    raw = yaml.safe_load(table.read_text(encoding="utf-8"))
    raw["engines"] = [v for v in raw["engines"] if Version(v) < Version(release)]
    for id in cells:
        kept = {v: cell for v, cell in raw["patches"][id]["cells"].items() if Version(v) < Version(release)}
        raw["patches"][id]["cells"] = kept
    table.write_text(yaml.safe_dump(raw), encoding="utf-8")


def test_a_release_that_changes_nothing(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget(table, "0.5.13.post1")
    assert main(["0.5.13.post1", "--table", str(table)]) == 0
    told = capsys.readouterr().out
    assert "sglang 0.5.13.post1: not in the table; compared with 0.5.13" in told
    assert "add 0.5.13.post1 to `engines`" in told


def test_a_release_that_brings_a_fix(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget(table, "0.5.21", "shm_pointer")
    assert main(["0.5.21", "--table", str(table)]) == 1
    told = capsys.readouterr().out
    assert "shm_pointer: 0.5.19 apply:" in told
    assert "! the cell names a fault that is gone: clones_on_receipt" in told
    assert '! the engine has the fix: add the cell 0.5.21: {native: "..."}' in told
    assert '! add before="0.5.21" to' in told
    assert "! read again, changed: sglang.srt.managers.mm_utils.ShmPointerMMData" in told
    (fan_out,) = [paragraph for paragraph in told.split("\n\n") if paragraph.startswith("fan_out:")]
    assert fan_out.startswith("fan_out: 0.5.13 native:") and fan_out.endswith("\n    holds")


def test_a_release_that_moves_a_target(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget(table, "0.5.13", "fan_out", "shm_pointer")
    assert main(["0.5.13", "--table", str(table)]) == 1
    told = capsys.readouterr().out
    assert "a fault that is gone: embeddings_inline" in told
    assert "! add the cell 0.5.13: {apply: [" in told
    assert "read again, gone: sglang.srt.managers.scheduler.Scheduler.recv_requests" in told
    assert "a person has to look at: shm_pointer, tp_barrier, fan_out" in told
    assert "then add 0.5.13 to `engines`, and run `make fingerprints table transcripts" in told


def test_a_release_that_fits_no_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A future engine, unpacked: a method that a patch replaces has another signature, other files are gone."""
    real = release(matrix().newest)
    target = a_method(real.version)
    assert real.root is not None and real.source is not None
    file = real.source.file(target.module)
    assert file is not None
    copy = tmp_path / file.relative_to(real.root)
    copy.parent.mkdir(parents=True)
    text, found = re.subn(
        rf"(def {target.name.split('.')[1]}\(\s*self)\b", r"\1, further", file.read_text(encoding="utf-8")
    )
    assert found
    copy.write_text(text, encoding="utf-8")
    assert main([str(tmp_path), "--version", "99.0"]) == 1
    told = capsys.readouterr().out
    assert f"sglang 99.0: not in the table; compared with {real.version}" in told
    assert "! neither fault nor fix was recognised: no sglang.srt.managers.tokenizer_manager" in told
    assert re.search(rf"! wanted {re.escape(target.path)}\(self.*, found \(self, further", told)


def a_method(version: Version) -> Target:
    """One that a patch replaces on that release, and that is not where the tokenizer is."""
    applied = [spec for spec in our_patches() if (cell := spec.cell(version)) and cell.state == "apply"]
    targets = [target for spec in applied for target in spec.targets_on(version)]
    return next(t for t in targets if t.name.count(".") == 1 and t.module != TOKENIZER)


def test_a_wheel_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The version is read from the wheel; a release of the table is compared with its own record."""
    real = release(matrix().newest)
    wheel = tmp_path / f"sglang-{real.version}-py3-none-any.whl"
    assert real.root is not None
    with zipfile.ZipFile(wheel, "w") as archive:
        for folder in ("entrypoints", "managers", "utils", "multimodal"):
            for file in (real.root / "sglang/srt" / folder).rglob("*.py"):
                archive.write(file, file.relative_to(real.root))
        for file in (real.root / "sglang/srt").glob("*.py"):
            archive.write(file, file.relative_to(real.root))
        archive.writestr(f"sglang-{real.version}.dist-info/METADATA", "")
    assert main([str(wheel)]) == 0
    told = capsys.readouterr().out
    assert f"sglang {real.version}: in the table" in told
    assert "nothing needs a person" in told


def test_older_than_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sglang").mkdir()
    assert main([str(tmp_path), "--version", "0.5.8"]) == 1
    assert "older than the oldest cell" in capsys.readouterr().out


def test_neither_version_nor_path() -> None:
    with pytest.raises(SystemExit, match="newest is neither a version nor a wheel nor a directory"):
        main(["newest"])
