"""Duplicates, clusters, complexity quotas and redundancy-aware choices, against plain computations in memory."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import BalanceConfig, DedupConfig, SelectConfig
from pipeline.errors import ConfigError, InputError, StageError
from pipeline.selection import clusters, duplicates, layers, prepare, redundancy, scan, structure
from pipeline.selection.recipe import TIE, OpenShard
from tests.selection.scores import kept, pickling_map, ranking, row, select, uid, write_run

DIM = 16


def embedded(vectors, utilities, **columns):
    """Rows with image embeddings; the text half is noise that must not matter."""
    rng = np.random.default_rng(9)
    rows = []
    for number, (vector, utility) in enumerate(zip(vectors, utilities, strict=True)):
        text = rng.normal(size=len(vector))
        both = np.concatenate([vector, text / np.linalg.norm(text)]).astype(np.float16)
        rows.append(row(number, float(utility), embedding=both.tolist(), **columns))
    return rows


def blobs(rng, centres, size, spread):
    points = np.repeat(centres, size, axis=0) + rng.normal(size=(len(centres) * size, centres.shape[1])) * spread
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def in_shards(rows, order, count):
    """Rows in `order` over `count` shards, and the number of the row at each place."""
    parts = np.array_split(order, count)
    places = {(shard, index): int(n) for shard, part in enumerate(parts) for index, n in enumerate(part)}
    return [[rows[n] for n in part] for part in parts], places


@pytest.mark.parametrize("bucket", [1 << 22, 16])
def test_exact_duplicates_keep_the_best(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(duplicates, "BUCKET_PAIRS", bucket)
    rng = np.random.default_rng(0)
    rows = [row(n, float(rng.integers(0, 5)), content=uid(n % 37)) for n in range(100)]
    rows[50] = row(50, None, status="corrupt-image", content=None)
    shards, places = in_shards(rows, rng.permutation(100), 3)
    run = write_run(tmp_path, [*shards, []])
    summary = select(run, SelectConfig(keep=1.0, dedup=DedupConfig(exact=True)), seed=0)
    best: dict[str, int] = {}
    for place in ranking(shards):
        best.setdefault(rows[places[place]]["content"], places[place])
    assert sorted(places[place] for place in kept(run)) == sorted(best.values())
    assert summary.pruned == {"duplicate": 99 - len(best)}
    assert summary.shortfall == 99 - len(best)
    assert not (tmp_path / "scratch").exists()


def test_planted_near_duplicates_are_found_and_the_best_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "PART_PAIRS", 64)  # many parts, and borders matter
    monkeypatch.setattr(structure, "MOST_CLUSTERS", 3)  # found in two levels
    monkeypatch.setattr(structure, "BATCH_PAIRS", 200)
    rng = np.random.default_rng(1)
    base = blobs(rng, rng.normal(size=(6, DIM)), 60, 0.5)
    copies = base[:100] + rng.normal(size=(100, DIM)) * 0.01
    vectors = np.concatenate([base, copies / np.linalg.norm(copies, axis=1, keepdims=True)])
    utilities = rng.normal(size=len(vectors))
    rows = embedded(vectors, utilities)
    shards, places = in_shards(rows, rng.permutation(len(rows)), 4)
    run = write_run(tmp_path, shards, embedding_size=2 * DIM)
    config = SelectConfig(keep=1.0, dedup=DedupConfig(cosine=0.99))
    summary = select(run, config, seed=0)
    stay = {places[place] for place in kept(run)}
    pairs = [(n, 360 + n) for n in range(100)]
    found = [pair for pair in pairs if len(stay & set(pair)) < 2]
    assert len(found) >= 99
    assert summary.pruned["near-duplicate"] == len(rows) - len(stay)
    close = vectors @ vectors.T > 0.985
    for gone in set(range(len(rows))) - stay:  # never without a better one nearby
        assert (close[gone] & (utilities > utilities[gone])).any()
    # the same pairs, whatever runs the tasks, also in other processes
    select(run, config.model_copy(update={"name": "again"}), seed=0, map_tasks=pickling_map)
    assert kept(run, "again") == kept(run)


@pytest.mark.parametrize("dense", [1, 256, 10**9])  # never, sometimes and always compared in full
@pytest.mark.parametrize(("dim", "spread"), [(8, 0.2), (256, 0.05), (256, 0.6)])
def test_greedy_removal_matches_the_definition(monkeypatch, dim, spread, dense):
    monkeypatch.setattr(duplicates, "DENSE", dense)
    rng = np.random.default_rng(2)
    spectrum = np.arange(1, dim + 1) ** -0.7
    points = blobs(rng, rng.normal(size=(40, dim)), 60, spread * spectrum)
    vectors = clusters.unit(points.astype(np.float32))[rng.permutation(2400)]
    home = rng.random(2400) < 0.6
    near = vectors @ vectors.T > 0.95
    near &= home[:, None] | home
    stays: list[int] = []
    for n in range(len(vectors)):
        if not near[n, stays].any():
            stays.append(n)
    assert np.flatnonzero(~duplicates._greedy(vectors, home, 0.95)).tolist() == stays
    assert 40 < len(stays) < 2350


def test_embeddings_of_a_joined_run(tmp_path):
    rng = np.random.default_rng(3)
    vectors = clusters.unit(rng.normal(size=(30, DIM)).astype(np.float32))
    vectors[20:] = vectors[:10]
    run = write_run(tmp_path / "a", [[row(n, float(n)) for n in range(30)]])
    theirs = embedded(vectors, rng.normal(size=30))
    theirs[3] |= {"status": "corrupt-image", "embedding": None}  # near nothing
    theirs[5]["embedding"][2] = float("nan")  # nor is this one
    other = write_run(tmp_path / "b", [theirs], embedding_size=2 * DIM)
    dedup = DedupConfig(cosine=0.999)
    with pytest.raises(ConfigError, match=r"select.dedup.cosine: .*score.embeddings"):
        select(run, SelectConfig(dedup=dedup), seed=0)
    config = SelectConfig(keep=1.0, dedup=dedup, join={"b": other.root}, embeddings="b")
    select(run, config, seed=0)
    assert kept(run) == [(0, n) for n in (3, 5, *range(10, 30))]


@pytest.mark.parametrize("quota", ["proportional", "equal", "complexity"])
def test_cluster_quotas_are_exact_and_filled_by_utility(tmp_path, quota):
    rng = np.random.default_rng(4)
    centres = np.eye(DIM)[:3]
    vectors = np.concatenate([blobs(rng, centres[n : n + 1], size, spread)
                              for n, (size, spread) in enumerate([(60, 0.02), (30, 0.02), (30, 0.12)])])  # fmt: skip
    rows = embedded(vectors, rng.normal(size=120))
    shards, places = in_shards(rows, rng.permutation(120), 3)
    run = write_run(tmp_path, shards, embedding_size=2 * DIM)
    config = SelectConfig(keep=0.3, balance=BalanceConfig(by="cluster", quota=quota, clusters=3))
    summary = select(run, config, seed=0)
    assert summary.kept == sum(group.kept for group in summary.groups) == 36
    chosen = [places[place] for place in kept(run)]
    of_blob = [sum(low <= n < high for n in chosen) for low, high in ((0, 60), (60, 90), (90, 120))]
    if quota == "proportional":
        assert of_blob == [18, 9, 9]
    elif quota == "equal":
        assert of_blob == [12, 12, 12]
    else:  # the spread-out blob is the complex one; the two tight ones differ little
        assert of_blob[2] > max(of_blob[:2])
        assert abs(of_blob[0] - of_blob[1]) <= 1
    for low, high in ((0, 60), (60, 90), (90, 120)):
        best = sorted(range(low, high), key=lambda n: -rows[n]["utility"])
        count = sum(low <= n < high for n in chosen)
        assert {n for n in chosen if low <= n < high} == set(best[:count])


def test_infomax_is_the_greedy_choice_over_all_parts(tmp_path):
    rng = np.random.default_rng(5)
    vectors = clusters.unit(blobs(rng, rng.normal(size=(4, DIM)), 25, 0.15).astype(np.float32))
    vectors = vectors.astype(np.float16).astype(np.float32)
    utilities = rng.normal(size=100)
    rows = embedded(vectors, utilities)
    run = write_run(tmp_path, [rows[:30], rows[30:]], embedding_size=2 * DIM)
    config = SelectConfig(keep=40, policy="infomax", redundancy=0.5, balance=BalanceConfig(clusters=1))
    assert select(run, config, seed=0).threshold is None  # what is cut are gains, not values

    similarity = clusters.unit(vectors) @ clusters.unit(vectors).T
    np.fill_diagonal(similarity, -2)
    near = np.argsort(-similarity, axis=1)[:, : redundancy.NEIGHBOURS]
    graph = np.zeros_like(similarity)
    np.put_along_axis(graph, near, np.take_along_axis(similarity, near, 1), 1)
    graph = np.maximum(np.maximum(graph, graph.T), 0)
    values = (utilities - utilities.mean()) / utilities.std()
    chosen: list[int] = []
    for _ in range(40):
        gains = values - 0.5 * graph[:, chosen].sum(1)
        gains[chosen] = -np.inf
        chosen.append(int(gains.argmax()))
    assert kept(run) == sorted((0, n) if n < 30 else (1, n - 30) for n in chosen)
    assert set(chosen) != set(np.argsort(-utilities)[:40].tolist())


def fill_run(tmp_path, tight=40):
    """Ties in one tight blob and scattered around it, one harmful pair; all utilities within their spread of 0."""
    rng = np.random.default_rng(6)
    centre = np.eye(DIM)[:1]
    vectors = np.concatenate([blobs(rng, centre, tight, 0.01), blobs(rng, centre, 20, 0.5)])
    rows = embedded(vectors, rng.uniform(-0.1, 0.1, size=tight + 20), utility_std=1.0)
    rows.append(embedded(centre, [-9.0], utility_std=1.0)[0] | {"uid": uid(999)})
    return write_run(tmp_path, [rows], embedding_size=2 * DIM), vectors


def test_fill_representative_takes_the_typical_and_diverse_the_scattered(tmp_path):
    run, _ = fill_run(tmp_path)
    base = SelectConfig(keep=20, policy="significant", balance=BalanceConfig(clusters=1))
    for fill in ("representative", "diverse"):
        select(run, base.model_copy(update={"name": fill, "fill": fill}), seed=0)
    typical = [index for _, index in kept(run, "representative")]
    scattered = [index for _, index in kept(run, "diverse")]
    assert len(typical) == len(scattered) == 20
    assert sum(index < 40 for index in typical) >= 19
    assert sum(40 <= index < 60 for index in scattered) >= 18


def test_farthest_first_is_monotone_and_starts_from_what_is_chosen():
    rng = np.random.default_rng(7)
    vectors = clusters.unit(rng.normal(size=(50, 4)).astype(np.float32))
    chosen = np.zeros(50, dtype=bool)
    chosen[:5] = True
    gains = redundancy._farthest_first(vectors, chosen)
    left = np.flatnonzero(~chosen)
    order = left[np.argsort(-gains[left])]
    taken = list(range(5))
    for pick in order:
        nearest = (vectors @ vectors[taken].T).max(1)
        assert gains[pick] == pytest.approx(1 - nearest[pick], abs=1e-5)
        assert nearest[pick] <= np.delete(nearest, taken).min() + 1e-5
        taken.append(int(pick))


def test_large_parts_are_traversed_in_pieces(monkeypatch):
    rng = np.random.default_rng(8)
    vectors = clusters.unit(rng.normal(size=(50, 6)).astype(np.float32))
    monkeypatch.setattr(redundancy, "MOST_PAIRS", 20)
    pieces = redundancy._chunks(vectors)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(50))
    assert [len(piece) for piece in pieces] == [17, 17, 16]
    along = vectors @ (vectors[0] - vectors.mean(axis=0))
    assert along[pieces[0]].max() <= along[pieces[1]].min()
    rows = np.zeros(50, dtype=[("shard", "i4"), ("row", "i4"), ("key", "u4"), ("high", "u8"), ("low", "u8"),
                               ("part", "i4"), ("tier", "i4"), ("embedding", "f2", (6,))])  # fmt: skip
    rows["row"], rows["embedding"], rows["tier"] = np.arange(50), vectors, TIE
    whole = rows["embedding"].astype(np.float32)
    gains = redundancy.diverse(rows)
    for piece in redundancy._chunks(whole):
        expected = redundancy._farthest_first(whole[piece], np.zeros(len(piece), dtype=bool))
        assert gains[piece].tolist() == expected.tolist()


def test_gains_count_each_chosen_neighbour_once():
    # a chain 0 - 1 - 2 of similarity 1: choosing 1 first makes its neighbours worth less
    graph = [[(1, 1.0)], [(0, 1.0), (2, 1.0)], [(1, 1.0)]]
    gains = redundancy._greedy_gains(np.array([1.0, 1.5, 0.9]), graph, 0.5)
    assert gains.tolist() == pytest.approx([0.5, 1.5, 0.4])
    gains = redundancy._greedy_gains(np.array([2.0, 1.5, 1.9]), graph, 0.5)
    assert gains.tolist() == pytest.approx([2.0, 0.5, 1.9])


def test_one_pair_alone_has_no_neighbours():
    assert redundancy._neighbours(np.ones((1, 4), np.float32)) == [[]]


@pytest.mark.parametrize("policy", [{"dedup": {"cosine": 0.9}}, {"policy": "infomax"}])
def test_pairs_without_any_embedding_cannot_be_clustered(tmp_path, policy):
    rows = [row(n, float(n), embedding=None) for n in range(3)]
    run = write_run(tmp_path, [rows], embedding_size=2 * DIM)
    with pytest.raises(StageError, match="no pair that can be kept has an embedding"):
        select(run, SelectConfig.model_validate(policy), seed=0)
    assert not (tmp_path / "scratch").exists()


def test_complexity_is_spread_times_distance_to_the_neighbours():
    centroids = clusters.unit(np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=np.float32))
    nearest, similarity = np.array([0, 0, 1, 2]), np.array([0.9, 0.7, 0.5, 1.0], dtype=np.float32)
    found = clusters._complexity(centroids, nearest, similarity)
    half = 1 - np.sqrt(0.5)
    assert found.tolist() == pytest.approx([0.2 * 1.0, 0.5 * (1 + half) / 2, 0.0], abs=1e-6)
    alone = clusters._complexity(centroids[:1], np.zeros(2, int), np.array([0.9, 0.7], np.float32))
    assert alone.tolist() == pytest.approx([0.2])
    weights = clusters.Clusters(centroids, np.arange(3, dtype=np.int32), found).weights()
    assert weights.sum() == pytest.approx(1)
    assert np.log(weights[1] / weights[0]) == pytest.approx((found[1] - found[0]) / 0.1)


def test_a_pair_visits_the_parts_whose_border_is_near(tmp_path):
    angles = np.radians([0.0, 40.0, 44.0, 90.0])
    vectors = np.zeros((4, DIM))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    run = write_run(tmp_path, [embedded(vectors, [1.0, 2.0, 3.0, 4.0])], embedding_size=2 * DIM)
    shards = scan.committed_shards(run)[0]
    recipe = prepare.make_recipe(SelectConfig(), shards[0], 0, str(tmp_path / "scratch"))
    centroids = np.eye(2, DIM, dtype=np.float32)
    both = clusters.Clusters(centroids, np.array([0, 1], np.int32), np.zeros(2))
    # 44 degrees are sin(1 degree) = 0.017 from the border at 45, 40 degrees 0.087
    for margin, visitors in ((0.0, []), (0.05, [2]), (0.1, [1, 2])):
        sizes = clusters.write_parts(recipe, shards, both, margin, map)
        parts = layers.read(recipe.scratch, "part", 0)
        assert parts[:, 0].tolist() == [0, 0, 0, 1]
        assert np.flatnonzero((parts[:, 1:] >= 0).any(axis=1)).tolist() == visitors
        assert sizes.tolist() == [3, 1 + len(visitors)]
    assert layers.read(recipe.scratch, "cluster", 0).tolist() == [0, 0, 0, 1]


def test_contents_that_share_a_half_are_no_duplicates(tmp_path):
    halves = ["a" * 16, "b" * 16]
    rows = [row(n, float(n), content=halves[n // 2 % 2] + halves[n % 2]) for n in range(5)]  # 4 repeats 0
    run = write_run(tmp_path, [rows])
    summary = select(run, SelectConfig(keep=1.0, dedup=DedupConfig(exact=True)), seed=0)
    assert kept(run) == [(0, n) for n in range(1, 5)]
    assert summary.pruned == {"duplicate": 1}


def test_content_that_is_no_hash_is_named_with_its_file(tmp_path):
    run = write_run(tmp_path, [[row(1, 1.0, content="no hash")]])
    with pytest.raises(InputError, match=r"00000\.parquet \(content\): expected uids of 32 hex digits"):
        select(run, SelectConfig(dedup=DedupConfig(exact=True)), seed=0)


def test_contents_are_spread_evenly_over_the_buckets(tmp_path):
    shards = scan.committed_shards(write_run(tmp_path, [[row(n, float(n)) for n in range(800)]]))[0]
    recipe = prepare.make_recipe(SelectConfig(), shards[0], 0, str(tmp_path / "scratch"))
    with OpenShard(recipe, shards[0]) as opened:
        made = [duplicates._content_rows(4, opened, judged) for judged in opened.judged()]
    counts = np.bincount(np.concatenate([bucket for _, bucket in made]), minlength=4)
    assert counts.tolist() == pytest.approx([200] * 4, abs=50)
    first = made[0][0][0]
    assert f"{first['content_high']:016x}{first['content_low']:016x}" == uid(10**9)


def test_the_border_is_as_wide_as_a_third_of_the_distance_at_the_threshold():
    assert duplicates.border_margin(0.5) == pytest.approx(0.35)
    assert duplicates.border_margin(0.98) == pytest.approx(0.35 * 0.2)
    assert duplicates.border_margin(1.0) == 0


def test_sketches_bound_every_cosine_and_are_tight_in_few_dimensions():
    rng = np.random.default_rng(11)
    full = clusters.unit((rng.normal(size=(600, 256)) * np.arange(1, 257) ** -0.7).astype(np.float32))
    few = clusters.unit((rng.normal(size=(600, 20)) @ rng.normal(size=(20, 256))).astype(np.float32))
    for vectors, slack in ((full, 0.6), (few, 1e-4)):
        sketches = duplicates._sketches(vectors)
        above = sketches @ sketches.T - vectors @ vectors.T
        assert above.min() > -duplicates.BOUND_ROUNDING
        assert above.max() < slack


def test_equal_embeddings_are_near_duplicates_at_a_cosine_of_one(tmp_path):
    vectors = np.repeat(clusters.unit(np.random.default_rng(12).normal(size=(10, DIM)).astype(np.float32)), 2, axis=0)
    run = write_run(tmp_path, [embedded(vectors, np.arange(20.0))], embedding_size=2 * DIM)
    select(run, SelectConfig(keep=1.0, dedup=DedupConfig(cosine=1.0)), seed=0)
    assert kept(run) == [(0, n) for n in range(1, 20, 2)]
