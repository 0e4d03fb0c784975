"""Comparing samples: against golden summaries with their standard errors, and against a law (Kolmogorov-Smirnov)."""

import numpy as np
import torch


def measures(crops: torch.Tensor) -> dict[str, np.ndarray]:
    """The figures of each normalised crop [n, 3, S, S] under their golden names, [n] each."""
    per_channel = {
        f"{name}_{letter}": values[:, channel].numpy()
        for name, values in (
            ("mean", crops.mean(dim=(2, 3))),
            ("std", crops.flatten(2).std(dim=2, correction=0)),
        )
        for channel, letter in enumerate("rgb")
    }
    return per_channel | {
        "abs_dx": crops.diff(dim=3).abs().mean(dim=(1, 2, 3)).numpy(),
        "abs_dy": crops.diff(dim=2).abs().mean(dim=(1, 2, 3)).numpy(),
        "min": crops.amin(dim=(1, 2, 3)).numpy(),
        "max": crops.amax(dim=(1, 2, 3)).numpy(),
    }


def assert_same_distribution(samples: dict[str, np.ndarray], golden: dict, *, errors: float = 5.0) -> None:
    """Each sample's mean, spread and quantiles lie within `errors` standard errors (of both) of the golden ones."""
    assert set(golden) <= set(samples)
    for name, figures in golden.items():
        drawn = np.asarray(samples[name], dtype=np.float64)
        value, error = figures["mean"]
        own_error = drawn.std() / np.sqrt(len(drawn))
        assert abs(drawn.mean() - value) <= errors * np.hypot(error, own_error) + 1e-6, (name, "mean")
        assert abs(drawn.std() - figures["std"]) <= 0.1 * figures["std"] + 1e-6, (name, "std")
        share_error = errors * np.sqrt(0.25 * (1 / len(drawn) + 1 / 2000))
        for level, (quantile, _) in figures["quantiles"].items():
            # By the shares on either side of it, which is fair to steps and plateaus of the distribution as well.
            slack = 1e-4 + 1e-4 * abs(quantile)
            assert (drawn < quantile - slack).mean() <= float(level) + share_error, (name, level)
            assert (drawn <= quantile + slack).mean() >= float(level) - share_error, (name, level)


def kolmogorov_smirnov_distance(drawn: np.ndarray, distribution) -> float:
    """Largest gap between the empirical distribution of `drawn` and the law `distribution` (a function to [0, 1])."""
    expected = distribution(np.sort(drawn))
    steps = np.arange(len(drawn) + 1) / len(drawn)
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))


def kolmogorov_smirnov_bound(n: int, p: float) -> float:
    """The distance that a sample of `n` from the law exceeds with probability `p` (asymptotic)."""
    return float(np.sqrt(-0.5 * np.log(p / 2) / n))


def two_sample_distance(left: np.ndarray, right: np.ndarray) -> float:
    """Largest gap between two empirical distributions."""
    places = np.concatenate([left, right])
    shares = [np.searchsorted(np.sort(drawn), places, side="right") / len(drawn) for drawn in (left, right)]
    return float(np.abs(shares[0] - shares[1]).max())
