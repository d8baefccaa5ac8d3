"""What mini-batches rest on: recognition of samples, pooled moments, maps kept for later."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dd.correction.decay import DecayLog, StepMap
from dd.curvature.moments import Moments
from dd.functional import centre_within_components, symmetric_curvature
from dd.support.fingerprint import Fingerprints, directions, fingerprint
from dd.support.ranks import Ranks


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- Fingerprints ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_are_found_among_many(dtype):
    inputs = normal(0, 20_000, 40, dtype=torch.float32)
    known = Fingerprints(fingerprint(inputs))
    rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(1))[:500]
    index, same = known.find(fingerprint(inputs[rows].to(dtype)))
    if dtype == torch.bfloat16:
        # Rounded by 2^-9 an entry, a sample lies beyond the tolerance of 2^-10 of the spread.
        assert not same.all()
        return
    assert same.all()
    assert torch.equal(index, rows)
    assert not known.find(fingerprint(inputs[rows] + 0.01 * normal(2, 500, 40)))[1].any()


def test_of_copies_the_first_is_found():
    inputs = normal(0, 50, 6)
    inputs[[30, 40]] = inputs[7].clone()
    index, same = Fingerprints(fingerprint(inputs)).find(fingerprint(inputs[[40, 30, 8]]))
    assert same.all()
    assert index.tolist() == [7, 7, 8]


def test_samples_not_yet_seen_are_not_found():
    inputs = normal(0, 50, 6)
    found = fingerprint(inputs)
    known = Fingerprints(torch.full_like(found, torch.nan))
    assert not known.find(found)[1].any()
    known.put(torch.tensor([3, 9]), found[[3, 9]])
    assert known.find(found)[1].nonzero().squeeze(1).tolist() == [3, 9]
    new, differ = known.differ(torch.tensor([3, 4, 9]), found[[3, 4, 10]])
    assert new.tolist() == [False, True, False]
    assert differ.tolist() == [False, False, True]


def test_directions_do_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        double = directions(5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(double, directions(5))


# --- Moments ---------------------------------------------------------------------------------


def moments_of(rows, products, ids):
    return Moments.centred(rows, products, ids, 3, Ranks())


def test_merged_moments_are_those_of_the_union():
    rows, products, ids = normal(0, 60, 4) + 5, normal(1, 60, 4), torch.arange(60) % 3
    parts = torch.arange(60).split([10, 20, 30])
    pooled = moments_of(rows[parts[0]], products[parts[0]], ids[parts[0]])
    for part in parts[1:]:
        now = moments_of(rows[part], products[part], ids[part])
        pooled = now.merged(Moments.unpacked(pooled.packed(), 3, 4), keep=1.0)
    centred = centre_within_components(rows, ids, 3)
    torch.testing.assert_close(pooled.gram, centred.mT @ centred / 60)
    torch.testing.assert_close(pooled.cross, centred[parts[2]].mT @ products[parts[2]])
    assert float(pooled.rows) == 60


def test_pooling_keeps_the_small_batch_from_biasing_the_curvature():
    """K of ten rows in three components is inverted with a bias of order k / (10 - 3 - k)."""
    k, m = 4, 10
    hessian = torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1])).double()
    ids = torch.arange(m) % 3
    single, pooled, memory = [], [], None
    for step in range(800):
        rows = normal(step, m, k) + ids.unsqueeze(1)
        products = rows @ hessian / m + normal(5000 + step, m, k) / m
        now = moments_of(rows, products, ids)
        single.append(symmetric_curvature(now.gram, now.cross, 1e-4))
        memory = now if memory is None else now.merged(memory, 1 - m / 256)
        if step > 100:
            pooled.append(symmetric_curvature(memory.gram, memory.cross, 1e-4))
    error = [
        (torch.stack(each).mean(0) - hessian).norm() / hessian.norm() for each in (single, pooled)
    ]
    # The mean of 700 estimates, each of standard deviation about sqrt(k / m), to three deviations.
    assert error[1] < 3 * (k / m / 700) ** 0.5
    scatter = [torch.stack(each).std(0).mean() for each in (single, pooled)]
    assert scatter[1] < scatter[0]


# --- Maps of absent samples ------------------------------------------------------------------


def bring(log, state, rows):
    """Bring some samples up to date; whether all were."""
    due = log.due(rows)
    assert set(due.tolist()) <= set(rows.tolist())
    if len(due) == 0:
        return False
    if log.prefers_flush(due):
        log.flush(state)
        return True
    state[:, due] = log.catch_up(state[:, due], due)
    assert len(log.due(rows)) == 0
    return False


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True), max_size=25),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_maps_kept_for_later_are_maps_applied_at_once(batches, flushes, seed):
    n, k, bins = 12, 2, 2
    eager = normal(seed, bins, n, k)
    lazy, log = eager.clone(), DecayLog(n)
    for number, batch in enumerate(batches):
        rows = torch.tensor(sorted(batch))
        bring(log, lazy, rows)
        torch.testing.assert_close(lazy[:, rows], eager[:, rows])
        step = torch.eye(k) - 0.1 * normal(seed + number, bins, k, k)
        push = normal(seed - number - 1, bins, len(rows), k)
        eager = eager @ step
        eager[:, rows] += push
        lazy[:, rows] = lazy[:, rows] @ step + push
        if log.append(StepMap(step), rows) or (flushes and number % 5 == 0):
            log.flush(lazy)
    log.flush(lazy)
    assert log.is_empty
    torch.testing.assert_close(lazy, eager)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10_000))
def test_factors_by_unit_are_a_map_of_many_zeros(bins, k, more, seed):
    first, factors = (
        normal(seed, bins, k, (1 + more) * k),
        normal(seed + 1, bins, more, (1 + more) * k),
    )
    blocks = factors.unflatten(-1, (1 + more, k))
    others = torch.cat(
        [
            torch.cat([row.diag_embed() for row in blocks[:, at].unbind(1)], -1)
            for at in range(more)
        ],
        1,
    )
    short, whole = StepMap(first, factors=factors), StepMap(first, others)
    rows, later = (
        normal(seed + 2, bins, 5, (1 + more) * k),
        normal(seed + 3, bins, (1 + more) * k, 7),
    )
    matrix = torch.cat([first, others], 1)
    for step in (short, whole):
        torch.testing.assert_close(step.of(rows), rows @ matrix)
        torch.testing.assert_close(step.before(later), matrix @ later)
        torch.testing.assert_close(step.before(None), matrix)
    assert short.numbers == (k + more) * (1 + more) * k


def test_a_step_costs_no_more_than_its_batch(monkeypatch):
    """Rows multiplied in an epoch of single passes: each sample twice, whatever n is."""
    for n in (200, 2000):
        log, k, m, work = DecayLog(n), 4, 20, 0
        catch_up = DecayLog.catch_up

        def counted(self, state, rows, catch_up=catch_up):
            nonlocal work
            ages = self._age[rows]
            work += int((ages == 0).sum())
            work += int((len(self._maps) - ages)[ages > 0].sum())
            return catch_up(self, state, rows)

        monkeypatch.setattr(DecayLog, "catch_up", counted)
        state = normal(0, 1, n, k)
        for epoch in range(5):
            g = torch.Generator().manual_seed(epoch)
            for rows in torch.randperm(n, generator=g).split(m):
                work += n * bring(log, state, rows)
                if log.append(StepMap(torch.eye(k)[None].double()), rows):
                    work += n
                    log.flush(state)
        monkeypatch.undo()
        assert work <= 5 * n * 3
