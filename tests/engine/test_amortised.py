"""The two passes of amortised scoring: what was computed is what full scoring computes, the rest is predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import Config, parse_config
from pipeline.data.decode import uid_to_id
from pipeline.data.inventory import ShardInfo
from pipeline.data.reader import read_shard
from pipeline.engine import shard_scorer
from pipeline.engine.sample import in_sample, observed, read_sampled
from pipeline.engine.scorer_spec import PredictorSpec, SampleSpec, ScorerSpec
from pipeline.engine.worker import WorkerSpec
from pipeline.errors import InputError
from pipeline.influence import Regressor, fit
from pipeline.prepared import save_regressor
from pipeline.run import RunFolder
from pipeline.selection.standardise import terms_matrix
from pipeline.store import marks, storage
from pipeline.store.commits import open_scores
from pipeline.store.fingerprint import Fingerprint
from tests.engine.prepared_run import outside_ray, prepare_run
from tests.engine.test_shard_scorer import mixed_shard
from tests.helpers import write_shards

pytestmark = pytest.mark.usefixtures("one_cpu")

RUNS = np.array([0, 0, 1, 1])


@pytest.fixture
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a scorer be built outside of an actor."""
    outside_ray(monkeypatch)


def work_through(spec: WorkerSpec, infos: list[ShardInfo]) -> None:
    work = spec.build("0")
    for info in infos:
        work.commit(info, work.score(info, work.load(info)), {"load": 1.0})


def both(folder: Path, **score: object) -> tuple[Config, list[ShardInfo], Fingerprint]:
    """A run scored in full in `full`, and one whose first pass is done in `part`, over the same three shards."""
    urls = [*write_shards(folder / "in", shards=2, samples=16), mixed_shard(folder / "in")]
    config, infos, fingerprint = prepare_run(str(folder / "full"), urls, runs=2, embeddings=True)
    work_through(ScorerSpec(config, fingerprint), infos)
    config, infos, fingerprint = prepare_run(str(folder / "part"), urls, runs=2, embeddings=True, sample=0.5, **score)
    work_through(SampleSpec(config, fingerprint), infos)
    return config, infos, fingerprint


def save(config: Config, sampled: Fingerprint, regressor: Regressor) -> Fingerprint:
    """Write the regressor; the fingerprint of what it completes."""
    return Fingerprint({**sampled.parts, "regressor": save_regressor(config.out, regressor)})


def test_computed_rows_are_those_of_full_scoring_and_the_rest_is_predicted(tmp_path: Path) -> None:
    config, infos, sampled = both(tmp_path)
    run = RunFolder(config.out)
    first, end_error = read_sampled(run, infos[0], sampled)
    assert end_error == ""
    known = np.flatnonzero(pc.is_valid(first["score"]).to_numpy())
    assert 3 <= len(known) <= 13
    terms = torch.from_numpy(terms_matrix(first["terms"].combine_chunks(), RUNS)[known])
    regressor = fit(observed(first, known, RUNS), terms, [0, 0, 1, 1])
    final = save(config, sampled, regressor)
    work_through(PredictorSpec(config, final, sampled, (0, 0, 1, 1), error=0.25), infos)

    full = open_scores(RunFolder(str(tmp_path / "full"))).to_table()
    mine = open_scores(run).to_table()
    assert mine.schema.equals(full.schema)
    for name in ("uid", "key", "index", "status", "error", "width", "caption_length", "content"):
        assert mine[name].equals(full[name]), name
    np.testing.assert_allclose(mine["similarity"].to_numpy(), full["similarity"].to_numpy(), atol=1e-6)
    np.testing.assert_allclose(mine["loss"].to_numpy(), full["loss"].to_numpy(), rtol=1e-5)
    vectors = [np.stack(table["embedding"].drop_null().to_numpy(zero_copy_only=False)) for table in (mine, full)]
    np.testing.assert_allclose(vectors[0].astype(float), vectors[1].astype(float), atol=1e-3)

    ok = pc.equal(mine["status"], "ok").to_numpy()
    predicted = mine["predicted"].to_numpy()
    assert not predicted[~ok].any()
    ids = torch.tensor([uid_to_id(uid) for uid in mine["uid"].to_pylist()])
    np.testing.assert_array_equal(predicted[ok], ~in_sample(ids, config).numpy()[ok])
    computed = ok & ~predicted
    for name in ("score", "utility", "utility_std"):
        ours, theirs = (table[name].to_numpy()[computed] for table in (mine, full))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
    rows = mine.filter(predicted)
    terms_of = terms_matrix(rows["terms"].combine_chunks(), RUNS)
    np.testing.assert_allclose(rows["score"].to_numpy(), terms_of.sum(1), rtol=1e-5)
    own = 2 * terms_of.reshape(-1, 2, 2).sum(2)
    spread = np.hypot(np.abs(own[:, 0] - own[:, 1]) / 2, 0.25)
    np.testing.assert_allclose(rows["utility_std"].to_numpy(), spread, rtol=1e-4)
    assert not full["predicted"].to_numpy().any()


