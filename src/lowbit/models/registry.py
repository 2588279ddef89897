"""Architecture names -> model families. A family's module is imported when one of its names is met."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lowbit.checkpoint.file_checks import same_bytes
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.errors import LowbitError, printable
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig
from lowbit.models.config_keys import architecture_of
from lowbit.models.model import Model


@dataclass(frozen=True)
class Family:
    """What is particular to a family.

    ``gguf_names``: canonical tensor stem -> GGUF stem, ``{n}`` standing for the layer number.
    ``gguf_rotates_pairs``: whether GGUF stores its Q/K rows as adjacent rotary pairs.
    ``unused``: regular expressions of tensor names a checkpoint may hold and the model does not use.
    ``prediction_layers``: layers behind the model's own are multi-token prediction heads, not used here.
    ``aliases``: (regular expression, replacement): other spellings of canonical names in the wild.
    ``grouped_qkv``: a fused ``qkv_proj`` has the rows of Q, K and V in turn, for each K/V head (not in GGUF).
    ``transposed``: plain matrices inside the blocks lie as (in, out) (GPT-2's Conv1D; not in GGUF).
    ``beside``: how names of tensors begin that belong to what stands beside the language model.
    """

    name: str
    read_config: Callable[[CheckpointHeader], ModelConfig]
    build: Callable[[ModelConfig, WeightLoader], Model]
    gguf_names: dict[str, str]
    gguf_rotates_pairs: bool
    unused: tuple[str, ...] = field(default=())
    aliases: tuple[tuple[str, str], ...] = field(default=())
    prediction_layers: bool = False
    grouped_qkv: bool = False
    transposed: bool = False
    beside: tuple[str, ...] = field(default=())

    def config_of(self, header: CheckpointHeader) -> ModelConfig:
        """What ``read_config`` reads; a head that is stored is the head, whatever else is said.

        Tools that quantize the head of a tied model leave ``tie_word_embeddings`` as it was (ExLlamaV3), and
        others store a copy of the embedding, which needs no room of its own.
        """
        config = self.read_config(header)
        if config.tied_head and header.container != "gguf" and has_own_head(header):
            return replace(config, tied_head=False)
        return config


# Architecture -> (module of this package, its Family, or the function of a header that gives it).
MODULES = {
    "LlamaForCausalLM": ("families.llama", "LLAMA"),
    "llama": ("families.llama", "LLAMA"),
    "MistralForCausalLM": ("families.llama", "MISTRAL"),
    "Ministral3ForCausalLM": ("families.llama", "MINISTRAL3"),
    "mistral3": ("families.llama", "MINISTRAL3"),
    "MixtralForCausalLM": ("families.llama", "MIXTRAL"),
    "Qwen2ForCausalLM": ("families.qwen", "QWEN2"),
    "Qwen3ForCausalLM": ("families.qwen", "QWEN3"),
    "Qwen3MoeForCausalLM": ("families.qwen", "QWEN3_MOE"),
    "MinistralForCausalLM": ("families.llama", "MISTRAL"),
    "GemmaForCausalLM": ("families.gemma", "GEMMA"),
    "gemma": ("families.gemma", "GEMMA"),
    "Gemma2ForCausalLM": ("families.gemma", "GEMMA2"),
    "Gemma3ForCausalLM": ("families.gemma", "GEMMA3"),
    "Phi3ForCausalLM": ("families.phi", "PHI3"),
    "Qwen3NextForCausalLM": ("families.qwen_next", "QWEN3_NEXT"),
    "qwen3next": ("families.qwen_next", "QWEN3_NEXT"),
    "Qwen3_5ForCausalLM": ("families.qwen_next", "QWEN3_5"),
    "qwen35": ("families.qwen_next", "QWEN3_5"),
    "Qwen3_5MoeForCausalLM": ("families.qwen_next", "QWEN3_5_MOE"),
    "qwen35moe": ("families.qwen_next", "QWEN3_5_MOE"),
    "Qwen2MoeForCausalLM": ("families.qwen", "QWEN2_MOE"),
    "qwen2moe": ("families.qwen", "QWEN2_MOE"),
    "GlmForCausalLM": ("families.glm", "GLM"),
    "chatglm": ("families.glm", "GLM"),
    "Dots1ForCausalLM": ("families.glm", "DOTS1"),
    "dots1": ("families.glm", "DOTS1"),
    "MiniMaxM2ForCausalLM": ("families.minimax", "MINIMAX_M2"),
    "minimax-m2": ("families.minimax", "MINIMAX_M2"),
    "Glm4ForCausalLM": ("families.glm", "GLM4"),
    "glm4": ("families.glm", "GLM4"),
    "Glm4MoeForCausalLM": ("families.glm", "GLM4_MOE"),
    "glm4moe": ("families.glm", "GLM4_MOE"),
    "GraniteForCausalLM": ("families.granite", "GRANITE"),
    "granite": ("families.granite", "GRANITE"),
    "GraniteMoeForCausalLM": ("families.granite", "GRANITE_MOE"),
    "GraniteMoeSharedForCausalLM": ("families.granite", "GRANITE_MOE"),
    "granitemoe": ("families.granite", "GRANITE_MOE"),
    "GraniteMoeHybridForCausalLM": ("families.granite", "hybrid_family"),
    "Olmo2ForCausalLM": ("families.olmo", "OLMO2"),
    "Olmo3ForCausalLM": ("families.olmo", "OLMO3"),
    "FlexOlmoForCausalLM": ("families.olmo", "FLEX_OLMO"),
    "olmo2": ("families.olmo", "OLMO2"),
    "OlmoeForCausalLM": ("families.olmo", "OLMOE"),
    "olmoe": ("families.olmo", "OLMOE"),
    "StableLmForCausalLM": ("families.stablelm", "STABLELM"),
    "stablelm": ("families.stablelm", "STABLELM"),
    "SmolLM3ForCausalLM": ("families.smollm3", "SMOLLM3"),
    "smollm3": ("families.smollm3", "SMOLLM3"),
    "CohereForCausalLM": ("families.cohere", "COHERE"),
    "command-r": ("families.cohere", "COHERE"),
    "Cohere2ForCausalLM": ("families.cohere", "COHERE2"),
    "cohere2": ("families.cohere", "COHERE2"),
    "GptOssForCausalLM": ("families.gpt_oss", "GPT_OSS"),
    "DeepseekV2ForCausalLM": ("families.deepseek", "DEEPSEEK"),
    "DeepseekV3ForCausalLM": ("families.deepseek", "DEEPSEEK"),
    "Glm4MoeLiteForCausalLM": ("families.deepseek", "DEEPSEEK"),
    "deepseek2": ("families.deepseek", "DEEPSEEK"),
    "qwen2": ("families.qwen", "QWEN2"),
    "qwen3": ("families.qwen", "QWEN3"),
    "qwen3moe": ("families.qwen", "QWEN3_MOE"),
    "gemma2": ("families.gemma", "GEMMA2"),
    "gemma3": ("families.gemma", "GEMMA3"),
    "phi3": ("families.phi", "PHI3"),
    "gpt-oss": ("families.gpt_oss", "GPT_OSS"),
}
# Llama's relatives, families with a plain MLP, and the language model of checkpoints that also see pictures.
MODULES |= {
    "InternLMForCausalLM": ("families.llama_relatives", "INTERNLM"),
    "InternLM2ForCausalLM": ("families.llama_relatives", "INTERNLM2"),
    "InternLM3ForCausalLM": ("families.llama_relatives", "INTERNLM"),
    "internlm2": ("families.llama_relatives", "INTERNLM2"),
    "BaichuanForCausalLM": ("families.llama_relatives", "BAICHUAN"),
    "BaiChuanForCausalLM": ("families.llama_relatives", "BAICHUAN"),
    "baichuan": ("families.llama_relatives", "BAICHUAN"),
    "MiniCPMForCausalLM": ("families.llama_relatives", "MINICPM"),
    "minicpm": ("families.llama_relatives", "MINICPM"),
    "ExaoneForCausalLM": ("families.llama_relatives", "EXAONE"),
    "exaone": ("families.llama_relatives", "EXAONE"),
    "Exaone4ForCausalLM": ("families.llama_relatives", "EXAONE4"),
    "exaone4": ("families.llama_relatives", "EXAONE4"),
    "ExaoneMoeForCausalLM": ("families.exaone_moe", "EXAONE_MOE"),
    "ExaoneMoEForCausalLM": ("families.exaone_moe", "EXAONE_MOE"),
    "exaone-moe": ("families.exaone_moe", "EXAONE_MOE"),
    "SeedOssForCausalLM": ("families.llama_relatives", "SEED_OSS"),
    "seed_oss": ("families.llama_relatives", "SEED_OSS"),
    "Ernie4_5ForCausalLM": ("families.llama_relatives", "ERNIE"),
    "Ernie4_5_ForCausalLM": ("families.llama_relatives", "ERNIE"),
    "ernie4_5": ("families.llama_relatives", "ERNIE"),
    "HunYuanDenseV1ForCausalLM": ("families.llama_relatives", "HUNYUAN"),
    "hunyuan-dense": ("families.llama_relatives", "HUNYUAN"),
    "HunYuanMoEV1ForCausalLM": ("families.llama_relatives", "HUNYUAN_MOE"),
    "hunyuan-moe": ("families.llama_relatives", "HUNYUAN_MOE"),
    "BitNetForCausalLM": ("families.llama_relatives", "BITNET"),
    "bitnet": ("families.llama_relatives", "BITNET"),
    "Starcoder2ForCausalLM": ("families.plain_mlp", "STARCODER2"),
    "starcoder2": ("families.plain_mlp", "STARCODER2"),
    "ArceeForCausalLM": ("families.plain_mlp", "ARCEE"),
    "arcee": ("families.plain_mlp", "ARCEE"),
    "NemotronForCausalLM": ("families.plain_mlp", "NEMOTRON"),
    "nemotron": ("families.plain_mlp", "NEMOTRON"),
    "PhiForCausalLM": ("families.plain_mlp", "PHI"),
    "phi2": ("families.plain_mlp", "PHI"),
    "FalconForCausalLM": ("families.plain_mlp", "FALCON"),
    "RWForCausalLM": ("families.plain_mlp", "FALCON"),
    "falcon": ("families.plain_mlp", "FALCON"),
    "GPTNeoXForCausalLM": ("families.plain_mlp", "GPT_NEOX"),
    "gptneox": ("families.plain_mlp", "GPT_NEOX"),
    "GPT2LMHeadModel": ("families.plain_mlp", "GPT2"),
    "gpt2": ("families.plain_mlp", "GPT2"),
    "Qwen2VLForConditionalGeneration": ("families.vision", "text_family"),
    "Qwen2_5_VLForConditionalGeneration": ("families.vision", "text_family"),
    "Qwen3VLForConditionalGeneration": ("families.vision", "text_family"),
    "Qwen3VLMoeForConditionalGeneration": ("families.vision", "text_family"),
    "Qwen3_5ForConditionalGeneration": ("families.vision", "text_family"),
    "Qwen3_5MoeForConditionalGeneration": ("families.vision", "text_family"),
    "Glm4vForConditionalGeneration": ("families.vision", "text_family"),
    "Glm46VForConditionalGeneration": ("families.vision", "text_family"),
    "Glm4vMoeForConditionalGeneration": ("families.vision", "text_family"),
    "KimiVLForConditionalGeneration": ("families.vision", "text_family"),
    "Kimi_K25ForConditionalGeneration": ("families.vision", "text_family"),
    "KimiK25ForConditionalGeneration": ("families.vision", "text_family"),
    "Gemma3ForConditionalGeneration": ("families.vision", "text_family"),
    "Mistral3ForConditionalGeneration": ("families.vision", "text_family"),
    "LlavaForConditionalGeneration": ("families.vision", "text_family"),
    "LlavaNextForConditionalGeneration": ("families.vision", "text_family"),
    "InternVLForConditionalGeneration": ("families.vision", "text_family"),
    "Idefics3ForConditionalGeneration": ("families.vision", "text_family"),
    "SmolVLMForConditionalGeneration": ("families.vision", "text_family"),
    "qwen2vl": ("families.qwen", "QWEN2"),
    "qwen3vl": ("families.qwen", "QWEN3"),
    "qwen3vlmoe": ("families.qwen", "QWEN3_MOE"),
}
MAMBA = "most layers are Mamba-2; of recurrent layers lowbit has gated delta networks (Qwen3-Next)"
_ALIBI = "it tells positions by ALiBi, which lowbit's attention does not have"
_LLAMA4 = "its chunked attention and temperatures by position are not there"
_MINICPM3 = "latent attention is there for DeepSeek only; the other MiniCPM models are served"
# Architectures that are known, and why they are not served.
REFUSED = {
    "MiniCPM3ForCausalLM": _MINICPM3,
    "minicpm3": _MINICPM3,
    "Llama4ForConditionalGeneration": _LLAMA4,
    "Llama4ForCausalLM": _LLAMA4,
    "llama4": _LLAMA4,
    "MllamaForConditionalGeneration": "layers that attend to pictures stand between those of the text",
    "BloomForCausalLM": _ALIBI,
    "bloom": _ALIBI,
    "MPTForCausalLM": _ALIBI,
    "mpt": _ALIBI,
    "granitehybrid": MAMBA,
}


def supported_architectures() -> list[str]:
    """Every architecture name a checkpoint may carry."""
    return sorted(MODULES)


_HEAD = re.compile(r"(?:.+\.)?lm_head\.(.+)")
_EMBEDDING = re.compile(r"(?:(?:model|language_model|text_model)\.)*embed_tokens\.(.+)")
HEAD_COPY = r"(?:.+\.)?lm_head\.(?!bias$).+"  # of a tied model: nobody needs it


def has_own_head(header: CheckpointHeader) -> bool:
    """Whether there are tensors of a head, and they are not those of the embedding once more."""
    heads, embedding = _of_module(header, _HEAD), _of_module(header, _EMBEDDING)
    if not heads.keys() - {"bias"}:
        return False
    if "weight" not in heads:
        return True
    if not embedding:  # under another name: what the config says counts
        return False
    if heads.keys() != embedding.keys():
        return True
    return not all(same_bytes(entry, embedding[suffix]) for suffix, entry in heads.items())


def has_plain_head(header: CheckpointHeader) -> bool:
    """Whether there is a head, and nothing of it is quantized."""
    return "weight" in (found := _of_module(header, _HEAD)) and not found.keys() - {"weight", "bias"}


def _of_module(header: CheckpointHeader, pattern: re.Pattern[str]) -> dict[str, TensorEntry]:
    """What of a module is stored, by what follows its name."""
    matches = ((pattern.fullmatch(name), entry) for name, entry in header.tensors.items())
    return {match[1]: entry for match, entry in matches if match}


def family_of(header: CheckpointHeader) -> Family:
    """The family that implements the checkpoint's architecture, or E0240/E0241."""
    name = architecture_of(header)
    if name in MODULES:
        module, attribute = MODULES[name]
        found = getattr(importlib.import_module(f"lowbit.models.{module}"), attribute)
        family: Family = found if isinstance(found, Family) else found(header)
        return family
    shown = printable(repr(name))
    if name in REFUSED:
        raise LowbitError(
            "E0241", f"architecture {shown} is not supported: {REFUSED[name]}. See: lowbit models"
        )
    if "auto_map" in header.config:
        raise LowbitError(
            "E0240",
            f"config.json asks for custom code (auto_map); lowbit never runs code from a model. "
            f"Architecture {shown} is not built in (see: lowbit models)",
        )
    close = difflib.get_close_matches(name, MODULES, n=3, cutoff=0.75)
    raise LowbitError(
        "E0241",
        f"architecture {shown} is not supported; closest supported: {', '.join(close) or 'none'}. "
        "See: lowbit models",
    )
