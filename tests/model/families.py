"""The families of open_clip and timm, supported and refused, from which docs/bases.md is written.

python tests/model/families.py > docs/bases.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = "attention of type {} has no split form here"
NOT_PLAIN = "its image tower is not a plain transformer"


@dataclass(frozen=True)
class Family:
    """A row of the page.

    Attributes:
        example: an architecture of the family, which the test builds at toy size.
        toy: options that make it small, over those of the fixture; None takes one of those away.
        refused: what the message says; None where the family works.
        note: what is particular about it, or why it is refused.
        slow: the example has no toy size.
    """

    name: str
    example: str
    note: str = ""
    toy: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    slow: bool = False


# Architectures that keep their own depth and width.
OWN = {"img_size": None, "patch_size": None, "embed_dim": None, "depth": None, "num_heads": None}
VITAMIN: Any = {
    "note": "a convolutional stem, and an MLP of its own (GeGluMlp)",
    "toy": OWN,
    "refused": "no fc1 in the layers of its image tower",
    "slow": True,
}

TIMM = [
    Family("ViT, also of MAE, MoCo, DINO", "vit_base_patch16_224"),
    Family("ViT of CLIP", "vit_base_patch16_clip_quickgelu_224"),
    Family("FlexiViT", "flexivit_small"),
    Family("ViT with registers", "vit_little_patch16_reg4_gap_256", "registers, average pooling"),
    Family("ViT with residual post-norm", "vit_base_patch16_rpn_224"),
    Family("DeiT", "deit_tiny_patch16_224"),
    Family("DeiT, distilled", "deit_tiny_distilled_patch16_224", "the mean of its two tokens"),
    Family("DeiT III", "deit3_small_patch16_224", "LayerScale"),
    Family("SigLIP, SigLIP 2", "vit_base_patch16_siglip_224", "six more blocks in its attention pooling, by choice"),
    Family("SigLIP, average pooling", "vit_base_patch16_siglip_gap_224"),
    Family("SO-150M with attention pooling", "vit_so150m_patch16_reg4_map_256"),
    Family("DINOv2", "vit_small_patch14_dinov2", "LayerScale"),
    Family("DINOv2 with registers, giant", "vit_giant_patch14_reg4_dinov2", "registers; SwiGLU packed into one fc1"),
    Family("TIPS v2", "vit_base_patch14_reg1_tipsv2"),
    Family("InternViT", "vit_intern300m_patch14_448"),
    Family("AIMv2", "aimv2_large_patch14_224", "RMS norms; fc1_g and fc1_x in the place of fc1"),
    Family("BEiT-3", "beit3_base_patch16_224", "norms inside attention and MLP"),
    Family("EVA", "eva_giant_patch14_224", "q/k/v in one, without a bias of k"),
    Family("EVA-02", "eva02_tiny_patch14_224", "rotary positions; SwiGLU packed into one fc1"),
    Family("EVA-02, base and large", "eva02_base_patch14_224", "q/k/v apart; fc1_g and fc1_x in the place of fc1"),
    Family("EVA-02 of CLIP", "eva02_base_patch16_clip_224", "rotary positions; fc1_g and fc1_x in the place of fc1"),
    Family("EVA-02 of CLIP, enormous", "eva02_enormous_patch14_clip_224", "post-norm"),
    Family("Perception Encoder", "vit_pe_core_tiny_patch16_384", "rotary positions, attention pooling"),
    Family("Perception Encoder, spatial", "vit_pe_spatial_tiny_patch16_512", "rotary positions"),
    Family("ViT with rotary positions", "vit_medium_patch16_rope_reg1_gap_256"),
    Family("RoPE-ViT", "vit_small_patch16_rope_224"),
    Family("RoPE-ViT, mixed", "vit_small_patch16_rope_mixed_224", "frequencies of each layer"),
    Family("DINOv3", "vit_small_patch16_dinov3", "rotary positions, registers"),
    Family("DINOv3 with q/k/v biases", "vit_small_patch16_dinov3_qkvb"),
    Family("DINOv3 plus", "vit_small_plus_patch16_dinov3", "fc1_g and fc1_x in the place of fc1"),
    Family("LingBot", "vit_small_patch16_lingbot"),
    Family("NaFlexViT", "naflexvit_base_patch16_gap", toy={"img_size": None}),
    Family("hybrid ViT", "vit_tiny_r_s16_p8_224", "behind a ResNet", toy={"patch_size": None}),
    Family(
        "Sapiens 2",
        "vit_base_patch16_sapiens2",
        "fewer heads for k and v than for q",
        toy={"num_kv_heads": [1, 1]},
        refused="fewer heads for k and v than for q",
    ),
    Family("parallel ViT", "vit_base_patch16_18x2_224", "several attentions side by side", refused="no split form"),
    Family(
        "ViT with parallel scaling", "vit_base_patch16_xp_224", "one linear for attention and MLP", refused="model:"
    ),
    Family(
        "ViT with differential attention", "vit_dlittle_patch16_reg1_gap_256", refused=PARTS.format("DiffAttention")
    ),
    Family("BEiT, BEiT v2", "beit_base_patch16_224", "relative positions", refused=PARTS.format("Attention")),
    Family(
        "ViT with relative positions",
        "vit_relpos_small_patch16_224",
        "relative positions",
        refused=PARTS.format("RelPosAttention"),
    ),
    Family("SAM", "samvit_base_patch16", "relative positions in windows", refused=PARTS.format("Attention")),
    Family("ViTamin", "vitamin_small_224", **VITAMIN),
    *(
        Family(name, example, "not a plain transformer", toy=OWN, refused="model:", slow=True)
        for name, example in (
            ("CaiT", "cait_xxs24_224"),
            ("ConViT", "convit_tiny"),
            ("CrossViT", "crossvit_tiny_240"),
            ("DaViT", "davit_tiny"),
            ("Hiera", "hiera_tiny_224"),
            ("LeViT", "levit_128s"),
            ("MViT v2", "mvitv2_tiny"),
            ("PiT", "pit_ti_224"),
            ("Swin", "swin_tiny_patch4_window7_224"),
            ("Swin v2", "swinv2_tiny_window8_256"),
            ("TNT", "tnt_s_patch16_224"),
            ("Twins", "twins_svt_small"),
            ("VOLO", "volo_d1_224"),
            ("XCiT", "xcit_nano_12_p16_224"),
            ("convolutional networks", "resnet18"),
        )
    ),
]

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60}
# Text models of Hugging Face at toy size.
TEXTS = {
    "roberta": BERT | {"model_type": "roberta", "max_position_embeddings": 20, "pad_token_id": 1},
    "xlm-roberta": BERT | {"model_type": "xlm-roberta", "max_position_embeddings": 20, "pad_token_id": 1},
    "mt5": {
        "model_type": "mt5",
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 60,
        "feed_forward_proj": "gated-gelu",
    },
    "nllb": {
        "model_type": "m2m_100",
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 60,
        "max_position_embeddings": 20,
        "pad_token_id": 1,
    },
}

OPEN_CLIP = [
    Family("ViT of OpenAI, LAION, DataComp, MetaCLIP, DFN", "ViT-B-16"),
    Family("the same with QuickGELU", "ViT-B-16-quickgelu"),
    Family("MetaCLIP 2", "ViT-H-14-worldwide"),
    Family("CLIPA", "ViT-L-14-CLIPA", "text feature of the last token"),
    Family("SigLIP", "ViT-B-16-SigLIP", "sigmoid loss; six more blocks in its attention pooling, by choice"),
    Family("SigLIP 2", "ViT-B-16-SigLIP2", "as SigLIP"),
    Family("EVA-01 CLIP", "EVA01-g-14", "q/k/v in one, without a bias of k"),
    Family("EVA-02 CLIP", "EVA02-B-16", "rotary positions; fc1_g and fc1_x in the place of fc1"),
    Family("EVA-02 CLIP, enormous", "EVA02-E-14", "post-norm"),
    Family("Perception Encoder", "PE-Core-B-16", "rotary positions, attention pooling"),
    Family("timm ViT, average pooling", "vit_medium_patch16_gap_256"),
    Family("RoBERTa", "roberta-ViT-B-32", "text model of Hugging Face"),
    Family("XLM-RoBERTa", "xlm-roberta-base-ViT-B-32", "text model of Hugging Face"),
    Family("mT5", "mt5-base-ViT-B-32", "text model of Hugging Face; fc1_g and fc1_x in the place of fc1"),
    Family("NLLB", "nllb-clip-base", "text model of Hugging Face"),
    Family("NLLB with SigLIP", "nllb-clip-base-siglip", "text model of Hugging Face; sigmoid loss"),
    Family("CoCa", "coca_ViT-B-32", "its caption decoder has a loss of its own", refused="CoCa"),
    Family("relative positions", "vit_relpos_medium_patch16_cls_224", refused=PARTS.format("RelPosAttention")),
    Family("ViTamin", "ViTamin-S", **VITAMIN),
    *(
        Family(name, example, "not a plain transformer", toy=OWN, refused=NOT_PLAIN, slow=True)
        for name, example in (
            ("ResNet", "RN50"),
            ("ConvNeXt", "convnext_tiny"),
            ("Swin", "swin_base_patch4_window7_224"),
            ("MobileCLIP S", "MobileCLIP-S1"),
        )
    ),
]


def toy_clip(
    family: Family,
    directory: Path,
    trunk_dir: Callable[..., Path],
    words: Callable[[Path], None],
    vocabulary: int = 60,
) -> None:
    """The architecture of open_clip with two layers of width 32 in each tower."""
    import open_clip

    config: Any = deepcopy(open_clip.get_model_config(family.example))
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 32
    if "timm_model_name" in vision:
        trunk = trunk_dir(vision["timm_model_name"], **family.toy)
        vision |= {"timm_model_name": f"local-dir:{trunk}", "timm_model_pretrained": False, "image_size": 32}
    elif not family.slow:
        vision |= {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    if "hf_model_name" in text:
        kind = next(name for name in TEXTS if family.example.startswith(name))
        (directory / "text").mkdir()
        (directory / "text/config.json").write_text(json.dumps(TEXTS[kind]))
        text |= {"hf_model_name": str(directory / "text"), "hf_model_pretrained": False}
    else:
        text |= {"width": 32, "heads": 2, "layers": 2, "vocab_size": vocabulary}
    text["context_length"] = 8
    if "hf_tokenizer_name" in text:
        words(directory)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 32, "heads": 2, "layers": 1, "vocab_size": 60, "context_length": 8}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    if "hf_model_name" in text:  # without weights of its own, open_clip would look for those of the text model
        from safetensors.torch import save_model

        model = open_clip.create_model(f"local-dir:{directory}", pretrained_text=False)
        save_model(model, str(directory / "open_clip_model.safetensors"))


HEAD = """# Bases

