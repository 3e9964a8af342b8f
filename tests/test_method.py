"""docs/method.md holds: its formulas, taken from the page and run in float64, give what the implementation gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from true_kd import compute_ce_loss, compute_kd_loss
from true_kd.examples import Example
from true_kd.losses import DIVERGENCES, ForwardKL, Objective, Softened, TokenTargets, token_losses
from true_kd.losses.divergences import SampledDivergence
from true_kd.prompts import from_strings
from true_kd.targets import SparseTargets, TargetSettings
from true_kd.targets.encoding import encode
from true_kd.weighting import weigh_tokens

PAGE = (Path(__file__).parents[1] / "true_kd" / "docs" / "method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
VOCAB = 300


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


NAMES = ("abs", "arange", "argmax", "exp", "eye", "isin", "log", "maximum", "mean", "round", "sum", "where")


def formulas(defines: str, **given: Any) -> dict[str, Any]:
    """The names that the page's block which defines `defines` comes to."""
    [block] = [block for block in BLOCKS if re.search(rf"^{defines} = ", block, flags=re.MULTILINE)]
    names = {name: getattr(np, name) for name in NAMES} | {"softmax": softmax} | given
    exec(block, names)
    return names


def drawn(seed: int, rows: int = 1, vocab: int = VOCAB) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Logits of a teacher and of a student near it, float32 numbers in float64."""
    random = np.random.default_rng(seed)
    teacher = random.normal(0, 3, (rows, vocab)).astype(np.float32).astype(np.float64)
    student = (teacher + random.normal(0, 1, (rows, vocab))).astype(np.float32).astype(np.float64)
    return random, teacher, student


def test_every_block_of_the_page_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    tested = set(re.findall(r'formulas\(\s*"(\w+)"', source))
    for block in BLOCKS:
        assert tested & set(re.findall(r"^(\w+) = ", block, flags=re.MULTILINE)), block


# The objective


@SEEDS
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_objective_and_its_slope_are_those_of_the_page(seed: int, temperature: float) -> None:
    _, [v], [z] = drawn(seed)
    said = formulas("loss", v=v, z=z, T=temperature, alpha=0.7, label=3)
    teacher, student = mx.array(v[None].astype(np.float32)), mx.array(z[None].astype(np.float32))
    kd, ce = compute_kd_loss(teacher, student, temperature), compute_ce_loss(student, mx.array([3]))
    assert kd.item() == pytest.approx(said["kd"], rel=1e-4, abs=1e-5)
    assert ce.item() == pytest.approx(said["ce"], rel=1e-5)
    objective = Objective(ForwardKL(), temperature, 0.7, None)
    targets = TokenTargets(
        mx.arange(VOCAB)[None].astype(mx.int32),
        mx.array(said["p"][None].astype(np.float32)),
        mx.array(np.log(said["p"])[None].astype(np.float32)),
        mx.ones((1, VOCAB), dtype=mx.bool_),
    )
    values = token_losses(student, mx.array([3]), targets, objective)
    total = 0.7 * values[0].item() + 0.3 * values[1].item()
    assert total == pytest.approx(said["loss"], rel=1e-4)
    slope = np.array(mx.grad(lambda logits: compute_kd_loss(teacher, logits, temperature))(student))[0]
    page = formulas("slope", p=said["p"], q=said["q"], v=v, z=z, T=temperature, V=VOCAB)["slope"]
    np.testing.assert_allclose(slope, temperature**2 * page, atol=2e-6)


@SEEDS
def test_at_high_temperature_the_slope_tends_to_the_difference_of_the_logits(seed: int) -> None:
    _, [v], [z] = drawn(seed)
    hot = 2000.0
    p, q = softmax(v / hot), softmax(z / hot)
    said = formulas("slope_when_hot", p=p, q=q, v=v, z=z, T=hot, V=VOCAB)
    np.testing.assert_allclose(said["slope"], said["slope_when_hot"], atol=0.01 * np.abs(said["slope"]).max())


@SEEDS
def test_the_teachers_text_has_the_slope_of_its_distribution_on_average_and_noise(seed: int) -> None:
    _, [v], [z] = drawn(seed, vocab=40)
    said = formulas("mean_slope", v=v, z=z, V=40)
    student = mx.array(z[None].astype(np.float32))
    each = [np.array(mx.grad(lambda x, y=y: compute_ce_loss(x, mx.array([y])))(student))[0] for y in range(40)]
    mean = said["p1"] @ np.stack(each)
    of_kl = np.array(mx.grad(lambda x: compute_kd_loss(mx.array(v[None].astype(np.float32)), x, 1.0))(student))[0]
    np.testing.assert_allclose(mean, said["mean_slope"], atol=1e-6)
    np.testing.assert_allclose(of_kl, said["mean_slope"], atol=1e-6)
    noise = said["p1"] @ np.square(np.stack(each) - mean).sum(axis=1)
    assert noise == pytest.approx(said["squared_error"], abs=1e-6)


# The divergences


@SEEDS
@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_divergence_is_the_pages(seed: int, name: str) -> None:
    _, [v], [z] = drawn(seed)
    p, q = softmax(v / 2), softmax(z / 2)
    values = {"p": p, "q": q, "beta": 0.3, "skew": 0.2}
    divergence = DIVERGENCES[name](0.3, 0.2)
    arrays = [mx.array(part.astype(np.float32)) for part in (np.log(q) - np.log(p), p, q)]
    found = np.array(divergence.weigh(*arrays)[0], dtype=np.float64)
    assert found.sum() == pytest.approx(formulas("forward_kl", **values)[name], rel=1e-4)
    if isinstance(divergence, SampledDivergence):
        terms = formulas("terms_forward_kl", **values)[f"terms_{name}"]
        np.testing.assert_allclose(found, p * terms, atol=1e-6)


@SEEDS
def test_reverse_kl_from_sparse_targets_is_the_pages_and_no_more_than_the_whole(seed: int) -> None:
    _, [v], [z] = drawn(seed)
    p, q = softmax(v), softmax(z)
    kept = np.argsort(-p)[:12]
    said = formulas("reverse_kl_sparse", p=p, q=q, K=kept)["reverse_kl_sparse"]
    targets = TokenTargets(
        mx.array(kept[None].astype(np.int32)),
        mx.array(p[kept][None].astype(np.float32)),
        mx.array(np.log(p[kept])[None].astype(np.float32)),
        mx.ones((1, 12), dtype=mx.bool_),
    )
    student, _ = Softened.both(mx.array(z[None].astype(np.float32)), 1.0)
    found = targets.compare(student, DIVERGENCES["reverse_kl"](0.5, 0.1)).values.item()
    assert found == pytest.approx(said, rel=1e-4)
    assert said <= formulas("forward_kl", p=p, q=q, beta=0.5, skew=0.1)["reverse_kl"]


# Sparse targets

DRAWS = 3000


def sampled(seed: int, draw_temperature: float, threshold: float) -> tuple[np.ndarray, int, SparseTargets]:
    """A teacher's probabilities, a label, and its targets, made many times with other random starts."""
    random, [v], _ = drawn(seed)
    label = int(random.integers(VOCAB))
    settings = TargetSettings("sparse", threshold, draw_temperature, 1.0)
    logits = mx.array(np.tile(v.astype(np.float32), (DRAWS, 1)))
    labels = mx.array(np.full(DRAWS, label, dtype=np.int32))
    return softmax(v), label, encode(logits, labels, random.uniform(size=DRAWS), settings)


