"""Responses by least squares, against dense ones on the quantities themselves."""

import pytest
import torch

from dd.functional.response import (
    NoiseBins,
    UnitProducts,
    coefficients_by_bin,
    combined,
    fit_across_units,
    fit_by_unit,
    fit_of_all_units,
)

K, D = 3, 40


def quantities(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(K, D, generator=generator, dtype=torch.float64) for name in "uabc"[:count]
    }


def ridge_solution(basis, target, ridge):
    """Least squares with a penalty on columns of unit length; basis (d, p), target (d, m)."""
    lengths = basis.norm(dim=0)
    scaled = basis / lengths
    gram = scaled.mT @ scaled + ridge * torch.eye(basis.shape[1], dtype=basis.dtype)
    return torch.linalg.solve(gram, scaled.mT @ target) / lengths[:, None]


def test_fit_by_unit_is_a_regression_of_each_unit():
    given = quantities()
    fit = fit_by_unit(UnitProducts(given), "u", ["a", "b", "c"], 0.1)
    left = 0.0
    for unit in range(K):
        basis = torch.stack([given[name][unit] for name in "abc"], 1)
        expected = ridge_solution(basis, given["u"][unit][:, None], 0.1)[:, 0]
        torch.testing.assert_close(fit.coefficients[:, unit], expected)
        left += (given["u"][unit] - basis @ expected).square().sum()
    assert fit.share == pytest.approx(1 - float(left / given["u"].square().sum()))
    assert fit.unexplained == pytest.approx(float(left) * D / (D - 3))
    assert fit.freedom == K * (D - 3)
    left_over = UnitProducts(given).left("u", ["a", "b", "c"], fit.coefficients)
    assert left_over == pytest.approx(float(left))


def test_fit_across_units_is_a_regression_on_all_of_them():
    given = quantities()
    fit = fit_across_units(UnitProducts(given), "u", ["a", "b"], 0.1)
    basis = torch.cat([given["a"], given["b"]]).mT
    expected = ridge_solution(basis, given["u"].mT, 0.1)
    torch.testing.assert_close(fit.coefficients, expected.unflatten(0, (2, K)))
    left = (given["u"].mT - basis @ expected).square().sum()
    assert fit.unexplained == pytest.approx(float(left) * D / (D - 2 * K))
    left_over = UnitProducts(given).left("u", ["a", "b"], fit.coefficients)
    assert left_over == pytest.approx(float(left))


def test_fit_of_all_units_is_one_regression():
    given = quantities()
    fit = fit_of_all_units(UnitProducts(given), "u", ["a", "b"], 0.1)
    basis = torch.stack([given[name].flatten() for name in "ab"], 1)
    expected = ridge_solution(basis, given["u"].flatten()[:, None], 0.1)
    torch.testing.assert_close(fit.coefficients, expected.expand(2, K))


def test_directions_taken_out_are_nowhere_in_the_products():
    given = quantities()
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(D, 5, generator=generator, dtype=torch.float64))[0]
    without = {name: v - v @ directions @ directions.mT for name, v in given.items()}
    found, expected = UnitProducts(given).without(directions), UnitProducts(without)
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.columns, expected.columns)
    torch.testing.assert_close(
        UnitProducts(given).within(directions) + found.gram, UnitProducts(given).gram
    )


def test_too_few_coordinates_tell_nothing():
    products = UnitProducts({name: v[:, :3] for name, v in quantities().items()})
    assert fit_by_unit(products, "u", ["a", "b", "c"], 0.1) is None
    assert fit_across_units(products, "u", ["a"], 0.1) is None
    assert fit_of_all_units(products, "u", ["a", "b", "c"], 0.1) is not None


def test_bins_have_coefficients_of_their_own():
    """A rule that answers otherwise in each bin, with noise by which coefficients are known."""
    k, d, ends, noise = 2, 3000, [400, 1000], 0.3
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(d, d, generator=generator))[0].double()
    parts = [slice(0, 400), slice(400, 1000), slice(1000, d)]
    given = {n: torch.randn(k, d, generator=generator, dtype=torch.float64) for n in "ab"}
    true = torch.randn(2, 3, k, generator=generator, dtype=torch.float64)
    update = noise * torch.randn(k, d, generator=generator, dtype=torch.float64)
    for at, part in enumerate(parts):
        inside = turned[:, part] @ turned[:, part].mT
        for i, name in enumerate("ab"):
            update += true[i, at][:, None] * (given[name] @ inside)
    products = UnitProducts({"u": update} | given)
    fit = fit_by_unit(products, "u", ["a", "b"], 1e-9)
    bins = NoiseBins(turned[:, : ends[-1]], ends, 3)
    found = coefficients_by_bin(products, "u", ["a", "b"], fit, bins)
    for at, part in enumerate(parts):
        size = part.stop - part.start
        # Four deviations of a coefficient, and what the ridge p/d_b takes of its distance.
        allowed = 4 * noise / size**0.5 + 2 / size * (true[:, at] - fit.coefficients).abs().max()
        assert (found[:, at] - true[:, at]).abs().max() < allowed
    assert (fit.coefficients[:, None] - true).abs().max() > 0.3
    # Bins whose directions are not known are taken together.
    first = NoiseBins(turned[:, :400], [400], 3)
    some = coefficients_by_bin(products, "u", ["a", "b"], fit, first)
    torch.testing.assert_close(some[:, 0], found[:, 0])
    assert torch.equal(some[:, 1], some[:, 2])


@pytest.mark.parametrize("kind", ["unit", "across", "bin"])
@pytest.mark.parametrize("starts", [True, False])
def test_combination_of_shadows(kind, starts):
    bins, n, k, p = 2, 5, 3, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts, start = [normal(bins, n, k) for _ in range(p)], normal(bins, n, k)
    shapes = {"unit": (p, k), "across": (p, k, k), "bin": (p, bins, 1, k)}
    coefficients = normal(*shapes[kind])
    spelled = {"unit": "pbnk,pk->bnk", "across": "pbnl,plk->bnk", "bin": "pbnk,pbxk->bnk"}
    expected = torch.einsum(spelled[kind], torch.stack(parts), coefficients)
    kept = start.clone()
    found = combined(parts, coefficients, start if starts else None)
    torch.testing.assert_close(found, expected + start if starts else expected)
    assert torch.equal(start, kept)
