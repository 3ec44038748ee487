"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929) as ``transformers`` lays them out."""

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import Group
from epmq_deploy.models.encoders.image_classifier import ImageClassifierFamily
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.loading import TRANSFORMER_KEYS


class VitFamily(ImageClassifierFamily):
    """ViT and DeiT (Touvron et al., arXiv 2012.12877), for classifying images.

    Heads are the experts' classifiers (``AutoModelForImageClassification``), on ``[CLS]`` after the
    last norm.
    """

    name = "vit"
    model_types = ("vit", "deit")
    architecture = (
        *TRANSFORMER_KEYS,
        "image_size",
        "patch_size",
        "num_channels",
        "qkv_bias",
    )
    prefixes = ("vit.", "deit.")
    # From the names files have to those the loaded model has.
    renames = (
        ("encoder.layer.", "layers."),
        ("attention.attention.query.", "attention.q_proj."),
        ("attention.attention.key.", "attention.k_proj."),
        ("attention.attention.value.", "attention.v_proj."),
        ("attention.output.dense.", "attention.o_proj."),
        ("intermediate.dense.", "mlp.fc1."),
        ("output.dense.", "mlp.fc2."),
    )
    deployed = ("embeddings.", "layers.", "layernorm.")
    heads = ("classifier.", "cls_classifier.", "distillation_classifier.")
    block_list = "layers"
    groups = (
        Group(
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"), norm="layernorm_before"
        ),
        Group(("attention.o_proj",)),
        Group(("mlp.fc1",), norm="layernorm_after"),
        Group(("mlp.fc2",)),
    )

    def expert_head(self, expert: Checkpoint) -> TaskHead | None:
        """Read the expert's classifier.

        Raises:
            RecipeError: a part of it is missing, or it has DeiT's two classifiers on two tokens.
        """
        head = super().expert_head(expert)
        if head is None and "distillation_classifier.weight" in expert.tensors:
            raise RecipeError(
                f"{expert.folder} has DeiT's two classifiers, on two tokens; fine-tune it as "
                "DeiTForImageClassification, which has one"
            )
        return head


FAMILY = VitFamily()