def test_the_second_pass_copies_computed_rows_to_the_bit_and_reads_only_sound_samples(tmp_path: Path) -> None:
    config, infos, sampled = both(tmp_path, estimator="clip-score")
    run = RunFolder(config.out)
    first, _ = read_sampled(run, infos[1], sampled)
    known = np.flatnonzero(pc.is_valid(first["score"]).to_numpy())
    terms = torch.from_numpy(terms_matrix(first["terms"].combine_chunks(), RUNS)[known])
    final = save(config, sampled, fit(observed(first, known, RUNS), terms, [0, 0, 1, 1]))
    work = PredictorSpec(config, final, sampled, (0, 0, 1, 1), error=0.0).build("0")
    work.commit(infos[1], work.score(infos[1], work.load(infos[1])), {})
    scores = pq.read_table(run.score_file(1))
    for name in ("score", "utility", "utility_std", "terms"):
        assert scores[name].take(known).equals(first[name].take(known)), name

    with pytest.raises(InputError, match=r"expected the finished sample .* found none with the present settings"):
        read_sampled(run, infos[1], Fingerprint({"other": 1}))
    path = Path(RunFolder(run.sample).score_file(1))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"changed since it was committed.*the same command makes the file anew"):
        work.load(infos[1])
    with pytest.raises(InputError, match=r"expected the finished sample .* the same command makes it"):
        work.load(infos[1])
    assert not storage.exists(RunFolder(run.sample).score_mark(1))
    Path(RunFolder(run.sample).score_file(0)).unlink()
    with pytest.raises(InputError, match="missing, though its commit mark is there"):
        work.load(infos[0])
    assert not storage.exists(RunFolder(run.sample).score_mark(0))


def test_another_regressor_than_the_marks_is_not_predicted_with(tmp_path: Path) -> None:
    config, _, sampled = both(tmp_path)
    run = RunFolder(config.out)
    for damage in (lambda path: path.write_bytes(b"another"), Path.unlink):
        storage.write_bytes(run.regressor, b"fitted")
        marks.write_mark(run.regressor_mark, sampled, {})
        damage(Path(run.regressor))
        final = Fingerprint({**sampled.parts, "regressor": storage.checksum(b"fitted")})
        with pytest.raises(InputError, match=r"regressor\.safetensors: .*the same command makes the file anew"):
            PredictorSpec(config, final, sampled, (0, 0, 1, 1), error=0.0).build("0")
        assert not storage.exists(run.regressor_mark)


