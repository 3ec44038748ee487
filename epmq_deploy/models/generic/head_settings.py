"""Settings in a config that are the heads' own: those of the experts count, not the base's."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import RecipeError

log = logging.getLogger(__name__)

# They decide how hidden states become logits; a base that was trained for something else has them
# at whatever they are by default.
HEAD_SETTINGS = (
    "classifier_activation",
    "classifier_bias",
    "classifier_pooling",
    "pooler_hidden_act",
    "use_mean_pooling",
)


def adopted_settings(
    folder: object, config: Mapping[str, Any], experts: Iterable[ModelFolder]
) -> dict[str, Any]:
    """Return the experts' settings of their heads, where they are not the base's.

    Args:
        folder: of the base, for messages.
        config: the base's ``config.json``.
        experts: their folders; those without a config, adapters, have the base's settings.

    Raises:
        RecipeError: experts differ in one, but share one encoder and its embedding.
    """
    of_base = _settings(config)
    given: dict[str, dict[str, Any]] = {
        str(expert.path): _settings(expert.config)
        for expert in experts
        if expert.config and expert.config.get("model_type") == config.get("model_type")
    }
    adopted: dict[str, Any] = {}
    for key in of_base:
        values = {path: settings[key] for path, settings in given.items() if key in settings}
        first, *others = dict.fromkeys(map(repr, values.values())) or [repr(of_base[key])]
        if others:
            shown = ", ".join(f"{value!r} in {path}" for path, value in values.items())
            raise RecipeError(
                f"{key} differs between experts ({shown}), which share what their heads read; "
                "fine-tune them alike, or merge those that agree"
            )
        if first != repr(of_base[key]):
            adopted[key] = next(iter(values.values()))
            log.warning(
                "%s: its config.json has %s %r; the experts' is used, %r",
                folder,
                key,
                of_base[key],
                adopted[key],
            )
    return adopted


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of heads that a config has, defaults included."""
    from transformers import AutoConfig

    plain = {name: value for name, value in config.items() if name != "model_type"}
    try:
        whole = AutoConfig.for_model(config["model_type"], **plain)
    except Exception:
        return {}
    return {key: getattr(whole, key) for key in HEAD_SETTINGS if hasattr(whole, key)}
