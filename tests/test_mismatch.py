"""Corrections of the mismatch of sampler and learner, against TRL's and verl's formulas in plain Python."""

import math

import pytest
import torch

pytest.importorskip("accelerate")

from fastgrpo.integrations.vllm import VLLMOptions

pytestmark = pytest.mark.quick
GAPS = ([0.01, -0.02, 0.005], [1.5, -0.4, 0.3, 0.2], [-2.0, 0.1], [0.002, 0.001, 0.003], [0.4, math.nan], [])


def plain(gaps, mode, low, high, band):
    gaps = [0.0 if math.isnan(g) else g for g in gaps]
    weights = [math.exp(g if mode.startswith("token") else sum(gaps)) for g in gaps]
    if mode.endswith("truncate"):
        weights = [min(max(w, low), high) for w in weights]
    else:
        weights = [w if low <= w <= high else 0.0 for w in weights]
    if band is not None and gaps:  # verl's rollout correction, rollout_rs = "geometric"
        mean = math.exp(sum(gaps) / len(gaps))
        weights = [w if band[0] <= mean <= band[1] else 0.0 for w in weights]
    return weights


@pytest.mark.parametrize("band", [None, (1 / 1.01, 1.01), (0.5, 1.2), (0.9999, 1.5)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights(mode, band):
    settings = {} if band is None else {"vllm_geometric_mask_max": band[1]}
    if band is not None and band[0] != 1 / band[1]:
        settings["vllm_geometric_mask_min"] = band[0]
    options = VLLMOptions(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=2.0,
        vllm_importance_sampling_clip_min=0.3,
        **settings,
    )  # fmt: skip
    kept = []
    for gaps in GAPS:
        old = -1 - torch.arange(len(gaps), dtype=torch.float64)
        weights = options.mismatch_weights(old, old - torch.tensor(gaps, dtype=torch.float64))
        assert weights.tolist() == pytest.approx(plain(gaps, mode, 0.3, 2.0, band), rel=1e-9)
        kept.append(bool(weights.count_nonzero()))
    assert band is None or not all(kept)
    assert any(kept)


def test_an_infinite_gap_leaves_no_nan():
    """A sampler that gave -inf: the ratio is infinite, and masked."""
    weights = VLLMOptions().mismatch_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-torch.inf, -1.0]))
    assert weights.tolist() == [0, 0]


def test_the_mask_belongs_to_the_correction():
    with pytest.raises(ValueError, match="part of vllm_importance_sampling_correction, which is False"):
        VLLMOptions(vllm_geometric_mask_max=1.001, vllm_importance_sampling_correction=False)
