"""The architectures that tests build tiny models of, as people bring them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiny_text import SPECIAL, WORDS

SIZE = 16
PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = PLAIN | {"image_size": SIZE, "patch_size": 8}
TEXT = PLAIN | {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 24}


@dataclass(frozen=True)
class Architecture:
    """One architecture to build tiny models of.

    Attributes:
        model_type: as in ``config.json``.
        settings: of its config.
        processor: key of ``PROCESSORS``; None for texts.
        called: what people call it, for the docs.
        blocks: how many blocks are found in it.
        norms: how many norms of blocks can be re-fitted.
    """

    model_type: str
    settings: Mapping[str, Any]
    processor: str | None = None
    called: str = ""
    blocks: int = 2
    norms: int = 4


DECODER = PLAIN | {
    "vocab_size": TEXT["vocab_size"],
    "max_position_embeddings": 24,
    "num_key_value_heads": 1,
}
_ROBERTA = TEXT | {"type_vocab_size": 1, "pad_token_id": 1}
_RELATIVE = TEXT | {
    "type_vocab_size": 0,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
}
_SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
_MODERNBERT = (
    TEXT
    | _SPECIAL
    | {
        "num_hidden_layers": 4,
        "global_attn_every_n_layers": 3,
        "local_attention": 8,
        "pad_token_id": 0,
    }
)
_SWIN = {
    "image_size": SIZE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
}
_STAGES = {"hidden_sizes": [8, 16], "depths": [2, 2]}

ARCHITECTURES = {
    "vit": Architecture("vit", VISION, "vit", "ViT"),
    "deit": Architecture("deit", VISION, "deit", "DeiT (one classifier)"),
    "dinov2": Architecture(
        "dinov2", VISION | {"image_size": 24, "mlp_ratio": 2}, "dinov2", "DINOv2"
    ),
    "dinov2-registers": Architecture(
        "dinov2_with_registers",
        VISION | {"mlp_ratio": 2, "num_register_tokens": 2, "use_swiglu_ffn": True},
        "dinov2",
        "DINOv2 with registers",
    ),
    "roberta": Architecture("roberta", _ROBERTA, called="RoBERTa"),
    "xlm-roberta": Architecture("xlm-roberta", _ROBERTA, called="XLM-RoBERTa"),
    "distilbert": Architecture(
        "distilbert",
        {
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 2,
            "vocab_size": TEXT["vocab_size"],
            "max_position_embeddings": 24,
        },
        called="DistilBERT",
    ),
    "bert": Architecture("bert", TEXT, called="BERT, MiniLM"),
    # Those below have no family of their own.
    "electra": Architecture(
        "electra", TEXT | {"embedding_size": 16, "type_vocab_size": 2}, called="ELECTRA"
    ),
    "mpnet": Architecture("mpnet", TEXT | {"pad_token_id": 1}, called="MPNet"),
    "camembert": Architecture("camembert", _ROBERTA, called="CamemBERT"),
    "mobilebert": Architecture(
        "mobilebert",
        TEXT | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        called="MobileBERT",
        norms=14,
    ),
    "deberta": Architecture("deberta", _RELATIVE | {"max_relative_positions": 8}, called="DeBERTa"),
    "deberta-v2": Architecture(
        "deberta-v2",
        _RELATIVE | {"max_relative_positions": 8, "conv_kernel_size": 3, "conv_act": "gelu"},
        called="DeBERTa-v2",
    ),
    "deberta-v3": Architecture(
        "deberta-v2",
        _RELATIVE
        | {
            "share_att_key": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        called="DeBERTa-v3",
    ),
    "modernbert": Architecture("modernbert", _MODERNBERT, called="ModernBERT", blocks=4, norms=7),
    "modernbert-mean": Architecture(
        "modernbert",
        _MODERNBERT | {"classifier_pooling": "mean"},
        called="ModernBERT (mean)",
        blocks=4,
        norms=7,
    ),
    "eurobert": Architecture(
        "eurobert", DECODER | _SPECIAL | {"pad_token_id": 0, "mask_token_id": 4}, called="EuroBERT"
    ),
    "nomic-bert": Architecture("nomic_bert", TEXT | {"initializer_range": 0.2}, called="NomicBERT"),
    "albert": Architecture(
        "albert",
        TEXT | {"embedding_size": 16, "num_hidden_groups": 1, "num_hidden_layers": 3},
        called="ALBERT",
        blocks=1,
        norms=2,
    ),
    "albert-groups": Architecture(
        "albert",
        TEXT
        | {
            "embedding_size": 16,
            "num_hidden_groups": 2,
            "num_hidden_layers": 4,
            "inner_group_num": 2,
        },
        called="ALBERT with several groups",
        norms=8,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "vocab_size": TEXT["vocab_size"],
            "n_positions": 24,
            "pad_token_id": 0,
        },
        called="GPT-2 as a classifier",
    ),
    "llama": Architecture("llama", DECODER | {"pad_token_id": 0}, called="Llama as a classifier"),
    # Its tokenizer knows pairs of bytes.
    "qwen2": Architecture(
        "qwen2",
        DECODER | {"pad_token_id": 0, "vocab_size": 112},
        called="Qwen2 as a classifier",
    ),
    "gemma": Architecture(
        "gemma",
        DECODER | {"head_dim": 16, "pad_token_id": 0},
        called="Gemma as a classifier",
        norms=0,
    ),
    "ijepa": Architecture("ijepa", VISION, "vit", "I-JEPA"),
    "vit-msn": Architecture("vit_msn", VISION, "vit", "ViT-MSN"),
    "beit": Architecture("beit", VISION | {"use_mean_pooling": True}, "vit", "BEiT"),
    "beit-cls": Architecture(
        "beit",
        VISION | {"use_mean_pooling": False, "use_relative_position_bias": True},
        "vit",
        "BEiT (first token)",
    ),
    "data2vec-vision": Architecture(
        "data2vec-vision", VISION | {"use_mean_pooling": True}, "vit", "data2vec-vision"
    ),
    "swin": Architecture("swin", _SWIN, "vit", "Swin", norms=5),
    "swinv2": Architecture("swinv2", _SWIN, "vit", "Swin v2", norms=1),
    "convnext": Architecture("convnext", _STAGES | {"num_stages": 2}, "vit", "ConvNeXt"),
    "convnextv2": Architecture("convnextv2", _STAGES | {"num_stages": 2}, "vit", "ConvNeXt v2"),
}

# Those whose experts cannot be deployed: refused before any work.
REFUSED = {
    "bart": Architecture(
        "bart",
        {
            "d_model": 32,
            "vocab_size": TEXT["vocab_size"],
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 24,
        },
        called="BART",
    ),
    "dinov3": Architecture("dinov3_vit", VISION, "vit", "DINOv3"),
    "fnet": Architecture(
        "fnet", {name: TEXT[name] for name in TEXT if name != "num_attention_heads"}, called="FNet"
    ),
    "resnet": Architecture(
        "resnet", _STAGES | {"embedding_size": 8, "layer_type": "basic"}, "vit", "ResNet"
    ),
    "siglip": Architecture(
        "siglip", {"vision_config": VISION, "text_config": TEXT}, "vit", "SigLIP"
    ),
    "squeezebert": Architecture("squeezebert", TEXT | {"embedding_size": 32}, called="SqueezeBERT"),
    "xlnet": Architecture(
        "xlnet",
        {
            "d_model": 32,
            "d_inner": 64,
            "n_layer": 2,
            "n_head": 2,
            "vocab_size": TEXT["vocab_size"],
        },
        called="XLNet",
    ),
}
