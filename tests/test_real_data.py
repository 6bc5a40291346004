"""The main job on real data, as users type it: prepare, train, both towers learn."""

import json
import math

import pytest
from helpers import ROOT, launch

PAIRS = {
    "movies_books": (
        "amazon-movies-books/books.csv",
        "amazon-movies-books/movies.csv",
        ["--min_item_users=3", "--min_user_items=2"],
    ),
    "douban": (
        "douban-books-music/books.dat",
        "douban-books-music/music.dat",
        ["--min_item_users=3", "--min_user_items=2"],
    ),
    "cell_electronics": (
        "amazon-cell-electronics/cell",
        "amazon-cell-electronics/electronics",
        ["--drop_twins"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", ":conet"])
@pytest.mark.parametrize("name", PAIRS)
def test_both_towers_learn_on_real_data(name, variant, data_dir, tmp_path):
    target, source, flags = PAIRS[name]
    prepared = launch(
        "prepare",
        f"--target={data_dir / target}",
        f"--source={data_dir / source}",
        f"--out={tmp_path / 'data'}",
        *flags,
    )
    assert prepared.returncode == 0, prepared.stderr
    config = ROOT / "configs" / f"{name}.py"
    trained = launch(
        "train",
        f"--config={config}{variant}",
        f"--config.data.dir={tmp_path / 'data'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert trained.returncode == 0, trained.stderr
    assert "is dead" not in trained.stdout
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    share = 1 / (1 + result["config"]["negatives"])
    # Knowing the share of positives alone gives this loss, in nats: ln 2 at one negative.
    ignorant = -share * math.log(share) - (1 - share) * math.log(1 - share)
    for domain in ("target", "source"):
        best = min(row["train_loss"][domain] for row in rows)
        assert best < min(0.6, 0.9 * ignorant)
    assert result["test"]["ndcg@10"] > 0.1
