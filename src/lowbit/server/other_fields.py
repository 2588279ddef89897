"""Fields of a request that OpenAI, SGLang, vLLM or llama.cpp know and lowbit has no use for.

Clients send them with their default values; one that asks for nothing must not cost the request its answer,
and one that asks for something must not be passed over in silence.
"""

from __future__ import annotations

# Accepted and without effect on the answer: bookkeeping, hints about speed, choices with one possible value,
# and what goes with a field of ``UNSUPPORTED`` or with images, which are refused themselves.
IGNORED = frozenset(
    {
        *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prompt_cache_options", "prediction", "verbosity"),
        *("include_reasoning", "separate_reasoning", "stream_reasoning", "spaces_between_special_tokens"),
        *("priority", "request_id", "rid", "custom_labels", "parallel_tool_calls", "data_parallel_rank"),
        *("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size"),
        *("routed_dp_rank", "disagg_prefill_dp_rank", "routing_key", "stream_interval", "log_metrics"),
        *("session_id", "conversation_id", "no_logs", "external_trace_header", "received_time", "kv_hints"),
        *("truncation_side", "guided_decoding_backend", "early_stopping", "routed_experts_start_len"),
        *("routed_experts_prompt_start", "return_flat_raw_top_logprobs_b64", "mm_payload"),
        *("max_dynamic_patch", "min_dynamic_patch", "image_max_dynamic_patch", "video_max_dynamic_patch"),
        *("images_config", "video_config", "use_audio_in_video", "mm_processor_kwargs", "media_io_kwargs"),
        # llama.cpp's
        *("cache_prompt", "id_slot", "n_keep", "min_keep", "timings_per_token", "return_progress"),
        *("post_sampling_probs", "repeat_last_n", "mirostat_tau", "mirostat_eta", "dynatemp_exponent"),
        *("xtc_threshold", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    }
)

_GRAMMARS = {
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("json_schema", "regex", "ebnf", "structural_tag", "grammar"),
}
_NO_PROCESSORS = "logit processors are not supported"
_NOT_PARSED = "answers are not parsed; look for the model's own marks in the text"
_TEXT_ONLY = "this server reads text only"
_IDS = "use 'return_token_ids'"
_NO_SAMPLER = "there is no such sampler; use temperature, top_p, top_k and min_p"
_BEAM = "beam search is not supported"
_USAGE = "'usage' says how many tokens came from the cache or were guessed"

# field -> (values that ask for nothing, why the others are refused). Empty lists and objects ask for nothing.
UNSUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "response_format": (
        ({"type": "text"},),
        "structured output is not supported yet; ask for JSON in the prompt and check the answer",
    ),
    "best_of": ((1,), "best_of is not offered; use n and choose yourself"),
    "suffix": (("",), "inserting text before a suffix is not supported"),
    "modalities": ((["text"],), "this server answers with text only"),
    "audio": ((), "this server answers with text only"),
    "functions": ((), "'functions' is the old name; use 'tools'"),
    "function_call": (("none", "auto"), "'function_call' is the old name; use 'tool_choice'"),
    "web_search_options": ((), "there is no web search here"),
    "moderation": ((), "there is no moderation here"),
    "chat_template": (
        (),
        "a chat template never comes from a request; start the server with --chat-template",
    ),
    "echo": ((False,), "the messages are not repeated; you have them"),
    "add_special_tokens": ((False,), "the chat template decides about special tokens"),
    "documents": ((), "documents are not supported; put their text into the messages"),
    "task": ((), "lowbit generates text only; put the task into the messages"),
    "prompt_logprobs": ((), "use 'echo' with 'logprobs' of /v1/completions"),
    "truncate_prompt_tokens": ((), "prompts are not truncated; shorten the prompt"),
    "allowed_token_ids": ((), "use 'logit_bias' instead"),
    "bad_words": ((), "use 'logit_bias' instead"),
    "length_penalty": ((1,), _BEAM),
    "use_beam_search": ((False,), _BEAM),
    "beam_width": ((1,), _BEAM),
    "stop_regex": ((), "use 'stop' with plain strings"),
    "lora_path": ((), "LoRA adapters are not supported"),
    "lora_id": ((), "LoRA adapters are not supported"),
    "lora": ((), "LoRA adapters are not supported"),
    "session_params": ((), "sessions are not supported; send the whole conversation"),
    "background": ((False,), "answers are not kept; wait for this one, or stream it"),
    "extra_key": (("",), "use 'cache_salt'"),
    "kv_transfer_params": ((), "KV transfer is not supported"),
    "ec_transfer_params": ((), "KV transfer is not supported"),
    "input_embeds": ((), "prompts are text or token ids"),
    "prompt_embeds": ((), "prompts are text or token ids"),
    "positional_embed_overrides": ((), "prompts are text or token ids"),
    "input_ids": ((), "messages go through the chat template; send token ids to /v1/completions"),
    "token_ids_logprob": ((), "use 'top_logprobs_num'"),
    "logprob_token_ids": ((), "use 'top_logprobs'"),
    "sampling_logprobs_mode": ((), "log-probabilities are the model's own, before sampling"),
    "repetition_detection": ((), "use 'repetition_penalty'"),
    "watermark": ((False,), "answers are not watermarked"),
    "watermarking": ((False,), "answers are not watermarked"),
    "thinking": ((), "use 'chat_template_kwargs' with the variable of the model's template"),
    "require_reasoning": ((False,), _NOT_PARSED),
    "max_thinking_tokens": ((), _NOT_PARSED),
    "thinking_token_budget": ((), _NOT_PARSED),
    "reasoning_format": (("none", "auto"), _NOT_PARSED),
    "return_hidden_states": ((False,), "hidden states are not returned"),
    "return_routed_experts": ((False,), "the experts' choice is not returned"),
    "return_indexer_topk": ((False,), "attention's choice is not returned"),
    "return_cached_tokens_details": ((False,), _USAGE),
    "return_spec_tokens_details": ((False,), _USAGE),
    "return_meta_info": ((False,), "/generate answers with 'meta_info'"),
    "return_sampling_mask": ((False,), "use 'top_logprobs'"),
    "return_flat_raw_top_logprobs": ((False,), "use 'top_logprobs_num'"),
    "return_flat_raw_output_top_logprobs": ((False,), "use 'top_logprobs_num'"),
    "return_entropy": ((False,), "use 'top_logprobs_num'"),
    "return_bytes": ((False,), "answers are text"),
    "return_prompt_text": ((False,), "the prompt is not repeated; use 'echo' of /v1/completions"),
    "return_prompt_token_ids": ((False,), _IDS),
    "return_input_ids_in_sglext": ((False,), _IDS),
    "return_output_ids_in_sglext": ((False,), _IDS),
    "return_tokens": ((False,), _IDS),
    "return_token_offsets": ((False,), "'logprobs' of /v1/completions has 'text_offset'"),
    "return_weight_versions": ((False,), "weights do not change while serving"),
    "return_mm_kwargs": ((False,), _TEXT_ONLY),
    **dict.fromkeys(
        ("image_data", "video_data", "audio_data", "mm_hashes", "mm_content_hashes"), ((), _TEXT_ONLY)
    ),
    **dict.fromkeys(
        ("logits_processors", "custom_logit_processor", "custom_params", "vllm_xargs"), ((), _NO_PROCESSORS)
    ),
    # llama.cpp's
    "n_predict": ((-1,), "use 'max_tokens'"),
    "n_probs": ((0,), "use 'top_logprobs', or 'logprobs' of /v1/completions"),
    "repeat_penalty": ((1,), "use 'repetition_penalty'"),
    "samplers": ((), _NO_SAMPLER),
    "mirostat": ((0,), _NO_SAMPLER),
    "typical_p": ((1,), _NO_SAMPLER),
    "dynatemp_range": ((0,), _NO_SAMPLER),
    "xtc_probability": ((0,), _NO_SAMPLER),
    "dry_multiplier": ((0,), _NO_SAMPLER),
    "top_n_sigma": ((-1,), _NO_SAMPLER),
    "t_max_predict_ms": ((0, -1), "start the server with --request-timeout"),
    "response_fields": ((), "answers have all their fields"),
} | dict.fromkeys(_GRAMMARS, ((), "grammars and structured output are not supported yet"))
