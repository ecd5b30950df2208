"""What alerts, dashboard and autoscaler ask of vLLM's own metrics, with the labels of each.

`tests/real/test_metrics.py` finds every one of them at a real engine.
"""

ENGINE = {"model_name", "engine"}
BUCKET = ENGINE | {"le"}
VLLM = {
    "vllm:num_requests_running": ENGINE,
    "vllm:num_requests_waiting": ENGINE,
    "vllm:kv_cache_usage_perc": ENGINE,
    "vllm:prefix_cache_queries_total": ENGINE,
    "vllm:prefix_cache_hits_total": ENGINE,
    "vllm:prompt_tokens_total": ENGINE,
    "vllm:generation_tokens_total": ENGINE,
    "vllm:time_to_first_token_seconds_bucket": BUCKET,
    "vllm:inter_token_latency_seconds_bucket": BUCKET,
    "vllm:request_queue_time_seconds_bucket": BUCKET,
}
