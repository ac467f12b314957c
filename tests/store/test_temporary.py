"""What killed writers leave behind is removed, and nothing else."""

from __future__ import annotations

from pathlib import Path

from pipeline.store import storage


def test_temporary_files_and_folders_go_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "00000.json", tmp_path / "tmp-1.json", tmp_path / "below" / "b.json"]
    deep = [tmp_path / "below" / ".tmp-2-a.json", tmp_path / "below" / ".tmp-parts" / "a.part"]
    right_here = [tmp_path / ".tmp-1-00000.json", tmp_path / ".tmp-runs" / "run-0"]
    for path in [*kept, *deep, *right_here]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    storage.remove_temporary(str(tmp_path), below=False)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*kept, *deep])
    storage.remove_temporary(str(tmp_path))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert not (tmp_path / "below" / ".tmp-parts").exists()
    storage.remove_temporary(str(tmp_path / "absent"))
    storage.remove_temporary("s3://bucket/folder")