@SEEDS
@pytest.mark.parametrize(("draw_temperature", "threshold"), [(1.0, 0.05), (2.0, 0.02), (4.0, 0.0085)])
def test_entries_are_kept_and_drawn_as_the_page_says(seed: int, draw_temperature: float, threshold: float) -> None:
    p1, label, targets = sampled(seed, draw_temperature, threshold)
    said = formulas("expected_count", p1=p1, h=threshold, D=draw_temperature, V=VOCAB, label=label)
    assert set(targets.ids[targets.exact]) == set(np.flatnonzero(said["exact"]))
    counts = np.zeros((DRAWS, VOCAB))
    np.add.at(counts, (targets.rows, targets.ids), 1)
    assert np.abs(counts - said["expected_count"]).max() < 1
    spread = np.sqrt(0.25 / DRAWS)
    np.testing.assert_allclose(counts.mean(axis=0), said["expected_count"], atol=5 * spread)


@SEEDS
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_sample_is_unbiased_and_no_noisier_than_the_page_says(seed: int, temperature: float) -> None:
    p1, label, targets = sampled(seed, 2.0, 0.02)
    said = formulas("expected_count", p1=p1, h=0.02, D=2.0, V=VOCAB, label=label)
    said |= formulas("power", p1=p1, T=temperature, expected_count=said["expected_count"])
    own = {name: said[name] for name in ("S", "a", "exact", "draws", "power", "Z")}
    weights, _ = targets.at_temperature(temperature)
    laid_out = np.zeros((DRAWS, VOCAB))
    np.add.at(laid_out, (targets.rows, targets.ids), weights)
    many = np.random.default_rng(seed).normal(1.0, 1.0, (200, VOCAB))
    estimates = laid_out @ many.T
    truths = many @ (said["power"] / said["Z"])
    # Beside the noise of the draws the rounding of what is stored.
    slack = 5 * estimates.std(axis=0) / np.sqrt(DRAWS) + 0.04
    assert (np.abs(estimates.mean(axis=0) - truths) < slack).all()
    variances = [formulas("variance", f=f, **own)["variance"] for f in many]
    assert 0.2 < np.mean(estimates.var(axis=0) / variances) < 1
    of_one = slice(0, targets.offsets[1])
    np.testing.assert_allclose(weights[of_one], said["weight"][targets.ids[of_one]], rtol=0.2)


