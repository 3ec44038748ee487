"""Options of quantization that have no effect are refused where they were given."""

from pathlib import Path
from typing import Any

import pytest
from tiny_zoo import TinyZoo

from epmq_deploy.artifacts.manifest import MergeManifest, read_manifest
from epmq_deploy.artifacts.outputs import finish_output
from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.quantization.methods.epmq import EpmqOptions
from epmq_deploy.quantization.stage import check_options, quantize
from epmq_deploy.recipe import Recipe, load_recipe, override, parse_recipe

NO_DATA = (
    r"quantize\.{} has no effect {}with quantize\.preset: weights, which uses no calibration data"
)


def recipe(**options: Any) -> Recipe:
    """Return a recipe with these options of quantization."""
    content = {"base": {"path": "b"}, "tasks": {"t": {"expert": "e"}}, "quantize": options}
    return parse_recipe(content, "test")


def carried(original: Recipe, folder: Path) -> Recipe:
    """Return the recipe as an earlier stage's manifest hands it on."""
    finish_output(folder, MergeManifest(fingerprint="0", recipe=original, inputs={}))
    return read_manifest(folder, "merge").recipe


OF_DATA = {
    "samples": 16,
    "seed": 1,
    "batch_size": 8,
    "bias": "joint",
    "unpooled_weight": 0.5,
    "products": "float32",
    "cache_limit": 1.0,
    "cache_dtype": "bfloat16",
    "anchor": "auto",
}


@pytest.mark.parametrize("option", OF_DATA)
def test_without_data_options_of_data_are_refused(option: str, tmp_path: Path) -> None:
    given = {option: OF_DATA[option]}
    as_auto = "as auto " if option == "anchor" else ""
    message = rf"^{NO_DATA.format(option, as_auto)}; leave it out$"
    for original in (
        recipe(preset="weights", **given),
        carried(recipe(preset="weights", **given), tmp_path),
        override(recipe(preset="weights"), "quantize", given),
        override(recipe(**given), "quantize", {"preset": "weights", **given}),
        override(carried(recipe(), tmp_path), "quantize", {"preset": "weights", **given}),
    ):
        with pytest.raises(RecipeError, match=message):
            check_options(original)


def test_options_of_one_reason_are_named_in_one_sentence() -> None:
    together = r"^quantize\.samples, quantize\.bias have no effect with [^;]*; leave them out$"
    with pytest.raises(RecipeError, match=together):
        check_options(recipe(preset="weights", bias="joint", samples=8))


def test_what_is_refused_without_data_has_indeed_no_effect(tiny: TinyZoo, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    plain = load_recipe(tiny.recipe)
    merge(plain, merged)

    def outputs(name: str, **options: Any) -> dict[str, str]:
        chosen = EpmqOptions(preset="weights", group_size=16).model_dump() | options
        # Constructed, not validated, so that nothing counts as given.
        unseen = EpmqOptions.model_construct(_fields_set=set(), **chosen)
        original = plain.model_copy(update={"quantize": unseen})
        outputs = quantize(original, merged, tmp_path / name).outputs
        return {file: digest for file, digest in outputs.items() if file != "report.json"}

    unused = {key: value for key, value in OF_DATA.items() if key != "anchor"}
    assert outputs("unused", **unused) == outputs("plain")
    assert outputs("refined", refine=3) != outputs("again")


def test_defaults_and_what_flags_put_out_of_use_are_not_refused(tmp_path: Path) -> None:
    check_options(recipe(preset="weights", anchor=0.1, refine=2))
    check_options(carried(recipe(preset="weights"), tmp_path))
    check_options(carried(recipe(target_bits=4.5), tmp_path))
    check_options(override(carried(recipe(), tmp_path), "quantize", {"preset": "weights"}))
    full = recipe(**OF_DATA)
    for original in (full, carried(full, tmp_path)):
        plain = override(original, "quantize", {"preset": "weights"})
        check_options(plain)
        assert plain.quantize == EpmqOptions(preset="weights")


@pytest.mark.parametrize("target", [{"target_bits": 5.0}, {"target_size": 3.0}])
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_beside_a_target_are_refused(target: dict[str, float], bits: int) -> None:
    (option,) = target
    for original in (
        recipe(bits=bits, **target),
        override(recipe(), "quantize", {"bits": bits, **target}),
        override(recipe(method="rtn"), "quantize", {"bits": bits, **target}),
    ):
        with pytest.raises(RecipeError, match=rf"^quantize\.bits has no effect with .*{option}, "):
            check_options(original)


def test_bits_and_targets_given_as_flags_take_each_others_place(tmp_path: Path) -> None:
    for original in (recipe(bits=8), carried(recipe(bits=8), tmp_path)):
        changed = override(original, "quantize", {"target_bits": 5})
        check_options(changed)
        back = override(changed, "quantize", {"bits": 3})
        check_options(back)
        assert (back.quantize.bits, back.quantize.target_bits) == (3, None)


def test_a_manifest_s_methods_are_kept(tmp_path: Path) -> None:
    original = parse_recipe(
        recipe(method="gptq", bits=3).model_dump() | {"merge": {"method": "average"}}, "test"
    )
    assert carried(original, tmp_path) == original