<!-- Written by `python tests/model/families.py`; edit the tables there. -->

A base is the pretrained model that a run starts from. `model.name` takes

| `model.name` | base |
| --- | --- |
| `ViT-B-16`, with `model.pretrained=openai` | an open_clip architecture and a tag of weights, or a weight file |
| `hf-hub:timm/ViT-B-16-SigLIP2` | a hub entry in the layout of open_clip |
| `hf:openai/clip-vit-base-patch32` | a hub entry in the layout of transformers' `CLIPModel` |
| `local-dir:PATH` | a directory in either layout |
| `timm:vit_small_patch14_dinov2.lvd142m` | a ViT of timm, which is trained as a classifier |

Weights are read from safetensors, or from files that hold nothing but tensors, such as the `epoch_N.pt` of open_clip's
own training. For a TorchScript archive or a pickled module the message has the command that turns it into safetensors.

## Image size

`model.image_size=336` trains, evaluates, exports and serves a model at another size than that of its weights. The
positions are resized in fp32, exactly as `force_image_size` of open_clip and `img_size` of timm do it. A CLIP with an
image tower of timm (SigLIP, EVA-02) has one size; take the architecture of the size you need.

## A base that has moved

A run stores the absolute path of its base and the digest of its weights. If the base is no longer there, `--base PATH`
gives its new place to `selora evaluate`, `selora export` and `selora promote`; the digest must be the same. The run
remembers the place. `selora train` continues with `model.name=PATH`.