def test_a_prediction_that_is_not_finite_is_a_reason(tmp_path: Path) -> None:
    config, infos, sampled = both(tmp_path)
    first, _ = read_sampled(RunFolder(config.out), infos[0], sampled)
    known = np.flatnonzero(pc.is_valid(first["score"]).to_numpy())
    terms = torch.from_numpy(terms_matrix(first["terms"].combine_chunks(), RUNS)[known])
    regressor = fit(observed(first, known, RUNS), terms, [0, 0, 1, 1])
    regressor.parts[1]["bias"] = regressor.parts[1]["bias"] * torch.nan
    final = save(config, sampled, regressor)
    work = PredictorSpec(config, final, sampled, (0, 0, 1, 1), error=0.0).build("0")
    table, _ = work.score(infos[0], work.load(infos[0]))
    spoilt = pc.equal(table["status"], "not-finite").to_numpy()
    assert spoilt.sum() == len(table) - len(known)
    assert table["error"].to_pylist()[int(np.flatnonzero(spoilt)[0])] == "term of checkpoint 2 is nan"
    assert not table["predicted"].to_numpy().any()
    assert table["terms"].null_count == table["score"].null_count == spoilt.sum()


def test_only_runs_that_hold_a_pair_out_predict_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = [set(), set()]
    monkeypatch.setattr(shard_scorer, "trained_ids", lambda folder, run: np.sort(np.array([*seen[run]], np.int64)))
    urls = write_shards(tmp_path / "in", shards=1, samples=24)
    with read_shard(urls[0]) as reader:
        ids = [uid_to_id(sample.uid) for sample in reader]
    # Each run saw a third of the pairs, the last pair was seen by both.
    seen[0] |= {*ids[::3], ids[-1]}
    seen[1] |= {*ids[1::3], ids[-1]}
    full, infos, fingerprint = prepare_run(str(tmp_path / "full"), urls, runs=2, held_out=True)
    work_through(ScorerSpec(full, fingerprint), infos)
    config, infos, sampled = prepare_run(str(tmp_path / "part"), urls, runs=2, held_out=True, sample=0.5)
    work_through(SampleSpec(config, sampled), infos)
    first, _ = read_sampled(RunFolder(config.out), infos[0], sampled)
    known = np.flatnonzero(pc.is_valid(first["score"]).to_numpy())
    terms = torch.from_numpy(terms_matrix(first["terms"].combine_chunks(), RUNS)[known])
    final = save(config, sampled, fit(observed(first, known, RUNS), terms, [0, 0, 1, 1]))
    work_through(PredictorSpec(config, final, sampled, (0, 0, 1, 1), error=0.1), infos)

    expected, found = (pq.read_table(RunFolder(c.out).score_file(0)) for c in (full, config))
    assert found["status"].equals(expected["status"])
    assert found["status"].to_pylist().count("not-finite") == 1
    predicted = found["predicted"].to_numpy()
    assert 3 <= predicted.sum() <= 20
    for ours, theirs in zip(found["terms"].to_pylist(), expected["terms"].to_pylist(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert [term is None for term in ours] == [term is None for term in theirs]
    for name in ("score", "loss", "similarity"):
        ours, theirs = (table[name].to_numpy(zero_copy_only=False)[~predicted] for table in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    sums = [sum(term for term in row if term is not None) for row in found["terms"].filter(predicted).to_pylist()]
    np.testing.assert_allclose(found["score"].to_numpy(zero_copy_only=False)[predicted], sums, rtol=1e-5)
    # Where one run counts there is no spread over runs.
    one = [row is not None and None in row for row in found["terms"].to_pylist()]
    assert found["utility_std"].filter(one).null_count == sum(one)


def test_every_seed_that_a_config_may_have_draws_a_sample() -> None:
    tree = {"data": {"shards": []}, "score": {"sample": 0.5}}
    ids = torch.arange(100)
    drawn = [in_sample(ids, parse_config({**tree, "seed": seed})) for seed in (2**63 - 1, 2**63 - 106, 2**63 - 107)]
    assert all(0 < int(each.sum()) < 100 for each in drawn)


def test_the_sample_depends_on_uid_and_seed_alone() -> None:
    config = Config.model_validate({"data": {"shards": "x"}, "score": {"sample": 0.3}})
    ids = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=torch.Generator().manual_seed(0))
    chosen = in_sample(ids, config)
    assert torch.equal(chosen[::7], in_sample(ids[::7], config))
    assert abs(float(chosen.double().mean()) - 0.3) < 0.02
    other = in_sample(ids, config.model_copy(update={"seed": 1}))
    assert 0.05 < float((chosen & other).double().mean()) < 0.13
