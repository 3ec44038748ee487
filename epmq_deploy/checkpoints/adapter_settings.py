"""The settings of an adapter, as ``peft`` has them, and what of them is supported."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq_deploy.checkpoints.files import read_json
from epmq_deploy.compat import adapter_prefix, matching_patterns
from epmq_deploy.errors import RecipeError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
# Kinds of adapters that tests compare with ``peft``. Others are refused: BOFT, for one, compiles a
# program when it is built.
KINDS = frozenset({"LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "HRA", "MISS", "C3A"})
KINDS |= {"FOURIERFT", "LN_TUNING", "ROAD", "DELORA", "VBLORA", "RANDLORA", "TRAINABLE_TOKENS"}
# Kinds that change what a model reads, or steer it, instead of its weights.
_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"}
_PROMPTS |= {"ADAPTION_PROMPT", "CARTRIDGE"}
# Kinds whose shared tensors are as large as the largest modules need.
_SHARED = {"VERA", "RANDLORA"}
# Options that make more of an adapter than a change of weights, and what they are called.
_REFUSED = {
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "target_parameters": "factors of parameters that are not a module's weight",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal factors",
}
# Options that concern other modules than the one that is adapted, or none.
_OF_OTHER_MODULES = (
    "modules_to_save",
    "trainable_token_indices",
    "task_type",
    "exclude_modules",
    "base_model_name_or_path",
    "ensure_weight_tying",
)
# Initialisations that change the base in a way that the adapter does not tell.
_CHANGED_BASES = ("pissa_niter", "loftq", "corda", "lora_ga")
# Those that change it in the same way whenever the adapter is loaded.
_DECOMPOSED_BASES = ("pissa", "olora")


@dataclass(frozen=True)
class AdapterSettings:
    """The content of ``adapter_config.json``.

    Attributes:
        content: as stored.
        config: as ``peft`` has it.
    """

    content: Mapping[str, Any]
    config: Any

    @classmethod
    def read(cls, folder: Path) -> "AdapterSettings":
        """Read and check a folder's settings; the base they name is ignored.

        Raises:
            RecipeError: the adapter is more than a change of weights that ``peft`` can merge.
        """
        from peft import PeftConfig

        content = read_json(folder / ADAPTER_CONFIG)
        if unsupported := _unsupported(content):
            raise RecipeError(
                f"{folder}: adapters with {', '.join(unsupported)} are not supported; merge it "
                "into its base (peft's merge_and_unload) and save the whole model"
            )
        try:
            config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**content))
        except Exception as error:
            # It raises whatever the content happens to cause.
            raise RecipeError(
                f"{folder / ADAPTER_CONFIG}: peft does not understand it ({error})"
            ) from error
        return cls(content, config)

    @property
    def kind(self) -> str:
        """Which kind of adapter it is, as ``peft`` calls it."""
        return str(self.content["peft_type"])

    @property
    def prefix(self) -> str:
        """What names of factors begin with."""
        return adapter_prefix(self.kind)

    @property
    def shares_tensors(self) -> bool:
        """Whether modules share tensors of the size that the largest of them need."""
        return self.kind in _SHARED

    @property
    def changes_biases(self) -> bool:
        """Whether the biases of modules are changed along with their weights."""
        return self.kind in ("IA3", "LN_TUNING", "ROAD") or bool(self.content.get("lora_bias"))

    @property
    def prunes_ranks(self) -> bool:
        """Whether ranks differ from what the settings start with."""
        return self.kind == "ADALORA"

    @property
    def decomposes_base(self) -> bool:
        """Whether loading the adapter takes a part of the base's weights away."""
        return str(self.content.get("init_lora_weights")).lower() in _DECOMPOSED_BASES

    @property
    def ensures_ties(self) -> bool:
        """Whether embedding and output layer are changed alike."""
        return bool(self.content.get("ensure_weight_tying"))

    def saves_whole(self, name: str) -> bool:
        """Tell whether a tensor was trained, and is saved, whole."""
        if self.content.get("bias") == "all" and name.endswith(".bias"):
            return True
        saved = tuple(self.content.get("modules_to_save") or ())
        # Heads of classifiers are trained; up to peft 0.10 the file did not say so.
        if self.content.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
            saved += ("classifier", "score")
        return any(f".{module}." in f".{name}" for module in saved)

    def of_module(self, module: str, *, tokens: bool, decomposed: bool) -> Any:
        """Return the settings for a model of this one module.

        Args:
            module: its dotted name.
            tokens: whether single rows of an embedding table were trained.
            decomposed: whether to take away what ``decomposes_base`` says.
        """
        from peft import TrainableTokensConfig

        config = copy.deepcopy(self.config)
        if tokens and self.kind != "TRAINABLE_TOKENS":
            indices = self.content["trainable_token_indices"]
            if isinstance(indices, dict):
                names = (name for name in indices if f".{module}".endswith(f".{name}"))
                indices = indices[next(names)]
            return TrainableTokensConfig(token_indices=indices, target_modules=[module])
        # Nothing else is in that model, and settings that match nothing make peft warn.
        others: dict[str, Any] = dict.fromkeys(_OF_OTHER_MODULES)
        if self.content.get("target_modules") in (None, "all-linear"):
            others["target_modules"] = {module}
        for option in ("rank_pattern", "alpha_pattern"):
            patterns = self.content.get(option) or {}
            if self.prunes_ranks:
                # Kept ranks by the name of a tensor.
                inside = f"{module}."
                others[option] = {k: v for k, v in patterns.items() if k.startswith(inside)} or None
            else:
                others[option] = matching_patterns(patterns, module)
        if hasattr(config, "init_lora_weights") and not decomposed:
            others["init_lora_weights"] = True
        for name, value in others.items():
            if hasattr(config, name):
                setattr(config, name, value)
        return config


def _unsupported(content: Mapping[str, Any]) -> list[str]:
    """Say what of an adapter is not supported."""
    kind = content.get("peft_type")
    if kind in _PROMPTS:
        return [f"peft_type {kind}, which leaves weights as they are,"]
    unsupported = [] if kind in KINDS else [f"peft_type {kind}"]
    saved = content.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        unsupported.append("modules_to_save that is not a list of names")
    unsupported += [label for option, label in _REFUSED.items() if content.get(option)]
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        unsupported.append(f"a base changed by init_lora_weights: {start}")
    return unsupported