## Blocks

Each layer carries six blocks: q_proj, k_proj, v_proj, out_proj, fc1 and fc2. q, k and v are split where a library keeps
them in one matrix, and put together again in exports. In a gated MLP, `fc1` in `adapter.projections` stands for its two
linears, `fc1_g` and `fc1_x`. The attention pooling of SigLIP carries six more, with `adapter.towers=[image, text,
pool]`.

## Losses

`train.loss=auto` takes the sigmoid loss for a model with a logit bias, as SigLIP has, and the contrastive loss for any
other; with `train.loss=sigmoid`, a CLIP without a bias gets one, which starts where the loss of the first batch is
least over the bias. The sigmoid loss is exact over ranks: the gradient of any number of ranks is that of one with the
whole batch. With `train.positives=class`, all captions of an image's class are positives of it. CLIP's upper limit of
100 on the logit scale is not applied to models with a bias, whose published weights are above it. In the served model,
the scores of a SigLIP are probabilities of each class on its own, which need not add up to 1.

The demo's CLIP under both losses, all else equal (gated LoRA of rank 64, 100 steps on 3,068 photos of clothes; percent,
and points against the untouched model):

| `train.loss` | active blocks | own images | other datasets, shift | zero-shot | retrieval | kept |
| --- | --: | --: | --: | --: | --: | --: |
| contrastive | 34 of 144 | 42.8 (+10.8) | 70.5 | 16.8 | 6.4 | 71.3 |
| sigmoid | 35 of 144 | 40.7 (+8.7) | 71.5 | 16.9 | 5.7 | 69.8 |
"""


def render() -> str:
    """The page in Markdown."""
    tables = [("open_clip", OPEN_CLIP), ("timm, with the prefix `timm:`", TIMM)]
    lines = [HEAD, "## Families", ""]
    lines += ["Every row is built by a test: its layers are split, carry blocks, train, and are merged again."]
    for title, families in tables:
        lines += ["", f"### {title}", "", "| family | for example | works | |", "| --- | --- | --- | --- |"]
        lines += [f"| {f.name} | `{f.example}` | {'no' if f.refused else 'yes'} | {f.note} |" for f in families]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
