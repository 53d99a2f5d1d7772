"""The README is short and links to the pages of docs, and two pages of docs/contributing agree with the sources."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_leads_to_the_pages():
    assert README.count("\n") <= 150
    linked = set(re.findall(r"\]\(docs/(\w+)/", README))
    assert linked >= {"get_started", "guides", "reference"}


def test_the_family_of_the_page_trains_from_its_file(tmp_path, monkeypatch, capsys):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "contributing" / "extending.md").read_text(), re.DOTALL
    )
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    Path("bigram.py").write_text(blocks[0])
    Path("variant.py").write_text(f"import sys\n{blocks[1]}\nassert config.attention == 'halved'\n")
    for words in (["-m", "stickjax.train", "bigram.py"], ["variant.py"]):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs" / "bigram" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_page_of_the_layout_names_files_that_exist():
    rows = re.findall(
        r"^\| `([\w/]+)/` \| (.*)$", (ROOT / "docs" / "contributing" / "layout.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 10
    for folder, cells in rows:
        for name in re.findall(r"`(\w+\.py|\w+/)`", cells):
            assert (ROOT / folder / name).exists() or any((ROOT / folder).glob(f"*/{name}")), f"{folder}/{name}"