def test_the_noise_vanishes_where_draws_weigh_the_same() -> None:
    p1, label, _ = sampled(0, 2.0, 0.02)
    said = formulas("expected_count", p1=p1, h=0.02, D=2.0, V=VOCAB, label=label)
    said |= formulas("power", p1=p1, T=2.0, expected_count=said["expected_count"])
    own = {name: said[name] for name in ("S", "a", "exact", "draws", "power", "Z")}
    assert formulas("variance", f=np.ones(VOCAB), **own)["variance"] == pytest.approx(0, abs=1e-12)


def test_what_the_most_likely_ids_leave_out_grows_with_temperature_as_the_page_says() -> None:
    ranks = np.arange(1, 50_001.0)
    shares = []
    for temperature in (1.0, 2.0):
        p = ranks ** (-2.0 / temperature) / np.sum(ranks ** (-2.0 / temperature))
        said = formulas("top_k", p=p, q=p, K=np.arange(64), T=temperature, V=50_000)
        shares.append(1 - p[:64].sum())
        # Where student and teacher agree there is nothing to learn; this target says otherwise.
        assert np.all(said["slope_top_k"][64:] > 0)
    assert f"leave out {shares[0]:.1%} at T = 1, and {shares[1]:.1%} at T = 2".replace("%", " %") in PAGE


# Weights and measures


@pytest.mark.parametrize("name", ["entropy", "certainty"])
def test_tokens_weigh_as_the_page_says(name: str) -> None:
    random, teacher, _ = drawn(5, rows=8)
    labels = random.integers(0, VOCAB, 8).astype(np.int32)
    settings = TargetSettings("sparse", 0.02, 2.0, 1.0)
    targets = encode(mx.array(teacher.astype(np.float32)), mx.array(labels), random.uniform(size=8), settings)
    prompt = np.zeros(1, dtype=np.int32)
    example = Example(prompt, labels, targets, np.arange(8, dtype=np.int32), np.ones(8, dtype=np.float32), "here")
    [weighed] = weigh_tokens([example], from_strings(["a prompt"], "here"), name)
    said = formulas("weights_entropy", H=np.maximum(targets.entropies, 0))
    np.testing.assert_allclose(weighed.weights, said[f"weights_{name}"], rtol=1e-5)


@SEEDS
def test_the_held_out_measures_are_the_pages(seed: int) -> None:
    random, teacher, student = drawn(seed, rows=20)
    theirs, ours = softmax(teacher), softmax(student)
    labels = random.integers(0, VOCAB, 20)
    said = formulas("perplexity", P=theirs, Q=ours, N=20, labels=labels)
    targets = TokenTargets(
        mx.array(np.tile(np.arange(VOCAB, dtype=np.int32), (20, 1))),
        mx.array(theirs.astype(np.float32)),
        mx.array(np.log(theirs).astype(np.float32)),
        mx.ones((20, VOCAB), dtype=mx.bool_),
    )
    logits = mx.array(student.astype(np.float32))
    kl, nll = token_losses(logits, mx.array(labels.astype(np.int32)), targets, Objective(ForwardKL(), 1.0, 1.0, None))
    assert mx.mean(kl).item() == pytest.approx(said["kl"], rel=1e-4)
    assert mx.exp(mx.mean(nll)).item() == pytest.approx(said["perplexity"], rel=1e-4)
    agreed = np.array(targets.best()) == np.argmax(student, axis=1)
    assert agreed.mean() == said["top1_agreement"]
