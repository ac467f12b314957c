"""What killed writers leave behind is removed, and nothing else."""

from __future__ import annotations

from pathlib import Path

from pipeline.store import storage


def test_only_temporary_files_right_in_the_folder_go(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    kept = [tmp_path / "00000.json", tmp_path / "tmp-1.json", tmp_path / "below" / ".tmp-2-a.json"]
    for path in [*kept, tmp_path / ".tmp-1-00000.json"]:
        path.write_text("{}")
    storage.remove_temporary(str(tmp_path))
    storage.remove_temporary(str(tmp_path / "absent"))
    storage.remove_temporary("s3://bucket/folder")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
