"""/metrics: every promised number is there, moves, and has the right value."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.harness import ServerThread, fake_options, http, quick, serving, settings, wait_until


def scrape(server: ServerThread) -> dict[str, float]:
    """Sample (with labels but le) -> value."""
    values = {}
    for family in text_string_to_metric_families(http.get(server.url + "/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


def test_numbers() -> None:
    with serving(quick()) as server:
        before = scrape(server)
        assert before["lowbit_ready"] == 1
        body = {"prompt": "twelve bytes", "max_tokens": 10}  # 13 tokens with the BOS
        assert http.post(server.url + "/v1/completions", json=body).status_code == 200
        assert http.post(server.url + "/v1/completions", json={"prompt": 5}).status_code == 400
        http.get(server.url + "/some/scanner/path")
        wait_until(lambda: server.app.client.status.generated_tokens == 10)
        after = scrape(server)
    assert after["lowbit_requests_total{path=/v1/completions,status=200}"] == 1
    assert after["lowbit_requests_total{path=/v1/completions,status=400}"] == 1
    assert after["lowbit_requests_total{path=unknown,status=404}"] == 1
    assert not any("scanner" in name for name in after)
    assert after["lowbit_prompt_tokens_total"] == 10  # computed
    assert after["lowbit_cached_prompt_tokens_total"] == 3
    assert after["lowbit_cache_hit_rate"] == 3 / 13
    assert after["lowbit_generated_tokens_total"] == 10
    assert after["lowbit_draft_tokens_total"] == 5
    assert after["lowbit_accepted_draft_tokens_total"] == 3
    assert after["lowbit_steps_total"] == 10
    assert after["lowbit_captured_steps_total"] == 5
    assert after["lowbit_time_to_first_token_seconds_count"] == 1
    assert after["lowbit_time_to_first_token_seconds_sum"] < 5
    assert after["lowbit_inter_token_latency_seconds_count"] == 9
    assert 0.002 * 9 <= after["lowbit_inter_token_latency_seconds_sum"] < 5
    assert after["lowbit_queue_wait_seconds_count"] == 1
    assert after["lowbit_running_requests"] == after["lowbit_queue_requests"] == 0
    assert after["lowbit_kv_pages_total"] == after["lowbit_kv_pages{state=free}"] == 40
    assert after["lowbit_kv_pages{state=used}"] == after["lowbit_kv_pages{state=cached}"] == 0
    assert after["lowbit_invariant_violations_total"] == after["lowbit_engine_restarts_total"] == 0
    assert after["lowbit_request_duration_seconds_count{path=/v1/completions}"] == 2


QUALITY = {"mean_kl": 0.0125, "top1_agreement": 0.97, "positions": 4096, "against": 'bf16 "original"'}
SERVED = {"architecture": "FakeForCausalLM", "quantization": 'int4 "1x128"\n', "weight_bytes": 12345678901}


def test_what_is_served() -> None:
    """The scheme and the size; quality only where it was measured."""
    with serving(quick()) as server:
        plain = scrape(server)
        card = http.get(server.url + "/v1/models").json()["data"][0]
    labels = 'architecture=FakeForCausalLM,model=tiny,quantization=int4 "1x128"\\n'
    assert plain[f"lowbit_model_info{{{labels}}}"] == 1
    assert plain["lowbit_weight_bytes"] == 12345678901
    assert not any("quality" in name for name in plain)
    assert {name: card[name] for name in SERVED} == SERVED and card["quality"] is None
    with serving(quick(), fake={"quality": QUALITY}) as server:
        measured = scrape(server)
        cards = [http.get(server.url + path).json() for path in ("/v1/models/tiny", "/get_model_info")]
        info = http.get(server.url + "/get_server_info").json()
    assert info["engine"]["quality"] == QUALITY
    against = '{against=bf16 "original"}'
    assert measured["lowbit_quality_mean_kl" + against] == 0.0125
    assert measured["lowbit_quality_top1_agreement" + against] == 0.97
    assert measured["lowbit_quality_positions" + against] == 4096
    assert all(card["quality"] == QUALITY and card["weight_bytes"] == 12345678901 for card in cards)


def test_before_the_model_is_loaded_nothing_is_said_of_it() -> None:
    with fake_options({"load_seconds": 3.0}):
        server = ServerThread(settings(), quick())
        try:
            values = scrape(server)
            card = http.get(server.url + "/v1/models")
        finally:
            server.stop()
    assert values["lowbit_ready"] == 0
    assert not any(name.startswith(("lowbit_model", "lowbit_weight", "lowbit_quality")) for name in values)
    assert card.json()["error"]["code"] == "loading"


def test_running_and_waiting() -> None:
    """The sequences would take 120 s: what is seen here is not their end, however slow this machine is."""
    with serving(quick(), fake={"step_seconds": 0.1}) as server:
        with httpx.stream(
            "POST",
            server.url + "/v1/completions",
            json={"prompt": "x", "max_tokens": 600, "n": 8, "stream": True},
            timeout=60,
        ) as response:
            assert response.status_code == 200
            lines = response.iter_lines()  # kept: its end would close the response
            next(lines)
            wait_until(lambda: server.app.client.status.running == 4, 60)
            values = scrape(server)
            assert values["lowbit_running_requests"] == 4
            assert values["lowbit_kv_pages{state=used}"] == 4
        wait_until(lambda: scrape(server)["lowbit_running_requests"] == 0, 60)
