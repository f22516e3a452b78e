"""Writes a tiny random Qwen2-VL or Qwen2.5-VL, in the layout of the released ones.

    checkpoint_writer.py DIRECTORY {qwen2_vl,qwen2_5_vl}

Random weights, but not a random mess: only rows of printable letters in the output layer are non-zero, so
replies are readable, never end early, and differ when the model saw different pixels.
"""

# Run by path in the base environment, which has torch; the devkit's own process has not.
# mypy: ignore-errors

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SEED = 20240917
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 2, 4, 4, 128
VISION_HIDDEN, VISION_LAYERS, VISION_HEADS = 64, 2, 4
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VOCABULARY = 320  # 256 bytes and the special tokens, rounded up so that it splits over ranks

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def tokenizer_files(root: Path) -> dict[str, int]:
    vocabulary = {letter: index for index, letter in enumerate(byte_alphabet())}
    special = {token: 256 + index for index, token in enumerate(SPECIAL)}

    def added(token: str, index: int) -> dict[str, object]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {"content": token, "id": index, **flags}

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocabulary, "merges": [],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(*item) for item in special.items()],
        "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "post_processor": byte_level,
        "decoder": byte_level, "model": model,
    }  # fmt: skip
    decoder = {str(index): {k: v for k, v in added(token, index).items() if k != "id"}
               for token, index in special.items()}  # fmt: skip
    write(root / "tokenizer.json", tokenizer)
    write(root / "vocab.json", vocabulary)
    (root / "merges.txt").write_text("#version: 0.2\n")
    write(root / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL[1:]), "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace", "split_special_tokens": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 32768, "chat_template": CHAT_TEMPLATE,
    })  # fmt: skip
    write(root / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return special


VISION_CONFIG = {
    "qwen2_vl": {
        "depth": VISION_LAYERS, "embed_dim": VISION_HIDDEN, "mlp_ratio": 2, "num_heads": VISION_HEADS,
        "in_chans": 3, "hidden_size": HIDDEN, "patch_size": 14, "spatial_merge_size": 2,
        "spatial_patch_size": 14, "temporal_patch_size": 2, "model_type": "qwen2_vl",
    },
    "qwen2_5_vl": {
        "depth": VISION_LAYERS, "hidden_act": "silu", "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN, "num_heads": VISION_HEADS, "in_chans": 3,
        "out_hidden_size": HIDDEN, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [VISION_LAYERS - 1], "tokens_per_second": 2,
        "temporal_patch_size": 2, "model_type": "qwen2_5_vl",
    },
}  # fmt: skip


def configuration_files(root: Path, special: dict[str, int], model: str) -> None:
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[model]
    write(root / "config.json", {
        "architectures": [f"{name}ForConditionalGeneration"], "model_type": model,
        "attention_dropout": 0.0, "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"], "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"], "vision_token_id": special["<|vision_pad|>"],
        "image_token_id": special["<|image_pad|>"], "video_token_id": special["<|video_pad|>"],
        "hidden_act": "silu", "hidden_size": HIDDEN, "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE, "max_position_embeddings": 32768, "max_window_layers": LAYERS,
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": VOCABULARY,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": VISION_CONFIG[model],
    })  # fmt: skip
    write(root / "generation_config.json", {
        "bos_token_id": special["<|endoftext|>"], "pad_token_id": special["<|endoftext|>"],
        "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]], "do_sample": False,
    })  # fmt: skip
    write(root / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": f"{name}Processor",
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    })  # fmt: skip


def weights(model: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, *shape: int, bias: bool = False, gain: float = 1.0) -> None:
        fan_in = torch.Size(shape[1:]).numel()
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * gain / fan_in**0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def norm(name: str, size: int, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = torch.ones(size)
        if bias:
            tensors[f"{name}.bias"] = torch.zeros(size)

    tensors["model.embed_tokens.weight"] = torch.randn((VOCABULARY, HIDDEN), generator=generator) * 0.5
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        head = HIDDEN // HEADS
        linear(f"{name}.self_attn.q_proj", HEADS * head, HIDDEN, bias=True, gain=3.0)
        linear(f"{name}.self_attn.k_proj", KV_HEADS * head, HIDDEN, bias=True, gain=3.0)
        linear(f"{name}.self_attn.v_proj", KV_HEADS * head, HIDDEN, bias=True, gain=2.0)
        linear(f"{name}.self_attn.o_proj", HIDDEN, HEADS * head, gain=4.0)
        linear(f"{name}.mlp.gate_proj", INTERMEDIATE, HIDDEN)
        linear(f"{name}.mlp.up_proj", INTERMEDIATE, HIDDEN)
        linear(f"{name}.mlp.down_proj", HIDDEN, INTERMEDIATE)
        norm(f"{name}.input_layernorm", HIDDEN)
        norm(f"{name}.post_attention_layernorm", HIDDEN)
    norm("model.norm", HIDDEN)
    linear("lm_head", VOCABULARY, HIDDEN, gain=4.0)
    # Printable ASCII has the same number as token and as byte, less the 33 bytes before "!".
    letters = [ord(letter) - ord("!") + first_printable() for letter in string.ascii_lowercase]
    silent = torch.ones(VOCABULARY, dtype=torch.bool)
    silent[letters] = False
    tensors["lm_head.weight"][silent] = 0

    older = model == "qwen2_vl"  # whose tower has LayerNorm and a plain MLP
    linear("visual.patch_embed.proj", VISION_HIDDEN, 3, 2, 14, 14, gain=4.0)
    for layer in range(VISION_LAYERS):
        name = f"visual.blocks.{layer}"
        norm(f"{name}.norm1", VISION_HIDDEN, bias=older)
        norm(f"{name}.norm2", VISION_HIDDEN, bias=older)
        linear(f"{name}.attn.qkv", 3 * VISION_HIDDEN, VISION_HIDDEN, bias=True)
        linear(f"{name}.attn.proj", VISION_HIDDEN, VISION_HIDDEN, bias=True)
        for widening in ("fc1",) if older else ("gate_proj", "up_proj"):
            linear(f"{name}.mlp.{widening}", 2 * VISION_HIDDEN, VISION_HIDDEN, bias=True)
        linear(f"{name}.mlp.{'fc2' if older else 'down_proj'}", VISION_HIDDEN, 2 * VISION_HIDDEN, bias=True)
    norm("visual.merger.ln_q", VISION_HIDDEN, bias=older)
    linear("visual.merger.mlp.0", 4 * VISION_HIDDEN, 4 * VISION_HIDDEN, bias=True)
    linear("visual.merger.mlp.2", HIDDEN, 4 * VISION_HIDDEN, bias=True, gain=3.0)
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def first_printable() -> int:
    """The token of "!": tokens are numbered by byte."""
    return byte_alphabet().index("!")


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    root, model = Path(sys.argv[1]), sys.argv[2]
    special = tokenizer_files(root)
    configuration_files(root, special, model)
    save_file(weights(model), str(root / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
