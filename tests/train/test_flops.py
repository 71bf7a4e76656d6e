"""Costs against published figures."""

import pytest
import torch

from hadal.config import preset
from hadal.train.flops import attention_flops_per_pair, flops_per_token, peak, step_flops
from tests.train import tiny


def test_v3_costs_what_its_authors_published():
    """250 GFLOP a token at 4K (ISCA 2025, without MTP): 219.75 for the matrices, 30.70 for causal
    attention.
    """
    from dataclasses import replace

    config = replace(preset("deepseek-v3").config, num_nextn_predict_layers=0)
    assert flops_per_token(config) / 1e9 == pytest.approx(219.75, abs=0.01)
    assert attention_flops_per_pair(config) * 4096 / 1e9 == pytest.approx(30.70, abs=0.01)
    assert step_flops(config, 4096, 4096**2) / 4096 / 1e9 == pytest.approx(250.46, abs=0.01)


def test_the_mtp_module_adds_its_active_parameters_and_the_head_again():
    without, with_mtp = tiny.config(mtp=0), tiny.config(mtp=1)
    n = with_mtp.parameters()
    idle = 5 * 3 * 32 * 24
    extra = flops_per_token(with_mtp) - flops_per_token(without)
    assert extra == 6 * (n.mtp_unique - idle + n.head)


def test_a_cpu_has_a_measured_peak():
    found = peak(torch.device("cpu"), torch.float32)
    assert found.flops > 1e9
    assert "measured" in found.source
