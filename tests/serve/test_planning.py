"""POST /plan: the planner's answers, its refusals in the API's form, and bounds on what a question may be."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from hadal.config import preset
from hadal.plan import answer

V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840,
}  # fmt: skip
RUN = {"ask": "run", "model": "deepseek-v3", "on": "8xh200"}


def test_the_answer_is_the_planners(client: httpx.Client) -> None:
    question = {**RUN, "batch": 16}
    for path in ("/v1/plan", "/plan"):
        response = client.post(path, json=question)
        assert response.status_code == 200
        assert response.json() == answer(question)
    known = client.post("/v1/plan", json={"ask": "models"}).json()["models"]
    lite = next(m for m in known if m["name"] == "deepseek-v2-lite")
    assert lite["parameters"] == preset("deepseek-v2-lite").config.parameters().main and lite["experts"]


def test_a_pasted_config_is_planned(client: httpx.Client) -> None:
    found = client.post(
        "/v1/plan", json={**RUN, "model": V3, "on": "A100-40GB, 52GB RAM", "dtype": "fp8"}
    ).json()
    named = client.post("/v1/plan", json={**RUN, "on": "A100-40GB, 52GB RAM", "dtype": "fp8"}).json()
    assert found["fits"] is named["fits"] is False
    assert found["memory"][4] == named["memory"][4]  # the experts


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "ask is None"),
    ({"ask": "run", "model": "deepseek-v3"}, "on which machine"),
    ({**RUN, "ask": ["run"]}, "ask must be a string"),
    ({**RUN, "on": "8xh2000"}, "unknown device 'h2000'"),
    ({**RUN, "on": "cluster.toml"}, "unknown device"),  # no file is read
    ({**RUN, "model": "deepseek-v9"}, "unknown model"),
    ({**RUN, "model": {"hello": 1}}, "model_type"),
    ({**RUN, "model": {**V3, "kv_lora_rank": "x" * 5000}}, "at most 1000 characters"),
    ({**RUN, "model": {**V3, "q_lora_rank": 10**300}}, "at most 1e+18"),
    ({**RUN, "model": {**V3, "first_k_dense_replace": 61}}, ""),
    ({**RUN, "model": {**V3, "extra": [[0] * 400] * 400}}, "at most 262144 bytes"),
    ({**RUN, "batch": 0}, "batch is 0"),
    ({**RUN, "batch": 1.5}, "batch is 1.5"),
    ({**RUN, "bach": 1}, "unknown key 'bach'"),
    ({"ask": "pipeline", "stages": 64, "micro_batches": 512, "schedule": "1f1b"}, "draws at most 4,096"),
]


@pytest.mark.parametrize(("question", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_answered_is_a_400_in_words(client: httpx.Client, question: Any, said: str) -> None:
    response = client.post("/v1/plan", json=question)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"
    assert "Traceback" not in error["message"] and len(error["message"]) < 3000


def test_a_body_that_is_no_object(client: httpx.Client) -> None:
    for body in (b"[]", b"{", b"", b'"run"'):
        assert client.post("/v1/plan", content=body).status_code == 400
